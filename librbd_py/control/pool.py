"""The threads of the control plane: one pool per process, so that an idle image costs none.

Threads start when there is work and nobody is free, and end after a few idle seconds. Jobs block for as long as a
store operation or a notify takes; what waits for time alone (retries) sits in a heap served by one clock thread.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable

MAX_THREADS = 16
IDLE_SECONDS = 5.0

log = logging.getLogger("librbd_py.control")
Job = Callable[[], None]


class Timer:
    """A job for later. `cancel()` may come too late."""

    __slots__ = ("_job", "due")

    def __init__(self, due: float, job: Job) -> None:
        self.due = due  # time.monotonic()
        self._job: Job | None = job

    def cancel(self) -> None:
        self._job = None

    def take(self) -> Job | None:
        job, self._job = self._job, None
        return job


class ControlPool:
    """Runs jobs in any order, several at a time."""

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self._max = max_threads
        self._work = threading.Condition()  # guards jobs, threads, idle
        self._jobs: deque[Job] = deque()
        self._threads = 0
        self._idle = 0
        self._clock = threading.Condition()  # guards timers, clock_runs
        self._timers: list[tuple[float, int, Timer]] = []
        self._clock_runs = False
        self._sequence = itertools.count()

    @property
    def threads(self) -> int:
        """How many worker threads exist now."""
        return self._threads

    def submit(self, job: Job) -> None:
        with self._work:
            self._jobs.append(job)
            if self._idle >= len(self._jobs):
                self._work.notify()
                return
            if self._threads >= self._max:
                return
            self._threads += 1
        threading.Thread(target=self._serve, name="rbd-control", daemon=True).start()

    def call_later(self, seconds: float, job: Job) -> Timer:
        timer = Timer(time.monotonic() + seconds, job)
        with self._clock:
            heapq.heappush(self._timers, (timer.due, next(self._sequence), timer))
            if self._clock_runs:
                self._clock.notify()
                return timer
            self._clock_runs = True
        threading.Thread(target=self._tick, name="rbd-control-clock", daemon=True).start()
        return timer

    def _serve(self) -> None:
        while True:
            with self._work:
                if not self._jobs:
                    self._idle += 1
                    self._work.wait_for(lambda: bool(self._jobs), IDLE_SECONDS)
                    self._idle -= 1
                    if not self._jobs:
                        self._threads -= 1
                        return
                job = self._jobs.popleft()
            try:
                job()
            except Exception:
                log.exception("a control job failed")
            del job

    def _tick(self) -> None:
        while True:
            with self._clock:
                if not self._timers:
                    self._clock.wait(IDLE_SECONDS)
                if not self._timers:
                    self._clock_runs = False
                    return
                wait = self._timers[0][0] - time.monotonic()
                if wait > 0:
                    self._clock.wait(wait)
                    continue
                job = heapq.heappop(self._timers)[2].take()
            if job is not None:
                self.submit(job)


_pool: ControlPool | None = None
_pool_lock = threading.Lock()


def control_pool() -> ControlPool:
    """The pool of this process."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ControlPool()
        return _pool


def _forget() -> None:
    global _pool, _pool_lock
    _pool = None  # threads do not survive a fork
    _pool_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)

"""The threads of the control plane: one pool per process, so that an idle image costs none.

Threads start when there is work and nobody is free, and end after a few idle seconds. A few are enough: jobs block for
as long as a store operation or a notify takes. Some block longer (an image drains before it gives its lock up), so when
work has waited for a moment behind such jobs another thread starts: many slow images must not stop the rest, and a job
that waits for another one must not wait for ever. What waits for time alone (retries) sits in a heap served by one
clock thread.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from librbd_py.format.logs import logger

USUAL_THREADS = 8
MOST_THREADS = 1024
IDLE_SECONDS = 5.0
STALL_SECONDS = 0.05  # how long work waits before a thread beyond the usual number starts

log = logger("librbd_py.control")
Job = Callable[[], None]


class Timer:
    """A job for later. `cancel()` may come too late."""

    __slots__ = ("_job", "due", "here")

    def __init__(self, due: float, job: Job, here: bool) -> None:
        self.due = due  # time.monotonic()
        self.here = here  # runs on the clock thread itself: a moment's work
        self._job: Job | None = job

    def cancel(self) -> None:
        self._job = None

    def take(self) -> Job | None:
        job, self._job = self._job, None
        return job


class ControlPool:
    """Runs jobs in any order, several at a time."""

    def __init__(self, usual_threads: int = USUAL_THREADS, most_threads: int = MOST_THREADS) -> None:
        self._usual = usual_threads
        self._most = max(most_threads, usual_threads)
        self._served = 0  # jobs ever begun
        self._watched = False  # a stall check is due
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
            grow = self._threads < self._usual
            if grow:
                self._threads += 1
            elif not self._watched and self._threads < self._most:
                self._watched = True
                self.call_later(STALL_SECONDS, partial(self._relieve, self._served), here=True)
        if grow:
            self._start_thread()

    def _start_thread(self) -> None:
        threading.Thread(target=self._serve, name="rbd-control", daemon=True).start()

    def _relieve(self, served: int) -> None:
        """On the clock thread: one more thread when nothing was begun since the last look and work waits."""
        with self._work:
            self._watched = bool(self._jobs) and self._threads < self._most
            grow = self._watched and self._served == served
            if grow:
                self._threads += 1
            if self._watched:
                self.call_later(STALL_SECONDS, partial(self._relieve, self._served), here=True)
        if grow:
            self._start_thread()

    def call_later(self, seconds: float, job: Job, *, here: bool = False) -> Timer:
        timer = Timer(time.monotonic() + seconds, job, here)
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
                self._served += 1
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
                timer = heapq.heappop(self._timers)[2]
                job = timer.take()
            if job is None:
                continue
            if timer.here:
                job()
            else:
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

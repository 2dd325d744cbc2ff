"""Asynchronous calls of the `rbd` face: each runs on a thread of one pool of the process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from librbd_py.control.pool import ControlPool

MAX_THREADS = 32

_pool: ControlPool | None = None
_pool_lock = threading.Lock()


def io_pool() -> ControlPool:
    """Not the control plane's: a write may wait there for a lock that the control plane is to get."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ControlPool(MAX_THREADS)
        return _pool


class Completion:
    """The state of one asynchronous call."""

    def __init__(self, oncomplete: Callable[..., Any] | None) -> None:
        self._oncomplete = oncomplete
        self._value = 0
        self._done = threading.Event()  # the operation
        self._finished = threading.Event()  # the callback too
        self._failure: BaseException | None = None

    def is_complete(self) -> bool:
        """Whether the operation is done; its callback may still run."""
        return self._done.is_set()

    def wait_for_complete_and_cb(self) -> None:
        """Waits for the operation and its callback, and raises what the callback raised."""
        self._finished.wait()
        if self._failure is not None:
            raise self._failure

    def get_return_value(self) -> int:
        """Bytes for a read, 0, or -errno. Valid once complete."""
        return self._value

    def start(self, job: Callable[[], tuple[int, tuple[Any, ...]]]) -> Completion:
        """Runs `job` on the pool: it gives the return value and further arguments of the callback."""

        def run() -> None:
            more: tuple[Any, ...]
            try:
                self._value, more = job()
            except OSError as failure:
                self._value, more = -(failure.errno or 5), (None,) if self.gives_result else ()
            self._done.set()
            try:
                if self._oncomplete is not None:
                    self._oncomplete(self, *more)
            except BaseException as failure:
                self._failure = failure
            self._finished.set()

        io_pool().submit(run)
        return self

    gives_result = False  # the callback takes a second argument: what was read or opened

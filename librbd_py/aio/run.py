"""How coroutines reach code that blocks: a bounded set of threads, and futures that survive cancellation.

Cancelling a coroutine never leaves something half-owned: the call in the thread runs to its end, and closing the object
waits for it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

MAX_THREADS = 32

P = ParamSpec("P")
T = TypeVar("T")

_executor: ThreadPoolExecutor | None = None
_executor_lock = threading.Lock()


def executor() -> ThreadPoolExecutor:
    """The threads of this process for blocking calls; they start as needed."""
    global _executor
    with _executor_lock:
        if _executor is None:
            _executor = ThreadPoolExecutor(MAX_THREADS, "rbd-asyncio")
        return _executor


def _forget() -> None:
    global _executor, _executor_lock
    _executor, _executor_lock = None, threading.Lock()  # threads do not survive a fork


os.register_at_fork(after_in_child=_forget)


class Outstanding:
    """Calls and requests that have begun and not ended. Begun on the loop's thread, ended on any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: set[Future[Any]] = set()

    def add(self, future: Future[Any]) -> None:
        with self._lock:
            self._begun.add(future)
        future.add_done_callback(self._ended)

    def _ended(self, future: Future[Any]) -> None:
        with self._lock:
            self._begun.discard(future)

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call of several steps: between two of them it is under way too."""
        ended: Future[None] = Future()
        self.add(ended)
        try:
            yield
        finally:
            ended.set_result(None)

    async def settle(self) -> None:
        """Waits until everything that has begun has ended, however it did. The caller lets nothing new begin."""
        while True:
            with self._lock:
                begun = list(self._begun)
            if not begun:
                return
            await asyncio.gather(*map(asyncio.wrap_future, begun), return_exceptions=True)


class Face:
    """An object of the synchronous face, `sync`, whose methods become coroutines."""

    def __init__(self, sync: Any) -> None:
        self.sync = sync
        self._outstanding = Outstanding()

    async def _run(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        begun = executor().submit(partial(call, *args, **kwargs))
        self._outstanding.add(begun)
        return await asyncio.wrap_future(begun)


def coroutine(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """The coroutine of a method: same arguments, same result, same exceptions, run on a thread."""

    @wraps(method)
    async def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        result: T = await self._run(method, self.sync, *args, **kwargs)
        return result

    return call


def listing(
    method: Callable[Concatenate[Any, P], Iterable[T]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, list[T]]]:
    """The same for a method that gives an iterator: the coroutine gives a list."""

    @wraps(method)
    async def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> list[T]:
        result: list[T] = await self._run(lambda: list(method(self.sync, *args, **kwargs)))
        return result

    return call


class Operation(Generic[T]):
    """A long operation: `await` it for its result, or iterate over its progress, (done, total) pairs.

    It starts when first awaited or iterated, and is not stopped by cancelling either. A slow reader sees the latest
    progress only. Failures are raised by both.
    """

    def __init__(self, face: Face, call: Callable[[Callable[[int, int], int]], T]) -> None:
        self._face = face
        self._call = call
        self._begun: asyncio.Future[T] | None = None
        self._news = asyncio.Event()
        self._latest: tuple[int, int] | None = None

    def _start(self) -> asyncio.Future[T]:
        if self._begun is None:
            loop = asyncio.get_running_loop()

            def progress(done: int, total: int) -> int:
                post(loop, self._progressed, done, total)
                return 0

            self._begun = asyncio.ensure_future(self._face._run(self._call, progress))
            self._begun.add_done_callback(lambda _: self._news.set())
        return self._begun

    def _progressed(self, done: int, total: int) -> None:
        self._latest = (done, total)
        self._news.set()

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.shield(self._start()).__await__()

    async def __aiter__(self) -> AsyncIterator[tuple[int, int]]:
        begun = self._start()
        while True:
            await self._news.wait()
            self._news.clear()
            latest, self._latest = self._latest, None
            if latest is not None:
                yield latest
            if begun.done() and self._latest is None:
                await begun
                return


def operation(method: Callable[..., T]) -> Callable[..., Operation[T]]:
    """A method with `on_progress` as its last argument, as an Operation."""

    @wraps(method)
    def call(self: Face, /, *args: Any, **kwargs: Any) -> Operation[T]:
        theirs = kwargs.pop("on_progress", None)

        def run(report: Callable[[int, int], int]) -> T:
            def both(done: int, total: int) -> int:
                report(done, total)
                return int(theirs(done, total) or 0) if theirs is not None else 0

            return method(self.sync, *args, on_progress=both, **kwargs)

        return Operation(self, run)

    return call


def post(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *args: Any) -> None:
    """Calls on the loop's thread; a loop that was closed meanwhile does not care any more."""
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise

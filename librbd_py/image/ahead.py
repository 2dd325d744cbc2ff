"""Several objects at a time: what waits for a store at the other end of a network is begun ahead of its turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from .datapath import NativeImage
from .handle import ImageHandle

LOCAL_OPS = 2  # where the data lies in files of this machine

T = TypeVar("T")
R = TypeVar("R")


def is_local(handle: ImageHandle) -> bool:
    """Whether the data lies in files of this machine."""
    return handle.objects.native is not None and handle.objects.native.write_back is not None


def at_once(handle: ImageHandle) -> int:
    """How many objects a maintenance operation on the image works on at a time."""
    if not isinstance(handle.data, NativeImage):
        return 1
    most = handle.settings.management_ops
    return min(LOCAL_OPS, most) if is_local(handle) else most


def in_order(items: Iterable[T], work: Callable[[T], R], count: int) -> Iterator[tuple[T, R]]:
    """`work` on each item, on `count` threads (1: on this one); results in the order of the items. What it raises ends
    the rest, as does leaving the loop; what has begun is waited for."""
    if count <= 1:
        for item in items:
            yield item, work(item)
        return
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(count, "rbdpy-ahead") as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) >= 2 * count:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()

"""Asynchronous I/O of `rbd.Image`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from librbd_py.image import io
from librbd_py.image.handle import ImageHandle

from .common import number, requires_not_closed
from .completion import Completion
from .constants import RBD_WRITE_ZEROES_FLAG_THICK_PROVISION


class ImageAio:
    """Each call returns a Completion at once; `oncomplete(completion)` runs when it is done, for reads with the bytes
    (None after a failure) as second argument."""

    handle: ImageHandle

    @requires_not_closed
    def aio_read(self, offset: int, length: int, oncomplete: Callable[..., Any], fadvise_flags: int = 0) -> Completion:
        offset, length = number(offset), number(length, kind="size_t")

        def job() -> tuple[int, tuple[Any, ...]]:
            data = io.read(self.handle, offset, length)
            return len(data), (data,)

        completion = Completion(oncomplete)
        completion.gives_result = True
        return completion.start(job)

    @requires_not_closed
    def aio_write(self, data: bytes, offset: int, oncomplete: Callable[..., Any], fadvise_flags: int = 0) -> Completion:
        if not isinstance(data, bytes):
            raise TypeError(f"expected bytes, {type(data).__name__} found")
        offset = number(offset)
        return self._start(oncomplete, lambda: io.write(self.handle, offset, data))

    @requires_not_closed
    def aio_discard(self, offset: int, length: int, oncomplete: Callable[..., Any]) -> Completion:
        offset, length = number(offset), number(length)
        return self._start(oncomplete, lambda: io.discard(self.handle, offset, length))

    @requires_not_closed
    def aio_write_zeroes(
        self, offset: int, length: int, oncomplete: Callable[..., Any], zero_flags: int = 0
    ) -> Completion:
        offset, length, flags = number(offset), number(length, kind="size_t"), number(zero_flags)

        def job() -> None:
            if flags & ~RBD_WRITE_ZEROES_FLAG_THICK_PROVISION:
                raise OSError(22, f"unknown flags {flags:#x}")
            io.write_zeroes(self.handle, offset, length, thick=bool(flags))

        return self._start(oncomplete, job)

    @requires_not_closed
    def aio_flush(self, oncomplete: Callable[..., Any]) -> Completion:
        return self._start(oncomplete, lambda: io.flush(self.handle))

    @requires_not_closed
    def aio_compare_and_write(
        self, offset: int, compare: bytes, data: bytes, oncomplete: Callable[..., Any], fadvise_flags: int = 0
    ) -> Completion:
        """Return value -EILSEQ when the content differs; nothing is written then."""
        offset = number(offset)

        def job() -> None:
            if io.compare_and_write(self.handle, offset, compare, data) is not None:
                raise OSError(84, "the image holds something else")

        return self._start(oncomplete, job)

    @staticmethod
    def _start(oncomplete: Callable[..., Any], job: Callable[[], object]) -> Completion:
        def run() -> tuple[int, tuple[Any, ...]]:
            job()
            return 0, ()

        return Completion(oncomplete).start(run)

"""The `file` stream: a file or block device of this machine."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any

from .api import DATA, Extent
from .checks import bounded
from .spec_values import text


class FileStream:
    """Spec: {"type": "file", "file_path": PATH}. Holes of a sparse file are known."""

    def __init__(self, path: str) -> None:
        """What open(2) says; EISDIR, EINVAL for what has no size."""
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not make us wait
        try:
            mode = os.fstat(self._fd).st_mode
            if stat.S_ISDIR(mode):
                raise OSError(errno.EISDIR, f"{path} is a directory")
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                raise OSError(errno.EINVAL, f"{path} is neither a file nor a block device")
            self._size = bounded(os.lseek(self._fd, 0, os.SEEK_END), path)
        except BaseException:
            os.close(self._fd)
            raise
        self._holes = stat.S_ISREG(mode)

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> FileStream:
        return cls(text(spec, "file_path", "the stream"))

    @property
    def size(self) -> int:
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        parts: list[bytes] = []
        while length:
            part = os.pread(self._descriptor(), length, offset)
            if not part:
                raise OSError(errno.EIO, f"{self.path} was cut short: nothing at {offset} of {self._size}")
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """SEEK_DATA and SEEK_HOLE move the position that the descriptor has, which nothing else here uses."""
        end = offset + length
        while offset < end:
            found, stop = self._next(offset, end)
            if found < stop:
                yield Extent(found, stop - found, DATA)
            offset = stop

    def _next(self, offset: int, end: int) -> tuple[int, int]:
        """The data that comes next, as (start, end); empty at `end`: none."""
        if not self._holes:
            return offset, end
        try:
            found = os.lseek(self._descriptor(), offset, os.SEEK_DATA)
            if found >= end:
                return end, end
            return found, min(os.lseek(self._descriptor(), found, os.SEEK_HOLE), end)
        except OSError as failure:
            if failure.errno == errno.ENXIO:
                return end, end
            if failure.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # this file system does not tell
                return offset, end
            raise

    def _descriptor(self) -> int:
        if self._fd < 0:
            raise OSError(errno.EBADF, f"{self.path} is closed")
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

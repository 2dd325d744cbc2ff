"""A stream is a run of bytes that can be read anywhere: what formats are read from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from .api import DATA, Extent


class Stream(Protocol):
    """As `Source`, without points in time: any number of threads, OSError, bounded."""

    @property
    def size(self) -> int:
        """Bytes; does not change."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes within the size, however many. EIO: it is shorter than it was."""

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Where there may be data, ascending; what is left out reads as zeros. A range within the size."""

    def close(self) -> None: ...


def all_data(offset: int, length: int) -> Iterator[Extent]:
    """Of a stream that does not know better."""
    if length:
        yield Extent(offset, length, DATA)

"""What an image can be filled from: the contract between sources and whoever copies from them.

A source is read only and stands still: it is what a file, a web server, an object store, an NBD server or another image
held when it was opened. What it says comes from outside, so whoever implements this checks it once, and a caller may
believe the answers: ranges are within bounds, ascending and do not overlap, and reads are complete.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

MAX_READ = 32 << 20  # bytes of one read
MAX_SIZE = 1 << 62  # bytes of a source: sums with it stay far below 2^63


class Kind(Enum):
    DATA = "data"  # has to be read
    ZERO = "zero"  # reads as zeros, and did not before, or need not have


DATA, ZERO = Kind.DATA, Kind.ZERO


@dataclass(frozen=True)
class Extent:
    """`length` bytes from `offset` of the source; never empty."""

    offset: int
    length: int
    kind: Kind

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True)
class SourceSnapshot:
    """A point in the past of a source. `size`: bytes it had then."""

    name: str
    size: int


class Source(Protocol):
    """Any number of threads may use one. Every failure is OSError with an errno. A call takes memory and time that
    depend on what was asked for, never on what the other side claims; a side that stops answering is ETIMEDOUT in the
    end.

    A point is a snapshot, by its index in `snapshots`, or None for the source as it is now (HEAD).
    """

    @property
    def size(self) -> int:
        """Bytes of HEAD."""

    @property
    def snapshots(self) -> Sequence[SourceSnapshot]:
        """Oldest first; names differ."""

    def read(self, offset: int, length: int, snapshot: int | None = None) -> bytes:
        """Exactly `length` bytes, at most MAX_READ. EINVAL: not within the size at that point, or too many."""

    def extents(
        self, offset: int, length: int, snapshot: int | None = None, since: int | None = None
    ) -> Iterator[Extent]:
        """What has to be copied of a range, ascending, so that a target that is as the source was at `since` becomes as
        it was at `snapshot`; without `since`, a target that is all zeros. What is left out is right already (without
        `since`: holds nothing). A source that does not know better names more than that, in the worst case all of the
        range as DATA, and says ZERO or DATA for what holds nothing. EINVAL: not within the size at `snapshot`, or
        `since` is not older than `snapshot`.

        It looks while it goes: memory is bounded whatever the range."""

    def close(self) -> None:
        """Of no use afterwards (EBADF); again: nothing. Reads under way end first or fail."""

"""Two diffs of version 1, one after the other, as one."""

from __future__ import annotations

import errno
from collections.abc import Callable

from .streams import END, BadStream, Extent, Named, Reader, Resized, diff_head, extent, read_diff

Progress = Callable[[int, int], object]


class _Side:
    """One diff, its extents in ascending order, one at a time. Ends with what the sizes say of the rest."""

    def __init__(self, source: Reader, which: str) -> None:
        self._source, self._which = source, which
        self._records = read_diff(source, 1, lambda text: None)
        self.start = self.end = ""
        self.size = 0
        self.extent: Extent | None = None
        self.ended = False
        while True:
            record = next(self._records, None)
            if isinstance(record, Named):
                if record.start:
                    self.start = record.name
                else:
                    self.end = record.name
            elif isinstance(record, Resized):
                self.size = record.size
            else:
                break
        self._at = 0
        self._put(record)

    def _put(self, record: object) -> None:
        if record is None:
            self.extent, self.ended = None, True
            return
        if not isinstance(record, Extent) or not record.length:
            raise BadStream(errno.ENOTSUP, f"failed to read {self._which} diff data chunk header")
        if record.offset < self._at:
            text = f"out-of-order offset from {self._which} diff ({self._at} > {record.offset})"
            raise BadStream(errno.ENOTSUP, text)
        self._at = record.offset
        self.extent = record

    def take(self, count: int, write: Callable[[bytes], object] | None) -> None:
        """Passes on, or drops, the first `count` bytes of the extent."""
        assert self.extent is not None
        now = self.extent
        if write is not None:
            write(extent(now.offset, count, now.is_data, 1))
        if now.is_data:
            for piece in self._source.pieces(count, f"{self._which} diff data"):
                if write is not None:
                    write(piece)
        if count == now.length:
            self._put(next(self._records, None))
        else:
            self.extent = Extent(now.offset + count, now.length - count, now.is_data)


def _side(source: Reader, which: str) -> _Side:
    try:
        return _Side(source, which)
    except BadStream as failure:
        raise BadStream(failure.errno, f"failed to parse {which} diff header") from failure


def merge(first: Reader, second: Reader, write: Callable[[bytes], object], progress: Progress) -> None:
    """The later diff wins where both have something. Extents must be in ascending order, as exports write them.
    BadStream: EINVAL when they do not follow each other, ENOTSUP for what cannot be merged."""
    old, new = _side(first, "first"), _side(second, "second")
    if old.end != new.start:
        raise BadStream(errno.EINVAL, "The first TO snapshot must be equal with the second FROM snapshot, aborting")
    write(diff_head(1, old.start or None, new.end or None, new.size))
    total = 2 * max(old.size, new.size)
    tail_old = Extent(old.size, new.size - old.size, False) if new.size > old.size else None
    # what was cut off is dropped without a word: the size says it
    tail_new = Extent(new.size, old.size - new.size, False) if old.size > new.size else None
    cut = False
    while True:
        if old.ended and old.extent is None and tail_old is not None:
            old.extent, tail_old = tail_old, None
        if new.ended and new.extent is None and tail_new is not None:
            new.extent, tail_new, cut = tail_new, None, True
        left, right = old.extent, new.extent
        if left is None and right is None:
            break
        progress((left.offset if left else old.size) + (right.offset if right else new.size), total)
        _step(old, new, write, cut)
    write(END)


def _step(old: _Side, new: _Side, write: Callable[[bytes], object], cut: bool) -> None:
    left, right = old.extent, new.extent
    if left is None:
        assert right is not None
        new.take(right.length, None if cut else write)
    elif right is None or left.offset < right.offset:
        room = left.length if right is None else min(left.length, right.offset - left.offset)
        old.take(room, write)
    elif left.offset < right.offset + right.length:
        old.take(min(left.length, right.offset + right.length - left.offset), None)
    else:
        new.take(right.length, None if cut else write)

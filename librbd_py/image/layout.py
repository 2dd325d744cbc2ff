"""Striping arithmetic: which object holds which byte of an image. Numbers only, no I/O.

An image is cut into stripe units; `stripe_count` of them side by side are a stripe; an object holds one column of
`object_size / stripe_unit` stripes; `stripe_count` objects are an object set. Not striped: unit = object size, count 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from librbd_py.format.values import dataclass


class Extent(NamedTuple):
    """A piece of one object, and where it lies in the caller's buffer."""

    objno: int
    offset: int  # bytes within the object
    length: int  # bytes
    position: int  # bytes from the start of the mapped range


@dataclass(frozen=True)
class Layout:
    order: int  # objects are 2^order bytes
    stripe_unit: int  # bytes; divides the object size
    stripe_count: int

    @property
    def object_size(self) -> int:
        return 1 << self.order

    @property
    def period(self) -> int:
        """Bytes of the image in one object set."""
        return self.stripe_count << self.order

    def objects(self, size: int) -> int:
        """How many objects an image of `size` bytes can have."""
        sets, rest = divmod(size, self.period)
        if not rest:
            return sets * self.stripe_count
        return sets * self.stripe_count + min(self.stripe_count, -(-rest // self.stripe_unit))

    def map(self, offset: int, length: int) -> Iterator[Extent]:
        """The pieces of objects that hold [offset, offset + length), in image order; neighbours within one object are
        joined."""
        stripes_per_object = self.object_size // self.stripe_unit
        start = offset
        end = offset + length
        pending: Extent | None = None
        while start < end:
            block, within = divmod(start, self.stripe_unit)
            stripe, column = divmod(block, self.stripe_count)
            objno = (stripe // stripes_per_object) * self.stripe_count + column
            at = (stripe % stripes_per_object) * self.stripe_unit + within
            take = min(self.stripe_unit - within, end - start)
            if pending is not None and pending.objno == objno and pending.offset + pending.length == at:
                pending = pending._replace(length=pending.length + take)
            else:
                if pending is not None:
                    yield pending
                pending = Extent(objno, at, take, start - offset)
            start += take
        if pending is not None:
            yield pending

    def unmap(self, objno: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The image ranges (offset, length) that [offset, offset + length) of an object holds, ascending."""
        objects_set, column = divmod(objno, self.stripe_count)
        stripes_per_object = self.object_size // self.stripe_unit
        end = offset + length
        pending: tuple[int, int] | None = None
        while offset < end:
            row, within = divmod(offset, self.stripe_unit)
            block = (objects_set * stripes_per_object + row) * self.stripe_count + column
            take = min(self.stripe_unit - within, end - offset)
            at = block * self.stripe_unit + within
            if pending is not None and pending[0] + pending[1] == at:
                pending = (pending[0], pending[1] + take)
            else:
                if pending is not None:
                    yield pending
                pending = (at, take)
            offset += take
        if pending is not None:
            yield pending

    def used(self, objno: int, size: int) -> int:
        """How many bytes of the object an image of `size` bytes uses: all that is used lies in front."""
        objects_set, column = divmod(objno, self.stripe_count)
        rest = size - objects_set * self.period
        if rest <= 0:
            return 0
        if rest >= self.period:
            return self.object_size
        rows, within = divmod(rest, self.stripe_unit * self.stripe_count)
        return rows * self.stripe_unit + min(max(within - column * self.stripe_unit, 0), self.stripe_unit)

    def within(self, objno: int, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """Image ranges of [offset, offset + length) of an object, cut at image byte `limit` (a parent's overlap)."""
        ranges = []
        for start, size in self.unmap(objno, offset, length):
            if start >= limit:
                break
            ranges.append((start, min(size, limit - start)))
        return ranges

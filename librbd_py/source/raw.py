"""The `raw` format: a stream is the image, and further streams are its snapshots."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any
from uuid import uuid4

from .api import ZERO, Extent, SourceSnapshot
from .checks import before, readable, size_at, within
from .spec_values import optional_text
from .stream import Stream

MAX_SNAPSHOTS = 512  # each has a stream open


class RawSource:
    """Spec: {"type": "raw", "stream": {...}, "snapshots": [{"type": "raw", "name": NAME, "stream": {...}}, ...]}.
    Snapshots are whole images of their own, oldest first; one without a name gets a random one, as in librbd."""

    def __init__(self, head: Stream, snapshots: Sequence[tuple[str, Stream]] = ()) -> None:
        self._streams: list[Stream] = [*(stream for _, stream in snapshots), head]
        self._snapshots = tuple(SourceSnapshot(name, stream.size) for name, stream in snapshots)

    @classmethod
    def of(cls, spec: Mapping[str, Any], open_stream: Callable[[Mapping[str, Any]], Stream]) -> RawSource:
        """`open_stream` makes the stream of an object that has "stream". EINVAL, ENOSYS, and what streams raise."""
        rows = spec.get("snapshots")
        if rows is None:
            rows = []
        if not isinstance(rows, list):
            raise OSError(errno.EINVAL, "'snapshots' of the source spec is no array")
        if len(rows) > MAX_SNAPSHOTS:
            raise OSError(errno.E2BIG, f"{len(rows)} snapshots in a source spec: at most {MAX_SNAPSHOTS}")
        names = [_name_of(row, number) for number, row in enumerate(rows)]
        if len(set(names)) < len(names):
            raise OSError(errno.EINVAL, "two snapshots of the source spec have one name")
        opened: list[Stream] = []
        try:
            for each in (spec, *rows):
                opened.append(open_stream(each))
        except BaseException:
            for stream in opened:
                with suppress(OSError):
                    stream.close()
            raise
        return cls(opened[0], list(zip(names, opened[1:], strict=True)))

    @property
    def size(self) -> int:
        return self._streams[-1].size

    @property
    def snapshots(self) -> Sequence[SourceSnapshot]:
        return self._snapshots

    def read(self, offset: int, length: int, snapshot: int | None = None) -> bytes:
        readable(offset, length, size_at(self.size, self._snapshots, snapshot))
        return self._at(snapshot).read(offset, length) if length else b""

    def extents(
        self, offset: int, length: int, snapshot: int | None = None, since: int | None = None
    ) -> Iterator[Extent]:
        """Two streams are not compared: since a snapshot, all data has changed, and what it had besides is zero now."""
        within(offset, length, size_at(self.size, self._snapshots, snapshot))
        before(since, snapshot, len(self._snapshots))
        now = self._at(snapshot).extents(offset, length)
        if since is None:
            return now
        old = self._at(since)
        shared = max(min(old.size, offset + length) - offset, 0)
        return _with_zeroes(now, old.extents(offset, shared))

    def _at(self, snapshot: int | None) -> Stream:
        return self._streams[-1 if snapshot is None else snapshot]

    def close(self) -> None:
        for stream in self._streams:
            stream.close()


def _name_of(row: object, number: int) -> str:
    if not isinstance(row, Mapping):
        raise OSError(errno.EINVAL, f"snapshot {number} of the source spec is no object")
    kind = row.get("type")
    if not isinstance(kind, str):
        raise OSError(errno.EINVAL, f"snapshot {number} of the source spec has no 'type'")
    if kind != "raw":
        raise OSError(errno.ENOSYS, f"snapshot {number} of the source spec has the unknown type '{kind}'")
    name = optional_text(row, "name", f"snapshot {number}") or str(uuid4())
    if "@" in name or "/" in name:
        raise OSError(errno.EINVAL, f"{name!r} cannot be the name of a snapshot")
    return name


def _with_zeroes(now: Iterator[Extent], old: Iterator[Extent]) -> Iterator[Extent]:
    """The data there is now, and ZERO where there was some that is gone."""
    data = next(now, None)
    for row in old:
        at = row.offset
        while at < row.end:
            while data is not None and data.end <= at:
                yield data
                data = next(now, None)
            stop = row.end if data is None else min(row.end, max(data.offset, at))
            if at < stop:
                yield Extent(at, stop - at, ZERO)
            at = stop
            if data is not None and data.offset <= at < data.end:
                at = min(data.end, row.end)
    while data is not None:
        yield data
        data = next(now, None)

"""The `qcow` format: QCOW2 images of versions 2 and 3 with internal snapshots and compressed clusters, and QCOW."""

from __future__ import annotations

import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .api import DATA, ZERO, Extent, Kind, SourceSnapshot
from .checks import before, readable, size_at, within
from .qcow_header import ALL_ZEROS, COMPRESSED, COPIED, OFFSET, ZSTD, Header, Point, bad, parse
from .stream import Stream
from .zstd import decompress

PAGE = 64 << 10  # bytes of metadata that are read and kept together
PAGES = 256  # of them are kept
UNPACKED = 8  # decompressed clusters are kept
_WINDOW = -12  # deflate without header, 4 KiB window: docs/interop/qcow2.txt


class Cache:
    """What was read last, by a key; any thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rows: OrderedDict[int, bytes] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, key: int, make: Callable[[], bytes]) -> bytes:
        with self._guard:
            found = self._rows.get(key)
            if found is not None:
                self._rows.move_to_end(key)
                return found
        made = make()  # without the lock: others need not wait for a slow server
        with self._guard:
            self._rows[key] = made
            if len(self._rows) > self._limit:
                self._rows.popitem(last=False)
        return made


class QcowSource:
    """Spec: {"type": "qcow", "stream": {...}}. Reference counts and bitmaps are not looked at: nothing is written, and
    what the tables of a point say is what QEMU reads there."""

    def __init__(self, stream: Stream) -> None:
        """Takes the stream, and closes it when the image cannot be read. EBADMSG, EOPNOTSUPP, EFBIG, E2BIG."""
        self._stream = stream
        self._pages = Cache(PAGES)
        self._unpacked = Cache(UNPACKED)
        try:
            self.header: Header = parse(self._metadata, stream.size)
        except BaseException:
            stream.close()
            raise

    @classmethod
    def of(cls, spec: Mapping[str, Any], open_stream: Callable[[Mapping[str, Any]], Stream]) -> QcowSource:
        return cls(open_stream(spec))

    @property
    def size(self) -> int:
        return self.header.head.size

    @property
    def snapshots(self) -> Sequence[SourceSnapshot]:
        return self.header.snapshots

    def close(self) -> None:
        self._stream.close()

    # --- reading

    def read(self, offset: int, length: int, snapshot: int | None = None) -> bytes:
        """EBADMSG: what the tables say of this range cannot be."""
        readable(offset, length, size_at(self.size, self.snapshots, snapshot))
        point = self._point(snapshot)
        out = bytearray(length)
        position, cluster = 0, self.header.cluster
        run_at = run_from = run_size = 0  # what lies together in the file: target, offset in the file, bytes
        while position < length:
            within_cluster = (offset + position) % cluster
            step = min(cluster - within_cluster, length - position)
            entry = self._entry(point, (offset + position) // cluster)
            if entry & self._compressed_flag:
                out[position : position + step] = self._unpack(entry)[within_cluster : within_cluster + step]
            elif (host := self._host(entry)) is not None:
                if run_size and run_from + run_size == host + within_cluster and run_at + run_size == position:
                    run_size += step
                else:
                    self._fill(out, run_at, run_from, run_size)
                    run_at, run_from, run_size = position, host + within_cluster, step
            position += step
        self._fill(out, run_at, run_from, run_size)
        return bytes(out)

    def _fill(self, out: bytearray, at: int, offset: int, size: int) -> None:
        """The last cluster of a file may be cut short: what is missing is zeros, as for QEMU."""
        size = min(size, self._stream.size - offset)
        if size > 0:
            out[at : at + size] = self._stream.read(offset, size)

    def _point(self, snapshot: int | None) -> Point:
        return self.header.head if snapshot is None else self.header.points[snapshot]

    @property
    def _compressed_flag(self) -> int:
        return COPIED if self.header.version == 1 else COMPRESSED

    def _host(self, entry: int) -> int | None:
        """Where the cluster of an entry that is not compressed lies; None: it is zeros."""
        if self.header.version == 1:
            host = entry
        else:
            if entry & ALL_ZEROS:
                if self.header.version == 2:
                    bad("a cluster of zeros in version 2")
                return None
            host = entry & OFFSET
            if host % self.header.cluster:
                bad(f"the cluster at {host} is not aligned")
        if not host:
            return None
        if host >= self._stream.size:
            bad(f"the cluster at {host} lies outside the file")
        return host

    def _unpack(self, entry: int) -> bytes:
        offset, most = self.header.compressed_at(entry)
        if offset >= self._stream.size:
            bad(f"the compressed cluster at {offset} lies outside the file")
        return self._unpacked.get(offset, lambda: self._decompress(offset, min(most, self._stream.size - offset)))

    def _decompress(self, offset: int, most: int) -> bytes:
        packed, size = self._stream.read(offset, most), self.header.cluster
        data: bytes | None
        if self.header.compression == ZSTD:
            data = decompress(packed, size)
        else:
            try:
                data = zlib.decompressobj(_WINDOW).decompress(packed, size)
            except zlib.error:
                data = None
        if data is None or len(data) != size:
            bad(f"the compressed cluster at {offset} cannot be decompressed")
        return data

    # --- tables

    def _metadata(self, offset: int, length: int) -> bytes:
        """A range of the file, through the kept pages."""
        parts = []
        while length:
            page, at = divmod(offset, PAGE)
            start = page * PAGE
            size = min(PAGE, self._stream.size - start)
            data = self._pages.get(page, lambda start=start, size=size: self._stream.read(start, size))  # type: ignore[misc]
            part = data[at : at + length]
            if not part:
                bad(f"a table at {offset} lies outside the file")
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _l2_at(self, point: Point, number: int) -> int:
        """Offset of an L2 table; 0: there is none."""
        if number >= point.l1_used:
            return 0
        return self._checked_l2(int.from_bytes(self._metadata(point.l1_offset + number * 8, 8), "big"))

    def _checked_l2(self, entry: int) -> int:
        if self.header.version == 1:
            offset = entry
        else:
            offset = entry & OFFSET
            if offset % self.header.cluster:
                bad(f"the L2 table at {offset} is not aligned")
        if offset and offset + (8 << self.header.l2_bits) > self._stream.size:
            bad(f"the L2 table at {offset} lies outside the file")
        return offset

    def _entry(self, point: Point, cluster: int) -> int:
        table, index = divmod(cluster, 1 << self.header.l2_bits)
        offset = self._l2_at(point, table)
        return int.from_bytes(self._metadata(offset + index * 8, 8), "big") if offset else 0

    # --- extents

    def extents(
        self, offset: int, length: int, snapshot: int | None = None, since: int | None = None
    ) -> Iterator[Extent]:
        """Exact to the cluster: two points that have one cluster in common have the same there, as QEMU copies before
        it writes. A row ends with its L2 table."""
        within(offset, length, size_at(self.size, self.snapshots, snapshot))
        before(since, snapshot, len(self.snapshots))
        return self._extents(
            offset, offset + length, self._point(snapshot), None if since is None else self._point(since)
        )

    def _extents(self, start: int, end: int, point: Point, since: Point | None) -> Iterator[Extent]:
        reach = self.header.reach
        first, last = start // reach, -(-end // reach)
        while first < last:
            count = min(last - first, PAGE // 8)
            now = self._l1(point, first, count)
            old = self._l1(since, first, count) if since is not None else b""
            if not any(now) and not any(old):
                first += count
                continue
            for at in range(count):
                table = self._checked_l2(int.from_bytes(now[at * 8 : at * 8 + 8], "big"))
                before_table = self._checked_l2(int.from_bytes(old[at * 8 : at * 8 + 8], "big")) if old else 0
                if table or before_table:
                    low = (first + at) * reach
                    for row in self._rows(low, table, before_table, since):
                        at_row, stop = max(row.offset, start), min(row.end, end)
                        if at_row < stop:
                            yield Extent(at_row, stop - at_row, row.kind)
            first += count

    def _l1(self, point: Point, first: int, count: int) -> bytes:
        """Entries, as they are in the file; zeros beyond the table."""
        have = max(min(point.l1_used - first, count), 0)
        data = self._metadata(point.l1_offset + first * 8, have * 8) if have else b""
        return data.ljust(count * 8, b"\0")

    def _rows(self, low: int, table: int, old_table: int, since: Point | None) -> Iterator[Extent]:
        """What one L2 table says, from `low` on."""
        cluster = self.header.cluster
        whole = since.size - since.size % cluster if since is not None else 0  # up to here `since` can be compared
        if table == old_table and low + self.header.reach <= whole:
            return
        now, old = self._l2(table), self._l2(old_table)
        flag = 0 if self.header.version == 1 else COPIED
        start, kind = low, None
        at = low
        for entry, other in zip(now, old, strict=True):
            found: Kind | None = None
            if at + cluster > whole:
                other = 0 if since is None or at >= since.size else ~entry
            if (entry ^ other) & ~flag:
                found = DATA if entry & self._compressed_flag or self._host(entry) is not None else ZERO
                if since is None and found is ZERO:
                    found = None
            if found is not kind:
                if kind is not None:
                    yield Extent(start, at - start, kind)
                start, kind = at, found
            at += cluster
        if kind is not None:
            yield Extent(start, at - start, kind)

    def _l2(self, offset: int) -> tuple[int, ...]:
        count = 1 << self.header.l2_bits
        if not offset:
            return (0,) * count
        return struct.unpack(f">{count}Q", self._metadata(offset, count * 8))

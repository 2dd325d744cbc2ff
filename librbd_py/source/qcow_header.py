"""Headers and snapshot tables of QCOW images: versions 2 and 3 (docs/interop/qcow2.txt of QEMU), and 1. Everything that
a number in them can do harm with is checked here, once."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from .api import MAX_SIZE, SourceSnapshot

MAGIC = b"QFI\xfb"
MAX_L1 = 32 << 20  # bytes of an L1 table, as in QEMU
MAX_SNAPSHOTS = 16384
MAX_EXTRA = 1024  # bytes of what a snapshot's record has beyond the specification, as in QEMU
MAX_HEADER = 4096

_V1 = struct.Struct(">4sIQIIQBBHIQ")
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_SNAPSHOT = struct.Struct(">QIHHIIQII")

DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED = 1, 2, 4, 8, 16
DEFLATE, ZSTD = 0, 1
COPIED = 1 << 63
COMPRESSED = 1 << 62
ALL_ZEROS = 1
OFFSET = 0x00FFFFFFFFFFFE00

ReadAt = Callable[[int, int], bytes]


def bad(what: str) -> NoReturn:
    """EBADMSG: no such image can be."""
    raise OSError(errno.EBADMSG, f"damaged QCOW image: {what}")


def unsupported(what: str) -> NoReturn:
    """ENOTSUP, in words."""
    raise OSError(errno.EOPNOTSUPP, f"this QCOW image {what}, which is not supported")


@dataclass(frozen=True)
class Point:
    """HEAD or a snapshot: where its tables begin and how much of them is used."""

    size: int  # bytes of the disk
    l1_offset: int
    l1_used: int  # entries that the size needs


@dataclass(frozen=True)
class Header:
    """What there is to know before tables are read."""

    version: int
    cluster_bits: int
    l2_bits: int  # an L2 table has 1 << l2_bits entries
    compression: int
    head: Point
    snapshots: tuple[SourceSnapshot, ...]
    points: tuple[Point, ...]  # of the snapshots

    @property
    def cluster(self) -> int:
        return 1 << self.cluster_bits

    @property
    def reach(self) -> int:
        """Bytes of the disk that one L2 table maps."""
        return 1 << (self.cluster_bits + self.l2_bits)

    def compressed_at(self, entry: int) -> tuple[int, int]:
        """Offset and most bytes in the file of a compressed cluster."""
        if self.version == 1:
            shift = 63 - self.cluster_bits
            return entry & ((1 << shift) - 1), (entry >> shift) & (self.cluster - 1)
        shift = 62 - (self.cluster_bits - 8)
        offset = entry & ((1 << shift) - 1)
        sectors = ((entry >> shift) & ((1 << (self.cluster_bits - 8)) - 1)) + 1
        return offset, sectors * 512 - (offset & 511)


def parse(read: ReadAt, file_size: int) -> Header:
    """`read` takes any range within the file. EBADMSG: no QCOW image, or damaged; EOPNOTSUPP: what is not read here."""
    start = read(0, min(MAX_HEADER, file_size))
    if start[:4] != MAGIC or len(start) < 8:
        raise OSError(errno.EBADMSG, "this is no QCOW image")
    version = int.from_bytes(start[4:8], "big")
    if version == 1:
        return _first(start, file_size)
    if version not in (2, 3):
        unsupported(f"has version {version}")
    return _second(start, version, read, file_size)


def _first(start: bytes, file_size: int) -> Header:
    if len(start) < _V1.size:
        bad("its header is cut short")
    _, _, backing, _, _, size, cluster_bits, l2_bits, _, crypt, l1_offset = _V1.unpack_from(start)
    _whole(backing, crypt)
    if not 9 <= cluster_bits <= 16 or not 6 <= l2_bits <= 13:
        bad(f"clusters of 2^{cluster_bits} bytes, L2 tables of 2^{l2_bits} entries")
    used = _l1_used(size, cluster_bits, l2_bits)
    _table(l1_offset, used, file_size, "the L1 table")
    return Header(1, cluster_bits, l2_bits, DEFLATE, Point(size, l1_offset, used), (), ())


def _second(start: bytes, version: int, read: ReadAt, file_size: int) -> Header:
    if len(start) < _V2.size:
        bad("its header is cut short")
    fields = _V2.unpack_from(start)
    _, _, backing, _, cluster_bits, size, crypt, l1_size, l1_offset, _, _, snapshots, snapshots_offset = fields
    _whole(backing, crypt)
    if not 9 <= cluster_bits <= 21:
        bad(f"clusters of 2^{cluster_bits} bytes")
    compression = DEFLATE
    if version == 3:
        compression = _features(start, cluster_bits)
    used = _l1_used(size, cluster_bits, cluster_bits - 3)
    if l1_size < used:
        bad(f"{l1_size} entries in the L1 table, where {size} bytes need {used}")
    _table(l1_offset, used, file_size, "the L1 table")
    if l1_offset % (1 << cluster_bits):
        bad("the L1 table begins within a cluster")
    rows, points = _snapshots(read, file_size, snapshots, snapshots_offset, cluster_bits, size)
    head = Point(size, l1_offset, used)
    return Header(version, cluster_bits, cluster_bits - 3, compression, head, tuple(rows), tuple(points))


def _features(start: bytes, cluster_bits: int) -> int:
    """The type of compression."""
    if len(start) < _V2.size + _V3.size:
        bad("its header is cut short")
    incompatible, _, _, refcount_order, length = _V3.unpack_from(start, _V2.size)
    if length < 104 or length > 1 << cluster_bits or length % 8:
        bad(f"a header of {length} bytes")
    if refcount_order > 6:
        bad(f"reference counts of 2^{refcount_order} bits")
    if incompatible & DATA_FILE:
        unsupported("has its data in another file")
    if incompatible & EXTENDED:
        unsupported("has extended L2 entries (subclusters)")
    if incompatible & ~(DIRTY | CORRUPT | COMPRESSION):
        unsupported(f"has the incompatible features {incompatible:#x}")
    compression = start[104] if length > 104 and len(start) > 104 else DEFLATE
    if bool(incompatible & COMPRESSION) != (compression != DEFLATE):
        bad("what it says of its compression contradicts itself")
    if compression not in (DEFLATE, ZSTD):
        unsupported(f"has compression of type {compression}")
    return compression


def _whole(backing: int, crypt: int) -> None:
    if backing:
        unsupported("has a backing file (qemu-img convert makes one without)")
    if crypt:
        unsupported("is encrypted")


def _l1_used(size: int, cluster_bits: int, l2_bits: int) -> int:
    if size > MAX_SIZE:
        raise OSError(errno.EFBIG, f"the QCOW image says that it has {size} bytes")
    used = -(-size >> (cluster_bits + l2_bits))
    if used * 8 > MAX_L1:
        raise OSError(errno.EFBIG, f"{size} bytes need an L1 table of {used * 8} bytes: at most {MAX_L1} may be")
    return used


def _table(offset: int, entries: int, file_size: int, what: str) -> None:
    if entries and (not offset or offset + entries * 8 > file_size):
        bad(f"{what} lies outside the file")


def _snapshots(
    read: ReadAt, file_size: int, count: int, offset: int, cluster_bits: int, disk_size: int
) -> tuple[list[SourceSnapshot], list[Point]]:
    if count > MAX_SNAPSHOTS:
        raise OSError(errno.E2BIG, f"{count} snapshots in a QCOW image: at most {MAX_SNAPSHOTS}")
    if count and (not offset or offset % (1 << cluster_bits)):
        bad("the snapshot table is not where a table can be")
    names: set[str] = set()
    rows: list[SourceSnapshot] = []
    points: list[Point] = []
    for number in range(count):
        offset = -(-offset // 8) * 8
        if offset + _SNAPSHOT.size > file_size:
            bad("the snapshot table lies outside the file")
        l1_offset, l1_size, id_size, name_size, _, _, _, _, extra = _SNAPSHOT.unpack(read(offset, _SNAPSHOT.size))
        offset += _SNAPSHOT.size
        if extra > MAX_EXTRA:
            bad(f"{extra} bytes more in the record of a snapshot")
        if offset + extra + id_size + name_size > file_size:
            bad("the snapshot table lies outside the file")
        rest = read(offset, extra + id_size + name_size)
        offset += len(rest)
        size = int.from_bytes(rest[8:16], "big") if extra >= 16 else disk_size
        used = _l1_used(size, cluster_bits, cluster_bits - 3)
        if l1_size < used:
            bad(f"{l1_size} entries in the L1 table of snapshot {number}, where {size} bytes need {used}")
        _table(l1_offset, used, file_size, f"the L1 table of snapshot {number}")
        if l1_offset % (1 << cluster_bits):
            bad(f"the L1 table of snapshot {number} begins within a cluster")
        name = _name(rest[extra + id_size :], rest[extra : extra + id_size], number, names)
        names.add(name)
        rows.append(SourceSnapshot(name, size))
        points.append(Point(size, l1_offset, used))
    return rows, points


def _name(raw: bytes, raw_id: bytes, number: int, taken: set[str]) -> str:
    """What an RBD snapshot can be called: QEMU's names may be empty, equal, or have characters that specs need."""
    name = raw.decode("utf-8", "replace").replace("/", "_").replace("@", "_").replace("\0", "_")
    if not name:
        name = "snapshot-" + (raw_id.decode("ascii", "replace").replace("\0", "") or str(number + 1))
    if name in taken:
        name = next(other for n in range(number + 1, number + len(taken) + 2) if (other := f"{name}-{n}") not in taken)
    return name

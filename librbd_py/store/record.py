"""What an object is to the op executor, and what it asks a store to change.

A store opens one `Transaction` per op list, under whatever makes it exclusive (a mutex, BEGIN IMMEDIATE). The executor
reads through it, decides everything, and hands back one `Changes` to apply; an op list that fails hands back nothing.
So a store needs no undo, and a store whose data lives outside its database still fails cleanly.

Reads inside a write list see the object as it was before the list; only its existence and size follow the ops. That is
what an OSD does (its transaction is applied at the end), and class methods count on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from librbd_py.format.values import dataclass, field

from .api import Client, CloneInfo, SnapContext, SnapSet, WatcherInfo

Extents = tuple[tuple[int, int], ...]  # (offset, length), ascending, disjoint, not touching

MAX_OBJECT_SIZE = 128 << 20  # osd_max_object_size; EFBIG
MAX_XATTR_SIZE = 64 << 10  # EFBIG
MAX_XATTR_NAME = 100  # osd_max_attr_name_len; ENAMETOOLONG
MAX_OBJECT_NAME = 2048  # osd_max_object_name_len, bytes; ENAMETOOLONG
MAX_NAMESPACE_NAME = 256  # osd_max_object_namespace_len, bytes; ENAMETOOLONG
MAX_OMAP_KEYS = 1024  # osd_max_omap_entries_per_request: a reply holds no more rows, whatever max_return says


class ObjectState(Protocol):
    """One readable version of an object: its head or a clone. Loaded lazily; valid while the transaction is."""

    @property
    def size(self) -> int: ...

    @property
    def mtime_ns(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """Short at the end of the object; holes are zeros."""

    def extents(self, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """Data ranges inside [offset, offset + length) and inside the object; what lies between reads as zero."""

    def xattr(self, name: str) -> bytes | None: ...

    def xattrs(self) -> dict[str, bytes]: ...

    def omap_get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Those of `keys` that exist."""

    def omap_rows(self, start_after: bytes, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Rows with key > start_after (b"" : from the first) and the prefix, ascending. The caller stops when it
        has enough; nothing may be loaded far beyond that."""


# --- steps of a change, applied in order -------------------------------------------------------------------------


@dataclass(frozen=True)
class Touch:
    """Exists from here on (empty if it did not)."""


@dataclass(frozen=True)
class Delete:
    """Head gone: data, xattrs, omap."""


@dataclass(frozen=True)
class PutData:
    offset: int
    data: bytes  # may be empty; extends the object


@dataclass(frozen=True)
class ZeroData:
    offset: int
    length: int  # > 0; ends before the object's current end


@dataclass(frozen=True)
class SetSize:
    size: int  # cuts or extends with zeros


@dataclass(frozen=True)
class Restore:
    """The head becomes a copy of this clone: data, xattrs and omap. Whatever it was before is dropped."""

    clone_id: int
    snap_id: int  # what the caller asked for; the clone serves it


@dataclass(frozen=True)
class PutXattr:
    name: str
    value: bytes


@dataclass(frozen=True)
class DropXattr:
    name: str  # may be missing


@dataclass(frozen=True)
class PutOmap:
    values: dict[bytes, bytes]


@dataclass(frozen=True)
class DropOmap:
    keys: tuple[bytes, ...]  # may be missing, may repeat


@dataclass(frozen=True)
class DropOmapRange:
    begin: bytes
    end: bytes  # exclusive


@dataclass(frozen=True)
class ClearOmap:
    pass


Step = (
    Touch
    | Delete
    | PutData
    | ZeroData
    | SetSize
    | Restore
    | PutXattr
    | DropXattr
    | PutOmap
    | DropOmap
    | DropOmapRange
    | ClearOmap
)


@dataclass(frozen=True)
class LayoutSpec:
    """`rbd.create` ran on this header: the image's data objects are `<object_prefix>.<%016x>` in `data_pool`.

    A store that keeps data objects apart registers them under the header's pool, namespace and name, and forgets them
    when a later `Changes` of that header has `exists` False.
    """

    object_prefix: str
    order: int  # objects are 2^order bytes
    data_pool: int  # pool id; the header's own pool when the image has no separate data pool


@dataclass(frozen=True)
class Changes:
    """Everything one successful op list does. `steps` empty and `clone` None: nothing to do."""

    snapc: SnapContext  # of the write, without removed snapshots
    clone: CloneInfo | None  # first copy the head (data, xattrs, omap) under this clone id
    steps: tuple[Step, ...]
    exists: bool  # of the head, afterwards
    size: int  # of the head, afterwards; 0 when it does not exist
    snapset: SnapSet  # afterwards, clones only (no row for the head), ascending by clone_id
    layout: LayoutSpec | None = None

    @property
    def forget(self) -> bool:
        """Neither head nor clones remain: the store drops the record altogether, snap_seq included."""
        return not self.exists and not self.snapset.clones


EMPTY_SNAPSET = SnapSet(0, ())


class Transaction(Protocol):
    """One object, one op list. Valid until the store ends it."""

    pool_id: int
    namespace: str
    oid: str
    client: Client
    now_ns: int  # the store's clock

    def head(self) -> ObjectState | None: ...

    def version(self) -> int:
        """Grows with every change of the object, also across removal; 0 when there is no head."""

    def snapset(self) -> SnapSet:
        """Clones only, ascending by clone_id; EMPTY_SNAPSET when unknown."""

    def clone(self, clone_id: int) -> ObjectState: ...

    def is_removed_snap(self, snap_id: int) -> bool:
        """snap_remove() was called for it."""

    def watchers(self) -> list[WatcherInfo]: ...

    def apply(self, changes: Changes) -> None:
        """Called at most once, last. Sets mtime to now_ns and raises the version. Only failures of the medium raise."""


# --- arithmetic on extents and snapsets ---------------------------------------------------------------------------


def subtract(extents: Extents, offset: int, length: int) -> Extents:
    """What remains of `extents` without [offset, offset + length)."""
    if length <= 0:
        return extents
    end = offset + length
    out: list[tuple[int, int]] = []
    for start, size in extents:
        stop = start + size
        if stop <= offset or start >= end:
            out.append((start, size))
            continue
        if start < offset:
            out.append((start, offset - start))
        if stop > end:
            out.append((end, stop - end))
    return tuple(out)


def intersect(a: Extents, b: Extents) -> Extents:
    out: list[tuple[int, int]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        start = max(a[i][0], b[j][0])
        stop = min(a[i][0] + a[i][1], b[j][0] + b[j][1])
        if start < stop:
            out.append((start, stop - start))
        if a[i][0] + a[i][1] < b[j][0] + b[j][1]:
            i += 1
        else:
            j += 1
    return tuple(out)


@dataclass(frozen=True)
class Trimmed:
    snapset: SnapSet
    dropped: tuple[int, ...] = field(default=())  # clone ids whose content may go


def trim(snapset: SnapSet, removed: Sequence[int]) -> Trimmed:
    """The snapset after these snapshots were removed from the pool. A clone that serves nobody goes; what the next
    older one shared with it, and it with its newer neighbour, stays shared between those two."""
    gone = set(removed)
    clones: list[CloneInfo] = []
    dropped: list[int] = []
    pending: Extents | None = None  # overlap of dropped clones still to be folded into the next older one
    for clone in reversed(snapset.clones):
        overlap = clone.overlap if pending is None else intersect(clone.overlap, pending)
        snaps = tuple(snap for snap in clone.snaps if snap not in gone)
        if snaps:
            clones.append(CloneInfo(clone.clone_id, snaps, clone.size, overlap))
            pending = None
        else:
            dropped.append(clone.clone_id)
            pending = overlap
    clones.reverse()
    return Trimmed(SnapSet(snapset.seq, tuple(clones)), tuple(dropped))


def find_snap(snapset: SnapSet, snap_id: int) -> int | None:
    """Which version serves a read at snap_id: a clone id, or None for the head (if there is one). KeyError: the object
    did not exist then."""
    if snap_id > snapset.seq:
        return None
    for clone in snapset.clones:
        if clone.clone_id >= snap_id:
            if clone.snaps and clone.snaps[0] <= snap_id:
                return clone.clone_id
            break
    raise KeyError(snap_id)

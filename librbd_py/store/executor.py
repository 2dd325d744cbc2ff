"""Runs op lists on one object with RADOS's rules. Shared by every store that is not RADOS itself.

The store supplies a `Transaction` (record.py); `execute_read` and `execute_write` do the rest. Nothing is changed
before the last op has succeeded.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any

from librbd_py.format.encoding import DecodeError

from . import api, record
from .api import NOSNAP, CloneInfo, ObjectStat, SnapContext, SnapSet
from .classes import find
from .record import Changes, Extents, LayoutSpec, ObjectState, Step, Transaction

_MAX_ERRNO = 4095


def fail(code: int, text: str) -> OSError:
    return OSError(code, text)


def check_name(oid: str, namespace: str = "") -> None:
    """EINVAL, ENAMETOOLONG. Every store calls it before anything else."""
    if not oid or "\0" in oid or "\0" in namespace:
        raise fail(errno.EINVAL, "an object name must not be empty or contain NUL")
    try:
        lengths = len(oid.encode()), len(namespace.encode())
    except UnicodeEncodeError:
        raise fail(errno.EINVAL, "an object name must be text") from None
    if lengths[0] > record.MAX_OBJECT_NAME:
        raise fail(errno.ENAMETOOLONG, f"object name of {lengths[0]} bytes; at most {record.MAX_OBJECT_NAME}")
    if lengths[1] > record.MAX_NAMESPACE_NAME:
        raise fail(errno.ENAMETOOLONG, f"namespace of {lengths[1]} bytes; at most {record.MAX_NAMESPACE_NAME}")


def check_snapc(snapc: SnapContext) -> None:
    """EINVAL unless ids descend and seq is not below the first."""
    ids = snapc.ids
    if any(later >= earlier for earlier, later in pairwise(ids)) or (ids and ids[0] > snapc.seq):
        raise fail(errno.EINVAL, f"snap context {snapc} is not newest first")
    if any(not 0 < snap < NOSNAP for snap in ids):
        raise fail(errno.EINVAL, f"snap context {snapc} has an impossible id")


_WRITES = (
    api.Create,
    api.Write,
    api.WriteFull,
    api.Append,
    api.WriteSame,
    api.Zero,
    api.Truncate,
    api.Remove,
    api.Rollback,
    api.SetXattr,
    api.RmXattr,
    api.OmapSet,
    api.OmapRmKeys,
    api.OmapRmRange,
    api.OmapClear,
    api.SetAllocHint,
)


def has_writes(ops: Sequence[Any]) -> bool:
    """Whether the list must go to write(). EOPNOTSUPP for an unknown class method."""
    return any(isinstance(op, _WRITES) or (isinstance(op, api.Exec) and find(op.cls, op.method).writes) for op in ops)


def execute_read(tx: Transaction, ops: Sequence[Any], snap_id: int = NOSNAP) -> list[Any]:
    """ENOENT when the object does not exist at snap_id; EPERM for a class method that writes."""
    run = _Run(tx, snap_id, writable=False)
    return [run.one(op) for op in ops]


def execute_write(tx: Transaction, ops: Sequence[Any], snapc: SnapContext = api.NO_SNAPS) -> list[Any]:
    """Applies all of them or none."""
    check_snapc(snapc)
    run = _Run(tx, NOSNAP, writable=True)
    results = [run.one(op) for op in ops]
    changes = run.changes(snapc)
    if changes is not None:
        tx.apply(changes)
    return results


class _Run:
    """State of one op list; also the `Context` of its class methods."""

    def __init__(self, tx: Transaction, snap_id: int, *, writable: bool) -> None:
        self._tx = tx
        self._writable = writable
        self._snap_id = snap_id
        self.oid, self.pool_id, self.namespace = tx.oid, tx.pool_id, tx.namespace
        self.client, self.now_ns = tx.client, tx.now_ns
        self._base: ObjectState | None = tx.head() if snap_id == NOSNAP else self._at_snap(snap_id)
        if not writable and self._base is None and snap_id != api.SNAPDIR:
            raise fail(errno.ENOENT, f"object {self.oid!r} does not exist")
        self._exists = self._base is not None
        self._size = self._base.size if self._base is not None else 0
        self._steps: list[Step] = []
        self._modified: list[tuple[int, int]] = []
        self._method_may_write = True
        self._layout: LayoutSpec | None = None

    def _at_snap(self, snap_id: int) -> ObjectState | None:
        if snap_id == api.SNAPDIR:
            if self._tx.head() is None and not self._tx.snapset().clones:
                raise fail(errno.ENOENT, f"object {self.oid!r} does not exist")
            return self._tx.head()
        if self._tx.is_removed_snap(snap_id):
            return None
        try:
            clone_id = record.find_snap(self._tx.snapset(), snap_id)
        except KeyError:
            return None
        return self._tx.head() if clone_id is None else self._tx.clone(clone_id)

    # --- dispatch

    def one(self, op: Any) -> Any:
        handler = _HANDLERS.get(type(op))
        if handler is None:
            raise fail(errno.EOPNOTSUPP, f"unknown operation {type(op).__name__}")
        if not self._writable and isinstance(op, _WRITES):
            raise fail(errno.EPERM, f"{type(op).__name__} in a read")
        return handler(self, op)

    def changes(self, snapc: SnapContext) -> Changes | None:
        """What the list does, with the copy of the head that a snapshot needs first (an OSD's rules)."""
        if not self._steps:
            return None
        tx = self._tx
        before = tx.snapset()
        ids = tuple(snap for snap in snapc.ids if not tx.is_removed_snap(snap))
        if before.seq > snapc.seq:
            # Somebody already wrote with a newer context: nothing in ours can need a copy any more.
            ids, seq = (), before.seq
        else:
            seq = snapc.seq
        clones = list(before.clones)
        clone: CloneInfo | None = None
        if self._base is not None and ids and ids[0] > before.seq:
            fresh = tuple(sorted(snap for snap in ids if snap > before.seq))
            size = self._base.size
            clone = CloneInfo(seq, fresh, size, ((0, size),) if size else ())
            clones.append(clone)
        if clones:
            newest = clones[-1]
            overlap: Extents = newest.overlap
            for offset, length in self._modified:
                overlap = record.subtract(overlap, offset, length)
            clones[-1] = CloneInfo(newest.clone_id, newest.snaps, newest.size, overlap)
        return Changes(
            snapc=SnapContext(seq, ids),
            clone=clone,
            steps=tuple(self._steps),
            exists=self._exists,
            size=self._size if self._exists else 0,
            snapset=SnapSet(seq, tuple(clones)),
            layout=self._layout,
        )

    # --- assertions

    def _op_assert_exists(self, op: api.AssertExists) -> None:
        if not self._exists:
            raise fail(errno.ENOENT, f"object {self.oid!r} does not exist")

    def _op_assert_version(self, op: api.AssertVersion) -> None:
        if op.version <= 0:
            raise fail(errno.EINVAL, "no version to assert")
        version = self._tx.version()
        if version < op.version:
            raise fail(errno.EOVERFLOW, f"object {self.oid!r} has version {version}, older than {op.version}")
        if version > op.version:
            raise fail(errno.ERANGE, f"object {self.oid!r} has version {version}, newer than {op.version}")

    def _op_version(self, op: api.Version) -> int:
        return self._tx.version()

    def _op_cmp_xattr(self, op: api.CmpXattr) -> None:
        try:
            held = self.xattr(op.name)
        except OSError as e:
            if e.errno != errno.ENODATA:
                raise
            held = b""
        if not _compare(op.op, op.value, held):
            raise fail(errno.ECANCELED, f"xattr {op.name!r} of {self.oid!r} is not {op.op} what was asked")

    def _op_omap_cmp(self, op: api.OmapCmp) -> None:
        self._must_exist()
        held = self._base.omap_get(list(op.comparisons)) if self._base is not None else {}
        for key, (value, relation) in op.comparisons.items():
            if relation not in ("eq", "lt", "gt"):
                raise fail(errno.EINVAL, f"omap comparison {relation!r}")
            # An OSD compares these as signed characters.
            if not _compare(relation, held.get(key, b"").translate(_SIGNED), bytes(value).translate(_SIGNED)):
                raise fail(errno.ECANCELED, f"omap key {key!r} of {self.oid!r} is not {relation} what was asked")

    def _op_cmp_ext(self, op: api.CmpExt) -> None:
        _check_range(op.offset, len(op.data))
        held = self._base.read(op.offset, len(op.data)) if self._base is not None else b""
        held = held.ljust(len(op.data), b"\0")
        if held != op.data:
            at = next(i for i, (a, b) in enumerate(zip(held, op.data, strict=True)) if a != b)
            raise fail(_MAX_ERRNO + at, f"object {self.oid!r} differs at offset {op.offset + at}")

    # --- reads

    def stat(self) -> ObjectStat:
        if not self._exists:
            raise fail(errno.ENOENT, f"object {self.oid!r} does not exist")
        return ObjectStat(self._size, self.now_ns if self._base is None else self._base.mtime_ns)

    def _op_stat(self, op: api.Stat) -> ObjectStat:
        return self.stat()

    def _op_read(self, op: api.Read) -> bytes:
        if op.offset < 0 or op.length < 0:
            raise fail(errno.EINVAL, "negative offset or length")
        return self.read(op.offset, op.length)

    def _op_sparse_read(self, op: api.SparseRead) -> tuple[list[tuple[int, int]], bytes]:
        if op.offset < 0 or op.length < 0:
            raise fail(errno.EINVAL, "negative offset or length")
        if self._base is None:
            return [], b""
        extents = list(self._base.extents(op.offset, op.length))
        return extents, b"".join(self._base.read(offset, length) for offset, length in extents)

    def _op_get_xattr(self, op: api.GetXattr) -> bytes:
        return self.xattr(op.name)

    def _op_get_xattrs(self, op: api.GetXattrs) -> dict[str, bytes]:
        return self.xattrs()

    def _op_omap_vals(self, op: api.OmapGetVals) -> tuple[dict[bytes, bytes], bool]:
        return self.omap_vals(op.start_after, op.prefix, _page(op.max_return))

    def _op_omap_keys(self, op: api.OmapGetKeys) -> tuple[list[bytes], bool]:
        rows, more = self.omap_vals(op.start_after, b"", _page(op.max_return))
        return list(rows), more

    def _op_omap_by_keys(self, op: api.OmapGetByKeys) -> dict[bytes, bytes]:
        return self._base.omap_get(list(op.keys)) if self._base is not None else {}

    def _op_list_snaps(self, op: api.ListSnaps) -> SnapSet:
        snapset = self._tx.snapset()
        rows = list(snapset.clones)
        head = self._tx.head()
        if head is not None:
            rows.append(CloneInfo(NOSNAP, (), head.size))
        return SnapSet(snapset.seq, tuple(rows))

    def _op_list_watchers(self, op: api.ListWatchers) -> list[api.WatcherInfo]:
        return self._tx.watchers()

    # --- writes

    def _op_create(self, op: api.Create) -> None:
        self.create(op.exclusive)

    def _op_write(self, op: api.Write) -> None:
        self.write(op.offset, op.data)

    def _op_write_full(self, op: api.WriteFull) -> None:
        self.write_full(op.data)

    def _op_append(self, op: api.Append) -> None:
        self.write(self._size if self._exists else 0, op.data)

    def _op_write_same(self, op: api.WriteSame) -> None:
        if not op.data or op.length < 0 or op.length % len(op.data):
            raise fail(errno.EINVAL, "writesame: the pattern's length does not divide the range")
        _check_range(op.offset, op.length)
        if op.length:
            self.write(op.offset, bytes(op.data) * (op.length // len(op.data)))

    def _op_zero(self, op: api.Zero) -> None:
        self.zero(op.offset, op.length)

    def _op_truncate(self, op: api.Truncate) -> None:
        self.truncate(op.size)

    def _op_remove(self, op: api.Remove) -> None:
        self.remove()

    def _op_rollback(self, op: api.Rollback) -> None:
        tx = self._tx
        snapset = tx.snapset()
        try:
            clone_id = record.find_snap(snapset, op.snap_id)
            if tx.is_removed_snap(op.snap_id) or (clone_id is None and tx.head() is None):
                raise KeyError(op.snap_id)
        except KeyError:
            # It did not exist then, so it must not exist now.
            if self._exists:
                self.remove()
            return
        if clone_id is None:
            # Unchanged since; but it counts as a change, so the snapshots in the context get their copy.
            self._steps.append(record.Touch())
            return
        size = tx.clone(clone_id).size
        changed: Extents = ((0, max(size, self._size)),)
        shared = changed
        for clone in snapset.clones:
            if clone.clone_id >= clone_id:
                shared = record.intersect(shared, clone.overlap)
        for offset, length in shared:
            changed = record.subtract(changed, offset, length)
        self._modified.extend(changed)
        self._exists, self._size = True, size
        self._steps.append(record.Restore(clone_id, op.snap_id))

    def _op_set_xattr(self, op: api.SetXattr) -> None:
        self.set_xattr(op.name, op.value)

    def _op_rm_xattr(self, op: api.RmXattr) -> None:
        self._must_exist()
        self._steps.append(record.DropXattr(op.name) if _is_text(op.name) else record.Touch())

    def _op_omap_set(self, op: api.OmapSet) -> None:
        self.omap_set(op.values)

    def _op_omap_rm_keys(self, op: api.OmapRmKeys) -> None:
        self.omap_remove(op.keys)

    def _op_omap_rm_range(self, op: api.OmapRmRange) -> None:
        self._must_exist()
        empty = op.begin >= op.end
        self._steps.append(record.Touch() if empty else record.DropOmapRange(bytes(op.begin), bytes(op.end)))

    def _op_omap_clear(self, op: api.OmapClear) -> None:
        self._must_exist()
        held = self._base is not None and next(iter(self._base.omap_rows(b"", b"")), None) is not None
        if held or any(isinstance(step, record.PutOmap | record.Restore) for step in self._steps):
            self._steps.append(record.ClearOmap())  # else it does not even count as a change

    def _op_alloc_hint(self, op: api.SetAllocHint) -> None:
        # The hint itself means nothing here. It creates the object, and counts as a change where snapshots need a copy.
        self.write(0, b"")

    # --- class methods

    def _op_exec(self, op: api.Exec) -> bytes:
        method = find(op.cls, op.method)
        if method.writes and not self._writable:
            raise fail(errno.EPERM, f"class method {op.cls}.{op.method} in a read")
        self._method_may_write = method.writes
        try:
            return method.body(self, op.data)
        except DecodeError as e:
            raise fail(errno.EINVAL, f"{op.cls}.{op.method}: {e.strerror}") from e
        finally:
            self._method_may_write = True

    @property
    def exists(self) -> bool:
        return self._exists

    def read(self, offset: int = 0, length: int = 0) -> bytes:
        if self._base is None:
            return b""
        size = self._base.size
        if offset >= size:
            return b""
        return self._base.read(offset, min(length, size - offset) if length else size - offset)

    def xattr(self, name: str) -> bytes:
        self._must_have_existed()
        value = self._base.xattr(name) if self._base is not None and _is_text(name) else None
        if value is None:
            raise fail(errno.ENODATA, f"object {self.oid!r} has no xattr {name!r}")
        return value

    def xattrs(self) -> dict[str, bytes]:
        self._must_have_existed()
        return self._base.xattrs() if self._base is not None else {}

    def omap_get(self, key: bytes) -> bytes:
        found = self._base.omap_get([key]) if self._base is not None else {}
        if key not in found:
            raise fail(errno.ENOENT, f"object {self.oid!r} has no omap key {key!r}")
        return found[key]

    def omap_vals(
        self, start_after: bytes = b"", prefix: bytes = b"", limit: int = 1 << 62
    ) -> tuple[dict[bytes, bytes], bool]:
        if self._base is None:
            return {}, False
        rows = self._base.omap_rows(start_after, prefix)
        page = dict(islice(rows, min(limit, 1 << 62)))
        return page, next(iter(rows), None) is not None

    def snap_seq(self) -> int:
        snapset = self._tx.snapset()
        if not self._exists and not snapset.clones:
            raise fail(errno.ENOENT, f"object {self.oid!r} does not exist")
        return snapset.seq

    def _may_write(self) -> None:
        if not self._method_may_write:
            raise fail(errno.EPERM, "a class method registered as reading tried to write")

    def _must_exist(self) -> None:
        if not self._exists:
            raise fail(errno.ENOENT, f"object {self.oid!r} does not exist")

    def _must_have_existed(self) -> None:
        """A removed head whose clones remain counts: an OSD keeps a record of it (a "whiteout") without attributes."""
        if self._base is None and not self._tx.snapset().clones:
            raise fail(errno.ENOENT, f"object {self.oid!r} does not exist")

    def create(self, exclusive: bool = False) -> None:
        self._may_write()
        if self._exists:
            if exclusive:
                raise fail(errno.EEXIST, f"object {self.oid!r} exists")
        else:
            self._exists, self._size = True, 0
        # Also on an object that exists: it counts as a change, so the snapshots in the context get their copy.
        self._steps.append(record.Touch())

    def remove(self) -> None:
        self._may_write()
        self._must_exist()
        self._modified.append((0, self._size))
        self._exists, self._size = False, 0
        self._steps.append(record.Delete())

    def write(self, offset: int, data: bytes) -> None:
        self._may_write()
        _check_range(offset, len(data))
        self._exists = True
        if data:
            self._modified.append((offset, len(data)))
            self._size = max(self._size, offset + len(data))
            self._steps.append(record.PutData(offset, bytes(data)))
        elif offset > self._size:
            self._modified.append((self._size, offset - self._size))
            self._size = offset
            self._steps.append(record.SetSize(offset))
        else:
            self._steps.append(record.Touch())

    def write_full(self, data: bytes) -> None:
        self._may_write()
        _check_range(0, len(data))
        self._modified.append((0, max(self._size, len(data))))
        shrink = self._size > len(data)
        self._exists, self._size = True, len(data)
        self._steps.append(record.PutData(0, bytes(data)) if data else record.Touch())
        if shrink:
            self._steps.append(record.SetSize(len(data)))

    def truncate(self, size: int) -> None:
        self._may_write()
        _check_range(size, 0)
        if not self._exists:
            return
        if size == self._size:
            self._steps.append(record.Touch())
            return
        if size < self._size:
            self._modified.append((size, self._size - size))
        else:
            self._modified.append((self._size, size - self._size))
        self._size = size
        self._steps.append(record.SetSize(size))

    def zero(self, offset: int, length: int) -> None:
        self._may_write()
        _check_range(offset, length)
        if not self._exists:
            return
        if offset + length >= self._size:
            # As an OSD does: zeros at the end of an object are not kept.
            if length and offset < self._size:
                self.truncate(offset)
        elif length:
            self._modified.append((offset, length))
            self._steps.append(record.ZeroData(offset, length))

    def set_xattr(self, name: str, value: bytes) -> None:
        self._may_write()
        if not name or not _is_text(name):
            raise fail(errno.EINVAL, "an xattr name must not be empty or contain NUL")
        if len(name.encode("utf-8", "surrogateescape")) > record.MAX_XATTR_NAME:
            raise fail(errno.ENAMETOOLONG, f"xattr name longer than {record.MAX_XATTR_NAME} bytes")
        if len(value) > record.MAX_XATTR_SIZE:
            raise fail(errno.EFBIG, f"xattr value of {len(value)} bytes; at most {record.MAX_XATTR_SIZE}")
        self._exists = True
        self._steps.append(record.PutXattr(name, bytes(value)))

    def omap_set(self, values: Mapping[bytes, bytes]) -> None:
        self._may_write()
        self._exists = True
        copy = {bytes(key): bytes(value) for key, value in values.items()}
        self._steps.append(record.PutOmap(copy) if copy else record.Touch())

    def omap_remove(self, keys: Sequence[bytes]) -> None:
        self._may_write()
        self._must_exist()
        self._steps.append(record.DropOmap(tuple(bytes(key) for key in keys)))

    def register_layout(self, object_prefix: str, order: int, data_pool: int) -> None:
        self._layout = LayoutSpec(object_prefix, order, self.pool_id if data_pool < 0 else data_pool)


def _is_text(name: str) -> bool:
    """Has bytes (those that were not UTF-8 come as lone surrogates), and no NUL."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return "\0" not in name


def _page(max_return: int) -> int:
    return max(0, min(max_return, record.MAX_OMAP_KEYS))


def _check_range(offset: int, length: int) -> None:
    """EFBIG as an OSD answers beyond osd_max_object_size."""
    if offset < 0 or length < 0:
        raise fail(errno.EINVAL, "negative offset or length")
    if offset >= record.MAX_OBJECT_SIZE or length > record.MAX_OBJECT_SIZE - offset:
        raise fail(errno.EFBIG, f"{offset}~{length} is beyond {record.MAX_OBJECT_SIZE} bytes")


_SIGNED = bytes(range(128, 256)) + bytes(range(128))

_RELATIONS: dict[str, Callable[[bytes, bytes], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
}


def _compare(relation: str, left: bytes, right: bytes) -> bool:
    try:
        return _RELATIONS[relation](left, right)
    except KeyError:
        raise fail(errno.EINVAL, f"unknown comparison {relation!r}") from None


_HANDLERS: dict[type, Callable[[_Run, Any], Any]] = {
    api.AssertExists: _Run._op_assert_exists,
    api.AssertVersion: _Run._op_assert_version,
    api.Version: _Run._op_version,
    api.CmpXattr: _Run._op_cmp_xattr,
    api.OmapCmp: _Run._op_omap_cmp,
    api.CmpExt: _Run._op_cmp_ext,
    api.Exec: _Run._op_exec,
    api.Stat: _Run._op_stat,
    api.Read: _Run._op_read,
    api.SparseRead: _Run._op_sparse_read,
    api.GetXattr: _Run._op_get_xattr,
    api.GetXattrs: _Run._op_get_xattrs,
    api.OmapGetVals: _Run._op_omap_vals,
    api.OmapGetKeys: _Run._op_omap_keys,
    api.OmapGetByKeys: _Run._op_omap_by_keys,
    api.ListSnaps: _Run._op_list_snaps,
    api.ListWatchers: _Run._op_list_watchers,
    api.Create: _Run._op_create,
    api.Write: _Run._op_write,
    api.WriteFull: _Run._op_write_full,
    api.Append: _Run._op_append,
    api.WriteSame: _Run._op_write_same,
    api.Zero: _Run._op_zero,
    api.Truncate: _Run._op_truncate,
    api.Remove: _Run._op_remove,
    api.Rollback: _Run._op_rollback,
    api.SetXattr: _Run._op_set_xattr,
    api.RmXattr: _Run._op_rm_xattr,
    api.OmapSet: _Run._op_omap_set,
    api.OmapRmKeys: _Run._op_omap_rm_keys,
    api.OmapRmRange: _Run._op_omap_rm_range,
    api.OmapClear: _Run._op_omap_clear,
    api.SetAllocHint: _Run._op_alloc_hint,
}

"""Operation lists of the contract as lists of librados, and their results back."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from librbd_py.native import ffi, lib

from .. import api
from .connection import Connection, check, fail

_RELATIONS = {"eq": 1, "ne": 2, "gt": 3, "ge": 4, "lt": 5, "le": 6}
_WAIT = 200  # ms between looks for a signal of Python's
_TO_THE_END = 256 << 10  # bytes tried first for a read without a length
MAX_OBJECT = 128 << 20  # bytes

Collector = Callable[[], Any]


class _TooSmall(Exception):
    """A read to the end filled its buffer; `args[0]` bytes will do next time."""


class OpList:
    """One list. Used by one thread: built, run, read, freed."""

    def __init__(self, *, writes: bool, to_the_end: int = _TO_THE_END) -> None:
        self._writes = writes
        self._to_the_end = to_the_end
        self._list = lib.rbdn_oplist_new(writes)
        self._collectors: list[Collector] = []
        self._operations = 0
        if not self._list:
            raise OSError(errno.ENOMEM, "an operation list")

    def free(self) -> None:
        """Also while it is in flight: then a change may still happen."""
        if self._list:
            found, self._list = self._list, ffi.NULL
            lib.rbdn_oplist_free(found)

    # --- building

    def add(self, op: Any) -> None:
        """EOPNOTSUPP for what librados cannot say in such a list, EINVAL for what it cannot carry."""
        build = _COMMON.get(type(op)) or (_WRITES if self._writes else _READS).get(type(op))
        if build is None:
            where = "writes" if self._writes else "reads"
            raise OSError(errno.EOPNOTSUPP, f"{type(op).__name__} in a list that {where} is not possible on Ceph")
        try:
            collector = build(self, op)
        except OverflowError as failure:
            raise OSError(errno.EINVAL, f"a number is out of range: {failure}") from None
        self._collectors.append(collector or _nothing)

    def _op(self, kind: int, data: bytes = b"", key: bytes = b"", **fields: Any) -> tuple[Any, Any]:
        op = ffi.new("rbdn_op *")
        keep = [op]
        op.kind = kind
        for name in ("name", "method"):
            keep.append(ffi.new("char[]", _c_text(fields.pop(name, b""))))
            setattr(op, name, keep[-1])
        for name, value in fields.items():
            setattr(op, name, value)
        for name, value in (("data", data), ("key", key)):
            content = ffi.from_buffer(value)
            keep.append(content)
            setattr(op, name, content)
            setattr(op, f"{name}_len", len(value))
        return op, keep

    def put(self, kind: int, data: bytes = b"", key: bytes = b"", **fields: Any) -> None:
        op, _keep = self._op(kind, data, key, **fields)
        check(lib.rbdn_oplist_add(self._list, op), "operation")
        self._operations += 1

    def get(self, kind: int, data: bytes = b"", **fields: Any) -> Any:
        op, _keep = self._op(kind, data, **fields)
        error = ffi.new("int *")
        out = lib.rbdn_oplist_get(self._list, op, error)
        check(error[0], "operation")
        self._operations += 1
        return out

    def put_rows(self, values: Mapping[bytes, bytes]) -> None:
        keys, key_lengths, _a = _strings(list(values))
        contents, lengths, _b = _strings(list(values.values()))
        check(lib.rbdn_oplist_omap_set(self._list, keys, key_lengths, contents, lengths, len(values)), "omap")
        self._operations += 1

    def drop_rows(self, keys: Sequence[bytes]) -> None:
        names, lengths, _keep = _strings(keys)
        check(lib.rbdn_oplist_omap_rm(self._list, names, lengths, len(keys)), "omap")
        self._operations += 1

    def get_rows(self, keys: Sequence[bytes]) -> Any:
        names, lengths, _keep = _strings(keys)
        error = ffi.new("int *")
        out = lib.rbdn_oplist_omap_get(self._list, names, lengths, len(keys), error)
        check(error[0], "omap")
        self._operations += 1
        return out

    def version(self) -> int:
        return int(lib.rbdn_oplist_version(self._list))

    def read_to_end(self, offset: int) -> Collector:
        size = self._to_the_end
        out = self.get(lib.RBDN_OP_READ, number=offset, length=size)

        def collect() -> bytes:
            if out.len == size:
                raise _TooSmall(min(size * 8, MAX_OBJECT))
            return _bytes(out)

        return collect

    # --- running

    def run(
        self,
        connection: Connection,
        io: Any,
        oid: str,
        what: str,
        snap_id: int = api.NOSNAP,
        snapc: api.SnapContext = api.NO_SNAPS,
    ) -> list[Any]:
        if self._operations == 0:
            self.put(lib.RBDN_OP_ASSERT_EXISTS)
        snaps = ffi.new("uint64_t[]", list(snapc.ids) or 1)
        sent = lib.rbdn_oplist_send(self._list, io, oid.encode(), snap_id, snapc.seq, snaps, len(snapc.ids))
        check(sent, what)
        check(wait(self._list, connection), what)
        return [collect() for collect in self._collectors]


def run_write(
    connection: Connection, io: Any, oid: str, ops: Sequence[Any], snapc: api.SnapContext, what: str
) -> list[Any]:
    found = OpList(writes=True)
    try:
        for op in ops:
            found.add(op)
        return found.run(connection, io, oid, what, snapc=snapc)
    finally:
        found.free()


def run_read(connection: Connection, io: Any, oid: str, ops: Sequence[Any], snap_id: int, what: str) -> list[Any]:
    size = _TO_THE_END
    while True:
        found = OpList(writes=False, to_the_end=size)
        try:
            for op in ops:
                found.add(op)
            return found.run(connection, io, oid, what, snap_id)
        except _TooSmall as more:
            if size == MAX_OBJECT:
                raise OSError(errno.EFBIG, f"{what}: the object is larger than {MAX_OBJECT} bytes") from None
            size = more.args[0]
        finally:
            found.free()


def wait(oplist: Any, connection: Connection) -> int:
    """Its result; -ESHUTDOWN once the client is known to be shut out, whatever the OSD does. Signals of Python's are
    handled while it waits."""
    while lib.rbdn_oplist_wait(oplist, _WAIT):
        if connection.fenced:
            return -errno.ESHUTDOWN
    return int(lib.rbdn_oplist_result(oplist))


def rows_of(out: Any) -> Iterator[tuple[bytes, bytes]]:
    key, value = ffi.new("char **"), ffi.new("char **")
    key_length, length = ffi.new("size_t *"), ffi.new("size_t *")
    while check(lib.rbdn_out_row(out, key, key_length, value, length), "rows"):
        content = ffi.buffer(value[0], length[0])[:] if length[0] else b""
        yield ffi.buffer(key[0], key_length[0])[:], content


def _strings(items: Sequence[bytes]) -> tuple[Any, Any, Any]:
    keep = [ffi.from_buffer(item) for item in items]
    pointers = ffi.new("char *[]", len(items) or 1)
    for at, item in enumerate(keep):
        pointers[at] = item
    lengths = ffi.new("size_t[]", [len(item) for item in items] or 1)
    return ffi.cast("const char **", pointers), lengths, (keep, pointers)


def _c_text(value: str | bytes) -> bytes:
    raw = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    if b"\0" in raw:
        raise OSError(errno.EINVAL, f"{raw!r} contains a NUL")
    return raw


def _bytes(out: Any) -> bytes:
    return bytes(ffi.buffer(out.data, out.len)) if out.len else b""


def _nothing() -> None:
    return None


def _relation(text: str) -> int:
    try:
        return _RELATIONS[text]
    except KeyError:
        raise fail(errno.EINVAL, f"unknown comparison {text!r}") from None


# --- what each operation is there


def _cmp_xattr(to: OpList, op: api.CmpXattr) -> None:
    to.put(lib.RBDN_OP_CMPXATTR, op.value, name=op.name, relation=_relation(op.op))


def _omap_cmp(to: OpList, op: api.OmapCmp) -> None:
    for key, (value, relation) in op.comparisons.items():
        to.put(lib.RBDN_OP_OMAP_CMP, value, key, relation=_relation(relation))


def _call(to: OpList, op: api.Exec) -> Collector:
    to.put(lib.RBDN_OP_CALL, op.data, name=op.cls, method=op.method)
    return lambda: b""  # an OSD gives no output of a list that writes


def _exec(to: OpList, op: api.Exec) -> Collector:
    out = to.get(lib.RBDN_OP_EXEC, op.data, name=op.cls, method=op.method)
    return lambda: _bytes(out)


def _stat(to: OpList, op: api.Stat) -> Collector:
    out = to.get(lib.RBDN_OP_STAT)
    return lambda: api.ObjectStat(out.size, out.mtime * 10**9)


def _read(to: OpList, op: api.Read) -> Collector:
    if op.length == 0:
        return to.read_to_end(op.offset)
    out = to.get(lib.RBDN_OP_READ, number=op.offset, length=min(op.length, MAX_OBJECT))
    return lambda: _bytes(out)


def _sparse_read(to: OpList, op: api.SparseRead) -> Collector:
    """Everything as one extent: librados' C interface has no sparse-read."""
    if op.length == 0:
        to.put(lib.RBDN_OP_ASSERT_EXISTS)
        return lambda: ([], b"")
    out = to.get(lib.RBDN_OP_READ, number=op.offset, length=min(op.length, MAX_OBJECT))
    return lambda: ([(op.offset, out.len)] if out.len else [], _bytes(out))


def _xattrs(to: OpList) -> Callable[[], dict[str, bytes]]:
    out = to.get(lib.RBDN_OP_XATTRS)
    return lambda: {key.decode("utf-8", "surrogateescape"): value for key, value in rows_of(out)}


def _get_xattr(to: OpList, op: api.GetXattr) -> Collector:
    found = _xattrs(to)

    def collect() -> bytes:
        value = found().get(op.name)
        if value is None:
            raise OSError(errno.ENODATA, f"there is no xattr {op.name!r}")
        return value

    return collect


def _get_xattrs(to: OpList, op: api.GetXattrs) -> Collector:
    return _xattrs(to)


def _omap_vals(to: OpList, op: api.OmapGetVals) -> Collector:
    out = to.get(lib.RBDN_OP_OMAP_VALS, name=op.start_after, method=op.prefix, number=op.max_return)
    return lambda: (dict(rows_of(out)), out.more != 0)


def _omap_keys(to: OpList, op: api.OmapGetKeys) -> Collector:
    out = to.get(lib.RBDN_OP_OMAP_KEYS, name=op.start_after, number=op.max_return)
    return lambda: ([key for key, _ in rows_of(out)], out.more != 0)


def _omap_by_keys(to: OpList, op: api.OmapGetByKeys) -> Collector:
    out = to.get_rows(op.keys)
    return lambda: dict(rows_of(out))


_COMMON: dict[type, Callable[[OpList, Any], Collector | None]] = {
    api.AssertExists: lambda to, op: to.put(lib.RBDN_OP_ASSERT_EXISTS),
    api.AssertVersion: lambda to, op: to.put(lib.RBDN_OP_ASSERT_VERSION, number=op.version),
    api.CmpXattr: _cmp_xattr,
    api.OmapCmp: _omap_cmp,
    api.CmpExt: lambda to, op: to.put(lib.RBDN_OP_CMPEXT, op.data, number=op.offset),
}
_WRITES: dict[type, Callable[[OpList, Any], Collector | None]] = {
    api.Exec: _call,
    api.Create: lambda to, op: to.put(lib.RBDN_OP_CREATE, number=op.exclusive),
    api.Write: lambda to, op: to.put(lib.RBDN_OP_WRITE, op.data, number=op.offset),
    api.WriteFull: lambda to, op: to.put(lib.RBDN_OP_WRITE_FULL, op.data),
    api.Append: lambda to, op: to.put(lib.RBDN_OP_APPEND, op.data),
    api.WriteSame: lambda to, op: to.put(lib.RBDN_OP_WRITESAME, op.data, number=op.offset, length=op.length),
    api.Zero: lambda to, op: to.put(lib.RBDN_OP_ZERO, number=op.offset, length=op.length),
    api.Truncate: lambda to, op: to.put(lib.RBDN_OP_TRUNCATE, number=op.size),
    api.Remove: lambda to, op: to.put(lib.RBDN_OP_REMOVE),
    api.SetXattr: lambda to, op: to.put(lib.RBDN_OP_SETXATTR, op.value, name=op.name),
    api.RmXattr: lambda to, op: to.put(lib.RBDN_OP_RMXATTR, name=op.name),
    api.OmapSet: lambda to, op: to.put_rows(op.values),
    api.OmapRmKeys: lambda to, op: to.drop_rows(op.keys),
    api.OmapRmRange: lambda to, op: to.put(lib.RBDN_OP_OMAP_RM_RANGE, op.end, op.begin),
    api.OmapClear: lambda to, op: to.put(lib.RBDN_OP_OMAP_CLEAR),
    api.SetAllocHint: lambda to, op: to.put(lib.RBDN_OP_ALLOC_HINT, number=op.object_size, length=op.write_size),
}
_READS: dict[type, Callable[[OpList, Any], Collector | None]] = {
    api.Exec: _exec,
    api.Version: lambda to, op: to.version,
    api.Stat: _stat,
    api.Read: _read,
    api.SparseRead: _sparse_read,
    api.GetXattr: _get_xattr,
    api.GetXattrs: _get_xattrs,
    api.OmapGetVals: _omap_vals,
    api.OmapGetKeys: _omap_keys,
    api.OmapGetByKeys: _omap_by_keys,
}

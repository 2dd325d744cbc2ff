"""One pool and namespace of a Ceph cluster."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from librbd_py.format import notify as wire
from librbd_py.format.encoding import DecodeError
from librbd_py.native import ffi, lib

from .. import api
from ..api import NO_SNAPS, NOSNAP, SNAPDIR, CloneInfo, NativeData, NotifyReply, SnapContext, SnapSet, WatcherInfo
from ..executor import check_name, check_snapc, has_writes
from . import oplist
from .connection import addresses, check, fail
from .watches import RadosWatch

if TYPE_CHECKING:
    from .store import RadosStore

ALL_NAMESPACES = "\x01"  # LIBRADOS_ALL_NSPACES
MAX_TIMEOUT = 1 << 31  # seconds of a watch
_NAMES = 64 << 10  # bytes of object names fetched at once
_NUMBERS = 1 << 12  # of a snapset, tried first
_WATCHERS = 64  # tried first


class RadosContext(api.ObjectContext):
    store: RadosStore

    def __init__(self, store: RadosStore, pool_id: int, namespace: str, io: Any) -> None:
        self.store = store
        self.pool_id = pool_id
        self.namespace = namespace
        self.io = io  # `rbdn_ioctx *`, the connection's

    def write(self, oid: str, ops: Sequence[Any], snapc: SnapContext = NO_SNAPS) -> list[Any]:
        """Durable on return."""
        check_name(oid, self.namespace)
        check_snapc(snapc)
        with self.store.using():
            if not ops:
                return []
            if len(ops) == 1 and isinstance(ops[0], api.Rollback):
                self._rollback(oid, ops[0].snap_id, snapc)
                return [None]
            return oplist.run_write(self.store.connection, self.io, oid, ops, snapc, f"write {oid}")

    def read(self, oid: str, ops: Sequence[Any], snap_id: int = NOSNAP) -> list[Any]:
        check_name(oid, self.namespace)
        with self.store.using():
            asked = [op for op in ops if not isinstance(op, (api.ListSnaps, api.ListWatchers))]
            found: Iterator[Any] = iter(())
            if asked or snap_id != SNAPDIR:
                found = iter(oplist.run_read(self.store.connection, self.io, oid, asked, snap_id, f"read {oid}"))
            return [self._listed(oid, op) if op not in asked else next(found) for op in ops]

    def _listed(self, oid: str, op: Any) -> Any:
        """By calls of their own: librados has them in C++ only, where they cannot join our lists."""
        return self._list_snaps(oid) if isinstance(op, api.ListSnaps) else self._list_watchers(oid)

    def exec_ops(self, oid: str, ops: Sequence[Any]) -> list[Any]:
        try:
            writes = has_writes(ops)
        except OSError:
            writes = False  # a class we do not know: the OSD knows whether it writes
        return self.write(oid, ops) if writes else self.read(oid, ops)

    def _rollback(self, oid: str, snap_id: int, snapc: SnapContext) -> None:
        ids = ffi.new("uint64_t[]", list(snapc.ids) or 1)
        result = lib.rbdn_ioctx_rollback(self.io, oid.encode(), snap_id, snapc.seq, ids, len(snapc.ids))
        check(result, f"rollback of {oid}")

    def _list_snaps(self, oid: str) -> SnapSet:
        size = _NUMBERS
        while True:
            numbers = ffi.new("uint64_t[]", size)
            count = check(lib.rbdn_ioctx_snapset(self.io, oid.encode(), numbers, size), f"snapshots of {oid}")
            if count <= size:
                return _snapset(iter(ffi.unpack(numbers, count)))
            size = count

    def _list_watchers(self, oid: str) -> list[WatcherInfo]:
        size = _WATCHERS
        while True:
            rows = ffi.new("rbdn_watcher[]", size)
            count = check(lib.rbdn_ioctx_watchers(self.io, oid.encode(), rows, size), f"watchers of {oid}")
            if count <= size:
                return [_watcher(rows[at]) for at in range(count)]
            size = count

    def objects(self) -> Iterator[str]:
        return self._names(self.io)

    def listing(self, *, everywhere: bool = False) -> Iterator[api.ObjectName]:
        io = self.store.connection.context(self.pool_id, ALL_NAMESPACES) if everywhere else self.io
        parts = self._names(io, whole=True)
        for name in parts:
            locator = next(parts)
            yield api.ObjectName(name, next(parts), locator)

    def with_locator(self, key: str) -> RadosContext:
        with self.store.using():
            io = self.store.connection.context(self.pool_id, self.namespace, key)
            return RadosContext(self.store, self.pool_id, self.namespace, io)

    def _names(self, io: Any, *, whole: bool = False) -> Iterator[str]:
        with self.store.using():
            error = ffi.new("int *")
            listing = lib.rbdn_listing_open(io, error)
            if not listing:
                raise fail(error[0], "list of objects")
            if whole:
                lib.rbdn_listing_whole(listing)
            try:
                names = ffi.new("char[]", _NAMES)
                while used := check(lib.rbdn_listing_next(listing, names, _NAMES), "list of objects"):
                    for name in ffi.buffer(names, used - 1)[:].split(b"\0"):
                        yield name.decode("utf-8", "surrogateescape")
            finally:
                lib.rbdn_listing_close(listing)

    # --- snapshots

    def snap_create(self) -> int:
        with self.store.using():
            found = ffi.new("uint64_t *")
            check(lib.rbdn_ioctx_snap_create(self.io, found), f"new snapshot in pool {self.pool_id}")
            return int(found[0])

    def snap_remove(self, snap_id: int) -> None:
        with self.store.using():
            result = lib.rbdn_ioctx_snap_remove(self.io, snap_id)
            if result != -errno.ENOENT:
                check(result, f"snapshot {snap_id} of pool {self.pool_id}")

    # --- watches

    def watch(
        self, oid: str, callback: api.NotifyCallback, error: api.WatchErrorCallback | None = None, timeout: int = 0
    ) -> RadosWatch:
        check_name(oid, self.namespace)
        if not 0 <= timeout < MAX_TIMEOUT:
            raise OSError(errno.EINVAL, f"a watch timeout of {timeout} s")
        with self.store.using():
            return self.store.keep_watch(RadosWatch(self, oid, callback, error, timeout))

    def notify(self, oid: str, payload: bytes, timeout_ms: int = 5000) -> NotifyReply:
        check_name(oid, self.namespace)
        with self.store.using():
            if self.store.connection.in_callback():
                raise OSError(errno.EDEADLK, "a watch callback must not wait for a notify")
            out, error = ffi.new("rbdn_out **"), ffi.new("int *")
            sent = lib.rbdn_notify_send(
                self.io, oid.encode(), bytes(payload), len(payload), max(timeout_ms, 1), out, error
            )
            if not sent:
                raise fail(error[0], f"notify of {oid}")
            try:
                result = oplist.wait(sent, self.store.connection)
                reply = ffi.buffer(out[0].data, out[0].len)[:] if out[0].len else b""
            finally:
                lib.rbdn_oplist_free(sent)
            if result != -errno.ETIMEDOUT or not reply:
                check(result, f"notify of {oid}")
            try:
                acks, silent = wire.decode_reply(reply)
            except DecodeError as failure:
                raise OSError(errno.EPROTO, f"reply of a notify of {oid}: {failure}") from None
            return NotifyReply(dict(sorted(acks.items())), tuple(sorted(silent)))

    def notify_ack(self, oid: str, notify_id: int, cookie: int, payload: bytes) -> None:
        with self.store.using():
            check(
                lib.rbdn_notify_ack(self.io, oid.encode(), notify_id, cookie, bytes(payload), len(payload)),
                f"acknowledge a notify of {oid}",
            )

    # --- data for the engine

    def native_data(self, prefix: str, order: int) -> NativeData:
        check_name(f"{prefix}.{0:016x}", self.namespace)
        connection = self.store.connection
        with self.store.using():
            error = ffi.new("int *")
            handle = lib.rbdn_rados_open(
                connection.handle, self.pool_id, self.namespace.encode(), prefix.encode(), order, error
            )
            if not handle:
                raise fail(error[0], f"data objects {prefix}")
            connection.acquire()
        opened = [handle]

        def close() -> None:
            if opened:
                lib.rbdn_store_close(opened.pop())
                connection.release()

        return NativeData(handle, False, close)


def _snapset(numbers: Iterator[int]) -> SnapSet:
    """See `rbdn_ioctx_snapset`."""
    seq, count = next(numbers), next(numbers)
    clones = []
    for _ in range(count):
        clone_id, size = next(numbers), next(numbers)
        snaps = tuple(sorted(next(numbers) for _ in range(next(numbers))))
        overlap = tuple((next(numbers), next(numbers)) for _ in range(next(numbers)))
        head = clone_id == NOSNAP
        clones.append(CloneInfo(clone_id, () if head else snaps, size, () if head else overlap))
    return SnapSet(seq, tuple(clones))


def _watcher(row: Any) -> WatcherInfo:
    text = ffi.string(row.address).decode(errors="replace")
    found = addresses(text)
    return WatcherInfo(row.gid, row.cookie, found[0] if found else text, row.timeout)

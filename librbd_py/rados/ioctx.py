"""Ioctx, Watch and Object of the `rados` face. Import them from `librbd_py.rados`."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from librbd_py import errors
from librbd_py.errors import rados_errors
from librbd_py.format import lock as fl
from librbd_py.format.encoding import NEVER, Time
from librbd_py.rados.aio import AioOperations, Pending
from librbd_py.rados.objects import LIBRADOS_ALL_NSPACES, ObjectIterator, Snap, SnapIterator, Watch
from librbd_py.rados.ops import (
    LIBRADOS_OPERATION_NOFLAG,
    Completion,
    OmapIterator,
    ReadOp,
    WriteOp,
    XattrIterator,
    data_of,
    raw,
    text,
)
from librbd_py.rados.pool_snaps import PoolSnaps
from librbd_py.store import api
from librbd_py.store.rados import RadosStore

if TYPE_CHECKING:
    from librbd_py.rados import Rados

LIBRADOS_SNAP_HEAD = api.NOSNAP
OMAP_PAGE = 1 << 31


class Ioctx(AioOperations):
    """I/O on one pool, in one namespace.

    `context` is the store's own view of that (an ObjectContext), for `librbd_py.rbd`.
    """

    def __init__(self, rados: Rados, name: str, pool_id: int | None = None) -> None:
        self.rados = rados
        self.name = name
        self.state = "open"
        self.locator_key: str | None = ""
        self.nspace = ""
        self.lock = threading.Lock()
        self.safe_completions: list[Completion] = []
        self.complete_completions: list[Completion] = []
        self.read_snap = LIBRADOS_SNAP_HEAD
        self._snapc = api.NO_SNAPS
        self._version: int | None = 0  # of the object last read; None: written, see _last
        self._last = ""  # the object last written
        self._pending = Pending()
        with rados_errors(f"error opening pool '{name}'"):
            self._context = rados.store.open(name if pool_id is None else pool_id)

    @property
    def context(self) -> api.ObjectContext:
        """IoctxStateError when closed."""
        self.require_ioctx_open()
        return self._context

    def __enter__(self) -> Ioctx:
        return self

    def __exit__(self, type_: object, value: object, traceback: object) -> None:
        self.close()

    def require_ioctx_open(self) -> None:
        if self.state != "open":
            raise errors.rados.IoctxStateError(f"The pool is {self.state}")

    def close(self) -> None:
        if self.state == "open":
            self.aio_flush()
            self.state = "closed"

    def dup(self) -> Ioctx:
        """Another context on the same pool and namespace."""
        other = self.rados.open_ioctx2(self.get_pool_id())
        other.set_namespace(self.get_namespace())
        other.set_locator_key(self.get_locator_key())
        return other

    # --- what applies to all later calls ---------------------------------------------------------------------------

    def set_locator_key(self, loc_key: str) -> None:
        """Objects are found by their name and this key from now on; "" ends it."""
        self.require_ioctx_open()
        self.locator_key = text(loc_key, "loc_key")
        self._place()

    def get_locator_key(self) -> str:
        return self.locator_key or ""

    def _place(self) -> None:
        """The context of the namespace and locator key that are set."""
        if self.nspace == LIBRADOS_ALL_NSPACES:
            return
        with rados_errors(f"error opening namespace {self.nspace!r}"):
            self._context = self.rados.store.open(self._context.pool_id, self.nspace)
            if self.locator_key:
                self._context = self._context.with_locator(self.locator_key)

    def set_read(self, snap_id: int) -> None:
        """Later reads see this snapshot; LIBRADOS_SNAP_HEAD ends it."""
        self.require_ioctx_open()
        self.read_snap = int(snap_id)

    def set_namespace(self, nspace: str) -> None:
        self.require_ioctx_open()
        before, self.nspace = self.nspace, "" if nspace is None else text(nspace, "nspace")
        if before != self.nspace:
            self._place()

    def get_namespace(self) -> str:
        return self.nspace

    def set_osdmap_full_try(self) -> None:
        """Accepted: there is no full flag to override."""

    def unset_osdmap_full_try(self) -> None:
        """Accepted."""

    # --- synchronous I/O ------------------------------------------------------------------------------------------

    def _write(self, oid: str, ops: Sequence[api.Op], what: str) -> list[Any]:
        key = text(oid, "key")
        context = self.context
        with rados_errors(what):
            if self.nspace == LIBRADOS_ALL_NSPACES:
                raise OSError(errno.EINVAL, "all namespaces can be listed, not written")
            if self.read_snap != LIBRADOS_SNAP_HEAD:
                raise OSError(errno.EROFS, "the context reads a snapshot")
            self._after_aio(key)
            found = context.write(key, ops, self._snapc if self._snapc.ids else self._pool_snapc())
        self._last, self._version = key, None
        return found

    def _read(self, oid: str, ops: Sequence[api.Op], what: str) -> list[Any]:
        key = text(oid, "key")
        context = self.context
        with rados_errors(what):
            self._after_aio(key)
            *found, self._version = context.read(key, [*ops, api.Version()], self.read_snap)
        return found

    def write(self, key: str, data: bytes, offset: int = 0) -> int:
        self._write(key, [api.Write(offset, data_of(data))], f"Ioctx.write({self.name}): failed to write {key}")
        return 0

    def write_full(self, key: str, data: bytes) -> int:
        self._write(key, [api.WriteFull(data_of(data))], f"Ioctx.write_full({self.name}): failed to write {key}")
        return 0

    def writesame(self, key: str, data: bytes, write_len: int, offset: int = 0) -> None:
        what = f"Ioctx.writesame({self.name}): failed to write {key}"
        self._write(key, [api.WriteSame(offset, write_len, data_of(data))], what)

    def append(self, key: str, data: bytes) -> int:
        self._write(key, [api.Append(data_of(data))], f"Ioctx.append({self.name}): failed to append {key}")
        return 0

    def read(self, key: str, length: int = 8192, offset: int = 0) -> bytes:
        what = f"Ioctx.read({self.name}): failed to read {key}"
        if length == 0:
            self._read(key, [api.Stat()], what)
            return b""
        result: bytes = self._read(key, [api.Read(offset, length)], what)[0]
        return result

    def execute(self, key: str, cls: str, method: str, data: bytes, length: int = 8192) -> tuple[int, bytes]:
        """Calls a class method: (length of the output, output). ERANGE when it is longer than `length`."""
        context = self.context
        with rados_errors(f"Ioctx.execute({self.name}): {cls}.{method} failed on {key}"):
            output = context.exec(text(key, "key"), text(cls, "cls"), text(method, "method"), data_of(data))
            if len(output) > length:
                raise OSError(errno.ERANGE, f"{len(output)} bytes of output")
        return len(output), output

    def remove_object(self, key: str) -> bool:
        self._write(key, [api.Remove()], f"Failed to remove {key!r}")
        return True

    def trunc(self, key: str, size: int) -> int:
        self._write(key, [api.Truncate(size)], f"Ioctx.trunc({self.name}): failed to truncate {key}")
        return 0

    def cmpext(self, key: str, cmp_buf: bytes, offset: int = 0) -> int:
        """0 when equal, else -(MAX_ERRNO + offset of the difference). Other failures raise."""
        try:
            self._read(
                key, [api.CmpExt(offset, data_of(cmp_buf))], f"Ioctx.cmpext({self.name}): failed to compare {key}"
            )
        except errors.rados.ExtendMismatch as failure:
            return -(errors.MAX_ERRNO + failure.offset)
        return 0

    def stat(self, key: str) -> tuple[int, time.struct_time]:
        """Size in bytes, time of the last change."""
        found: api.ObjectStat = self._read(key, [api.Stat()], f"Failed to stat {key!r}")[0]
        return found.size, time.localtime(found.mtime_ns // 1_000_000_000)

    def get_xattr(self, key: str, xattr_name: str) -> bytes:
        name = text(xattr_name, "xattr_name")
        result: bytes = self._read(key, [api.GetXattr(name)], f"Failed to get xattr {name!r}")[0]
        return result

    def get_xattrs(self, oid: str) -> XattrIterator:
        self.require_ioctx_open()
        return XattrIterator(self, oid)

    def set_xattr(self, key: str, xattr_name: str, xattr_value: bytes) -> bool:
        name = text(xattr_name, "xattr_name")
        self._write(key, [api.SetXattr(name, data_of(xattr_value))], f"Failed to set xattr {name!r}")
        return True

    def rm_xattr(self, key: str, xattr_name: str) -> bool:
        name = text(xattr_name, "xattr_name")
        self._write(key, [api.RmXattr(name)], f"Failed to delete key {key!r} xattr {name!r}")
        return True

    def list_objects(self) -> ObjectIterator:
        self.require_ioctx_open()
        return ObjectIterator(self)

    # --- the pool --------------------------------------------------------------------------------------------------

    def get_pool_id(self) -> int:
        return self._context.pool_id

    def get_pool_name(self) -> str:
        name = self.rados.pool_reverse_lookup(self._context.pool_id)
        if name is None:
            raise errors.rados.ObjectNotFound("get pool name error", errno.ENOENT)
        return name

    def get_stats(self) -> dict[str, int]:
        context = self.context
        with rados_errors(f"Ioctx.get_stats({self.name}): get_stats failed"):
            stats = self.rados.store.pool_stats(context.pool_id)
        return {
            "num_bytes": stats.num_bytes,
            "num_kb": (stats.num_bytes + 1023) // 1024,
            "num_objects": stats.num_objects,
            "num_object_clones": 0,
            "num_object_copies": stats.num_objects,
            "num_objects_missing_on_primary": 0,
            "num_objects_unfound": 0,
            "num_objects_degraded": 0,
            "num_rd": 0,
            "num_rd_kb": 0,
            "num_wr": 0,
            "num_wr_kb": 0,
            **stats.counters,
        }

    def alignment(self) -> int | None:
        """None: appends need no alignment."""
        return None

    def _application(self, command: str, what: str, **words: str | bool) -> Any:
        """A command to the monitors about this pool's applications."""
        with rados_errors(what):
            prefix = {"prefix": f"osd pool application {command}", "pool": self.get_pool_name(), "format": "json"}
            result, output, message = self.rados.mon_command(json.dumps(prefix | words), b"")
            if result < 0:
                raise OSError(-result, message)
        return json.loads(output) if output.strip() else {}

    def application_enable(self, app_name: str, force: bool = False) -> None:
        """PermissionError: the pool is another application's, and not `force`."""
        name = text(app_name, "app_name")
        sure = {"yes_i_really_mean_it": True} if force else {}
        self._application("enable", "error enabling application", app=name, **sure)

    def application_list(self) -> list[str]:
        return list(self._application("get", "error listing applications"))

    def application_metadata_get(self, app_name: str, key: str) -> str:
        """KeyError: there is no such key."""
        for name, value in self.application_metadata_list(app_name):
            if name == key:
                return value
        raise KeyError(f"no metadata {key} for application {app_name}")

    def application_metadata_set(self, app_name: str, key: str, value: str) -> None:
        """ObjectNotFound: the pool is not for that application."""
        self._application("set", "error setting application metadata", app=app_name, key=key, value=value)

    def application_metadata_remove(self, app_name: str, key: str) -> None:
        self._application("rm", "error removing application metadata", app=app_name, key=key)

    def application_metadata_list(self, app_name: str) -> list[tuple[str, str]]:
        """ObjectNotFound: the pool is not for that application."""
        found = self._application("get", "error listing application metadata")
        if app_name not in found:
            raise errors.rados.ObjectNotFound("error listing application metadata", errno.ENOENT)
        return sorted(found[app_name].items())

    # --- snapshots -------------------------------------------------------------------------------------------------

    def _pool_snaps(self) -> PoolSnaps:
        return PoolSnaps(self.rados.store, self.context)

    def _pool_snapc(self) -> api.SnapContext:
        """Of writes that bring none. OSDs know the pool's snapshots themselves."""
        return api.NO_SNAPS if isinstance(self.rados.store, RadosStore) else self._pool_snaps().context()

    def create_snap(self, snap_name: str) -> None:
        """A snapshot of the whole pool. ObjectExists; InvalidArgumentError: there are snapshots of images."""
        name = text(snap_name, "snap_name")
        with rados_errors(f"Failed to create snap {snap_name}"):
            self._pool_snaps().create(name)

    def remove_snap(self, snap_name: str) -> None:
        """ObjectNotFound."""
        name = text(snap_name, "snap_name")
        with rados_errors(f"Failed to remove snap {snap_name}"):
            self._pool_snaps().remove(name)

    def lookup_snap(self, snap_name: str) -> Snap:
        """ObjectNotFound."""
        name = text(snap_name, "snap_name")
        with rados_errors(f"Failed to lookup snap {snap_name}"):
            return Snap(self, name, self._pool_snaps().find(name).snap_id)

    def snap_rollback(self, oid: str, snap_name: str) -> None:
        """ObjectNotFound: no such snapshot."""
        snap_id = self.lookup_snap(snap_name).snap_id
        self._write(oid, [api.Rollback(snap_id)], f"Failed to rollback {oid}")

    def list_snaps(self) -> SnapIterator:
        self.require_ioctx_open()
        return SnapIterator(self)

    def create_self_managed_snap(self) -> int:
        context = self.context
        with rados_errors("Failed to create self-managed snapshot"):
            return context.snap_create()

    def remove_self_managed_snap(self, snap_id: int) -> None:
        context = self.context
        with rados_errors("Failed to remove self-managed snapshot"):
            context.snap_remove(int(snap_id))

    def set_self_managed_snap_write(self, snaps: Sequence[int | str]) -> None:
        """The snapshots that exist, for later writes; the highest id is the context's sequence."""
        self.require_ioctx_open()
        ids = tuple(sorted((int(snap) for snap in snaps or ()), reverse=True))
        self._snapc = api.SnapContext(ids[0] if ids else 0, ids)

    def rollback_self_managed_snap(self, oid: str, snap_id: int) -> None:
        self._write(oid, [api.Rollback(int(snap_id))], f"Failed to rollback {oid}")

    def get_last_version(self) -> int:
        """Of the object last read or written here. After a write it is asked for only now, so it is a later one if
        somebody else wrote meanwhile."""
        self.require_ioctx_open()
        if self._version is None:
            self._version = 0
            with suppress(errors.rados.ObjectNotFound):
                self._read(self._last, [], "get_last_version")
        return self._version

    # --- operation lists -------------------------------------------------------------------------------------------

    def create_write_op(self) -> WriteOp:
        return WriteOp().create()

    def create_read_op(self) -> ReadOp:
        return ReadOp().create()

    def release_write_op(self, write_op: WriteOp) -> None:
        write_op.release()

    def release_read_op(self, read_op: ReadOp) -> None:
        read_op.release()

    def operate_write_op(
        self, write_op: WriteOp, oid: str, mtime: int = 0, flags: int = LIBRADOS_OPERATION_NOFLAG
    ) -> None:
        """All of it or nothing; the list is empty afterwards, as librados leaves it. `mtime` and `flags` are accepted
        and ignored: the store takes its own clock."""
        ops = list(write_op.ops)
        write_op.ops.clear()
        self._write(oid, ops, f"Failed to operate write op for oid {oid}")

    def operate_read_op(self, read_op: ReadOp, oid: str, flag: int = LIBRADOS_OPERATION_NOFLAG) -> None:
        if read_op.ops:
            read_op.deliver(self._read(oid, list(read_op.ops), f"Failed to operate read op for oid {oid}"))

    def set_omap(self, write_op: WriteOp, keys: Sequence[str], values: Sequence[bytes]) -> None:
        if len(keys) != len(values):
            raise errors.rados.Error("Rados(): keys and values must have the same number of items")
        rows = {raw(key, "keys"): raw(value, "values") for key, value in zip(keys, values, strict=True)}
        write_op.ops.append(api.OmapSet(rows))

    def get_omap_vals(
        self, read_op: ReadOp, start_after: str, filter_prefix: str, max_return: int
    ) -> tuple[OmapIterator, int]:
        """Adds a read of keys above `start_after`; the iterator is filled when the list has run. The 0 says nothing."""
        rows = OmapIterator(self)
        after, prefix = raw(start_after or "", "start_after"), raw(filter_prefix or "", "filter_prefix")
        read_op.add(api.OmapGetVals(after, prefix, _count(max_return)), rows)
        return rows, 0

    def get_omap_keys(self, read_op: ReadOp, start_after: str, max_return: int) -> tuple[OmapIterator, int]:
        rows = OmapIterator(self)
        read_op.add(api.OmapGetKeys(raw(start_after or "", "start_after"), _count(max_return)), rows)
        return rows, 0

    def get_omap_vals_by_keys(self, read_op: ReadOp, keys: Sequence[str]) -> tuple[OmapIterator, int]:
        rows = OmapIterator(self)
        read_op.add(api.OmapGetByKeys([raw(key, "keys") for key in keys]), rows)
        return rows, 0

    def remove_omap_keys(self, write_op: WriteOp, keys: Sequence[str]) -> None:
        write_op.ops.append(api.OmapRmKeys([raw(key, "keys") for key in keys]))

    def clear_omap(self, write_op: WriteOp) -> None:
        write_op.ops.append(api.OmapClear())

    def remove_omap_range2(self, write_op: WriteOp, key_begin: str, key_end: str) -> None:
        """Keys from `key_begin` up to, not including, `key_end`."""
        write_op.ops.append(api.OmapRmRange(raw(key_begin, "key_begin"), raw(key_end, "key_end")))

    # --- locks -----------------------------------------------------------------------------------------------------

    def lock_exclusive(
        self, key: str, name: str, cookie: str, desc: str = "", duration: int | None = None, flags: int = 0
    ) -> None:
        """ObjectBusy: another has it. ObjectExists: this client has it with this cookie. `duration` in seconds."""
        self._lock(key, name, fl.LOCK_EXCLUSIVE, cookie, "", desc, duration, flags)

    def lock_shared(
        self, key: str, name: str, cookie: str, tag: str, desc: str = "", duration: int | None = None, flags: int = 0
    ) -> None:
        self._lock(key, name, fl.LOCK_SHARED, cookie, tag, desc, duration, flags)

    def _lock(
        self, key: str, name: str, kind: int, cookie: str, tag: str, desc: str, duration: int | None, flags: int
    ) -> None:
        request = fl.LockRequest(
            text(name, "name"),
            kind,
            text(cookie, "cookie"),
            text(tag, "tag"),
            text(desc, "desc"),
            NEVER if duration is None else Time(int(duration)),
            flags,
        )
        what = f"Ioctx.rados_lock_exclusive({self.name}): failed to set lock {name} on {key}"
        self._exec(key, "lock", request.encode(), what)

    def unlock(self, key: str, name: str, cookie: str) -> None:
        request = fl.UnlockRequest(text(name, "name"), text(cookie, "cookie"))
        self._exec(key, "unlock", request.encode(), f"Ioctx.unlock({self.name}): failed to release {name} on {key}")

    def _exec(self, key: str, method: str, request: bytes, what: str) -> None:
        context = self.context
        with rados_errors(what):
            context.exec(text(key, "key"), "lock", method, request)

    # --- watch and notify --------------------------------------------------------------------------------------------

    def watch(
        self,
        obj: str,
        callback: Callable[[int, int, int, bytes], Any],
        error_callback: Callable[[int, int], Any] | None = None,
        timeout: int | None = None,
    ) -> Watch:
        """`callback(notify_id, notifier_id, watch_id, data)`; what it returns (str or bytes) is the ack.

        `error_callback(watch_id, -errno)` when the watch is lost. `timeout` in seconds.
        """
        self.require_ioctx_open()
        return Watch(self, obj, callback, error_callback, timeout)

    def notify(self, obj: str, msg: str = "", timeout_ms: int = 5000) -> bool:
        """Waits for every watcher's ack; TimedOut when one is silent."""
        self._notify(text(obj, "obj"), raw(msg, "msg"), timeout_ms)
        return True

    def _notify(self, obj: str, message: bytes, timeout_ms: int) -> api.NotifyReply:
        context = self.context
        with rados_errors(f"Failed to notify {obj!r}"):
            reply = context.notify(obj, message, timeout_ms)
            if reply.timed_out:
                raise OSError(errno.ETIMEDOUT, f"{len(reply.timed_out)} watchers did not answer")
        return reply


def _count(max_return: int) -> int:
    return OMAP_PAGE if max_return < 0 else max_return

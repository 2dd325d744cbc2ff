"""A real Ceph cluster behind the store contract, for comparing errno with errno: librados through ctypes.

Only for tests, and only what the conformance suite needs. Not offered by librados's C interface: sparse-read, the
outputs of class methods that write, list-watchers and list-snaps (the last two are asked of the `rados` command).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from ctypes import byref, c_char_p, c_int, c_int64, c_long, c_size_t, c_ubyte, c_uint64, c_void_p
from typing import Any

from librbd_py.format import notify as wire
from librbd_py.store import api, executor

_CMP = {"eq": 1, "ne": 2, "gt": 3, "ge": 4, "lt": 5, "le": 6}
_WATCH = ctypes.CFUNCTYPE(None, c_void_p, c_uint64, c_uint64, c_uint64, c_void_p, c_size_t)
_WATCH_ERROR = ctypes.CFUNCTYPE(None, c_void_p, c_uint64, c_int)


def _library() -> ctypes.CDLL:
    lib = ctypes.CDLL("librados.so.2")
    for name in ("rados_create_write_op", "rados_create_read_op"):
        getattr(lib, name).restype = c_void_p
    for name in ("rados_get_instance_id", "rados_get_last_version"):
        getattr(lib, name).restype = c_uint64
    for name in ("rados_ioctx_get_id", "rados_pool_lookup"):
        getattr(lib, name).restype = c_int64
    return lib


def check(code: int, what: str) -> int:
    if code < 0:
        raise OSError(-code, f"{what}: {os.strerror(-code)}")
    return code


def _arrays(items: Sequence[bytes]) -> tuple[Any, Any]:
    count = max(1, len(items))
    return (c_char_p * count)(*items), (c_size_t * count)(*[len(item) for item in items])


class CephStore(api.Store):
    def __init__(self, conf: str) -> None:
        self.lib = _library()
        self.conf = conf
        handle = c_void_p()
        check(self.lib.rados_create(byref(handle), None), "create")
        self.handle = handle
        check(self.lib.rados_conf_read_file(handle, conf.encode()), "conf")
        check(self.lib.rados_connect(handle), "connect")
        self.closed = False
        addrs = c_char_p()
        check(self.lib.rados_getaddrs(handle, byref(addrs)), "getaddrs")
        text = (addrs.value or b"").decode()
        address = re.search(r"([0-9.]+:\d+/\d+)", text)
        assert address is not None, text
        self.client = api.Client(self.lib.rados_get_instance_id(handle), address[1])
        fsid = ctypes.create_string_buffer(64)
        check(self.lib.rados_cluster_fsid(handle, fsid, c_size_t(64)), "fsid")
        self.fsid = fsid.value.decode()
        self._watches: list[CephWatch] = []

    def command(self, **words: Any) -> Any:
        text = json.dumps({**words, "format": "json"}).encode()
        out, length, status, status_length = c_void_p(), c_size_t(), c_void_p(), c_size_t()
        code = self.lib.rados_mon_command(
            self.handle, (c_char_p * 1)(text), c_size_t(1), None, c_size_t(0),
            byref(out), byref(length), byref(status), byref(status_length),
        )  # fmt: skip
        check(code, words["prefix"])
        raw = ctypes.string_at(out, length.value) if length.value else b""
        return json.JSONDecoder().raw_decode(raw.decode().strip())[0] if raw.strip() else None

    def pools(self) -> list[api.PoolInfo]:
        rows = self.command(prefix="osd lspools")
        return [api.PoolInfo(row["poolnum"], row["poolname"]) for row in rows]

    def pool_create(self, name: str) -> int:
        check(self.lib.rados_pool_create(self.handle, name.encode()), "pool create")
        return check(self.lib.rados_pool_lookup(self.handle, name.encode()), "pool lookup")

    def pool_remove(self, name: str) -> None:
        check(self.lib.rados_pool_delete(self.handle, name.encode()), "pool delete")

    def pool_stats(self, pool_id: int) -> api.PoolStats:
        raise OSError(errno.EOPNOTSUPP, "needs a manager")

    def open(self, pool: str | int, namespace: str = "") -> CephContext:
        io = c_void_p()
        if isinstance(pool, str):
            check(self.lib.rados_ioctx_create(self.handle, pool.encode(), byref(io)), "pool")
        else:
            check(self.lib.rados_ioctx_create2(self.handle, c_int64(pool), byref(io)), "pool")
        return CephContext(self, io, namespace)

    def blocklist_add(self, address: str, seconds: int = 3600) -> None:
        self.command(prefix="osd blocklist", blocklistop="add", addr=address, expire=float(seconds))

    def blocklist_remove(self, address: str) -> None:
        self.command(prefix="osd blocklist", blocklistop="rm", addr=address)

    def blocklist(self) -> dict[str, float]:
        return {row["addr"]: 0.0 for row in self.command(prefix="osd blocklist ls") or []}

    def rados(self, *words: str) -> str:
        return subprocess.run(["rados", "-c", self.conf, *words], check=True, capture_output=True, text=True).stdout

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            for watch in list(self._watches):
                watch.close()
            self.lib.rados_shutdown(self.handle)


class CephWatch(api.Watch):
    def __init__(self, context: CephContext, oid: str, callback: Any, error: Any, timeout: int) -> None:
        self._context = context
        self._lib = context.store.lib
        self._oid = oid

        def notified(_: int, notify_id: int, cookie: int, gid: int, data: int, length: int) -> None:
            payload = ctypes.string_at(data, length) if length else b""
            answer = callback(notify_id, gid, cookie, payload)
            if answer is not None:
                context.notify_ack(oid, notify_id, cookie, answer)

        def failed(_: int, cookie: int, code: int) -> None:
            if error is not None:
                error(cookie, OSError(abs(code), os.strerror(abs(code))))

        self._keep = _WATCH(notified), _WATCH_ERROR(failed)
        cookie = c_uint64()
        check(
            self._lib.rados_watch3(
                context.io, oid.encode(), byref(cookie), *self._keep, ctypes.c_uint32(timeout), None
            ),
            "watch",
        )
        self.cookie = cookie.value
        self._open = True
        context.store._watches.append(self)

    def check(self) -> float:
        return check(self._lib.rados_watch_check(self._context.io, c_uint64(self.cookie)), "watch check") / 1000

    def close(self) -> None:
        if self._open:
            self._open = False
            self._context.store._watches.remove(self)
            self._lib.rados_unwatch2(self._context.io, c_uint64(self.cookie))
            self._lib.rados_watch_flush(self._context.store.handle)


class CephContext(api.ObjectContext):
    def __init__(self, store: CephStore, io: c_void_p, namespace: str) -> None:
        self.store: CephStore = store
        self.io = io
        self.namespace = namespace
        self.lib = store.lib
        self.lib.rados_ioctx_set_namespace(io, namespace.encode())
        self.pool_id = self.lib.rados_ioctx_get_id(io)
        self._lock = threading.Lock()

    def exec_ops(self, oid: str, ops: Sequence[Any]) -> list[Any]:
        return self.write(oid, ops) if executor.has_writes(ops) else self.read(oid, ops)

    def write(self, oid: str, ops: Sequence[Any], snapc: api.SnapContext = api.NO_SNAPS) -> list[Any]:
        if len(ops) == 1 and isinstance(ops[0], api.Rollback):
            with self._lock:
                self._set_snapc(snapc)
                snap = c_uint64(ops[0].snap_id)
                check(self.lib.rados_ioctx_selfmanaged_snap_rollback(self.io, oid.encode(), snap), "rollback")
            return [None]
        op = c_void_p(self.lib.rados_create_write_op())
        keep: list[Any] = []
        try:
            for one in ops:
                self._add_write(op, one, keep)
            with self._lock:
                self._set_snapc(snapc)
                check(self.lib.rados_write_op_operate2(op, self.io, oid.encode(), None, 0), "write")
        finally:
            self.lib.rados_release_write_op(op)
        return [b"" if isinstance(one, api.Exec) else None for one in ops]

    def _set_snapc(self, snapc: api.SnapContext) -> None:
        self.lib.rados_ioctx_snap_set_read(self.io, c_uint64(api.NOSNAP))
        ids = (c_uint64 * max(1, len(snapc.ids)))(*snapc.ids)
        check(
            self.lib.rados_ioctx_selfmanaged_snap_set_write_ctx(self.io, c_uint64(snapc.seq), ids, len(snapc.ids)),
            "snap context",
        )

    def _add_common(self, kind: str, op: c_void_p, one: Any, keep: list[Any]) -> bool:
        def call(name: str, *args: Any) -> None:
            getattr(self.lib, f"rados_{kind}_op_{name}")(op, *args)

        match one:
            case api.AssertExists():
                call("assert_exists")
            case api.AssertVersion():
                call("assert_version", c_uint64(one.version))
            case api.CmpXattr():
                call("cmpxattr", one.name.encode(), c_ubyte(_CMP[one.op]), one.value, c_size_t(len(one.value)))
            case api.OmapCmp():
                for key, (value, relation) in one.comparisons.items():
                    call(
                        "omap_cmp2", key, c_ubyte(_CMP[relation]), value, c_size_t(len(key)), c_size_t(len(value)), None
                    )
            case api.CmpExt():
                call("cmpext", one.data, c_size_t(len(one.data)), c_uint64(one.offset), None)
            case _:
                return False
        return True

    def _add_write(self, op: c_void_p, one: Any, keep: list[Any]) -> None:
        def call(name: str, *args: Any) -> None:
            getattr(self.lib, f"rados_write_op_{name}")(op, *args)

        if self._add_common("write", op, one, keep):
            return
        match one:
            case api.Exec():
                call("exec", one.cls.encode(), one.method.encode(), one.data, c_size_t(len(one.data)), None)
            case api.Create():
                call("create", int(one.exclusive), None)
            case api.Write():
                call("write", one.data, c_size_t(len(one.data)), c_uint64(one.offset))
            case api.WriteFull():
                call("write_full", one.data, c_size_t(len(one.data)))
            case api.Append():
                call("append", one.data, c_size_t(len(one.data)))
            case api.WriteSame():
                call("writesame", one.data, c_size_t(len(one.data)), c_size_t(one.length), c_uint64(one.offset))
            case api.Zero():
                call("zero", c_uint64(one.offset), c_uint64(one.length))
            case api.Truncate():
                call("truncate", c_uint64(one.size))
            case api.Remove():
                call("remove")
            case api.SetXattr():
                call("setxattr", one.name.encode(), one.value, c_size_t(len(one.value)))
            case api.RmXattr():
                call("rmxattr", one.name.encode())
            case api.OmapSet():
                keys, key_lengths = _arrays(list(one.values))
                values, lengths = _arrays(list(one.values.values()))
                call("omap_set2", keys, values, key_lengths, lengths, c_size_t(len(one.values)))
            case api.OmapRmKeys():
                keys, key_lengths = _arrays(list(one.keys))
                call("omap_rm_keys2", keys, key_lengths, c_size_t(len(one.keys)))
            case api.OmapRmRange():
                call("omap_rm_range2", one.begin, c_size_t(len(one.begin)), one.end, c_size_t(len(one.end)))
            case api.OmapClear():
                call("omap_clear")
            case api.SetAllocHint():
                call("set_alloc_hint", c_uint64(one.object_size), c_uint64(one.write_size))
            case _:
                raise OSError(errno.EOPNOTSUPP, type(one).__name__)

    def read(self, oid: str, ops: Sequence[Any], snap_id: int = api.NOSNAP) -> list[Any]:
        if len(ops) == 1 and isinstance(ops[0], api.Version):
            with self._lock:
                size, mtime = c_uint64(), c_long()
                check(self.lib.rados_stat(self.io, oid.encode(), byref(size), byref(mtime)), "stat")
                return [self.lib.rados_get_last_version(self.io)]
        op = c_void_p(self.lib.rados_create_read_op())
        try:
            collectors = [self._add_read(op, oid, one) for one in ops]
            with self._lock:
                self.lib.rados_ioctx_snap_set_read(self.io, c_uint64(snap_id))
                check(self.lib.rados_read_op_operate(op, self.io, oid.encode(), 0), "read")
            return [collect() for collect in collectors]
        finally:
            self.lib.rados_release_read_op(op)

    def _add_read(self, op: c_void_p, oid: str, one: Any) -> Any:
        def call(name: str, *args: Any) -> None:
            getattr(self.lib, f"rados_read_op_{name}")(op, *args)

        if self._add_common("read", op, one, []):
            return lambda: None
        match one:
            case api.Exec():
                out, length = c_void_p(), c_size_t()
                call(
                    "exec", one.cls.encode(), one.method.encode(), one.data, c_size_t(len(one.data)),
                    byref(out), byref(length), None,
                )  # fmt: skip
                return lambda: ctypes.string_at(out, length.value) if length.value else b""
            case api.Stat():
                size, mtime = c_uint64(), c_long()
                call("stat", byref(size), byref(mtime), None)
                return lambda: api.ObjectStat(size.value, mtime.value * 10**9)
            case api.Read():
                want = one.length or 1 << 20
                buffer, got = ctypes.create_string_buffer(want), c_size_t()
                call("read", c_uint64(one.offset), c_size_t(want), buffer, byref(got), None)
                return lambda: buffer.raw[: got.value]
            case api.GetXattr() | api.GetXattrs():
                rows = c_void_p()
                call("getxattrs", byref(rows), None)
                return lambda: self._xattrs(rows, one)
            case api.OmapGetVals():
                rows, more = c_void_p(), c_ubyte()
                call(
                    "omap_get_vals2", one.start_after, one.prefix, c_uint64(one.max_return),
                    byref(rows), byref(more), None,
                )  # fmt: skip
                return lambda: (self._omap(rows), bool(more.value))
            case api.OmapGetKeys():
                rows, more = c_void_p(), c_ubyte()
                call("omap_get_keys2", one.start_after, c_uint64(one.max_return), byref(rows), byref(more), None)
                return lambda: (list(self._omap(rows)), bool(more.value))
            case api.OmapGetByKeys():
                rows = c_void_p()
                keys, lengths = _arrays(list(one.keys))
                call("omap_get_vals_by_keys2", keys, c_size_t(len(one.keys)), lengths, byref(rows), None)
                return lambda: self._omap(rows)
            case api.ListSnaps():
                call("assert_exists")
                return lambda: self._list_snaps(oid)
            case api.ListWatchers():
                call("assert_exists")
                return lambda: self._list_watchers(oid)
        raise OSError(errno.EOPNOTSUPP, type(one).__name__)

    def _xattrs(self, rows: c_void_p, one: Any) -> Any:
        found: dict[str, bytes] = {}
        name, value, length = c_char_p(), c_void_p(), c_size_t()
        while True:
            check(self.lib.rados_getxattrs_next(rows, byref(name), byref(value), byref(length)), "xattrs")
            if name.value is None:
                break
            found[name.value.decode()] = ctypes.string_at(value, length.value) if length.value else b""
        self.lib.rados_getxattrs_end(rows)
        if isinstance(one, api.GetXattrs):
            return found
        if one.name not in found:
            raise OSError(errno.ENODATA, one.name)
        return found[one.name]

    def _omap(self, rows: c_void_p) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        key, value, key_length, length = c_void_p(), c_void_p(), c_size_t(), c_size_t()
        while True:
            check(
                self.lib.rados_omap_get_next2(rows, byref(key), byref(value), byref(key_length), byref(length)), "omap"
            )
            if not key.value:
                break
            found[ctypes.string_at(key, key_length.value)] = (
                ctypes.string_at(value, length.value) if length.value else b""
            )
        self.lib.rados_omap_get_end(rows)
        return found

    def _pool_words(self) -> list[str]:
        pool = next(pool.name for pool in self.store.pools() if pool.pool_id == self.pool_id)
        return ["-p", pool, "-N", self.namespace]

    def _list_snaps(self, oid: str) -> api.SnapSet:
        held = json.loads(self.store.rados(*self._pool_words(), "listsnaps", oid, "--format", "json"))
        clones = []
        for row in held["clones"]:
            if row["id"] == "head":
                clones.append(api.CloneInfo(api.NOSNAP, (), row["size"]))
            else:
                snaps = tuple(sorted(snap if isinstance(snap, int) else snap["id"] for snap in row["snapshots"]))
                overlap = tuple((part["start"], part["length"]) for part in row["overlaps"])
                clones.append(api.CloneInfo(int(row["id"]), snaps, row["size"], overlap))
        return api.SnapSet(0, tuple(clones))

    def _list_watchers(self, oid: str) -> list[api.WatcherInfo]:
        text = self.store.rados(*self._pool_words(), "listwatchers", oid)
        rows = re.findall(r"watcher=(\S+) client\.(\d+) cookie=(\d+)", text)
        return [api.WatcherInfo(int(gid), int(cookie), address) for address, gid, cookie in rows]

    def objects(self) -> Iterator[str]:
        rows = c_void_p()
        check(self.lib.rados_nobjects_list_open(self.io, byref(rows)), "list")
        names = []
        name = c_char_p()
        while self.lib.rados_nobjects_list_next(rows, byref(name), None, None) == 0:
            names.append((name.value or b"").decode())
        self.lib.rados_nobjects_list_close(rows)
        return iter(names)

    def snap_create(self) -> int:
        snap = c_uint64()
        check(self.lib.rados_ioctx_selfmanaged_snap_create(self.io, byref(snap)), "snap create")
        return snap.value

    def snap_remove(self, snap_id: int) -> None:
        check(self.lib.rados_ioctx_selfmanaged_snap_remove(self.io, c_uint64(snap_id)), "snap remove")

    def watch(self, oid: str, callback: Any, error: Any = None, timeout: int = 30) -> CephWatch:
        return CephWatch(self, oid, callback, error, timeout)

    def notify(self, oid: str, payload: bytes, timeout_ms: int = 5000) -> api.NotifyReply:
        out, length = c_void_p(), c_size_t()
        code = self.lib.rados_notify2(
            self.io, oid.encode(), payload, len(payload), c_uint64(timeout_ms), byref(out), byref(length)
        )
        if code != -errno.ETIMEDOUT:
            check(code, "notify")
        acks, silent = wire.decode_reply(ctypes.string_at(out, length.value))
        return api.NotifyReply(acks, tuple(silent))

    def notify_ack(self, oid: str, notify_id: int, cookie: int, payload: bytes) -> None:
        self.lib.rados_notify_ack(self.io, oid.encode(), c_uint64(notify_id), c_uint64(cookie), payload, len(payload))

    def native_data(self, prefix: str, order: int) -> api.NativeData:
        raise OSError(errno.EOPNOTSUPP, "no data plane here")

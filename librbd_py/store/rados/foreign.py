"""An Ioctx of Ceph's own `rados` module, used by our `rbd`.

Its connection is borrowed, as Ceph's own `rbd` module borrows it: what the program configured is honoured without
knowing how, and the client is the same one. So the same rule applies: the Rados object outlives the images.

The module shows neither pointer to Python, so `rados_ioctx_t` is read where Cython keeps it: the first field of the
object, behind the table of its methods when it has one. A pointer is believed only when it leads to librados' record of
this pool (reference count, client, pool id); that is read through /proc/self/mem, which fails where memory ends.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from typing import Any

from librbd_py.native import ffi, lib

from .connection import Connection, load
from .context import RadosContext
from .store import RadosStore

_HEAD = 16  # bytes of a Python object before its fields
_FIELDS = (_HEAD, _HEAD + 8)  # without and with a table of methods
_RECORD = struct.Struct("<QQq")  # how librados' IoCtxImpl begins: references, client, pool id


def is_foreign(ioctx: object) -> bool:
    kind = type(ioctx)
    return kind.__module__ == "rados" and kind.__name__ == "Ioctx"


class BorrowedConnection(Connection):
    """Somebody else's `rados_t`, never shut down by us."""

    def __init__(self, handle: Any) -> None:
        self._prepare(handle)
        self._identify()

    def _shut_down(self) -> None:
        self.handle = None


def open_foreign(ioctx: Any) -> RadosContext:
    """Our context on the same connection, pool and namespace. EINVAL when the pool's record is not found in it."""
    load()
    ioctx.require_ioctx_open()
    pool_id, namespace = ioctx.get_pool_id(), ioctx.get_namespace()
    found = ffi.new("int64_t *")
    handle = lib.rbdn_foreign_cluster(ffi.cast("void *", _pointer(ioctx, pool_id)), found)
    if not handle or found[0] != pool_id:
        raise OSError(errno.EINVAL, "this rados module keeps its contexts in a way we do not know")
    return _store(handle).open(pool_id, namespace or "")


def _pointer(ioctx: Any, pool_id: int) -> int:
    memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for offset in _FIELDS:
            (candidate,) = struct.unpack("<Q", os.pread(memory, 8, id(ioctx) + offset))
            if _is_record(memory, candidate, pool_id):
                return int(candidate)
    finally:
        os.close(memory)
    raise OSError(errno.EINVAL, "this rados module keeps its contexts in a way we do not know")


def _is_record(memory: int, address: int, pool_id: int) -> bool:
    if not 0 < address < 1 << 47 or address % 8:
        return False
    try:
        raw = os.pread(memory, _RECORD.size, address)
    except OSError:
        return False
    if len(raw) < _RECORD.size:
        return False
    references, client, pool = _RECORD.unpack(raw)
    return bool(0 < references < 1 << 31 and client != 0 and client % 8 == 0 and pool == pool_id)


_stores: dict[int, RadosStore] = {}  # by the rados_t's address
_lock = threading.Lock()


def _store(handle: Any) -> RadosStore:
    """One for each connection, for as long as that is the same client: its memory may be given to another later."""
    address = int(ffi.cast("uintptr_t", handle))
    with _lock:
        store = _stores.get(address)
        if store is None or store.client.gid != lib.rbdn_rados_instance(handle):
            store = _stores[address] = RadosStore(BorrowedConnection(handle))
        return store

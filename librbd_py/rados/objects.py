"""Watch, Object, snapshots and listings of the `rados` face. Import them from `librbd_py.rados`."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from librbd_py import errors
from librbd_py.errors import rados_errors
from librbd_py.format.logs import logger
from librbd_py.rados.ops import XattrIterator, raw, text
from librbd_py.rados.pool_snaps import PoolSnaps

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from librbd_py.rados.ioctx import Ioctx

LIBRADOS_ALL_NSPACES = "\x01"
WATCH_SECONDS = 30

log = logger("librbd_py.rados")


class Watch:
    """Interest in an object's notifies, until closed. Made by `Ioctx.watch`."""

    def __init__(
        self,
        ioctx: Ioctx,
        oid: str,
        callback: Callable[[int, int, int, bytes], Any],
        error_callback: Callable[[int, int], Any] | None,
        timeout: int | None,
    ) -> None:
        self.id = 0
        self.ioctx = ioctx.dup()
        self.oid = text(oid, "oid")
        self.callback = callback
        self.error_callback = error_callback
        with rados_errors("watch error"):
            self._watch = self.ioctx.context.watch(
                self.oid, self._callback, self._error_callback, timeout or WATCH_SECONDS
            )
        self.id = self._watch.cookie

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, type_: object, value: object, traceback: object) -> None:
        self.close()

    def _callback(self, notify_id: int, notifier_id: int, watch_id: int, data: bytes) -> bytes:
        try:
            reply = self.callback(notify_id, notifier_id, watch_id, data)
            return b"" if reply is None else raw(reply, "reply")
        except Exception:
            log.exception("the callback of a watch on %s failed", self.oid)
            return b""

    def _error_callback(self, watch_id: int, error: OSError) -> None:
        if self.error_callback is not None:
            self.error_callback(watch_id, -(error.errno or errno.EIO))

    def get_id(self) -> int:
        return self.id

    def check(self) -> timedelta:
        """Time since the watch was last known to live. NotConnected when it is lost."""
        self.ioctx.require_ioctx_open()
        with rados_errors("check error"):
            from datetime import timedelta

            return timedelta(seconds=self._watch.check())

    def close(self) -> None:
        if self.id == 0:
            return
        self.ioctx.require_ioctx_open()
        with rados_errors("unwatch error"):
            self._watch.close()
        self.id = 0
        self.ioctx.close()


class ObjectIterator:
    """The objects of a pool and namespace, as `Object`; of all namespaces when it is LIBRADOS_ALL_NSPACES."""

    def __init__(self, ioctx: Ioctx) -> None:
        self.ioctx = ioctx
        with rados_errors(f"error iterating over the objects in ioctx '{ioctx.name}'"):
            self._names = ioctx.context.listing(everywhere=ioctx.nspace == LIBRADOS_ALL_NSPACES)

    def __iter__(self) -> ObjectIterator:
        return self

    def __next__(self) -> Object:
        with rados_errors("error iterating over the objects"):
            found = next(self._names)
        return Object(self.ioctx, found.name, found.locator or None, found.namespace)


class Snap:
    """A snapshot of a pool."""

    def __init__(self, ioctx: Ioctx, name: str, snap_id: int) -> None:
        self.ioctx = ioctx
        self.name = name
        self.snap_id = snap_id

    def __str__(self) -> str:
        return f"rados.Snap(ioctx={self.ioctx},name={self.name},snap_id={self.snap_id})"

    def get_timestamp(self) -> datetime:
        """When it was made, in local time and whole seconds as Ceph's module gives it."""
        with rados_errors(f"Failed to get timestamp of snap {self.name}"):
            from datetime import datetime

            return datetime.fromtimestamp(
                int(PoolSnaps(self.ioctx.rados.store, self.ioctx.context).find(self.name).stamp)
            )


class SnapIterator:
    """Snapshots of a pool, by id."""

    def __init__(self, ioctx: Ioctx) -> None:
        self.ioctx = ioctx
        with rados_errors(f"Failed to list snapshots of pool {ioctx.name}"):
            self._snaps = iter(PoolSnaps(ioctx.rados.store, ioctx.context).list())

    def __iter__(self) -> SnapIterator:
        return self

    def __next__(self) -> Snap:
        found = next(self._snaps)
        return Snap(self.ioctx, found.name, found.snap_id)


class Object:
    """An object with a position, read and written like a file."""

    def __init__(self, ioctx: Ioctx, key: str, locator_key: str | None = None, nspace: str | None = None) -> None:
        self.key = key
        self.ioctx = ioctx
        self.offset = 0
        self.state = "exists"
        self.locator_key = locator_key
        self.nspace = "" if nspace is None else nspace

    def __str__(self) -> str:
        where = self.nspace or "--default--"
        return f"rados.Object(ioctx={self.ioctx},key={self.key},nspace={where},locator={self.locator_key})"

    def require_object_exists(self) -> None:
        if self.state != "exists":
            raise errors.rados.ObjectStateError(f"The object is {self.state}")

    def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        """In the object's own namespace and place, whatever the context's are now."""
        self.require_object_exists()
        before = self.ioctx.get_namespace(), self.ioctx.get_locator_key()
        self.ioctx.set_namespace(self.nspace)
        self.ioctx.set_locator_key(self.locator_key or "")
        try:
            return method(self.key, *args)
        finally:
            self.ioctx.set_namespace(before[0])
            self.ioctx.set_locator_key(before[1])

    def read(self, length: int = 1024 * 1024) -> bytes:
        found: bytes = self._call(self.ioctx.read, length, self.offset)
        self.offset += len(found)
        return found

    def write(self, string_to_write: bytes) -> int:
        result: int = self._call(self.ioctx.write, string_to_write, self.offset)
        self.offset += len(string_to_write)
        return result

    def remove(self) -> None:
        self._call(self.ioctx.remove_object)
        self.state = "removed"

    def stat(self) -> tuple[int, time.struct_time]:
        result: tuple[int, time.struct_time] = self._call(self.ioctx.stat)
        return result

    def seek(self, position: int) -> None:
        self.require_object_exists()
        self.offset = position

    def get_xattr(self, xattr_name: str) -> bytes:
        result: bytes = self._call(self.ioctx.get_xattr, xattr_name)
        return result

    def get_xattrs(self) -> XattrIterator:
        result: XattrIterator = self._call(self.ioctx.get_xattrs)
        return result

    def set_xattr(self, xattr_name: str, xattr_value: bytes) -> bool:
        result: bool = self._call(self.ioctx.set_xattr, xattr_name, xattr_value)
        return result

    def rm_xattr(self, xattr_name: str) -> bool:
        result: bool = self._call(self.ioctx.rm_xattr, xattr_name)
        return result

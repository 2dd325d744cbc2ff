"""Locks and watchers of `rbd.Image`."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from librbd_py.errors import rbd_errors
from librbd_py.format import lock as fl
from librbd_py.image import locks
from librbd_py.image.handle import ImageHandle
from librbd_py.image.objects import ignoring
from librbd_py.store.api import NOSNAP

from .common import number, requires_not_closed, text
from .iterators import LockOwnerIterator, WatcherIterator


class ImageLocks:
    handle: ImageHandle

    @property
    def label(self) -> str:
        raise NotImplementedError

    @requires_not_closed
    def is_exclusive_lock_owner(self) -> bool:
        """Asks the store, too: whom somebody fenced may not have heard of it. ConnectionShutdown."""
        with rbd_errors(f"error getting lock status for image {self.label}"):
            handle = self.handle
            handle.header  # noqa: B018  a fenced client gets its error here
            cookie = handle.control.lock_cookie if handle.control is not None else None
            if not handle.is_lock_owner or handle.snap_id != NOSNAP or cookie is None:
                return False
            request = fl.AssertRequest(fl.RBD_LOCK_NAME, fl.LOCK_EXCLUSIVE, cookie, fl.RBD_LOCK_TAG)
            with ignoring(errno.EBUSY):
                handle.ctx.exec(handle.oid, "lock", "assert_locked", request.encode())
                return True
            return False

    @requires_not_closed
    def lock_acquire(self, lock_mode: int) -> None:
        """Takes the exclusive lock and keeps it. ReadOnlyImage: another owner does; OperationNotSupported: shared."""
        with rbd_errors("error acquiring lock on image"):
            locks.acquire(self.handle, number(lock_mode))

    @requires_not_closed
    def lock_release(self) -> None:
        """InvalidArgument: not the owner."""
        with rbd_errors("error releasing lock on image"):
            self.handle.unlock_by_hand()

    @requires_not_closed
    def lock_get_owners(self) -> LockOwnerIterator:
        return LockOwnerIterator(self)  # type: ignore[arg-type]

    @requires_not_closed
    def lock_break(self, lock_mode: int, lock_owner: str | bytes) -> None:
        """Fences the owner and takes its lock away. ImageNotFound: nobody, or ImageBusy: somebody else, owns it."""
        owner = text(lock_owner, "lock_owner")
        with rbd_errors("error breaking lock on image"):
            locks.break_owner(self.handle, number(lock_mode), owner)

    @requires_not_closed
    def list_lockers(self) -> Any:
        """{} -> [] when unlocked; else tag, exclusive and (client, cookie, address) of every locker."""
        with rbd_errors(f"error listing lockers for image {self.label}"):
            held = locks.lockers(self.handle)
            if not held.lockers:
                return []
            return {"tag": held.tag, "exclusive": held.exclusive, "lockers": list(held.lockers)}

    @requires_not_closed
    def lock_exclusive(self, cookie: str | bytes) -> None:
        """An advisory lock of the caller's own. ImageBusy, ImageExists."""
        with rbd_errors("error acquiring exclusive lock on image"):
            locks.lock(self.handle, text(cookie, "cookie"), "", exclusive=True)

    @requires_not_closed
    def lock_shared(self, cookie: str | bytes, tag: str | bytes) -> None:
        with rbd_errors("error acquiring shared lock on image"):
            locks.lock(self.handle, text(cookie, "cookie"), text(tag, "tag"), exclusive=False)

    @requires_not_closed
    def unlock(self, cookie: str | bytes) -> None:
        """ImageNotFound: no such lock of this client."""
        with rbd_errors("error unlocking image"):
            locks.unlock(self.handle, text(cookie, "cookie"))

    @requires_not_closed
    def break_lock(self, client: str | bytes, cookie: str | bytes) -> None:
        """Fences the client (`client.<id>`) and removes its lock. InvalidArgument: no such form of name."""
        with rbd_errors("error unlocking image"):
            locks.break_lock(self.handle, text(client, "client"), text(cookie, "cookie"))

    @requires_not_closed
    def register_update_watch(self, callback: Callable[[], None]) -> int:
        """librbd's `rbd_update_watch`, which Ceph's module does not offer: `callback()` runs on a thread of the library
        after the header changed. The result is for `unregister_update_watch`."""
        with rbd_errors(f"error watching image {self.label}"):
            return self.handle.watch_updates(callback)

    @requires_not_closed
    def unregister_update_watch(self, number: int) -> None:
        """ImageNotFound: no such watch."""
        with rbd_errors(f"error watching image {self.label}"):
            self.handle.unwatch_updates(number)

    @requires_not_closed
    def quiesce_watch(self, quiesce: Callable[[], object], unquiesce: Callable[[], object]) -> int:
        """librbd's `rbd_quiesce_watch`, which Ceph's module does not offer: `quiesce()` runs on a thread of the library
        before anybody makes a snapshot, `unquiesce()` after it. An OSError of `quiesce` refuses the snapshot. The
        result is for `quiesce_unwatch`. InvalidArgument: the image is open read-only, nobody asks it."""
        with rbd_errors(f"error watching image {self.label}"):
            if self.handle.control is None:
                raise OSError(22, "the image is open read-only")
            return self.handle.quiesce.add(quiesce, unquiesce)

    @requires_not_closed
    def quiesce_unwatch(self, number: int) -> None:
        """ImageNotFound: no such watch."""
        with rbd_errors(f"error watching image {self.label}"):
            self.handle.quiesce.remove(number)

    @requires_not_closed
    def watchers_list(self) -> WatcherIterator:
        return WatcherIterator(self)  # type: ignore[arg-type]

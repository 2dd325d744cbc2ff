"""Locks as users see them: the exclusive lock's owner, advisory locks, watchers."""

from __future__ import annotations

import errno
import re

from librbd_py.format import features as ft
from librbd_py.format import lock as fl
from librbd_py.format.values import dataclass
from librbd_py.store.api import NOSNAP, ListWatchers, WatcherInfo

from .handle import ImageHandle

MODE_EXCLUSIVE = 0  # of the lock_acquire family


@dataclass(frozen=True)
class Lockers:
    tag: str
    exclusive: bool
    lockers: tuple[tuple[str, str, str], ...]  # client, cookie, address


def lockers(handle: ImageHandle) -> Lockers:
    """Whoever is in the lock of the header, by hand or automatically."""
    held = _state(handle)
    rows = [(str(who.entity), who.cookie, info.address.text) for who, info in held.lockers.items()]
    return Lockers(held.tag, held.type == fl.LOCK_EXCLUSIVE, tuple(rows))


def _state(handle: ImageHandle) -> fl.LockState:
    return fl.LockState.decode(
        handle.ctx.exec(handle.oid, "lock", "get_info", fl.InfoRequest(fl.RBD_LOCK_NAME).encode())
    )


def lock(handle: ImageHandle, cookie: str, tag: str, *, exclusive: bool) -> None:
    """An advisory lock. EBUSY: held by others, or with another tag; EEXIST: held by this very one; EROFS."""
    if handle.read_only:
        raise OSError(errno.EROFS, "the image is open read-only")
    request = fl.LockRequest(fl.RBD_LOCK_NAME, fl.LOCK_EXCLUSIVE if exclusive else fl.LOCK_SHARED, cookie, tag)
    handle.ctx.exec(handle.oid, "lock", "lock", request.encode())
    handle.announce()


def unlock(handle: ImageHandle, cookie: str) -> None:
    """ENOENT, EROFS."""
    if handle.read_only:
        raise OSError(errno.EROFS, "the image is open read-only")
    handle.ctx.exec(handle.oid, "lock", "unlock", fl.UnlockRequest(fl.RBD_LOCK_NAME, cookie).encode())
    handle.announce()


def break_lock(handle: ImageHandle, client: str, cookie: str) -> None:
    """Fences the client's address and removes its lock. EINVAL: not `client.<number>`; ENOENT; EROFS."""
    if handle.read_only:
        raise OSError(errno.EROFS, "the image is open read-only")
    found = re.fullmatch(r"client\.(\d{1,18})", client)
    if found is None:
        raise OSError(errno.EINVAL, f"{client!r} is no client")
    address = next((where for who, what, where in lockers(handle).lockers if (who, what) == (client, cookie)), None)
    if address is None:
        raise OSError(errno.ENOENT, f"{client} has no lock {cookie!r}")
    handle.store.blocklist_add(address)
    who = fl.EntityName(fl.ENTITY_CLIENT, int(found[1]))
    handle.ctx.exec(handle.oid, "lock", "break_lock", fl.BreakRequest(fl.RBD_LOCK_NAME, who, cookie).encode())
    handle.announce()


def acquire(handle: ImageHandle, mode: int) -> None:
    """lock_acquire. EOPNOTSUPP: shared; EINVAL: no exclusive-lock feature here; EROFS: the owner keeps it."""
    if mode != MODE_EXCLUSIVE:
        raise OSError(errno.EOPNOTSUPP, "only the exclusive mode is supported")
    handle.lock_by_hand()


def owners(handle: ImageHandle) -> list[str]:
    """The address of the exclusive lock's owner, if any. EINVAL: the image has no such feature."""
    if not handle.header.has(ft.EXCLUSIVE_LOCK):
        raise OSError(errno.EINVAL, "the image has no exclusive lock")
    held = lockers(handle)
    return [address for _, _, address in held.lockers] if held.tag == fl.RBD_LOCK_TAG else []


def break_owner(handle: ImageHandle, mode: int, owner: str) -> None:
    """Takes the exclusive lock away from the client at address `owner`. ENOENT: nobody owns it; EBUSY: another does;
    EINVAL: no such feature; EOPNOTSUPP: shared."""
    if mode != MODE_EXCLUSIVE:
        raise OSError(errno.EOPNOTSUPP, "only the exclusive mode is supported")
    if handle.read_only or handle.snap_id != NOSNAP:
        raise OSError(errno.EROFS, "the image is open read-only")
    if not handle.header.has(ft.EXCLUSIVE_LOCK):
        raise OSError(errno.EINVAL, "the image has no exclusive lock")
    held = lockers(handle)
    if not held.lockers:
        raise OSError(errno.ENOENT, "nobody owns the lock")
    for client, cookie, address in held.lockers:
        if address == owner:
            break_lock(handle, client, cookie)
            return
    raise OSError(errno.EBUSY, f"{owner} does not own the lock")


def watchers(handle: ImageHandle) -> list[WatcherInfo]:
    rows: list[WatcherInfo] = handle.ctx.read(handle.oid, [ListWatchers()])[0]
    return rows

"""Locks as users see them: the exclusive lock's owner, advisory locks, watchers."""

from __future__ import annotations

import errno
import re
import struct
from dataclasses import dataclass

from librbd_py.store.api import NOSNAP, ListWatchers, WatcherInfo

from . import features as ft
from .cls import Reader, text, u8, versioned
from .handle import ImageHandle

LOCK_NAME = "rbd_lock"
INTERNAL_TAG = "internal"
EXCLUSIVE, SHARED = 1, 2  # of the class `lock`
MODE_EXCLUSIVE = 0  # of the lock_acquire family


@dataclass(frozen=True)
class Lockers:
    tag: str
    exclusive: bool
    lockers: tuple[tuple[str, str, str], ...]  # client, cookie, address


def lockers(handle: ImageHandle) -> Lockers:
    """Whoever is in the lock of the header, by hand or automatically."""
    body = Reader(handle.ctx.exec(handle.oid, "lock", "get_info", versioned(1, 1, text(LOCK_NAME)))).struct()
    rows = []
    for _ in range(body.u32()):
        who = body.struct()
        kind, number = who.u8(), who.s64()
        cookie = who.text()
        info = body.struct()
        info.take(8)
        rows.append((f"client.{number}" if kind == 8 else f"{kind}.{number}", cookie, _address(info)))
    lock_type = body.u8()
    return Lockers(body.text(), lock_type == EXCLUSIVE, tuple(rows))


def _address(info: Reader) -> str:
    info.u8()
    body = info.struct()
    body.u32()
    nonce = body.u32()
    sockaddr = body.blob()
    if len(sockaddr) < 8 or struct.unpack_from("<H", sockaddr)[0] != 2:
        return f":/{nonce}"
    port = struct.unpack_from(">H", sockaddr, 2)[0]
    return ".".join(str(byte) for byte in sockaddr[4:8]) + f":{port}/{nonce}"


def lock(handle: ImageHandle, cookie: str, tag: str, *, exclusive: bool) -> None:
    """An advisory lock. EBUSY: held by others, or with another tag; EEXIST: held by this very one; EROFS."""
    if handle.read_only:
        raise OSError(errno.EROFS, "the image is open read-only")
    kind = EXCLUSIVE if exclusive else SHARED
    arguments = text(LOCK_NAME) + u8(kind) + text(cookie) + text(tag) + text("") + bytes(8) + u8(0)
    handle.ctx.exec(handle.oid, "lock", "lock", versioned(1, 1, arguments))
    handle.announce()


def unlock(handle: ImageHandle, cookie: str) -> None:
    """ENOENT, EROFS."""
    if handle.read_only:
        raise OSError(errno.EROFS, "the image is open read-only")
    handle.ctx.exec(handle.oid, "lock", "unlock", versioned(1, 1, text(LOCK_NAME) + text(cookie)))
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
    who = u8(8) + struct.pack("<q", int(found[1]))
    handle.ctx.exec(handle.oid, "lock", "break_lock", versioned(1, 1, text(LOCK_NAME) + who + text(cookie)))
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
    return [address for _, _, address in held.lockers] if held.tag == INTERNAL_TAG else []


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

"""Between the machines of this folder and what the store carries: lock class calls, watchers, notify messages."""

from __future__ import annotations

import errno
from collections.abc import Callable

from librbd_py.control.lock_events import Locker, LockView
from librbd_py.format import lock as fl
from librbd_py.format import notify as nf
from librbd_py.format.encoding import NEVER, DecodeError
from librbd_py.store.api import CmpXattr, Exec, GetXattr, GetXattrs, ListWatchers, ObjectContext, SetXattr
from librbd_py.store.executor import has_writes

_RECORD = fl.XATTR_PREFIX + fl.RBD_LOCK_NAME

# Told to all watchers, not asked of the lock owner.
TO_ALL = (nf.AsyncProgress, nf.AsyncComplete, nf.Quiesce, nf.Unquiesce)
ACKED_EMPTY = (nf.AsyncProgress, nf.AsyncComplete)


def acquired_lock(gid: int, handle: int) -> bytes:
    return nf.encode(nf.AcquiredLock(nf.ClientId(gid, handle)))


def released_lock(gid: int, handle: int) -> bytes:
    return nf.encode(nf.ReleasedLock(nf.ClientId(gid, handle)))


def request_lock(gid: int, handle: int, force: bool = False) -> bytes:
    return nf.encode(nf.RequestLock(nf.ClientId(gid, handle), force))


def header_update() -> bytes:
    return nf.encode(nf.HeaderUpdate())


def result_of(ack: bytes) -> int | None:
    """The result in an ack, None for an empty or unreadable one."""
    try:
        return nf.decode_response(ack)
    except DecodeError:
        return None


def asks_owner(message: nf.Message) -> bool:
    """Only the lock owner may answer; everybody else acks empty."""
    return not isinstance(message, TO_ALL)


def wants_result(message: nf.Message) -> bool:
    return not isinstance(message, ACKED_EMPTY)


# --- the class lock ----------------------------------------------------------------------------------------------


def get_lock(ctx: ObjectContext, oid: str) -> LockView:
    """Who holds the lock, and the record that says so. ENOENT when the object is gone."""
    ask = Exec("lock", "get_info", fl.InfoRequest(fl.RBD_LOCK_NAME).encode())
    info, xattrs = ctx.read(oid, [ask, GetXattrs()])
    state = fl.LockState.decode(info)
    if not state.lockers:
        return LockView()
    (locker_id, about), *others = state.lockers.items()
    owner = Locker(locker_id.entity.number, locker_id.cookie, about.address.text, about.description)
    ours = state.type == fl.LOCK_EXCLUSIVE and state.tag == fl.RBD_LOCK_TAG and not others
    foreign = not ours or locker_id.entity.type != fl.ENTITY_CLIENT or fl.parse_auto_cookie(owner.cookie) is None
    return LockView(owner, foreign, xattrs.get(_RECORD, b""))


def lock(ctx: ObjectContext, oid: str, cookie: str) -> None:
    """EBUSY when another client has it, EEXIST when this one has it with this cookie."""
    request = fl.LockRequest(fl.RBD_LOCK_NAME, fl.LOCK_EXCLUSIVE, cookie, fl.RBD_LOCK_TAG)
    ctx.exec(oid, "lock", "lock", request.encode())


def unlock(ctx: ObjectContext, oid: str, cookie: str) -> None:
    """ENOENT when this client does not have it with this cookie."""
    ctx.exec(oid, "lock", "unlock", fl.UnlockRequest(fl.RBD_LOCK_NAME, cookie).encode())


def break_lock(ctx: ObjectContext, oid: str, owner: Locker) -> None:
    """ENOENT when it is not theirs any more."""
    entity = fl.EntityName(fl.ENTITY_CLIENT, owner.gid)
    ctx.exec(oid, "lock", "break_lock", fl.BreakRequest(fl.RBD_LOCK_NAME, entity, owner.cookie).encode())


def set_cookie(ctx: ObjectContext, oid: str, old: str, new: str) -> None:
    """EBUSY unless this client has it with the old cookie."""
    request = fl.SetCookieRequest(fl.RBD_LOCK_NAME, fl.LOCK_EXCLUSIVE, old, fl.RBD_LOCK_TAG, new)
    ctx.exec(oid, "lock", "set_cookie", request.encode())


def mark(ctx: ObjectContext, oid: str, owner: Locker, description: str) -> None:
    """Changes the description of the locker `owner`. ECANCELED unless the lock is held by exactly that one."""

    def change(key: fl.LockerId, info: fl.LockerInfo) -> tuple[fl.LockerId, fl.LockerInfo]:
        return key, fl.LockerInfo(info.expiration, info.address, description)

    _exchange(ctx, oid, owner, change)


def take(ctx: ObjectContext, oid: str, owner: Locker, cookie: str, description: str, record: bytes = b"") -> None:
    """Puts this client, with `cookie`, in the place of the locker `owner`. ECANCELED unless the lock is held by exactly
    that one; of several who try one succeeds. `record`: the lock's as it was read with the owner, to read it once."""
    client = ctx.store.client

    def change(key: fl.LockerId, info: fl.LockerInfo) -> tuple[fl.LockerId, fl.LockerInfo]:
        entity = fl.EntityName(fl.ENTITY_CLIENT, client.gid)
        return fl.LockerId(entity, cookie), fl.LockerInfo(NEVER, fl.EntityAddress.parse(client.address), description)

    _exchange(ctx, oid, owner, change, record)


Exchange = Callable[[fl.LockerId, fl.LockerInfo], tuple[fl.LockerId, fl.LockerInfo]]


def _exchange(ctx: ObjectContext, oid: str, owner: Locker, change: Exchange, record: bytes = b"") -> None:
    """Compare and set on the class lock's own record: the class has no method that moves a lock to another client
    without a moment in which nobody holds it."""
    record = record or ctx.read(oid, [GetXattr(_RECORD)])[0]
    state = fl.LockState.decode(record)
    held = [Locker(k.entity.number, k.cookie, i.address.text, i.description) for k, i in state.lockers.items()]
    if held != [owner]:
        raise OSError(errno.ECANCELED, f"{oid}: the lock is not {owner}'s any more")
    ((key, info),) = state.lockers.items()
    new = fl.LockState(dict([change(key, info)]), state.type, state.tag)
    ctx.write(oid, [CmpXattr(_RECORD, record), SetXattr(_RECORD, new.encode())])


def rehearse(ctx: ObjectContext) -> None:
    """Loads and compiles what a hand-off runs, without doing anything: the first one costs twice as much otherwise."""
    client, offer = ctx.store.client, fl.Offer("*", "1")
    fl.Offer.parse(offer.mark)
    locker = fl.LockerId(fl.EntityName(fl.ENTITY_CLIENT, client.gid), fl.auto_cookie(1))
    info = fl.LockerInfo(NEVER, fl.EntityAddress.parse(client.address), offer.taken)
    fl.LockState.decode(fl.LockState({locker: info}, fl.LOCK_EXCLUSIVE, fl.RBD_LOCK_TAG).encode())
    for method in ("lock", "unlock", "assert_locked"):
        has_writes([Exec("lock", method)])


def is_watching(ctx: ObjectContext, oid: str, owner: Locker) -> bool:
    """True when a watch with the owner's address and handle is there: the owner lives."""
    handle = fl.parse_auto_cookie(owner.cookie)
    watchers = ctx.read(oid, [ListWatchers()])[0]
    return any(w.cookie == handle and w.address == owner.address for w in watchers)

"""Class `lock`: advisory locks on an object, kept in the xattr `lock.<name>`.

The caller is who the store says it is (entity name and address of the connection), not who it claims to be.
"""

from __future__ import annotations

import errno

from librbd_py.format import lock
from librbd_py.format.encoding import Time
from librbd_py.format.lock import EntityAddress, EntityName, LockerId, LockerInfo, LockState

from .context import Context, stored
from .registry import method

_KINDS = (lock.LOCK_EXCLUSIVE, lock.LOCK_SHARED, lock.LOCK_EXCLUSIVE_EPHEMERAL)


def _entity(context: Context) -> EntityName:
    return EntityName(lock.ENTITY_CLIENT, context.client.gid)


def _load(context: Context, name: str) -> LockState:
    """Lockers whose time is up are not there. Never locked: the empty state. ENOENT without the object, EIO for an
    xattr that does not parse."""
    try:
        raw = context.xattr(lock.XATTR_PREFIX + name)
    except OSError as e:
        if e.errno == errno.ENODATA:
            return LockState()
        raise
    if not raw:
        return LockState()
    state = stored(LockState.decode, raw)
    now = Time.from_ns(context.now_ns)
    held = {who: info for who, info in state.lockers.items() if not info.expiration or info.expiration >= now}
    return LockState(held, state.type, state.tag)


def _save(context: Context, name: str, state: LockState) -> None:
    context.set_xattr(lock.XATTR_PREFIX + name, state.encode())


def _bad(text: str) -> OSError:
    return OSError(errno.EINVAL, text)


def _busy(text: str) -> OSError:
    return OSError(errno.EBUSY, text)


def _check(name: str, kind: int) -> None:
    if kind not in _KINDS:
        raise _bad(f"lock type {kind}")
    if not name:
        raise _bad("a lock needs a name")


@method("lock", "lock", writes=True)
def take(context: Context, data: bytes) -> bytes:
    request = lock.LockRequest.decode(data)
    _check(request.name, request.type)
    may_renew = bool(request.flags & lock.FLAG_MAY_RENEW)
    must_renew = bool(request.flags & lock.FLAG_MUST_RENEW)
    if may_renew and must_renew:
        raise _bad("may-renew and must-renew exclude each other")
    try:
        state = _load(context, request.name)
    except OSError as e:
        if e.errno != errno.ENOENT:
            raise
        state = LockState()  # the lock makes the object
    lockers = dict(state.lockers)
    me = LockerId(_entity(context), request.cookie)
    # Before the renewal check: a renewal must not slip in under another tag.
    if lockers and request.tag != state.tag:
        raise _busy(f"locked under the tag {state.tag!r}")
    if me in lockers:
        if not may_renew and not must_renew:
            raise OSError(errno.EEXIST, "this client holds the lock already with this cookie")
        del lockers[me]
    elif must_renew:
        raise OSError(errno.ENOENT, "no lock to renew")
    if lockers:
        if request.type != lock.LOCK_SHARED:
            raise _busy("held by somebody else")
        if state.type != request.type:
            raise _busy("held in another mode")
    expiration = Time()
    if request.duration:
        expiration = Time.from_ns(context.now_ns + request.duration.ns)
    address = EntityAddress.parse(context.client.address).as_type(lock.ADDRESS_LEGACY)
    lockers[me] = LockerInfo(expiration, address, request.description)
    _save(context, request.name, LockState(lockers, request.type, request.tag))
    return b""


def _drop(context: Context, name: str, who: LockerId) -> None:
    state = _load(context, name)
    if who not in state.lockers:
        raise OSError(errno.ENOENT, f"{who.entity} with cookie {who.cookie!r} does not hold the lock")
    if state.type == lock.LOCK_EXCLUSIVE_EPHEMERAL:
        context.remove()
        return
    lockers = {key: info for key, info in state.lockers.items() if key != who}
    _save(context, name, LockState(lockers, state.type, state.tag))


@method("lock", "unlock", writes=True)
def unlock(context: Context, data: bytes) -> bytes:
    request = lock.UnlockRequest.decode(data)
    _drop(context, request.name, LockerId(_entity(context), request.cookie))
    return b""


@method("lock", "break_lock", writes=True)
def break_lock(context: Context, data: bytes) -> bytes:
    request = lock.BreakRequest.decode(data)
    _drop(context, request.name, LockerId(request.locker, request.cookie))
    return b""


@method("lock", "get_info", writes=False)
def get_info(context: Context, data: bytes) -> bytes:
    return _load(context, lock.InfoRequest.decode(data).name).encode()


@method("lock", "list_locks", writes=False)
def list_locks(context: Context, data: bytes) -> bytes:
    names = sorted(name for name in context.xattrs() if name.startswith(lock.XATTR_PREFIX))
    return lock.encode_lock_names([name[len(lock.XATTR_PREFIX) :] for name in names])


def _held(context: Context, name: str, kind: int, tag: str, who: LockerId) -> LockState:
    state = _load(context, name)
    if not state.lockers:
        raise _busy("not locked")
    if state.type != kind:
        raise _busy("locked in another mode")
    if state.tag != tag:
        raise _busy(f"locked under the tag {state.tag!r}")
    if who not in state.lockers:
        raise _busy("locked by somebody else")
    return state


@method("lock", "assert_locked", writes=False)
def assert_locked(context: Context, data: bytes) -> bytes:
    request = lock.AssertRequest.decode(data)
    _check(request.name, request.type)
    _held(context, request.name, request.type, request.tag, LockerId(_entity(context), request.cookie))
    return b""


@method("lock", "set_cookie", writes=True)
def set_cookie(context: Context, data: bytes) -> bytes:
    request = lock.SetCookieRequest.decode(data)
    _check(request.name, request.type)
    me = LockerId(_entity(context), request.cookie)
    state = _held(context, request.name, request.type, request.tag, me)
    renamed = LockerId(me.entity, request.new_cookie)
    if renamed in state.lockers:
        raise _busy("the new cookie is in use")
    lockers = {(renamed if key == me else key): info for key, info in state.lockers.items()}
    _save(context, request.name, LockState(lockers, state.type, state.tag))
    return b""

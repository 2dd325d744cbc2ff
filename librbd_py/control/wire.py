"""Between the machines of this folder and what the store carries: lock class calls, watchers, notify messages.

Only what moves watch and lock is taken apart here; a proxied operation travels on as it came.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from librbd_py.control.lock_events import Locker, LockView, handle_of
from librbd_py.format import lock as fl
from librbd_py.store.api import ListWatchers, ObjectContext

VERSION, COMPAT = 7, 1
OP_ACQUIRED_LOCK, OP_RELEASED_LOCK, OP_REQUEST_LOCK, OP_HEADER_UPDATE = range(4)
OP_ASYNC_PROGRESS, OP_ASYNC_COMPLETE = 4, 5
OP_QUIESCE, OP_UNQUIESCE = 18, 19
TO_ALL = frozenset({OP_ASYNC_PROGRESS, OP_ASYNC_COMPLETE, OP_QUIESCE, OP_UNQUIESCE})
ACKED_EMPTY = frozenset({OP_ASYNC_PROGRESS, OP_ASYNC_COMPLETE})
MAX_PAYLOAD = 1 << 20  # longer ones are refused unread

_HEADER = struct.Struct("<BBI")
_CLIENT = struct.Struct("<QQ")


@dataclass(frozen=True)
class AcquiredLock:
    gid: int
    handle: int


@dataclass(frozen=True)
class ReleasedLock:
    gid: int
    handle: int


@dataclass(frozen=True)
class RequestLock:
    gid: int
    handle: int
    force: bool


@dataclass(frozen=True)
class HeaderUpdate:
    pass


@dataclass(frozen=True)
class PeerMessage:
    """Any other op: a proxied operation, its progress or end, quiesce. `payload` is the whole notify."""

    op: int
    payload: bytes


Message = AcquiredLock | ReleasedLock | RequestLock | HeaderUpdate | PeerMessage


def decode(payload: bytes) -> Message:
    """A notify on a header. ValueError when it cannot be read. An empty one means HeaderUpdate (old clients)."""
    if not payload:
        return HeaderUpdate()
    if not 10 <= len(payload) <= MAX_PAYLOAD:
        raise ValueError(f"a notify of {len(payload)} bytes")
    _, compat, length = _HEADER.unpack_from(payload)
    if compat > VERSION:
        raise ValueError(f"needs version {compat}")
    if not 4 <= length <= len(payload) - 6:
        raise ValueError("its length is not its own")
    body = payload[6 : 6 + length]
    (op,) = struct.unpack_from("<I", body)
    if op == OP_HEADER_UPDATE:
        return HeaderUpdate()
    if op > OP_REQUEST_LOCK:
        return PeerMessage(op, payload)
    if len(body) < 20:
        raise ValueError("no client id")
    gid, handle = _CLIENT.unpack_from(body, 4)
    if op == OP_ACQUIRED_LOCK:
        return AcquiredLock(gid, handle)
    if op == OP_RELEASED_LOCK:
        return ReleasedLock(gid, handle)
    return RequestLock(gid, handle, len(body) > 20 and body[20] != 0)


def _message(op: int, body: bytes = b"") -> bytes:
    return _HEADER.pack(VERSION, COMPAT, 4 + len(body)) + struct.pack("<I", op) + body


def acquired_lock(gid: int, handle: int) -> bytes:
    return _message(OP_ACQUIRED_LOCK, _CLIENT.pack(gid, handle))


def released_lock(gid: int, handle: int) -> bytes:
    return _message(OP_RELEASED_LOCK, _CLIENT.pack(gid, handle))


def request_lock(gid: int, handle: int, force: bool = False) -> bytes:
    return _message(OP_REQUEST_LOCK, _CLIENT.pack(gid, handle) + bytes([force]))


def header_update() -> bytes:
    return _message(OP_HEADER_UPDATE)


def response(result: int) -> bytes:
    """The ack of who answers: 0 or -errno."""
    return _HEADER.pack(1, 1, 4) + struct.pack("<i", result)


def result_of(ack: bytes) -> int | None:
    """The result in an ack, None for an empty or unreadable one."""
    if len(ack) < 10 or ack[1] > 1 or struct.unpack_from("<I", ack, 2)[0] < 4:
        return None
    result: int = struct.unpack_from("<i", ack, 6)[0]
    return result


def asks_owner(message: PeerMessage) -> bool:
    """Only the lock owner may answer; everybody else acks empty."""
    return message.op not in TO_ALL


def wants_result(message: PeerMessage) -> bool:
    return message.op not in ACKED_EMPTY


# --- the class lock ----------------------------------------------------------------------------------------------


def get_lock(ctx: ObjectContext, oid: str) -> LockView:
    """Who holds the lock. ENOENT when the object is gone."""
    state = fl.LockState.decode(ctx.exec(oid, "lock", "get_info", fl.InfoRequest(fl.RBD_LOCK_NAME).encode()))
    if not state.lockers:
        return LockView()
    (locker_id, info), *others = state.lockers.items()
    owner = Locker(locker_id.entity.number, locker_id.cookie, info.address.text)
    ours = state.type == fl.LOCK_EXCLUSIVE and state.tag == fl.RBD_LOCK_TAG and not others
    return LockView(owner, not ours or locker_id.entity.type != fl.ENTITY_CLIENT or handle_of(owner.cookie) is None)


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


def is_watching(ctx: ObjectContext, oid: str, owner: Locker) -> bool:
    """True when a watch with the owner's address and handle is there: the owner lives."""
    handle = handle_of(owner.cookie)
    watchers = ctx.read(oid, [ListWatchers()])[0]
    return any(w.cookie == handle and w.address == owner.address for w in watchers)

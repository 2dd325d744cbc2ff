"""Object maps: two bits per data object, for HEAD and for every snapshot.

The HEAD map is written by the owner of the exclusive lock only, and every change carries an assertion that it still
holds the map's own lock. Stores that record existence themselves (`NativeData.keeps_object_map`) do the changes of
single objects; creating, resizing and copying maps is done here for all stores.
"""

from __future__ import annotations

import errno
import logging
import struct
from collections.abc import Callable

from librbd_py.store.api import NOSNAP, Exec, ObjectContext, Op, Read, WriteFull

from . import cls
from .cls import Reader, call, text, u8, u64, versioned
from .header import map_oid
from .objects import ignoring, remove
from .plain import ObjectMapKeeper

NONEXISTENT, EXISTS, PENDING, EXISTS_CLEAN = range(4)
LOCK_NAME = "rbd_lock"

log = logging.getLogger("librbd_py.image")
_UNPACK = [bytes(((byte >> 6) & 3, (byte >> 4) & 3, (byte >> 2) & 3, byte & 3)) for byte in range(256)]


def decode_states(data: bytes) -> bytearray:
    """One byte (0..3) per object from an encoded map. EBADMSG when damaged; checksums are the store's business."""
    reader = Reader(data)
    count = Reader(reader.blob()).struct().u64()
    packed = reader.take(-(-count // 4))
    return bytearray(b"".join([_UNPACK[byte] for byte in packed])[:count])


def encode_states(states: bytes | bytearray) -> bytes:
    """Without checksums, as class methods take it."""
    padded = bytes(states) + bytes(-len(states) % 4)
    packed = bytes(
        padded[i] << 6 | padded[i + 1] << 4 | padded[i + 2] << 2 | padded[i + 3] for i in range(0, len(padded), 4)
    )
    header = versioned(1, 1, u64(len(states)))
    return struct.pack("<I", len(header)) + header + packed + struct.pack("<I", 0)


def load(ctx: ObjectContext, image_id: str, snap_id: int = NOSNAP) -> bytearray:
    """ENOENT: there is no map."""
    return decode_states(ctx.exec(map_oid(image_id, snap_id), "rbd", "object_map_load"))


def save(ctx: ObjectContext, image_id: str, snap_id: int, states: bytes | bytearray, *, locked: bool = False) -> None:
    ops: list[Op] = [_assert_locked()] if locked else []
    ctx.write(map_oid(image_id, snap_id), [*ops, call("object_map_save", encode_states(states))])


def resize(ctx: ObjectContext, image_id: str, count: int, *, locked: bool) -> None:
    """Makes the HEAD map if there is none; new entries are NONEXISTENT."""
    ops: list[Op] = [_assert_locked()] if locked else []
    ctx.write(map_oid(image_id), [*ops, call("object_map_resize", u64(count), u8(NONEXISTENT))])


def snap_create(ctx: ObjectContext, image_id: str, snap_id: int) -> None:
    """The snapshot's map is a copy of HEAD's; then HEAD's existing objects are clean."""
    data = ctx.read(map_oid(image_id), [Read()])[0]
    ctx.write(map_oid(image_id, snap_id), [WriteFull(data)])
    ctx.write(map_oid(image_id), [_assert_locked(), call("object_map_snap_add")])


def snap_remove(ctx: ObjectContext, image_id: str, snap_id: int, newer: int) -> None:
    """What the removed map knew of changes goes to the next newer map (`newer`: snapshot id or NOSNAP)."""
    with ignoring(errno.ENOENT):
        removed = ctx.exec(map_oid(image_id, snap_id), "rbd", "object_map_load")
        ops: list[Op] = [_assert_locked()] if newer == NOSNAP else []
        ctx.write(map_oid(image_id, newer), [*ops, call("object_map_snap_remove", removed)])
    remove(ctx, map_oid(image_id, snap_id))


def lock(ctx: ObjectContext, image_id: str) -> None:
    """Takes the HEAD map's lock. Whoever owns the image may break a stale one."""
    oid = map_oid(image_id)
    arguments = text(LOCK_NAME) + u8(1) + text("") + text("") + text("") + bytes(8) + u8(0)
    for attempt in range(8):
        try:
            ctx.exec(oid, "lock", "lock", versioned(1, 1, arguments))
            return
        except OSError as failure:
            if failure.errno == errno.EEXIST:
                return
            if failure.errno != errno.EBUSY or attempt == 7:
                raise
        info = Reader(ctx.exec(oid, "lock", "get_info", versioned(1, 1, text(LOCK_NAME)))).struct()
        for _ in range(info.u32()):
            body = info.struct()
            locker = body.take(9) + body.take(4 + struct.unpack_from("<I", body.data, body.at)[0])
            info.struct()
            with ignoring(errno.ENOENT):
                ctx.exec(oid, "lock", "break_lock", versioned(1, 1, text(LOCK_NAME) + locker))


def unlock(ctx: ObjectContext, image_id: str) -> None:
    with ignoring(errno.ENOENT):
        ctx.exec(map_oid(image_id), "lock", "unlock", versioned(1, 1, text(LOCK_NAME) + text("")))


def _assert_locked() -> Exec:
    return Exec("lock", "assert_locked", versioned(1, 1, text(LOCK_NAME) + u8(1) + text("") + text("")))


class HeadMap(ObjectMapKeeper):
    """The HEAD map in memory while this client owns the image; used where the store does not keep it itself."""

    def __init__(self, ctx: ObjectContext, image_id: str, failed: Callable[[OSError], None]) -> None:
        self._ctx = ctx
        self._oid = map_oid(image_id)
        self._failed = failed
        self._states = load(ctx, image_id)
        self._broken = False

    def exists(self, objno: int) -> None:
        if objno < len(self._states) and self._states[objno] != EXISTS:
            self._update(objno, EXISTS, None)

    def pending(self, objno: int) -> None:
        if objno < len(self._states) and self._states[objno] != NONEXISTENT:
            self._update(objno, PENDING, None)

    def gone(self, objno: int) -> None:
        if objno < len(self._states) and self._states[objno] == PENDING:
            self._update(objno, NONEXISTENT, PENDING)

    def _update(self, objno: int, state: int, current: int | None) -> None:
        if self._broken:
            return
        filtered = u8(0) if current is None else u8(1) + u8(current)
        update = call("object_map_update", u64(objno), u64(objno + 1), u8(state), filtered)
        try:
            self._ctx.write(self._oid, [_assert_locked(), update])
        except OSError as failure:
            # As librbd: mark the map invalid and go on without it.
            log.warning("%s: cannot be updated: %s", self._oid, failure)
            self._broken = True
            self._failed(failure)
            return
        self._states[objno] = state


def invalidate(ctx: ObjectContext, oid: str, snap_ids: list[int], flags: int) -> None:
    """Sets invalid flags on HEAD (NOSNAP) and snapshots."""
    for snap_id in snap_ids:
        set_flags(ctx, oid, snap_id, flags, flags)


def set_flags(ctx: ObjectContext, oid: str, snap_id: int, flags: int, mask: int) -> None:
    ctx.exec(oid, "rbd", "set_flags", cls.u64(flags) + cls.u64(mask) + cls.u64(snap_id))

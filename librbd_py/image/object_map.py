"""Object maps: two bits per data object, for HEAD and for every snapshot.

The HEAD map is written by the owner of the exclusive lock only, and every change carries an assertion that it still
holds the map's own lock. Stores that record existence themselves (`NativeData.keeps_object_map`) do the changes of
single objects; creating, resizing and copying maps is done here for all stores.
"""

from __future__ import annotations

import errno

from librbd_py.format import lock as fl
from librbd_py.format import object_map as fm
from librbd_py.format.logs import logger
from librbd_py.format.object_map import NONEXISTENT
from librbd_py.store.api import NOSNAP, Exec, ObjectContext, Op, Read, WriteFull

from . import cls
from .cls import call, u8, u64
from .header import map_oid
from .objects import ignoring, remove

ATTEMPTS = 8  # at the lock of a map whose stale owners are being broken

log = logger("librbd_py.image")


def load(ctx: ObjectContext, image_id: str, snap_id: int = NOSNAP) -> bytearray:
    """ENOENT: there is no map."""
    return fm.decode(ctx.exec(map_oid(image_id, snap_id), "rbd", "object_map_load"))


def save(ctx: ObjectContext, image_id: str, snap_id: int, states: bytes | bytearray, *, locked: bool = False) -> None:
    ops: list[Op] = [assert_locked()] if locked else []
    ctx.write(map_oid(image_id, snap_id), [*ops, call("object_map_save", fm.encode(states, crc=False))])


def resize(ctx: ObjectContext, image_id: str, count: int, *, locked: bool) -> None:
    """Makes the HEAD map if there is none; new entries are NONEXISTENT."""
    ops: list[Op] = [assert_locked()] if locked else []
    ctx.write(map_oid(image_id), [*ops, call("object_map_resize", u64(count), u8(NONEXISTENT))])


def snap_create(ctx: ObjectContext, image_id: str, snap_id: int) -> None:
    """The snapshot's map is a copy of HEAD's; then HEAD's existing objects are clean."""
    data = ctx.read(map_oid(image_id), [Read()])[0]
    ctx.write(map_oid(image_id, snap_id), [WriteFull(data)])
    ctx.write(map_oid(image_id), [assert_locked(), call("object_map_snap_add")])


def snap_remove(ctx: ObjectContext, image_id: str, snap_id: int, newer: int) -> None:
    """What the removed map knew of changes goes to the next newer map (`newer`: snapshot id or NOSNAP)."""
    with ignoring(errno.ENOENT):
        removed = ctx.exec(map_oid(image_id, snap_id), "rbd", "object_map_load")
        ops: list[Op] = [assert_locked()] if newer == NOSNAP else []
        ctx.write(map_oid(image_id, newer), [*ops, call("object_map_snap_remove", removed)])
    remove(ctx, map_oid(image_id, snap_id))


def lock(ctx: ObjectContext, image_id: str) -> None:
    """Takes the HEAD map's lock. Whoever owns the image may break a stale one."""
    oid = map_oid(image_id)
    request = fl.LockRequest(fl.RBD_LOCK_NAME, fl.LOCK_EXCLUSIVE, "", "")
    for attempt in range(ATTEMPTS):
        try:
            ctx.exec(oid, "lock", "lock", request.encode())
            return
        except OSError as failure:
            if failure.errno == errno.EEXIST:
                return
            if failure.errno != errno.EBUSY or attempt == ATTEMPTS - 1:
                raise
        held = fl.LockState.decode(ctx.exec(oid, "lock", "get_info", fl.InfoRequest(fl.RBD_LOCK_NAME).encode()))
        for locker in held.lockers:
            with ignoring(errno.ENOENT):
                stale = fl.BreakRequest(fl.RBD_LOCK_NAME, locker.entity, locker.cookie)
                ctx.exec(oid, "lock", "break_lock", stale.encode())


def unlock(ctx: ObjectContext, image_id: str) -> None:
    with ignoring(errno.ENOENT):
        ctx.exec(map_oid(image_id), "lock", "unlock", fl.UnlockRequest(fl.RBD_LOCK_NAME, "").encode())


ASSERT_LOCKED = fl.AssertRequest(fl.RBD_LOCK_NAME, fl.LOCK_EXCLUSIVE, "", "").encode()


def assert_locked() -> Exec:
    return Exec("lock", "assert_locked", ASSERT_LOCKED)


def invalidate(ctx: ObjectContext, oid: str, snap_ids: list[int], flags: int) -> None:
    """Sets invalid flags on HEAD (NOSNAP) and snapshots."""
    for snap_id in snap_ids:
        set_flags(ctx, oid, snap_id, flags, flags)


def set_flags(ctx: ObjectContext, oid: str, snap_id: int, flags: int, mask: int) -> None:
    ctx.exec(oid, "rbd", "set_flags", cls.u64(flags) + cls.u64(mask) + cls.u64(snap_id))

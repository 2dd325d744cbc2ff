"""Snapshots: create, remove, rename, protect, roll back, limit."""

from __future__ import annotations

import errno

from librbd_py.format import features as ft
from librbd_py.format import header as fh
from librbd_py.format import names
from librbd_py.format import notify as nf
from librbd_py.format import trash as ftr
from librbd_py.format.header import ChildImageSpec, ParentImageSpec
from librbd_py.format.logs import logger
from librbd_py.format.object_map import EXISTS, NONEXISTENT
from librbd_py.store.api import NOSNAP, ObjectContext, Rollback

from . import cls, object_map
from .cls import Snapshot, call, text, u8, u64
from .content import read_view
from .handle import ImageHandle, announce
from .header import Header, header_oid, load
from .objects import exists, ignoring
from .progress import Progress, report
from .proxy import perform
from .quiesce import guests_quiesced
from .resize import known_states, resize

COPY = 4 << 20  # bytes read and written at once
UNLIMITED = (1 << 64) - 1
ATTEMPTS = 16  # of a creation that lost the race for its id

log = logger("librbd_py.image")


def find(header: Header, name: str) -> Snapshot:
    """A user snapshot by name. ENOENT."""
    snap = header.snap_named(name, fh.NAMESPACE_USER)
    if snap is None:
        raise OSError(errno.ENOENT, f"no snapshot named {name!r}")
    return snap


def find_removable(header: Header, name: str) -> Snapshot:
    """As `find`; or one of that name that waits in the trash for no clone: its removal was cut short."""
    if header.snap_named(name, fh.NAMESPACE_USER) is None:
        for snap in header.snaps.values():
            namespace = snap.namespace
            if isinstance(namespace, fh.TrashNamespace) and namespace.original_name == name and not snap.children:
                return snap
    return find(header, name)


def by_id(header: Header, snap_id: int) -> Snapshot:
    """ENOENT."""
    if snap_id not in header.snaps:
        raise OSError(errno.ENOENT, f"no snapshot {snap_id}")
    return header.snaps[snap_id]


def create(handle: ImageHandle, name: str, namespace: fh.SnapshotNamespace = fh.USER, flags: int = 0) -> int:
    """The id of the new snapshot. EEXIST; EDQUOT: as many as the image may have; EROFS. `flags`: SKIP_QUIESCE,
    IGNORE_QUIESCE_ERROR of `quiesce`; without them also what a guest's quiesce hook fails with."""
    if handle.read_only:
        raise OSError(errno.EROFS, "the image is open read-only")
    with handle.at_head():
        perform(
            handle,
            lambda request: nf.SnapCreate(name, namespace, request, flags),
            lambda: _create(handle, name, namespace, flags),
            done_already=errno.EEXIST,
        )
        snap = _found(handle.header, name, namespace)
    if snap is None:
        raise OSError(errno.ENOENT, f"snapshot {name!r} was removed as soon as it was made")
    return snap.id


def _found(header: Header, name: str, namespace: fh.SnapshotNamespace) -> Snapshot | None:
    if namespace.type == fh.NAMESPACE_USER:
        return header.snap_named(name, fh.NAMESPACE_USER)
    return next((snap for snap in header.snaps.values() if snap.namespace == namespace), None)


def _create(handle: ImageHandle, name: str, namespace: fh.SnapshotNamespace, flags: int) -> None:
    with handle.exclusive() as header:
        if namespace == fh.USER and header.snap_named(name, fh.NAMESPACE_USER) is not None:
            raise OSError(errno.EEXIST, f"snapshot {name!r} exists")
        with guests_quiesced([handle], flags), handle.quiesced():
            snap_id = _add(handle, name, namespace)
            _map_created(handle, snap_id)
            handle.refresh()
    handle.announce()


def _add(handle: ImageHandle, name: str, namespace: fh.SnapshotNamespace) -> int:
    for _ in range(ATTEMPTS):
        snap_id = handle.data_ctx.snap_create()
        try:
            handle.ctx.exec(handle.oid, "rbd", "snapshot_add", text(name) + u64(snap_id) + cls.namespace(namespace))
            return snap_id
        except OSError as failure:
            handle.data_ctx.snap_remove(snap_id)
            if failure.errno != errno.ESTALE:
                raise
    raise OSError(errno.EAGAIN, "snapshot ids are taken faster than one can be used")


def _map_created(handle: ImageHandle, snap_id: int) -> None:
    if handle.header.has(ft.OBJECT_MAP):
        try:
            object_map.snap_create(handle.ctx, handle.id, snap_id)
        except OSError as failure:
            log.warning("image %s: no object map for snapshot %d: %s", handle.id, snap_id, failure)
            both = ft.FLAG_OBJECT_MAP_INVALID | ft.FLAG_FAST_DIFF_INVALID
            object_map.invalidate(handle.ctx, handle.oid, [snap_id, NOSNAP], both)
        handle.take_map()


def remove(handle: ImageHandle, snap_id: int) -> None:
    """ENOENT; EBUSY: protected. With format v2 clones it moves to the trash and goes with the last of them; removing
    it again is EBUSY then."""
    if handle.read_only:
        raise OSError(errno.EROFS, "the image is open read-only")
    with handle.at_head():
        snap = by_id(handle.header, snap_id)
        perform(
            handle,
            lambda request: nf.SnapRemove(snap.name, snap.namespace, request),
            lambda: _remove(handle, snap_id),
            done_already=errno.ENOENT,
        )


def _remove(handle: ImageHandle, snap_id: int) -> None:
    with handle.exclusive() as header:
        snap = by_id(header, snap_id)
        if snap.protection != fh.PROTECTION_UNPROTECTED:
            raise OSError(errno.EBUSY, f"snapshot {snap.name!r} is protected")
        if snap.is_trash and forget_lost_children(handle, snap_id):
            raise OSError(errno.EBUSY, f"snapshot {snap.name!r} has clones")
        if not snap.is_trash:
            # In the trash nobody can clone it any more, so the children seen next are all there will be.
            with ignoring(errno.EEXIST):
                handle.ctx.exec(handle.oid, "rbd", "snapshot_trash_add", u64(snap_id))
        if not forget_lost_children(handle, snap_id):
            _remove_now(handle, by_id(handle.header, snap_id))
    handle.announce()


def _remove_now(handle: ImageHandle, snap: Snapshot) -> None:
    header = handle.header
    with handle.quiesced():
        if header.has(ft.OBJECT_MAP):
            newer = min((other for other in header.snaps if other > snap.id), default=NOSNAP)
            try:
                object_map.snap_remove(handle.ctx, handle.id, snap.id, newer)
                if header.flags_at(snap.id):  # what changed before the snapshot is known to nobody
                    object_map.invalidate(handle.ctx, handle.oid, [newer], ft.FLAG_FAST_DIFF_INVALID)
            except OSError as failure:
                log.warning("image %s: object map of snapshot %d: %s", handle.id, snap.id, failure)
                object_map.invalidate(handle.ctx, handle.oid, [newer], ft.FLAG_FAST_DIFF_INVALID)
            handle.take_map()
        handle.ctx.exec(handle.oid, "rbd", "snapshot_remove", u64(snap.id))
        handle.refresh()
    detach_child(handle, header)
    handle.data_ctx.snap_remove(snap.id)


def detach_child(handle: ImageHandle, before: Header) -> None:
    """After a change that may have cut the last tie to the parent: if so, tells the parent that this image is no
    longer its clone, and removes the parent's snapshot when it was kept in the trash for us alone.

    In this order a crash in between leaves a snapshot that knows a clone too many; the other way round it would leave
    a clone that cannot be opened. `before`: the header before that change.
    """
    after = handle.header
    parent = before.clone_of
    if not parent.exists or after.clone_of.exists:
        return
    child = ChildImageSpec(handle.ctx.pool_id, handle.id, handle.ctx.namespace)
    with ignoring(errno.ENOENT):
        if not before.op_features & ft.OP_CLONE_CHILD:
            handle.ctx.exec(names.CHILDREN, "rbd", "remove_child", cls.parent_key(parent) + text(handle.id))
            return
        parent_ctx = handle.store.open(parent.pool_id, parent.pool_namespace)
        oid = header_oid(parent.image_id)
        with ignoring(errno.ENOENT):
            parent_ctx.exec(oid, "rbd", "child_detach", u64(parent.snap_id) + cls.encoded(child))
        if after.op_features & ft.OP_CLONE_CHILD:
            bit = u64(0) + u64(ft.OP_CLONE_CHILD)
            handle.ctx.exec(handle.oid, "rbd", "op_features_set", bit)
        announce(parent_ctx, oid)
        remove_trashed(parent_ctx, parent)


def forget_lost_children(handle: ImageHandle, snap_id: int) -> int:
    """How many format 2 clones a snapshot has, without those that are none: a clone is listed after it was tied to its
    parent and struck out after it was untied, so a crash in between leaves an entry too many."""
    count = 0
    for child in cls.children(handle.ctx, handle.oid, snap_id):
        if _is_clone(handle, snap_id, child):
            count += 1
            continue
        log.info("image %s: snapshot %d lists a clone %s that is none", handle.id, snap_id, child.image_id)
        with ignoring(errno.ENOENT):
            handle.ctx.exec(handle.oid, "rbd", "child_detach", u64(snap_id) + cls.encoded(child))
    handle.refresh()
    return count


def _is_clone(handle: ImageHandle, snap_id: int, child: ChildImageSpec) -> bool:
    """Who may not look at the child believes what the parent says."""
    spec = ParentImageSpec(handle.ctx.pool_id, handle.ctx.namespace, handle.id, snap_id)
    try:
        ctx = handle.store.open(child.pool_id, child.pool_namespace)
        return load(ctx, child.image_id, read_only=True).clone_of == spec
    except OSError as failure:
        if failure.errno not in (errno.ENOENT, errno.EPERM, errno.EACCES):
            raise
        return failure.errno != errno.ENOENT


def remove_trashed(ctx: ObjectContext, parent: ParentImageSpec) -> None:
    """Removes a snapshot that waited in the trash for its last clone to go, and its image when that waited there for
    its last one (`rbd_move_parent_to_trash_on_remove`; librbd: DetachChildRequest). Failing to leaves them."""
    from .trash import remove_from_trash

    image_id = parent.image_id
    try:
        snap = cls.read_snapshots(ctx, header_oid(image_id), [parent.snap_id])[0]
        if snap.namespace.type != fh.NAMESPACE_TRASH or snap.children:
            return
        with ImageHandle.open(ctx, image_id=image_id) as handle:
            remove(handle, parent.snap_id)
            left = bool(handle.refresh().snaps)
        with ignoring(errno.ENOENT):
            spec = cls.trash_get(ctx, image_id)
            if not left and (spec.source, spec.state) == (ftr.SOURCE_USER_PARENT, ftr.STATE_NORMAL):
                remove_from_trash(ctx, image_id, force=True)
    except OSError as failure:
        if failure.errno != errno.ENOENT:
            log.warning("image %s: snapshot %d stays in the trash: %s", image_id, parent.snap_id, failure)


def rename(handle: ImageHandle, snap_id: int, name: str) -> None:
    """ENOENT, EEXIST, EROFS."""
    if handle.read_only:
        raise OSError(errno.EROFS, "the image is open read-only")
    by_id(handle.header, snap_id)
    if handle.header.snap_named(name, fh.NAMESPACE_USER) is not None:
        raise OSError(errno.EEXIST, f"snapshot {name!r} exists")
    handle.ctx.exec(handle.oid, "rbd", "snapshot_rename", u64(snap_id) + text(name))
    handle.changed()


def protect(handle: ImageHandle, name: str) -> None:
    """ENOENT; EBUSY: it is; ENOSYS: no layering; EROFS."""
    if handle.read_only:
        raise OSError(errno.EROFS, "the image is open read-only")
    snap = find(handle.header, name)
    if not handle.header.has(ft.LAYERING):
        raise OSError(errno.ENOSYS, "the image has no layering")
    if snap.protection == fh.PROTECTION_PROTECTED:
        raise OSError(errno.EBUSY, f"snapshot {name!r} is protected")
    _set_protection(handle, snap.id, fh.PROTECTION_PROTECTED)
    handle.changed()


def unprotect(handle: ImageHandle, name: str) -> None:
    """ENOENT; EINVAL: it is not protected; EBUSY: it has format v1 clones; EROFS."""
    if handle.read_only:
        raise OSError(errno.EROFS, "the image is open read-only")
    snap = find(handle.header, name)
    if snap.protection == fh.PROTECTION_UNPROTECTED:
        raise OSError(errno.EINVAL, f"snapshot {name!r} is not protected")
    _set_protection(handle, snap.id, fh.PROTECTION_UNPROTECTING)
    try:
        if forget_lost_v1_children(handle, snap.id):
            raise OSError(errno.EBUSY, f"snapshot {name!r} has clones")
    except OSError:
        _set_protection(handle, snap.id, fh.PROTECTION_PROTECTED)
        handle.changed()
        raise
    _set_protection(handle, snap.id, fh.PROTECTION_UNPROTECTED)
    handle.changed()


def forget_lost_v1_children(handle: ImageHandle, snap_id: int) -> int:
    """As `forget_lost_children`, for clones of format 1."""
    count = 0
    spec = ParentImageSpec(handle.ctx.pool_id, handle.ctx.namespace, handle.id, snap_id)
    for child in v1_children(handle, snap_id):
        if _is_clone(handle, snap_id, child):
            count += 1
            continue
        with ignoring(errno.ENOENT):
            ctx = handle.store.open(child.pool_id)
            ctx.exec(names.CHILDREN, "rbd", "remove_child", cls.parent_key(spec) + text(child.image_id))
    return count


def _set_protection(handle: ImageHandle, snap_id: int, status: int) -> None:
    handle.ctx.exec(handle.oid, "rbd", "set_protection_status", u64(snap_id) + u8(status))


def v1_children(handle: ImageHandle, snap_id: int) -> list[ChildImageSpec]:
    """Format v1 clones of a snapshot, from the back references of every pool."""
    spec = ParentImageSpec(handle.ctx.pool_id, handle.ctx.namespace, handle.id, snap_id)
    out = []
    for pool in handle.store.pools():
        with ignoring(errno.ENOENT):
            # they never cross namespaces
            ctx = handle.store.open(pool.pool_id, spec.pool_namespace)
            found = cls.v1_children(ctx, spec)
            out += [ChildImageSpec(pool.pool_id, image_id, spec.pool_namespace) for image_id in found]
    return out


def rollback(handle: ImageHandle, snap_id: int, progress: Progress | None = None) -> None:
    """HEAD becomes what the snapshot holds, its size included. ENOENT; EROFS, also when another client owns the lock:
    librbd has no message that asks an owner to roll back."""
    handle.require_no_other_owner()
    with handle.exclusive() as header:
        snap = by_id(header, snap_id)
        if header.migrates:
            raise OSError(errno.EBUSY, "the image migrates: it can be rolled back when that is done")
        if snap.size != header.size:
            resize(handle, snap.size)
        header = handle.header
        total = header.layout.objects(snap.size)
        with handle.quiesced():
            absent = _absent(handle, snap_id)
            for objno in range(total):
                report(progress, objno, total)
                if absent is not None and absent[objno]:
                    continue
                with ignoring(errno.ENOENT):
                    handle.data_ctx.write(handle.objects.oid(objno), [Rollback(snap_id)], header.snapc)
            _map_rolled_back(handle, snap_id)
        _copy_lost_overlap(handle, snap_id)
    handle.announce()


def _copy_lost_overlap(handle: ImageHandle, snap_id: int) -> None:
    """A shrink cuts the overlap of HEAD for good; what the snapshot still shows of the parent behind it is copied."""
    header = handle.header
    view = handle.view_at(snap_id)
    end = header.overlap_at(snap_id)
    for offset in range(header.overlap_at(NOSNAP), end, COPY):
        take = min(COPY, end - offset)
        content = read_view(view, offset, take)
        if content != handle.data.read(offset, take):
            handle.data.write(offset, content)


def _absent(handle: ImageHandle, snap_id: int) -> bytes | None:
    """1 for objects that exist neither in HEAD nor in the snapshot, by their maps; None when these cannot tell."""
    head, snap = known_states(handle), known_states(handle, snap_id)
    if head is None or snap is None or len(head) != len(snap):
        return None
    return bytes(a == NONEXISTENT == b for a, b in zip(head, snap, strict=True))


def _map_rolled_back(handle: ImageHandle, snap_id: int) -> None:
    """Existence is the snapshot's. Nothing may be called clean: what is clean in the snapshot's map is clean against
    the snapshot before it, not against the newest. A map of the snapshot that is not to be believed (librbd rebuilds
    HEAD's alone) says nothing: the objects are asked."""
    header = handle.header
    if not header.has(ft.OBJECT_MAP):
        return
    try:
        count = header.layout.objects(header.size)
        states = known_states(handle, snap_id)
        if states is None:
            states = bytearray(EXISTS if exists(handle.data_ctx, handle.objects.oid(n)) else 0 for n in range(count))
        present = bytearray(NONEXISTENT if state == NONEXISTENT else EXISTS for state in states[:count])
        object_map.save(handle.ctx, handle.id, NOSNAP, bytes(present) + bytes(count - len(present)), locked=True)
    except OSError as failure:
        handle.map_failed(failure)
    handle.take_map()


def set_limit(handle: ImageHandle, limit: int) -> None:
    """How many snapshots the image may have; UNLIMITED takes the limit away. ERANGE: it has more already."""
    if handle.read_only:
        raise OSError(errno.EROFS, "the image is open read-only")
    handle.ctx.write(handle.oid, [call("snapshot_set_limit", u64(limit))])

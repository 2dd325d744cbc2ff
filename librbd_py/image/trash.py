"""The trash of a pool: images out of the directory that still exist, and the removal of images."""

from __future__ import annotations

import errno
import time

from librbd_py.format import features as ft
from librbd_py.format import names
from librbd_py.format import trash as ftr
from librbd_py.store.api import NOSNAP, ObjectContext, WriteFull

from . import cls
from .cls import text
from .directory import check_removable, leads_to, require_free, require_name
from .handle import ImageHandle
from .header import header_oid, id_oid, map_oid
from .objects import exists, ignoring, remove
from .progress import Progress
from .resize import trim
from .snapshots import remove as remove_snapshot


def move_to_trash(handle: ImageHandle, source: int, delay: float) -> None:
    """Takes the image out of the directory. The caller owns it (`handle.exclusive`)."""
    ctx, image_id, name = handle.ctx, handle.id, handle.name
    now = time.time()
    spec = ftr.TrashImageSpec(source, name, cls.moment(now), cls.moment(now + delay), ftr.STATE_MOVING)
    with ignoring(errno.ENOENT):
        cls.trash_forget(ctx, image_id)  # left by a move that was cut short
    cls.trash_add(ctx, image_id, spec)
    remove(ctx, id_oid(name))
    with ignoring(errno.ENOENT):
        ctx.exec(names.DIRECTORY, "rbd", "dir_remove_image", text(name) + text(image_id))
    cls.trash_state(ctx, image_id, ftr.STATE_NORMAL, ftr.STATE_MOVING)


def move(ctx: ObjectContext, name: str, delay: float = 0, source: int = ftr.SOURCE_USER) -> None:
    """ENOENT. Called again it goes on where it was cut short."""
    begun = None
    if not exists(ctx, id_oid(name)):
        moving = (source, name, ftr.STATE_MOVING)
        found = cls.trash_list(ctx).items()
        begun = next((key for key, spec in found if (spec.source, spec.name, spec.state) == moving), None)
    with ImageHandle.open(ctx, name if begun is None else None, image_id=begun) as handle:
        handle.name = name
        with handle.exclusive():
            move_to_trash(handle, source, delay)


def restore(ctx: ObjectContext, image_id: str, name: str | None = None, *, migration: bool = False) -> None:
    """Back under its old name or a new one. ENOENT: not in the trash; EEXIST; EINVAL: it is being removed. Called again
    it goes on where it was cut short. `migration`: one that went there because it migrates, and no other."""
    spec = cls.trash_get(ctx, image_id)
    if spec.source == ftr.SOURCE_REMOVING or (spec.source == ftr.SOURCE_MIGRATION) != migration:
        raise OSError(errno.EINVAL, f"image {image_id} is being removed")
    name = name or spec.name
    require_name(name)
    if spec.state != ftr.STATE_RESTORING or not leads_to(ctx, name, image_id):
        require_free(ctx, name)
    cls.trash_state(ctx, image_id, ftr.STATE_RESTORING, spec.state)
    ctx.write(id_oid(name), [WriteFull(text(image_id))])
    with ignoring(errno.EEXIST):
        ctx.write(names.DIRECTORY, [cls.call("dir_add_image", text(name), text(image_id))])
    cls.trash_forget(ctx, image_id)


def remove_from_trash(
    ctx: ObjectContext, image_id: str, *, force: bool = False, progress: Progress | None = None
) -> None:
    """ENOENT; EPERM: its time has not come and not `force`; ENOTEMPTY, EBUSY as for images. Finishes interrupted
    removals."""
    spec = cls.trash_get(ctx, image_id)
    if cls.seconds(spec.deferment_end_time) > time.time() and not force:
        raise OSError(errno.EPERM, f"image {image_id} is kept until its time has come")
    if spec.source == ftr.SOURCE_REMOVING:
        if leads_to(ctx, spec.name, image_id):
            raise OSError(errno.EBUSY, f"image {image_id} is named {spec.name}: remove it by its name")
        with ignoring(errno.ENOENT):
            ctx.exec(names.DIRECTORY, "rbd", "dir_remove_image", text(spec.name) + text(image_id))
    elif spec.state not in (ftr.STATE_NORMAL, ftr.STATE_REMOVING):
        raise OSError(errno.EBUSY, f"image {image_id} is being moved or restored")
    if exists(ctx, header_oid(image_id)):
        with ImageHandle.open(ctx, image_id=image_id) as handle, handle.exclusive():
            if spec.source == ftr.SOURCE_REMOVING:
                for snap_id in list(handle.header.snaps):  # of a copy that was not completed: nobody has seen them
                    remove_snapshot(handle, snap_id)
            check_removable(handle)
            cls.trash_state(ctx, image_id, ftr.STATE_REMOVING, spec.state)
            finish_removal(handle, progress)
    else:
        remove(ctx, map_oid(image_id))
    cls.trash_forget(ctx, image_id)


def finish_removal(handle: ImageHandle, progress: Progress | None) -> None:
    """Data, parent link, header, object map. The image is in the trash and owned; afterwards only its trash entry is
    left."""
    from .flatten import detach

    ctx = handle.ctx
    trim(handle, 0, progress)
    if handle.refresh().clone_of.exists:
        detach(handle)
    has_map = handle.header.has(ft.OBJECT_MAP)
    handle.forget_map()
    if has_map:
        remove(ctx, map_oid(handle.id, NOSNAP))
    remove(ctx, header_oid(handle.id))


def entries(ctx: ObjectContext) -> dict[str, ftr.TrashImageSpec]:
    """id -> record; images that are just being removed are not shown."""
    return {image_id: spec for image_id, spec in cls.trash_list(ctx).items() if spec.source != ftr.SOURCE_REMOVING}


def purge(ctx: ObjectContext, before: float) -> None:
    """Removes everything whose time came before `before` (seconds since 1970). ENOTEMPTY as for images."""
    for image_id, spec in cls.trash_list(ctx).items():
        if spec.source == ftr.SOURCE_REMOVING and leads_to(ctx, spec.name, image_id):
            continue
        if _migrates(ctx, image_id, spec):
            continue
        if cls.seconds(spec.deferment_end_time) < before:
            remove_from_trash(ctx, image_id, force=True)


def _migrates(ctx: ObjectContext, image_id: str, spec: ftr.TrashImageSpec) -> bool:
    """The source of a migration that is not committed: its destination still reads from it."""
    if spec.source == ftr.SOURCE_MIGRATION:
        with ignoring(errno.EINVAL, errno.ENOENT):
            cls.migration(ctx, header_oid(image_id))
            return True
    return False


def purge_to_free(ctx: ObjectContext, wanted: int) -> None:
    """Removes what is in the trash, whose time comes first first, until `wanted` bytes were freed or nothing is left.
    ENOTEMPTY as for images."""
    waiting = sorted(entries(ctx).items(), key=lambda row: (cls.seconds(row[1].deferment_end_time), row[0]))
    for image_id, spec in waiting:
        if wanted <= 0:
            return
        if spec.source != ftr.SOURCE_USER:
            continue
        wanted -= _allocated(ctx, image_id)
        remove_from_trash(ctx, image_id, force=True)


def _allocated(ctx: ObjectContext, image_id: str) -> int:
    """Bytes that the image's own objects hold, without its snapshots'."""
    from .diff import diff_iterate

    total = 0

    def found(offset: int, length: int, data: bool) -> int:
        nonlocal total
        total += length if data else 0
        return 0

    with ImageHandle.open(ctx, image_id=image_id, read_only=True) as handle:
        diff_iterate(handle, 0, handle.header.size, None, found, include_parent=False)
    return total

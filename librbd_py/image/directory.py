"""Images by name in a pool and namespace: create, list, rename, remove. The order of operations is librbd's, so that
what a crash leaves behind is what `rbd` knows how to clean up.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from librbd_py.format import features as ft
from librbd_py.format import names
from librbd_py.format import notify as nf
from librbd_py.format import object_map as fm
from librbd_py.format import trash as ftr
from librbd_py.store.api import Create, ListWatchers, ObjectContext, WriteFull

from . import cls, object_map
from .cls import call, text, u8
from .handle import ImageHandle, name_by_id
from .header import header_oid, id_oid
from .layout import Layout
from .objects import exists, ignoring, remove
from .progress import Progress
from .proxy import perform

DEFAULT_ORDER = 22


@dataclass(frozen=True)
class CreateOptions:
    """What a new image may be told; None leaves it to the defaults."""

    order: int | None = None
    features: int | None = None
    stripe_unit: int | None = None  # bytes
    stripe_count: int | None = None
    data_pool: str | None = None


DEFAULTS = CreateOptions()


@dataclass(frozen=True)
class Plan:
    """Checked options."""

    layout: Layout
    features: int
    striped: bool
    data_pool_id: int | None


def plan(ctx: ObjectContext, size: int, options: CreateOptions) -> Plan:
    """EDOM: order. EINVAL: size, striping, feature combination. ENOSYS: unknown feature. ENOENT: no such data pool."""
    order = options.order or DEFAULT_ORDER
    if not 12 <= order <= 25:
        raise OSError(errno.EDOM, f"object order {order} is not 12 to 25")
    unit, count = options.stripe_unit or 0, options.stripe_count or 0
    if bool(unit) != bool(count):
        raise OSError(errno.EINVAL, "stripe unit and stripe count go together")
    unit, count = unit or 1 << order, count or 1
    if (1 << order) % unit or count >= 1 << 32:
        raise OSError(errno.EINVAL, f"a stripe unit of {unit} bytes does not divide the object size {1 << order}")
    striped = (unit, count) != (1 << order, 1)
    data_pool_id = None if options.data_pool is None else ctx.store.pool_id(options.data_pool)
    if data_pool_id == ctx.pool_id:
        data_pool_id = None
    features = ft.DEFAULT if options.features is None else options.features
    if features & ~ft.ALL:
        raise OSError(errno.ENOSYS, f"unknown feature bits {features & ~ft.ALL:#x}")
    features &= ~(ft.STRIPINGV2 | ft.DATA_POOL | ft.INTERNAL | ft.NON_PRIMARY | ft.DIRTY_CACHE)
    if striped:
        features |= ft.STRIPINGV2
    if data_pool_id is not None:
        features |= ft.DATA_POOL
    features = paired(features)
    if features & ft.OBJECT_MAP and not features & ft.EXCLUSIVE_LOCK:
        raise OSError(errno.EINVAL, "object-map needs exclusive-lock")
    if features & ft.JOURNALING:
        if not features & ft.EXCLUSIVE_LOCK:
            raise OSError(errno.EINVAL, "journaling needs exclusive-lock")
        raise OSError(errno.ENOSYS, "journaling is not supported")
    layout = Layout(order, unit, count)
    check_size(layout, size, features)
    return Plan(layout, features, striped, data_pool_id)


def paired(features: int) -> int:
    """object-map and fast-diff come together; fast-diff alone is dropped."""
    if features & ft.OBJECT_MAP:
        return features | ft.FAST_DIFF
    return features & ~ft.FAST_DIFF


def check_size(layout: Layout, size: int, features: int) -> None:
    """EINVAL: larger than an image, or its object map, may be."""
    if not 0 <= size < 1 << 63:
        raise OSError(errno.EINVAL, f"an image cannot have {size} bytes")
    if features & ft.OBJECT_MAP and layout.objects(size) > fm.MAX_OBJECTS:
        raise OSError(errno.EINVAL, f"{layout.objects(size)} objects are more than an object map may have")


def require_name(name: str) -> None:
    """EINVAL: empty."""
    if not name:
        raise OSError(errno.EINVAL, "an image needs a name")


def require_free(ctx: ObjectContext, name: str) -> None:
    """EEXIST: there is an image (of either format) of that name."""
    if exists(ctx, names.old_header(name)) or exists(ctx, id_oid(name)):
        raise OSError(errno.EEXIST, f"image {name} exists")


def create(ctx: ObjectContext, name: str, size: int, options: CreateOptions = DEFAULTS) -> str:
    """Makes an empty image of `size` bytes and returns its id. EEXIST, and what `plan` raises. ENOENT: no such
    namespace."""
    require_name(name)
    checked = plan(ctx, size, options)
    require_free(ctx, name)
    image_id = names.make_id(ctx.store.client.gid)
    pool = checked.data_pool_id
    prefix = names.data_prefix(image_id, None if pool is None else ctx.pool_id)
    ready = [call("dir_state_assert", u8(0))] if ctx.namespace else []
    ctx.write(names.DIRECTORY, [*ready, call("dir_add_image", text(name), text(image_id))])
    undo: list[Callable[[], object]] = [
        lambda: ctx.exec(names.DIRECTORY, "rbd", "dir_remove_image", text(name) + text(image_id))
    ]
    try:
        ctx.write(id_oid(name), [Create(exclusive=True), call("set_id", text(image_id))])
        undo.append(lambda: remove(ctx, id_oid(name)))
        cls.create_header(
            ctx,
            header_oid(image_id),
            size,
            checked.layout.order,
            checked.features,
            prefix,
            pool,
            (checked.layout.stripe_unit, checked.layout.stripe_count) if checked.striped else None,
        )
        undo.append(lambda: remove(ctx, header_oid(image_id)))
        if checked.features & ft.OBJECT_MAP:
            object_map.resize(ctx, image_id, checked.layout.objects(size), locked=False)
    except OSError:
        for step in reversed(undo):
            with ignoring(errno.ENOENT):
                step()
        raise
    return image_id


def list_images(ctx: ObjectContext) -> list[tuple[str, str]]:
    """(name, id): those of the directory by name, then those whose removal began and has not ended."""
    return [*cls.list_images(ctx).items(), *((spec.name, image_id) for image_id, spec in removals(ctx).items())]


def removals(ctx: ObjectContext) -> dict[str, ftr.TrashImageSpec]:
    """id -> record of the images whose removal began and has not ended."""
    return {image_id: spec for image_id, spec in cls.trash_list(ctx).items() if spec.source == ftr.SOURCE_REMOVING}


def rename(ctx: ObjectContext, source: str, dest: str) -> None:
    """ENOENT, EEXIST, EINVAL (no name)."""
    require_name(dest)
    with ImageHandle.open(ctx, source) as handle:
        rename_open(handle, dest)


def rename_open(handle: ImageHandle, dest: str) -> None:
    """Gives an open image another name. As `rename`."""
    require_name(dest)
    require_free(handle.ctx, dest)
    perform(
        handle, lambda request: nf.Rename(dest, request), lambda: _rename(handle, dest), done_already=errno.EEXIST
    )
    handle.name = dest


def _rename(handle: ImageHandle, dest: str) -> None:
    ctx, source = handle.ctx, name_by_id(handle.ctx, handle.id)
    with handle.exclusive():
        ctx.write(id_oid(dest), [Create(exclusive=True), WriteFull(text(handle.id))])
        try:
            ctx.exec(names.DIRECTORY, "rbd", "dir_rename_image", text(source) + text(dest) + text(handle.id))
        except OSError:
            remove(ctx, id_oid(dest))
            raise
        remove(ctx, id_oid(source))
    handle.announce()


def remove_image(ctx: ObjectContext, name: str, progress: Progress | None = None) -> None:
    """Deletes an image: ENOENT; ENOTEMPTY it has snapshots; EBUSY somebody has it open.

    It is first moved to the trash, so that another `remove_image` finishes a removal that was interrupted.
    """
    from .trash import finish_removal, move_to_trash, remove_from_trash

    if not exists(ctx, id_oid(name)):
        for image_id, spec in removals(ctx).items():
            if spec.name == name:
                remove_from_trash(ctx, image_id, force=True, progress=progress)
                return
    with ImageHandle.open(ctx, name) as handle:
        image_id = handle.id
        with handle.exclusive():
            check_removable(handle)
            move_to_trash(handle, ftr.SOURCE_REMOVING, 0)
            cls.trash_state(ctx, image_id, ftr.STATE_REMOVING, ftr.STATE_NORMAL)
            finish_removal(handle, progress)
    cls.trash_forget(ctx, image_id)


def check_removable(handle: ImageHandle) -> None:
    """ENOTEMPTY, EBUSY, EMLINK (member of a group)."""
    header = handle.refresh()
    if any(not snap.is_trash for snap in header.snaps.values()):
        raise OSError(errno.ENOTEMPTY, f"image {handle.name} has snapshots")
    if other_watchers(handle):
        raise OSError(errno.EBUSY, f"image {handle.name} is open elsewhere")
    if header.snaps:
        raise OSError(errno.ENOTEMPTY, f"image {handle.name} has snapshots in the trash that clones need")
    if cls.group_of(handle.ctx, handle.oid)[0] != -1:
        raise OSError(errno.EMLINK, f"image {handle.name} belongs to a group")


def other_watchers(handle: ImageHandle) -> int:
    """How many watches on the header are not this handle's own."""
    own = handle.control.watch_handle if handle.control is not None else None
    gid = handle.store.client.gid
    rows = handle.ctx.read(handle.oid, [ListWatchers()])[0]
    return sum(1 for row in rows if (row.gid, row.cookie) != (gid, own))

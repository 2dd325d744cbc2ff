"""Images by name in a pool and namespace: create, list, rename, remove. The order of operations is librbd's, so that
what a crash leaves behind is what `rbd` knows how to clean up.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from librbd_py.format import features as ft
from librbd_py.format import names
from librbd_py.format import notify as nf
from librbd_py.format import object_map as fm
from librbd_py.format import trash as ftr
from librbd_py.format.values import dataclass
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
        _finish_naming(ctx, name)
        raise OSError(errno.EEXIST, f"image {name} exists")


def create(
    ctx: ObjectContext, name: str, size: int, options: CreateOptions = DEFAULTS, image_id: str | None = None
) -> str:
    """Makes an empty image of `size` bytes and returns its id: `image_id`, where one is given. EEXIST, and what
    `plan` raises. ENOENT: no such namespace. Cut short it leaves a name that cannot be opened; `remove_image`
    takes that away."""
    require_name(name)
    checked = plan(ctx, size, options)
    require_free(ctx, name)
    image_id = image_id or names.make_id(ctx.store.client.gid)
    ready = [call("dir_state_assert", u8(0))] if ctx.namespace else []
    ctx.write(names.DIRECTORY, [*ready, call("dir_add_image", text(name), text(image_id))])
    with _undoing() as undo:
        undo.append(lambda: _leave_directory(ctx, name, image_id))
        ctx.write(id_oid(name), [Create(exclusive=True), call("set_id", text(image_id))])
        undo.append(lambda: remove(ctx, id_oid(name)))
        _make(ctx, image_id, size, checked, undo)
    return image_id


def create_unnamed(ctx: ObjectContext, name: str, size: int, options: CreateOptions = DEFAULTS) -> str:
    """As `create`, but the image has its name only after `give_name`: for images that are something only when they
    are complete. Until then it is in the trash as one whose removal began, so that `remove_image`, ours or librbd's,
    takes away what a crash left of it."""
    require_name(name)
    checked = plan(ctx, size, options)
    require_free(ctx, name)
    if ctx.namespace:
        ctx.exec(names.DIRECTORY, "rbd", "dir_state_assert", u8(0))
    image_id = names.make_id(ctx.store.client.gid)
    now = cls.moment(time.time())
    cls.trash_add(ctx, image_id, ftr.TrashImageSpec(ftr.SOURCE_REMOVING, name, now, now, ftr.STATE_REMOVING))
    with _undoing() as undo:
        undo.append(lambda: cls.trash_forget(ctx, image_id))
        _make(ctx, image_id, size, checked, undo)
    return image_id


def give_name(ctx: ObjectContext, name: str, image_id: str) -> None:
    """EEXIST: the name was taken meanwhile."""
    ctx.write(id_oid(name), [Create(exclusive=True), call("set_id", text(image_id))])
    with _undoing() as undo:
        undo.append(lambda: remove(ctx, id_oid(name)))
        ctx.write(names.DIRECTORY, [call("dir_add_image", text(name), text(image_id))])
    cls.trash_forget(ctx, image_id)


def _finish_naming(ctx: ObjectContext, name: str) -> None:
    """An image that can be opened by its name, but is not in the directory and still in the trash: `give_name` was cut
    short. (A removal begins with the trash and ends with the directory.)"""
    with ignoring(errno.ENOENT):
        image_id = cls.get_id(ctx, id_oid(name))
        if cls.trash_get(ctx, image_id).source == ftr.SOURCE_REMOVING and not _in_directory(ctx, image_id):
            ctx.write(names.DIRECTORY, [call("dir_add_image", text(name), text(image_id))])
            cls.trash_forget(ctx, image_id)


@contextmanager
def _undoing() -> Iterator[list[Callable[[], object]]]:
    """Takes the steps back, last first, when there is an OSError."""
    undo: list[Callable[[], object]] = []
    try:
        yield undo
    except OSError:
        for step in reversed(undo):
            with ignoring(errno.ENOENT):
                step()
        raise


def _make(ctx: ObjectContext, image_id: str, size: int, checked: Plan, undo: list[Callable[[], object]]) -> None:
    """Header and object map."""
    pool = checked.data_pool_id
    prefix = names.data_prefix(image_id, None if pool is None else ctx.pool_id)
    stripes = (checked.layout.stripe_unit, checked.layout.stripe_count) if checked.striped else None
    undo.append(lambda: remove(ctx, header_oid(image_id)))
    cls.create_header(ctx, header_oid(image_id), size, checked.layout.order, checked.features, prefix, pool, stripes)
    if checked.features & ft.OBJECT_MAP:
        object_map.resize(ctx, image_id, checked.layout.objects(size), locked=False)


def _leave_directory(ctx: ObjectContext, name: str, image_id: str) -> None:
    ctx.exec(names.DIRECTORY, "rbd", "dir_remove_image", text(name) + text(image_id))


def _in_directory(ctx: ObjectContext, image_id: str) -> bool:
    try:
        cls.name_of(ctx, image_id)
    except OSError as failure:
        if failure.errno == errno.ENOENT:
            return False
        raise
    return True


def list_images(ctx: ObjectContext) -> list[tuple[str, str]]:
    """(name, id): those of the directory by name, then those whose removal began and has not ended."""
    return cls.all_images(ctx)


def removals(ctx: ObjectContext) -> dict[str, ftr.TrashImageSpec]:
    """id -> record of the images whose removal began and has not ended. An image that can still be opened by its name
    is none of them, whatever the trash says: the first step of its removal or the last of its creation was cut off."""
    found = cls.trash_list(ctx).items()
    return {
        key: spec for key, spec in found if spec.source == ftr.SOURCE_REMOVING and not leads_to(ctx, spec.name, key)
    }


def leads_to(ctx: ObjectContext, name: str, image_id: str) -> bool:
    """Whether the image can be opened by this name."""
    with ignoring(errno.ENOENT):
        return cls.get_id(ctx, id_oid(name)) == image_id
    return False


def rename(ctx: ObjectContext, source: str, dest: str) -> None:
    """ENOENT, EEXIST, EINVAL (no name). Called again it goes on where it was cut short."""
    require_name(dest)
    with ImageHandle.open(ctx, source) as handle:
        rename_open(handle, dest)
        if leads_to(ctx, source, handle.id):
            remove(ctx, id_oid(source))


def rename_open(handle: ImageHandle, dest: str) -> None:
    """Gives an open image another name. As `rename`."""
    require_name(dest)
    if dest == handle.name or not leads_to(handle.ctx, dest, handle.id):
        require_free(handle.ctx, dest)
    perform(handle, lambda request: nf.Rename(dest, request), lambda: _rename(handle, dest), done_already=errno.EEXIST)
    handle.name = dest


def _rename(handle: ImageHandle, dest: str) -> None:
    ctx, source = handle.ctx, name_by_id(handle.ctx, handle.id)
    with handle.exclusive():
        if not leads_to(ctx, dest, handle.id):
            ctx.write(id_oid(dest), [Create(exclusive=True), WriteFull(text(handle.id))])
        if source != dest:
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
        begun = [image_id for image_id, spec in removals(ctx).items() if spec.name == name]
        for image_id in begun:
            remove_from_trash(ctx, image_id, force=True, progress=progress)
        if begun:
            return
    if _remove_half_made(ctx, name):
        return
    with ImageHandle.open(ctx, name) as handle:
        image_id = handle.id
        with handle.exclusive():
            check_removable(handle)
            move_to_trash(handle, ftr.SOURCE_REMOVING, 0)
            cls.trash_state(ctx, image_id, ftr.STATE_REMOVING, ftr.STATE_NORMAL)
            finish_removal(handle, progress)
    cls.trash_forget(ctx, image_id)


def _remove_half_made(ctx: ObjectContext, name: str) -> bool:
    """Whether there was a name, but no image: its creation was cut short."""
    try:
        image_id = cls.id_in_directory(ctx, name)
        if exists(ctx, header_oid(image_id)):
            return False
        if exists(ctx, id_oid(name)) and cls.get_id(ctx, id_oid(name)) != image_id:
            return False
    except OSError as failure:
        if failure.errno == errno.ENOENT:
            return False
        raise
    remove(ctx, id_oid(name))
    _leave_directory(ctx, name, image_id)
    return True


def check_removable(handle: ImageHandle) -> None:
    """ENOTEMPTY, EBUSY, EMLINK (member of a group). Snapshots in the trash that no clone needs go now."""
    from .snapshots import forget_lost_children
    from .snapshots import remove as remove_snapshot

    for snap in list(handle.refresh().snaps.values()):
        if snap.is_trash and not forget_lost_children(handle, snap.id):
            remove_snapshot(handle, snap.id)
    header = handle.refresh()
    if any(not snap.is_trash for snap in header.snaps.values()):
        raise OSError(errno.ENOTEMPTY, f"image {handle.name} has snapshots")
    if other_watchers(handle):
        raise OSError(errno.EBUSY, f"image {handle.name} is open elsewhere")
    if cls.group_of(handle.ctx, handle.oid)[0] != -1:
        raise OSError(errno.EMLINK, f"image {handle.name} belongs to a group")
    if header.snaps:
        raise OSError(errno.ENOTEMPTY, f"image {handle.name} has snapshots in the trash that clones need")


def other_watchers(handle: ImageHandle) -> int:
    """How many watches on the header are not this handle's own."""
    own = handle.control.watch_handle if handle.control is not None else None
    gid = handle.store.client.gid
    rows = handle.ctx.read(handle.oid, [ListWatchers()])[0]
    return sum(1 for row in rows if (row.gid, row.cookie) != (gid, own))

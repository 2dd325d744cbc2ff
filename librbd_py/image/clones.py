"""Clones: making them, finding them."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from librbd_py.format import features as ft
from librbd_py.format import header as fh
from librbd_py.format import names
from librbd_py.format.header import ChildImageSpec, ParentImageSpec
from librbd_py.format.values import dataclass, replace
from librbd_py.store.api import ObjectContext

from . import cls
from .cls import call, text, u64
from .directory import DEFAULTS, CreateOptions, create_unnamed, give_name, require_free, require_name
from .handle import ImageHandle, announce, name_by_id
from .header import Header, header_oid
from .objects import ignoring
from .snapshots import v1_children
from .trash import remove_from_trash


@dataclass(frozen=True)
class Child:
    """A clone, for people. `name` may be one it has in the trash."""

    pool: str
    namespace: str
    name: str
    id: str
    trash: bool


def clone(
    parent_ctx: ObjectContext,
    parent_name: str,
    snap_name: str | int,
    ctx: ObjectContext,
    name: str,
    options: CreateOptions = DEFAULTS,
    *,
    clone_format: int = 2,
    parent_id: str | None = None,
) -> str:
    """A copy-on-write child of a snapshot; returns its id. Format 1 needs a protected snapshot (EINVAL). A snapshot
    given by its id may be a group's or a mirror's; one in the trash is EINVAL.

    ENOENT, EEXIST; ENOSYS: features without layering; what `directory.create` raises.
    """
    require_name(name)
    by_name = None if parent_id else parent_name
    with ImageHandle.open(parent_ctx, by_name, image_id=parent_id, snapshot=snap_name, read_only=True) as parent:
        header = parent.header
        if not header.has(ft.LAYERING):
            raise OSError(errno.EINVAL, f"image {parent_name} has no layering")
        if header.snaps[parent.snap_id].is_trash:
            raise OSError(errno.EINVAL, "a snapshot in the trash has no new clones")
        if clone_format == 1 and header.snaps[parent.snap_id].protection != fh.PROTECTION_PROTECTED:
            raise OSError(errno.EINVAL, f"snapshot {snap_name!r} is not protected")
        require_free(ctx, name)
        if clone_format == 1 and parent_ctx.namespace != ctx.namespace:
            raise OSError(errno.EXDEV, "clones across namespaces need format 2")
        image_id = create_unnamed(ctx, name, header.size_at(parent.snap_id), inherited(header, options))
        try:
            attach(parent, ctx, image_id, clone_format)
            give_name(ctx, name, image_id)
        except OSError:
            remove_from_trash(ctx, image_id, force=True)
            raise
    return image_id


def inherited(header: Header, options: CreateOptions) -> CreateOptions:
    """What the child takes from its parent where nothing was asked for. ENOSYS: features without layering."""
    if options.features is not None and not options.features & ft.LAYERING:
        raise OSError(errno.ENOSYS, "a clone needs layering")
    order = options.order or header.order
    unit, count = options.stripe_unit, options.stripe_count
    if not unit and not count:
        unit, count = header.layout.stripe_unit, header.layout.stripe_count
    if options.features is None:
        features = (header.features & ~ft.INTERNAL) | ft.LAYERING
        # What the parent may have lost or never had, a new image has by default.
        return replace(options, order=order, stripe_unit=unit, stripe_count=count, features=features | ft.DEFAULT)
    return replace(options, order=order, stripe_unit=unit, stripe_count=count)


def attach(
    parent: ImageHandle,
    ctx: ObjectContext,
    image_id: str,
    clone_format: int,
    overlap: int | None = None,
    *,
    metadata: bool = True,
) -> None:
    """Ties a new, empty image to the snapshot `parent` is open at, of which it sees `overlap` bytes (None: all). It
    gets the parent's `metadata`. In another namespace than the parent's nobody looks for clones of format 1, so it is
    one of format 2 there."""
    if parent.ctx.namespace != ctx.namespace:
        clone_format = 2
    header = parent.header
    spec = ParentImageSpec(parent.ctx.pool_id, parent.ctx.namespace, parent.id, parent.snap_id)
    size = header.size_at(parent.snap_id)
    if overlap is not None:
        size = min(size, overlap)
    oid = header_oid(image_id)
    if size:
        ctx.write(oid, [call("parent_attach", cls.encoded(spec), u64(size))])
    rows = cls.metadata(parent.ctx, parent.oid) if metadata else {}
    if rows:
        ctx.exec(oid, "rbd", "metadata_set", cls.encode_metadata(rows))
    if not size:
        return
    if clone_format == 1:
        key = cls.parent_key(spec)
        ctx.exec(names.CHILDREN, "rbd", "add_child", key + text(image_id))
        if cls.protection(parent.ctx, parent.oid, spec.snap_id) != fh.PROTECTION_PROTECTED:
            raise OSError(errno.EINVAL, "the snapshot is no longer protected")
        return
    ctx.exec(oid, "rbd", "op_features_set", u64(ft.OP_CLONE_CHILD) + u64(ft.OP_CLONE_CHILD))
    child = ChildImageSpec(ctx.pool_id, image_id, ctx.namespace)
    parent.ctx.exec(parent.oid, "rbd", "child_attach", u64(spec.snap_id) + cls.encoded(child))
    with ignoring(errno.ENOENT):
        announce(parent.ctx, parent.oid)


def children_of(handle: ImageHandle, snap_id: int | None = None) -> list[ChildImageSpec]:
    """Clones of one snapshot, or of all: ascending by pool, namespace and id, without doubles."""
    header = handle.header
    found: set[ChildImageSpec] = set()
    for number in header.snaps if snap_id is None else [snap_id]:
        found.update(cls.children(handle.ctx, handle.oid, number))
        found.update(v1_children(handle, number))
    return sorted(found, key=lambda child: child.sort_key)


def describe(handle: ImageHandle, child: ChildImageSpec) -> Child:
    ctx = handle.store.open(child.pool_id, child.pool_namespace)
    pool = next((row.name for row in handle.store.pools() if row.pool_id == child.pool_id), "")
    trashed = False
    with ignoring(errno.ENOENT):
        cls.trash_get(ctx, child.image_id)
        trashed = True
    return Child(pool, child.pool_namespace, name_by_id(ctx, child.image_id), child.image_id, trashed)


def descendants_of(handle: ImageHandle, snap_id: int | None = None) -> Iterator[ChildImageSpec]:
    """Clones, their clones and so on."""
    seen: set[ChildImageSpec] = set()
    queue = children_of(handle, snap_id)
    while queue:
        child = queue.pop(0)
        if child in seen:
            continue
        seen.add(child)
        yield child
        with ignoring(errno.ENOENT):
            ctx = handle.store.open(child.pool_id, child.pool_namespace)
            with ImageHandle.open(ctx, image_id=child.image_id, read_only=True) as opened:
                queue += children_of(opened)

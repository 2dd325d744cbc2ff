"""What points at an image that migrates: its clones and its group."""

from __future__ import annotations

import errno

from librbd_py.format import features as ft
from librbd_py.format import header as fh
from librbd_py.format import names
from librbd_py.format.header import ChildImageSpec, ParentImageSpec
from librbd_py.format.values import replace
from librbd_py.store.api import ObjectContext, OmapCmp, OmapGetByKeys, OmapSet

from .. import cls, group
from ..cls import text, u64
from ..handle import announce
from ..header import Header, header_oid, load
from ..objects import ignoring
from .records import Side

PARENT_KEY = b"parent"


def move_children(before: Header, source: Side, after: Header, dest: Side) -> None:
    """The clones of `source`'s snapshots become those of `dest`'s of the same names. Called again, also the other way
    round, it goes on where it was cut short: a clone is listed at both until it points to the one it shall."""
    for snap in before.snaps.values():
        same = after.snap_named(snap.name, fh.NAMESPACE_USER)
        if same is None:
            continue
        old = ParentImageSpec(source.ctx.pool_id, source.ctx.namespace, source.id, snap.id)
        new = ParentImageSpec(dest.ctx.pool_id, dest.ctx.namespace, dest.id, same.id)
        for child in _children(source, snap.id, old):
            _move_child(source, old, dest, new, child)


def _children(side: Side, snap_id: int, spec: ParentImageSpec) -> list[ChildImageSpec]:
    found = cls.children(side.ctx, side.oid, snap_id)
    for pool in side.ctx.store.pools():
        with ignoring(errno.ENOENT):
            ctx = side.ctx.store.open(pool.pool_id, side.ctx.namespace)
            rows = cls.v1_children(ctx, spec)
            found += [ChildImageSpec(pool.pool_id, image_id, side.ctx.namespace) for image_id in rows]
    return found


def _move_child(source: Side, old: ParentImageSpec, dest: Side, new: ParentImageSpec, child: ChildImageSpec) -> None:
    ctx = source.ctx.store.open(child.pool_id, child.pool_namespace)
    oid = header_oid(child.image_id)
    try:
        header = load(ctx, child.image_id, read_only=True, alone=True)
    except OSError as failure:
        if failure.errno != errno.ENOENT:
            raise
        return  # listed, and gone
    if header.clone_of not in (old, new):
        return  # listed by mistake: a crash left it
    was_second = bool(header.op_features & ft.OP_CLONE_CHILD)
    # Nobody looks for clones of format 1 in another namespace than the parent's.
    second = was_second or new.pool_namespace != child.pool_namespace
    with ignoring(errno.EEXIST):
        if second:
            dest.ctx.exec(dest.oid, "rbd", "child_attach", u64(new.snap_id) + cls.encoded(child))
        else:
            ctx.exec(names.CHILDREN, "rbd", "add_child", cls.parent_key(new) + text(child.image_id))
    if second and not was_second:
        ctx.exec(oid, "rbd", "op_features_set", u64(ft.OP_CLONE_CHILD) + u64(ft.OP_CLONE_CHILD))
    if header.clone_of == old:
        _point(source, ctx, oid, old, new)
    with ignoring(errno.ENOENT):  # cut short, one that became of format 2 may be in either list
        source.ctx.exec(source.oid, "rbd", "child_detach", u64(old.snap_id) + cls.encoded(child))
    with ignoring(errno.ENOENT):
        ctx.exec(names.CHILDREN, "rbd", "remove_child", cls.parent_key(old) + text(child.image_id))
    announce(ctx, oid)


def _point(source: Side, ctx: ObjectContext, oid: str, old: ParentImageSpec, new: ParentImageSpec) -> None:
    """One step for HEAD and all snapshots: they share the record. ESTALE: it has another parent by now."""
    row = ctx.read(oid, [OmapGetByKeys([PARENT_KEY])])[0].get(PARENT_KEY)
    held = fh.Parent.decode(row) if row is not None else None
    if row is None or held is None or held.spec != old:
        raise OSError(errno.ESTALE, f"{oid} is no clone of image {source.name} any more")
    ctx.write(oid, [OmapCmp({PARENT_KEY: (row, "eq")}), OmapSet({PARENT_KEY: replace(held, spec=new).encode()})])


def move_group(source: Side, dest: Side) -> None:
    """The destination takes the source's place in its group, if it is in one. ENOENT: the group is gone."""
    pool_id, group_id = cls.group_of(source.ctx, source.oid)
    if pool_id == -1:
        # Cut short, its place may be the destination's already, and only the group still know of it.
        pool_id, group_id = cls.group_of(dest.ctx, dest.oid)
        if pool_id != -1:
            ctx = dest.ctx.store.open(pool_id, dest.ctx.namespace)
            group.drop_image(ctx, group_id, source.ctx.pool_id, source.id)
        return
    ctx = source.ctx.store.open(pool_id, source.ctx.namespace)
    if source.ctx.namespace != dest.ctx.namespace:
        raise OSError(errno.EINVAL, "a group and its images are in one namespace")
    group.replace_image(ctx, group_id, (source.ctx.pool_id, source.id), (dest.ctx.pool_id, dest.id))

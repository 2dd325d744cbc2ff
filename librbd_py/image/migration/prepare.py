"""The first step of a migration: the destination takes the source's place.

In librbd's order: source to the trash, the source's record, an empty destination, its snapshots and metadata, its
record, the group, both records say prepared, the clones. Wherever it is cut short, `abort` puts everything back.
"""

from __future__ import annotations

import errno

from librbd_py.format import features as ft
from librbd_py.format import header as fh
from librbd_py.format import names
from librbd_py.format import trash as ftr
from librbd_py.format.header import (
    MIGRATION_DESTINATION,
    MIGRATION_PREPARED,
    MIGRATION_PREPARING,
    MIGRATION_SOURCE,
    MigrationSpec,
)
from librbd_py.format.logs import logger
from librbd_py.format.values import replace
from librbd_py.store.api import NOSNAP, ObjectContext

from .. import cls, snapshots
from ..clones import attach, children_of
from ..directory import DEFAULTS, CreateOptions, create, other_watchers, plan, require_free, require_name
from ..handle import ImageHandle, announce
from ..header import Header, header_oid
from ..quiesce import SKIP_QUIESCE
from ..resize import resize
from ..trash import move_to_trash
from .finish import abort_pair
from .records import Pair, Side, find, set_record, set_state
from .relink import move_children, move_group

log = logger("librbd_py.image")


def prepare(
    ctx: ObjectContext,
    name: str,
    dest_ctx: ObjectContext,
    dest_name: str = "",
    options: CreateOptions = DEFAULTS,
    *,
    flatten: bool = False,
) -> None:
    """From here on the image is `dest_name` in `dest_ctx` (by default of the same name). What `options` does not say is
    the source's. Both are of one store.

    ENOENT; EBUSY: it is open, or has snapshots that are no user's; EEXIST: there is an image of that name; EROFS: it
    migrates already; EINVAL: it has clones, and the destination would have no layering, or its parent's snapshot is in
    the trash; and what creating an image raises. Whatever fails leaves everything as it was.
    """
    dest_name = dest_name or name
    require_name(dest_name)
    with ImageHandle.open(ctx, name) as handle:
        if other_watchers(handle):
            raise OSError(errno.EBUSY, f"image {name} is open elsewhere")
        header = handle.header
        chosen = _options(header, options)
        checked = plan(dest_ctx, header.size, chosen)
        _check_snapshots(handle, checked.features)
        if header.clone_of.exists and not flatten:
            _check_parent(handle)
        if (dest_ctx.pool_id, dest_ctx.namespace, dest_name) != (ctx.pool_id, ctx.namespace, name):
            require_free(dest_ctx, dest_name)
        dest = Side(dest_ctx, dest_name, names.make_id(ctx.store.client.gid), None)
        here = MigrationSpec(
            MIGRATION_SOURCE,
            dest_ctx.pool_id,
            dest_ctx.namespace,
            dest_name,
            dest.id,
            flatten=flatten,
            state=MIGRATION_PREPARING,
        )
        with handle.exclusive():
            handle.alone = True
            move_to_trash(handle, ftr.SOURCE_MIGRATION, 0)
            source = Side(ctx, name, handle.id, here)
            try:
                set_record(source, here)
                handle.announce()
                _make(handle, source, dest, chosen, flatten)
            except OSError as failure:
                _undo(handle, Pair(source, dest, here), failure)
                raise


def _undo(handle: ImageHandle, pair: Pair, failure: OSError) -> None:
    try:
        again = find(pair.source.ctx, pair.source.name) if pair.source is not None else pair
        abort_pair(again, None, handle)
    except OSError as problem:
        log.warning("image %s: preparing its migration failed (%s), and so did putting it back: %s; `rbdpy migration "
                    "abort` does it", pair.spec.image_name, failure, problem)  # fmt: skip


def _options(header: Header, options: CreateOptions) -> CreateOptions:
    """ENOSYS: unknown features."""
    features = header.features if options.features is None else options.features
    if features & ~ft.ALL:
        raise OSError(errno.ENOSYS, f"unknown feature bits {features & ~ft.ALL:#x}")
    unit, count = header.layout.stripe_unit, header.layout.stripe_count
    return replace(
        options,
        order=options.order or header.order,
        features=features,
        stripe_unit=unit if options.stripe_unit is None else options.stripe_unit,
        stripe_count=count if options.stripe_count is None else options.stripe_count,
    )


def _check_snapshots(handle: ImageHandle, features: int) -> None:
    for snap in handle.header.snaps.values():
        if not snap.is_user:
            what = "needed by clones" if snap.is_trash else "of a group or a mirror"
            raise OSError(errno.EBUSY, f"image {handle.name} has snapshots {what}, which do not migrate")
    if handle.header.has(ft.LAYERING) and not features & ft.LAYERING and children_of(handle):
        raise OSError(errno.EINVAL, "the image has clones, and the destination would have no layering")


def _check_parent(handle: ImageHandle) -> None:
    """A snapshot that waits in the trash for its clones to go takes no new ones. EINVAL, as of librbd."""
    spec = handle.header.clone_of
    parent = handle.store.open(spec.pool_id, spec.pool_namespace)
    if cls.read_snapshots(parent, header_oid(spec.image_id), [spec.snap_id])[0].is_trash:
        raise OSError(errno.EINVAL, "the parent's snapshot is in the trash: the image migrates flattened only")


def _make(handle: ImageHandle, source: Side, dest: Side, options: CreateOptions, flatten: bool) -> None:
    header = handle.header
    snaps = [*header.snaps.values()]
    first = snaps[0].id if snaps else NOSNAP
    create(dest.ctx, dest.name, header.size_at(first), options, dest.id)
    with ImageHandle.open(dest.ctx, image_id=dest.id) as made:
        made.name = dest.name
        with made.exclusive():
            if header.clone_of.exists and not flatten:
                _tie(made, header, first)
            seqs = _make_snapshots(made, header)
            _size_and_overlap(made, header, NOSNAP)
            metadata = cls.metadata(handle.ctx, handle.oid)
            if metadata:
                dest.ctx.exec(dest.oid, "rbd", "metadata_set", cls.encode_metadata(metadata))
            spec = MigrationSpec(
                MIGRATION_DESTINATION,
                source.ctx.pool_id,
                source.ctx.namespace,
                source.name,
                source.id,
                seqs,
                overlap=header.size,
                flatten=flatten,
                state=MIGRATION_PREPARING,
            )
            made.alone = True  # this handle has seen it without its source all the time
            set_record(dest, spec)
            move_group(source, dest)
            set_state(source, MIGRATION_PREPARED)
            set_state(dest, MIGRATION_PREPARED)
            move_children(header, source, made.refresh(), dest)
        made.announce()


def _tie(made: ImageHandle, header: Header, first: int) -> None:
    """To the parent that the source is a clone of."""
    spec = header.clone_of
    overlap = header.overlap_at(first)
    if not overlap:
        return
    ctx = made.store.open(spec.pool_id, spec.pool_namespace)
    clone_format = 2 if header.op_features & ft.OP_CLONE_CHILD else 1
    with ImageHandle.open(ctx, image_id=spec.image_id, snapshot=spec.snap_id, read_only=True) as parent:
        attach(parent, made.ctx, made.id, clone_format, overlap, metadata=False)
    made.changed()


def _make_snapshots(made: ImageHandle, header: Header) -> dict[int, int]:
    """Of the same names, sizes and protection. The source's ids -> the destination's."""
    seqs = {}
    for snap in header.snaps.values():
        _size_and_overlap(made, header, snap.id)
        seqs[snap.id] = snapshots.create(made, snap.name, flags=SKIP_QUIESCE)
        if snap.protection != fh.PROTECTION_UNPROTECTED:
            snapshots.protect(made, snap.name)
    return seqs


def _size_and_overlap(made: ImageHandle, header: Header, snap_id: int) -> None:
    """As the source at this snapshot. An overlap only shrinks, and only with the size."""
    overlap, size = header.overlap_at(snap_id), header.size_at(snap_id)
    if made.header.overlap_at(NOSNAP) > overlap and made.header.size > overlap:
        resize(made, overlap)
    if made.header.size != size:
        resize(made, size)
    announce(made.ctx, made.oid)

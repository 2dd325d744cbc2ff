"""Copies of images: content only, or with snapshots."""

from __future__ import annotations

from collections.abc import Iterator

from librbd_py.format import features as ft
from librbd_py.format.header import PROTECTION_UNPROTECTED
from librbd_py.store.api import NOSNAP, ObjectContext

from . import cls, snapshots
from .ahead import at_once, in_order
from .clones import attach, inherited
from .content import read_view
from .diff import changed
from .directory import DEFAULTS, CreateOptions, create_unnamed, give_name
from .handle import ImageHandle
from .header import header_oid
from .io import before_write
from .progress import Progress, report
from .resize import resize
from .streams import is_zero
from .trash import remove_from_trash

CHUNK = 4 << 20  # bytes read and written at once
ALONE = 2 << 20  # where no parent shows through, so that part of an object needs no copy of the rest: twice as fast


def copy(
    source: ImageHandle,
    ctx: ObjectContext,
    name: str,
    options: CreateOptions = DEFAULTS,
    progress: Progress | None = None,
) -> str:
    """A new image with the content `source` is open at; no snapshots, no parent. Returns its id. EEXIST, and what
    `directory.create` raises."""
    header = source.header
    size = header.size_at(source.snap_id)
    image_id = create_unnamed(ctx, name, size, _options(source, options))
    try:
        with ImageHandle.open(ctx, image_id=image_id) as dest:
            metadata = cls.metadata(source.ctx, source.oid)
            if metadata:
                ctx.exec(dest.oid, "rbd", "metadata_set", cls.encode_metadata(metadata))
            copy_range(source, dest, None, progress)
            dest.data.flush()
        give_name(ctx, name, image_id)
    except BaseException:
        remove_from_trash(ctx, image_id, force=True)
        raise
    return image_id


def deep_copy(
    source: ImageHandle,
    ctx: ObjectContext,
    name: str,
    options: CreateOptions = DEFAULTS,
    *,
    flatten: bool = False,
    progress: Progress | None = None,
) -> str:
    """A new image with content, user snapshots and, unless `flatten` or the parent's snapshot is in the trash, the
    parent. Open at a snapshot, the source is copied as far as that one. Returns its id."""
    header = source.header
    before = source.snap_id
    order = [snap for snap in header.snaps.values() if snap.is_user and snap.id <= before]
    last_size = header.size_at(before)
    keeps_parent = not flatten and _has_parent_throughout(source, [snap.id for snap in order], before)
    image_id = create_unnamed(ctx, name, order[0].size if order else last_size, _options(source, options))
    try:
        with ImageHandle.open(ctx, image_id=image_id) as dest:
            if keeps_parent:
                _same_parent(source, dest, header.overlap_at(order[0].id if order else before))
            metadata = cls.metadata(source.ctx, source.oid)
            if metadata:
                ctx.exec(dest.oid, "rbd", "metadata_set", cls.encode_metadata(metadata))
            last: int | None = None
            for snap in order:
                if dest.header.size != snap.size:
                    resize(dest, snap.size)
                source.set_snapshot(snap.id)
                _copy_changes(source, dest, last, keeps_parent, None)
                snapshots.create(dest, snap.name)
                if snap.protection != PROTECTION_UNPROTECTED:
                    snapshots.protect(dest, snap.name)
                last = snap.id
            source.set_snapshot(None if before == NOSNAP else before)
            if dest.header.size != last_size:
                resize(dest, last_size)
            if last is None or last != before:
                _copy_changes(source, dest, last, keeps_parent, progress)
            dest.data.flush()
        give_name(ctx, name, image_id)
    except BaseException:
        source.set_snapshot(None if before == NOSNAP else before)
        remove_from_trash(ctx, image_id, force=True)
        raise
    return image_id


def _copy_changes(
    source: ImageHandle, dest: ImageHandle, last: int | None, keeps_parent: bool, progress: Progress | None
) -> None:
    if keeps_parent and last is None:
        _copy_over_parent(source, dest, progress)
    else:
        copy_range(source, dest, last, progress)


def _has_parent_throughout(source: ImageHandle, snap_ids: list[int], end: int) -> bool:
    """A parent that some snapshot does not need any more, after a flatten, is not worth keeping for the others."""
    throughout = all(source.header.overlap_at(snap_id) for snap_id in (*snap_ids, end))
    return throughout and not source.header.migrates and _parent_takes_clones(source)


def _parent_takes_clones(source: ImageHandle) -> bool:
    spec = source.header.parent
    ctx = source.store.open(spec.pool_id, spec.pool_namespace)
    return not cls.read_snapshots(ctx, header_oid(spec.image_id), [spec.snap_id])[0].is_trash


def _same_parent(source: ImageHandle, dest: ImageHandle, overlap: int) -> None:
    spec = source.header.parent
    ctx = source.store.open(spec.pool_id, spec.pool_namespace)
    with ImageHandle.open(ctx, image_id=spec.image_id, snapshot=spec.snap_id, read_only=True) as parent:
        attach(
            parent,
            dest.ctx,
            dest.id,
            2 if source.header.op_features & ft.OP_CLONE_CHILD else 1,
            overlap,
        )
    dest.changed()


def _copy_over_parent(source: ImageHandle, dest: ImageHandle, progress: Progress | None) -> None:
    """Both show the same parent: writes where they differ. Reads all, because an empty object of the source hides
    the parent as much as a full one."""
    view = source.view_at(source.snap_id)
    before_write(dest)
    for offset in range(0, view.size, CHUNK):
        report(progress, offset, view.size)
        take = min(CHUNK, view.size - offset)
        content = read_view(view, offset, take)
        if content != dest.data.read(offset, take):
            if content.strip(b"\0"):
                dest.data.write(offset, content)
            else:
                dest.data.write_zeroes(offset, take)


def _options(source: ImageHandle, options: CreateOptions) -> CreateOptions:
    chosen = options
    if chosen.features is None:
        header = source.header
        chosen = CreateOptions(
            options.order, header.features & ~ft.INTERNAL, options.stripe_unit, options.stripe_count, options.data_pool
        )
    if not chosen.features or not chosen.features & ft.LAYERING:
        return chosen
    return inherited(source.header, chosen)


def copy_range(
    source: ImageHandle,
    dest: ImageHandle,
    from_snapshot: int | None,
    progress: Progress | None,
) -> None:
    """Writes into `dest` what changed in `source` since the snapshot."""
    total = source.header.size_at(source.snap_id)
    if not total:
        return
    before_write(dest)
    chunk = CHUNK if dest.header.parent.exists else ALONE

    def pieces() -> Iterator[tuple[int, int, bool]]:
        for offset, length, data in changed(source, from_snapshot):
            end = offset + length
            while offset < end:
                take = min(chunk - offset % chunk, end - offset)
                yield offset, take, data
                offset += take

    def move(piece: tuple[int, int, bool]) -> None:
        offset, take, data = piece
        content = source.data.read(offset, take) if data else b""
        if not is_zero(content):
            dest.data.write(offset, content)
        elif from_snapshot is not None:
            dest.data.write_zeroes(offset, take)

    for (offset, _, _), _ in in_order(pieces(), move, min(at_once(source), at_once(dest))):
        report(progress, offset, total)
    report(progress, total, total)

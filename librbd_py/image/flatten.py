"""Cutting a clone loose from its parent."""

from __future__ import annotations

import errno

from librbd_py.format import features as ft
from librbd_py.format.object_map import EXISTS, NONEXISTENT
from librbd_py.store.api import NOSNAP

from . import object_map
from .handle import ImageHandle
from .map_check import snapset_of, version_at
from .objects import ignoring
from .progress import Progress, report
from .snapshots import detach_child


def flatten(handle: ImageHandle, progress: Progress | None = None) -> None:
    """Copies what is still the parent's and drops the link. EINVAL: no parent; EROFS, also when set to a snapshot.

    With deep-flatten the snapshots are cut loose too; without it they keep the parent until the last of them goes.
    """
    if not handle.read_only and not handle.header.head_has_parent:
        raise OSError(errno.EINVAL, "the image has no parent")
    with handle.exclusive() as header:
        overlap = header.overlap_at(NOSNAP)
        total = header.layout.objects(overlap)
        for objno in range(total):
            report(progress, objno, total)
            handle.data.copyup(objno)
        handle.data.flush()
        if header.snaps and header.has(ft.OBJECT_MAP):
            maps_of_snapshots(handle)
        detach(handle)
    handle.announce()


def maps_of_snapshots(handle: ImageHandle) -> None:
    """What was copied up belongs to every snapshot: their object maps learn of it before the link that explains the
    difference is gone."""
    header = handle.header
    total = max(header.layout.objects(header.overlap_at(snap_id)) for snap_id in (NOSNAP, *header.snaps))
    maps = {}
    for snap_id in header.snaps:
        with ignoring(errno.ENOENT):
            maps[snap_id] = object_map.load(handle.ctx, handle.id, snap_id)
    for objno in range(total):
        unknown = [snap_id for snap_id in maps if objno < len(maps[snap_id]) and maps[snap_id][objno] == NONEXISTENT]
        snapset = snapset_of(handle, objno) if unknown else None
        for snap_id in unknown:
            if snapset is not None and version_at(snapset, snap_id) is not None:
                maps[snap_id][objno] = EXISTS
    for snap_id, states in maps.items():
        object_map.save(handle.ctx, handle.id, snap_id, states)


def detach(handle: ImageHandle) -> None:
    """Ends the link of HEAD to its parent; of the child to the parent when no snapshot needs it either."""
    before = handle.header
    with handle.quiesced():
        with ignoring(errno.ENOENT):
            handle.ctx.exec(handle.oid, "rbd", "parent_detach")
        handle.refresh()
    detach_child(handle, before)


def flatten_children(handle: ImageHandle, snap_id: int) -> None:
    """Flattens every clone of a snapshot."""
    from .clones import children_of

    for child in children_of(handle, snap_id):
        ctx = handle.store.open(child.pool_id, child.pool_namespace)
        with ImageHandle.open(ctx, image_id=child.image_id) as opened:
            flatten(opened)
    handle.refresh()

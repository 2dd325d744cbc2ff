"""Building object maps from what exists, and comparing the two."""

from __future__ import annotations

import errno

from librbd_py.format import features as ft
from librbd_py.format import notify as nf
from librbd_py.format.object_map import EXISTS, EXISTS_CLEAN, MAX_OBJECTS, NONEXISTENT
from librbd_py.store.api import NOSNAP, SNAPDIR, ListSnaps, SnapSet

from . import object_map
from .handle import ImageHandle
from .progress import Progress, report
from .proxy import perform

BOTH_INVALID = ft.FLAG_OBJECT_MAP_INVALID | ft.FLAG_FAST_DIFF_INVALID


def version_at(snapset: SnapSet, snap_id: int) -> int | None:
    """Which version of an object a snapshot (or HEAD) sees: a clone id, NOSNAP for the head; None: it did not exist."""
    head = any(clone.clone_id == NOSNAP for clone in snapset.clones)
    if snap_id == NOSNAP:
        return NOSNAP if head else None
    for clone in snapset.clones:
        if clone.clone_id != NOSNAP and snap_id in clone.snaps:
            return clone.clone_id
    if head and snap_id > snapset.seq:
        return NOSNAP
    return None


def snapset_of(handle: ImageHandle, objno: int) -> SnapSet | None:
    """None: no version of the object exists."""
    try:
        found: SnapSet = handle.data_ctx.read(handle.objects.oid(objno), [ListSnaps()], SNAPDIR)[0]
    except OSError as failure:
        if failure.errno == errno.ENOENT:
            return None
        raise
    return found


def states_of(handle: ImageHandle, progress: Progress | None = None) -> dict[int, bytearray]:
    """The maps of every snapshot and of HEAD (NOSNAP) as they should be. An object is clean when the same version
    serves the snapshot before. EFBIG: more objects than a map may have, so the size is damaged."""
    header = handle.header
    order = [*header.snaps, NOSNAP]
    if max(header.layout.objects(header.size_at(snap_id)) for snap_id in order) > MAX_OBJECTS:
        raise OSError(errno.EFBIG, f"an object map has {MAX_OBJECTS} objects at most")
    maps = {snap_id: bytearray(header.layout.objects(header.size_at(snap_id))) for snap_id in order}
    total = max(len(states) for states in maps.values())
    for objno in range(total):
        report(progress, objno, total)
        snapset = snapset_of(handle, objno)
        if snapset is None:
            continue
        before: int | None = None
        for snap_id in order:
            version = version_at(snapset, snap_id)
            if version is not None and objno < len(maps[snap_id]):
                maps[snap_id][objno] = EXISTS_CLEAN if version == before else EXISTS
            before = version
    return maps


def rebuild(handle: ImageHandle, progress: Progress | None = None) -> None:
    """Writes all maps anew and clears the invalid flags; when the image is open at a snapshot, that one's alone.
    EINVAL: the image has none; EROFS."""
    if handle.read_only:
        raise OSError(errno.EROFS, "the image is open read-only")
    if not handle.header.has(ft.OBJECT_MAP):
        raise OSError(errno.EINVAL, "the image has no object map")
    if handle.snap_id == NOSNAP:
        perform(handle, nf.RebuildObjectMap, lambda: _rebuild(handle, progress), progress)
        return
    # What changes the map of a snapshot later, a copy-up, does so without the lock, so this needs none either.
    states = states_of(handle, progress)[handle.snap_id]
    object_map.save(handle.ctx, handle.id, handle.snap_id, states)
    object_map.set_flags(handle.ctx, handle.oid, handle.snap_id, 0, BOTH_INVALID)
    handle.changed()


def _rebuild(handle: ImageHandle, progress: Progress | None) -> None:
    with handle.exclusive(), handle.quiesced():
        for snap_id, states in states_of(handle, progress).items():
            if snap_id == NOSNAP:
                object_map.lock(handle.ctx, handle.id)
            object_map.save(handle.ctx, handle.id, snap_id, states, locked=snap_id == NOSNAP)
            object_map.set_flags(handle.ctx, handle.oid, snap_id, 0, BOTH_INVALID)
        handle.refresh()
        handle.take_map()
    handle.announce()


def check(handle: ImageHandle, progress: Progress | None = None) -> bool:
    """Is the map of what the handle shows right about what exists? When not, it is marked invalid. EINVAL: no map."""
    if not handle.header.has(ft.OBJECT_MAP):
        raise OSError(errno.EINVAL, "the image has no object map")
    expected = states_of(handle, progress)[handle.snap_id]
    actual = object_map.load(handle.ctx, handle.id, handle.snap_id)
    right = [state != NONEXISTENT for state in actual] == [state != NONEXISTENT for state in expected]
    if not right:
        object_map.invalidate(handle.ctx, handle.oid, [handle.snap_id], BOTH_INVALID)
        handle.announce()
    return right


def differences(handle: ImageHandle) -> list[str]:
    """Where the maps are wrong about existence, or call changed objects clean. For tests and `rbd object-map check`."""
    header = handle.header
    found = []
    for snap_id, expected in states_of(handle).items():
        if header.flags_at(snap_id) & ft.FLAG_OBJECT_MAP_INVALID:
            continue
        actual = object_map.load(handle.ctx, handle.id, snap_id)
        where = "HEAD" if snap_id == NOSNAP else f"snapshot {snap_id}"
        if len(actual) != len(expected):
            found.append(f"{where}: {len(actual)} entries for {len(expected)} objects")
        for objno, (is_state, should) in enumerate(zip(actual, expected, strict=False)):
            exists = is_state in (EXISTS, EXISTS_CLEAN)
            if exists != (should != NONEXISTENT):
                found.append(f"{where}: object {objno} is {is_state}, should be {should}")
            elif is_state == EXISTS_CLEAN and should == EXISTS:
                found.append(f"{where}: object {objno} is called clean and was changed")
    return found

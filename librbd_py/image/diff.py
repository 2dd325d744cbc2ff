"""What differs between two points in an image's life.

Exact: from each object's own history (its snapset: which bytes neighbouring versions share). Whole objects: from the
object maps where they can be believed, else from the same history.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from itertools import chain, pairwise, starmap

from librbd_py.format import features as ft
from librbd_py.format.object_map import EXISTS_CLEAN, NONEXISTENT
from librbd_py.store.api import NOSNAP, SnapSet

from .ahead import at_once, in_order, is_local
from .content import read_view
from .datapath import NativeImage
from .handle import ImageHandle
from .layout import Extent
from .map_check import snapset_of, version_at
from .resize import known_states, listed
from .snapshots import find
from .view import ViewSpec

HUGE = 1 << 24  # objects: in more the store's list of what there is is looked at instead of each
COMPARED = 1 << 16  # bytes of an image that migrates
Found = Callable[[int, int, bool], object]  # offset, length in the image; True: data, False: a hole now
Extents = list[tuple[int, int, bool]]  # offset, length within an object; data or hole


def diff_iterate(
    handle: ImageHandle,
    offset: int,
    length: int,
    from_snapshot: str | int | None,
    found: Found,
    *,
    include_parent: bool = True,
    whole_object: bool = False,
) -> None:
    """Calls `found` in ascending order for what changed from the snapshot (None: since the image was empty) to what the
    handle is open at. A negative result ends it with EIO.

    ENOENT: no such snapshot. EINVAL: it is newer than what the handle is open at, or the range lies beyond the image.
    """
    header = handle.header
    end_id = handle.snap_id
    if from_snapshot is None:
        start_id = 0
    elif isinstance(from_snapshot, int):
        start_id = from_snapshot
        if start_id not in header.snaps:
            raise OSError(errno.ENOENT, f"no snapshot {start_id}")
    else:
        start_id = find(header, from_snapshot).id
    size = header.size_at(end_id)
    if not length:
        return
    if offset >= size:
        raise OSError(errno.EINVAL, f"{offset} is not within the image's {size} bytes")
    length = min(length, size - offset)
    if start_id > end_id:
        raise OSError(errno.EINVAL, "the snapshot is newer than what the image is open at")
    rows = changes(handle, offset, length, start_id, include_parent=include_parent, whole_object=whole_object)
    for start, size, data in rows:
        result = found(start, size, data)
        if isinstance(result, int) and result < 0:
            raise OSError(-result, "the callback asked to stop")


def changed(handle: ImageHandle, from_snapshot: int | None) -> Iterator[tuple[int, int, bool]]:
    """The whole image's rows from the snapshot (None: since the image was empty) to what the handle is open at."""
    start_id = from_snapshot or 0
    if start_id > handle.snap_id:
        raise OSError(errno.EINVAL, "the snapshot is newer than what the image is open at")
    size = handle.header.size_at(handle.snap_id)
    return changes(handle, 0, size, start_id) if size else iter(())


def changes(
    handle: ImageHandle,
    offset: int,
    length: int,
    start_id: int,
    *,
    include_parent: bool = True,
    whole_object: bool = False,
) -> Iterator[tuple[int, int, bool]]:
    """The rows of diff_iterate, within the image and from a snapshot that exists (0: none). As in librbd a row ends
    with its object, or its set of objects when the image is striped."""
    header, end_id = handle.header, handle.snap_id
    if start_id == end_id:
        return
    layout = header.layout
    striped = layout.stripe_count > 1

    def rows_of(offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        if not start_id and include_parent and isinstance(handle.data, NativeImage) and not (striped and whole_object):
            rows = _allocated(handle.data, offset, length)
            return _by_object(rows, layout.object_size, offset, offset + length) if whole_object else rows
        if header.migrates and (start_id or include_parent):
            return _compared(handle, offset, length, start_id)
        return _rows(handle, offset, length, start_id, end_id, include_parent, whole_object)

    huge = length // layout.object_size > HUGE
    ranges = _listed_ranges(handle, offset, offset + length) if huge else [(offset, length)]
    rows = chain.from_iterable(starmap(rows_of, ranges))
    pending: tuple[int, int, bool] | None = None
    for at, size, data in rows:
        while size:
            step = min(layout.period - at % layout.period, size)
            joins = striped and pending is not None and pending[0] + pending[1] == at and pending[2] == data
            if joins and at % layout.period:
                assert pending is not None
                pending = (pending[0], pending[1] + step, data)
            else:
                if pending is not None:
                    yield pending
                pending = (at, step, data)
            at, size = at + step, size - step
    if pending is not None:
        yield pending


def _listed_ranges(handle: ImageHandle, offset: int, end: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what may show a parent, and of the sets of objects that there are: more cannot differ."""
    header = handle.header
    layout = header.layout
    count, period = layout.stripe_count, layout.period
    inherited = -(-min(max(header.overlap_at(handle.snap_id), header.overlap_at(NOSNAP)), end) // period)
    sets = sorted({objno // count for objno in listed(handle, inherited * count, layout.objects(end))})
    for start, size in [(0, inherited * period), *((number * period, period) for number in sets)]:
        first, last = max(start, offset), min(start + size, end)
        if first < last:
            yield first, last - first


def _compared(handle: ImageHandle, offset: int, length: int, start_id: int) -> Iterator[tuple[int, int, bool]]:
    """Byte by byte: while an image migrates, an object's own history is not all of its history."""
    before, after = handle.view_at(start_id) if start_id else None, handle.view_at(handle.snap_id)
    end = offset + length
    while offset < end:
        take = min(COMPARED - offset % COMPARED, end - offset)
        there = 0 if before is None else max(0, min(take, before.size - offset))
        old = bytes(take) if before is None else read_view(before, offset, there).ljust(take, b"\0")
        new = read_view(after, offset, take)
        if old != new:
            yield offset, take, bool(new.strip(b"\0"))
        offset += take


def _allocated(native: NativeImage, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """Where there is data now, parents included, as the C engine knows it."""
    at, end = offset, offset + length
    start: int | None = None  # of the data before `at`
    while at < end:
        for size, flags in native.runs(at, end - at):
            if flags and start is not None:
                yield start, at - start, True
                start = None
            elif not flags and start is None:
                start = at
            at += size
    if start is not None:
        yield start, at - start, True


def _by_object(
    rows: Iterator[tuple[int, int, bool]], grain: int, offset: int, end: int
) -> Iterator[tuple[int, int, bool]]:
    """Ascending rows, each widened to whole objects of `grain` bytes within [offset, end); no object twice."""
    done = offset
    for at, size, data in rows:
        low, high = max(at // grain * grain, done), min(-(-(at + size) // grain) * grain, end)
        while low < high:
            step = min((low // grain + 1) * grain, high)
            yield low, step - low, data
            low = step
        done = max(done, high)


def _rows(
    handle: ImageHandle, offset: int, length: int, start_id: int, end_id: int, include_parent: bool, whole: bool
) -> Iterator[tuple[int, int, bool]]:
    layout = handle.header.layout
    view = handle.view_at(end_id)
    maps = _maps(handle, start_id, end_id)
    cache: dict[int, Extents] = {}
    striped = layout.stripe_count > 1
    pending: tuple[int, int, bool] | None = None

    def extents(piece: Extent) -> Extents:
        found = cache.get(piece.objno)
        if found is None:
            found = _object(handle, view, piece.objno, start_id, end_id, maps, include_parent, whole)
            if striped:
                cache[piece.objno] = found
        return found

    count = 1 if striped or is_local(handle) or (whole and maps is not None) else at_once(handle)
    pieces = _pieces(handle, offset, length, maps, bool(start_id), view.parent is not None)
    for piece, found in in_order(pieces, extents, count):
        image_at = offset + piece.position
        for at, size, data in found:
            first, last = max(at, piece.offset), min(at + size, piece.offset + piece.length)
            if first >= last:
                continue
            row = (image_at + first - piece.offset, last - first, data)
            if pending is not None and pending[0] + pending[1] == row[0] and pending[2] == data and not whole:
                pending = (pending[0], pending[1] + row[1], data)
            else:
                if pending is not None:
                    yield pending
                pending = row
    if pending is not None:
        yield pending


def _pieces(
    handle: ImageHandle, offset: int, length: int, maps: list[bytearray] | None, from_snapshot: bool, clone: bool
) -> Iterator[Extent]:
    """Of the objects in the range that the maps do not call unchanged, in image order; striped: of all."""
    layout = handle.header.layout
    if maps is None or layout.stripe_count > 1:
        yield from layout.map(offset, length)
        return
    size, end = layout.object_size, offset + length
    suspects = _suspects(maps, -(-end // size), from_snapshot, clone)
    objno = suspects.find(1, offset // size)
    while objno >= 0:
        first, last = max(objno * size, offset), min((objno + 1) * size, end)
        yield Extent(objno, first - objno * size, last - first, first - offset)
        objno = suspects.find(1, objno + 1)


_EXISTS = bytes(state != NONEXISTENT for state in range(256))
_CHANGED = bytes(state not in (NONEXISTENT, EXISTS_CLEAN) for state in range(256))


def _suspects(maps: list[bytearray], count: int, from_snapshot: bool, clone: bool) -> bytes | bytearray:
    """A byte for each of `count` objects, 0 where `_map_says` False. Works on whole maps at a time: an image of a
    tebibyte has 262,144 objects, most of them unchanged."""
    if not from_snapshot and clone:
        return b"\1" * count

    def bits(states: bytearray, table: bytes) -> int:
        return int.from_bytes(states[:count].ljust(count, b"\0").translate(table), "little")

    if not from_snapshot:
        return maps[-1][:count].ljust(count, b"\0").translate(_EXISTS)
    changed, before = 0, bits(maps[0], _EXISTS)
    for states in maps[1:]:
        now = bits(states, _EXISTS)
        changed |= bits(states, _CHANGED) | (now ^ before)
        before = now
    return changed.to_bytes(count, "little")


def _object(
    handle: ImageHandle,
    view: ViewSpec,
    objno: int,
    start_id: int,
    end_id: int,
    maps: list[bytearray] | None,
    include_parent: bool,
    whole: bool,
) -> Extents:
    changed = None if maps is None else _map_says(maps, objno, bool(start_id), view.parent is not None)
    object_size = handle.header.layout.object_size
    if maps is not None and (changed is False or (changed and whole)):
        exists = _present(maps[-1], objno)
        extents = [(0, object_size, exists)] if changed else []
    else:
        snapset = snapset_of(handle, objno) or SnapSet(0, ())
        exists = version_at(snapset, end_id) is not None
        extents = _history(handle, view, objno, snapset, start_id, end_id, include_parent)
    if whole and extents:
        return [(0, object_size, exists or any(data for _, _, data in extents))]
    return extents


def _history(
    handle: ImageHandle,
    view: ViewSpec,
    objno: int,
    snapset: SnapSet,
    start_id: int,
    end_id: int,
    include_parent: bool,
) -> Extents:
    """The bytes of one object that differ between two snapshots, from what neighbouring versions share."""
    order = sorted(snapset.clones, key=lambda clone: clone.clone_id)
    sizes = {clone.clone_id: clone.size for clone in order}
    start = version_at(snapset, start_id) if start_id else None
    end = version_at(snapset, end_id)
    if start is None and end is None:
        # The parent, if any, shows through at both ends.
        return [] if start_id or not include_parent else [(at, size, True) for at, size in _of_parent(view, objno)]
    if start is None:
        shown = _of_parent(handle.view_at(start_id), objno) if start_id else []
        return _replaced(shown, [(0, sizes[end])] if end is not None else [])
    if end is None:
        return _replaced([(0, sizes[start])], _of_parent(view, objno))
    if start == end:
        return []
    # Shared through every version from start to end = unchanged.
    shared = [(0, max(sizes[start], sizes[end]))]
    for clone in order:
        if start <= clone.clone_id < end:
            shared = _intersect(shared, list(clone.overlap))
    changed: list[tuple[int, int]] = []
    at = 0
    for first, size in [*shared, (max(sizes[start], sizes[end]), 0)]:
        if first > at:
            changed.append((at, first - at))
        at = max(at, first + size)
    now = [(0, sizes[end])]
    return _replaced(_intersect(changed, [(0, sizes[start])]), _intersect(changed, now))


def _replaced(before: list[tuple[int, int]], after: list[tuple[int, int]]) -> Extents:
    """Everything that was or is there: data where it is, holes elsewhere."""
    edges = sorted({edge for at, size in [*before, *after] for edge in (at, at + size)})
    rows: Extents = []
    for first, last in pairwise(edges):
        is_there = any(at <= first < at + size for at, size in after)
        if not is_there and not any(at <= first < at + size for at, size in before):
            continue
        if rows and rows[-1][0] + rows[-1][1] == first and rows[-1][2] == is_there:
            rows[-1] = (rows[-1][0], last - rows[-1][0], is_there)
        else:
            rows.append((first, last - first, is_there))
    return rows


def _intersect(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out = []
    for a, a_size in left:
        for b, b_size in right:
            first, last = max(a, b), min(a + a_size, b + b_size)
            if first < last:
                out.append((first, last - first))
    return sorted(out)


def _of_parent(view: ViewSpec, objno: int) -> list[tuple[int, int]]:
    """Where the parent has data below an object that does not exist in the child."""
    if view.parent is None:
        return []
    rows = []
    at = 0
    for start, size in view.layout.within(objno, 0, view.layout.object_size, view.overlap):
        data = read_view(view.parent, start, size)
        first = len(data) - len(data.lstrip(b"\0"))
        kept = len(data.rstrip(b"\0"))
        if kept > first:
            rows.append((at + first, kept - first))
        at += size
    return rows


def _present(states: bytearray, objno: int) -> bool:
    return objno < len(states) and states[objno] != NONEXISTENT


def _map_says(maps: list[bytearray], objno: int, from_snapshot: bool, clone: bool) -> bool | None:
    """Did the object change? None: the maps cannot tell, because the parent may show data since the image was made.
    `maps` runs from the start to the end, both included."""
    if not from_snapshot:
        return True if _present(maps[-1], objno) else None if clone else False
    states = [states[objno] if objno < len(states) else NONEXISTENT for states in maps]
    before = states[0]
    for state in states[1:]:
        if (state == NONEXISTENT) != (before == NONEXISTENT) or state not in (NONEXISTENT, EXISTS_CLEAN):
            return True
        before = state
    return False


def _maps(handle: ImageHandle, start_id: int, end_id: int) -> list[bytearray] | None:
    """Object maps of every snapshot from start to end; None unless all of them can be believed."""
    header = handle.header
    if not header.has(ft.FAST_DIFF):
        return None
    between = [snap_id for snap_id in header.snaps if start_id <= snap_id <= end_id]
    if end_id == NOSNAP:
        between.append(NOSNAP)
    maps = []
    for snap_id in between:
        states = None if header.flags_at(snap_id) & ft.FLAG_FAST_DIFF_INVALID else known_states(handle, snap_id)
        if states is None:
            return None
        maps.append(states)
    return maps

"""Changing an image's size, and removing the data objects that fall off its end."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator

from librbd_py.format import features as ft
from librbd_py.format import notify as nf
from librbd_py.format.header import MIGRATION_KEY
from librbd_py.format.object_map import NONEXISTENT
from librbd_py.format.values import replace
from librbd_py.store.api import NOSNAP, OmapCmp, OmapSet, Op, Remove, Truncate

from . import cls, object_map
from .cls import call, u64
from .directory import check_size
from .handle import ImageHandle
from .objects import NUMBER, ignoring
from .progress import Progress, report
from .proxy import perform
from .view import ObjectMapKeeper

SCAN_LIMIT = 4096  # more objects than this are not tried one by one without a hint of which exist


def resize(handle: ImageHandle, size: int, *, allow_shrink: bool = True, progress: Progress | None = None) -> None:
    """EINVAL: too large, or smaller without `allow_shrink`; EROFS."""
    handle.require_writable()
    perform(
        handle,
        lambda request: nf.Resize(size, request, allow_shrink),
        lambda: _resize(handle, size, allow_shrink, progress),
        progress,
    )


def _resize(handle: ImageHandle, size: int, allow_shrink: bool, progress: Progress | None) -> None:
    with handle.exclusive() as header:
        check_size(header.layout, size, header.features)
        if size < header.size and not allow_shrink:
            raise OSError(errno.EINVAL, f"the image has {header.size} bytes and may not shrink")
        if size < header.size:
            copyup_doomed(handle, size)
            # From here on nobody writes beyond the new end.
            with handle.quiesced():
                handle.limit_size(size)
            try:
                trim(handle, size, progress)
                with handle.quiesced():
                    set_size(handle, size)
                    resize_map(handle, size)
            finally:
                handle.limit_size(None)
        else:
            if header.migrates:
                from .migration.execute import bring_hidden

                bring_hidden(handle)
            with handle.quiesced():
                resize_map(handle, size)
                set_size(handle, size)
                handle.refresh()
        if progress is not None and size >= header.size:
            progress(header.layout.objects(size), header.layout.objects(size))
    handle.announce()


def set_size(handle: ImageHandle, size: int) -> None:
    """What falls off the end of an image that migrates must not show its source again when it grows: with the size goes
    the overlap in its record, unless that changes just now."""
    change = call("set_size", u64(size))
    while True:
        spec = cls.migration(handle.ctx, handle.oid) if handle.header.migrates else None
        if spec is None or spec.overlap <= size:
            handle.ctx.write(handle.oid, [change])
            return
        same = OmapCmp({MIGRATION_KEY: (spec.encode(), "eq")})
        cut = OmapSet({MIGRATION_KEY: replace(spec, overlap=size).encode()})
        with ignoring(errno.ECANCELED):
            handle.ctx.write(handle.oid, [same, change, cut])
            return


def resize_map(handle: ImageHandle, size: int) -> None:
    """No request may run: a map is rewritten as a whole."""
    header = handle.refresh()
    if header.has(ft.OBJECT_MAP):
        try:
            object_map.resize(handle.ctx, handle.id, header.layout.objects(size), locked=True)
        except OSError as failure:
            handle.map_failed(failure)
        handle.take_map()


def copyup_doomed(handle: ImageHandle, size: int) -> None:
    """Snapshots of a clone see the parent below their own overlap, which is larger than HEAD's will be: objects that
    lose their parent are copied up first, so that snapshots keep what they show."""
    header = handle.header
    overlap = header.overlap_at(NOSNAP)
    if not header.snaps or overlap <= size:
        return
    layout = header.layout
    for objno in range(layout.objects(overlap)):
        if layout.used(objno, size) < layout.used(objno, overlap):
            handle.data.copyup(objno)


def trim(handle: ImageHandle, size: int, progress: Progress | None = None) -> None:
    """Removes the data objects beyond `size` and cuts those at the edge. The header is left alone."""
    header = handle.header
    layout = header.layout
    total = layout.objects(header.size)
    keeper = map_keeper(handle)
    report(progress, 0, total)
    for objno in doomed(handle, size):
        kept = layout.used(objno, size)
        ops: list[Op] = [Truncate(kept)] if kept else [Remove()]
        report(progress, objno, total)
        with ignoring(errno.ENOENT):
            if kept:
                handle.data_ctx.stat(handle.objects.oid(objno))
                keeper.exists(objno)
            else:
                keeper.pending(objno)
            handle.data_ctx.write(handle.objects.oid(objno), ops, header.snapc)
        if not kept:
            keeper.gone(objno)


def doomed(handle: ImageHandle, size: int) -> Iterator[int]:
    """Objects that an image of `size` bytes uses less of than this one, without those known not to exist."""
    header = handle.header
    layout = header.layout
    total = layout.objects(header.size)
    first = (size // layout.period) * layout.stripe_count
    for objno in present(handle, first, total):
        if layout.used(objno, size) < layout.used(objno, header.size):
            yield objno


def present(handle: ImageHandle, first: int, end: int) -> Iterator[int]:
    """Objects from `first` to before `end`, without those known not to exist; of very many those that are listed."""
    known = known_states(handle)
    if known is not None and len(known) < end:
        known = None  # a map of another size
    numbers: Iterable[int] = range(first, end)
    if known is None and end - first > SCAN_LIMIT:
        numbers = listed(handle, first, end)
    for objno in numbers:
        if known is None or known[objno] != NONEXISTENT:
            yield objno


def listed(handle: ImageHandle, first: int, end: int) -> list[int]:
    """The objects from `first` to before `end` that the store has, or keeps something of for snapshots: ascending."""
    prefix = handle.objects.prefix + "."
    found = [oid.removeprefix(prefix) for oid in handle.data_ctx.objects() if oid.startswith(prefix)]
    numbers = sorted(int(number, 16) for number in found if NUMBER.fullmatch(number))
    return [objno for objno in numbers if first <= objno < end]


def known_states(handle: ImageHandle, snap_id: int = NOSNAP) -> bytearray | None:
    """The object map if there is one and it can be believed."""
    header = handle.header
    if not header.has(ft.OBJECT_MAP) or header.flags_at(snap_id) & ft.FLAG_OBJECT_MAP_INVALID:
        return None
    try:
        return object_map.load(handle.ctx, handle.id, snap_id)
    except OSError:
        return None


def map_keeper(handle: ImageHandle) -> ObjectMapKeeper:
    return handle.data.object_map

"""The second step of a migration: whatever has not come over by itself is brought.

Objects come over one by one, each at once with all it holds in the source's snapshots, through the very path that a
write to an absent object takes (`DataPath.copyup`), so a guest may use the image meanwhile. Cut short, it goes on with
what is missing.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Sequence

from librbd_py.format import notify as nf
from librbd_py.format.header import MIGRATION_EXECUTED, MIGRATION_EXECUTING, MIGRATION_PREPARED
from librbd_py.format.object_map import NONEXISTENT
from librbd_py.store.api import NOSNAP, Create, ObjectContext

from ..handle import ImageHandle
from ..header import Header
from ..objects import exists, ignoring
from ..progress import Progress, report
from ..proxy import perform
from ..resize import known_states, map_keeper
from ..transfer_data import each
from .existing import any_version
from .objects import bring, source_of
from .records import Pair, find, set_both

STRETCH = 256  # objects brought before the lock may move to whoever waits for it
SAY_SECONDS = 0.5  # between two changes of the percentage in the headers


def execute(ctx: ObjectContext, name: str, progress: Progress | None = None) -> None:
    """Returns when everything is at the destination. ENOENT; EINVAL: it does not migrate, or is not prepared."""
    pair = find(ctx, name)
    if pair.dest.spec is None or pair.state not in (MIGRATION_PREPARED, MIGRATION_EXECUTING):
        raise OSError(errno.EINVAL, f"the migration is in state {pair.state}: it is not prepared")
    set_both(pair, MIGRATION_EXECUTING)
    with ImageHandle.open(pair.dest.ctx, image_id=pair.dest.id) as handle:
        said = _Said(pair, progress)
        perform(handle, nf.Migrate, lambda: bring_all(handle, said), said)
        set_both(pair, MIGRATION_EXECUTED)
        handle.changed()


class _Said:
    """Progress, told to the caller and in both headers as librbd does."""

    def __init__(self, pair: Pair, progress: Progress | None) -> None:
        self._pair = pair
        self._progress = progress
        self._last = ""
        self._next = 0.0

    def __call__(self, done: int, total: int) -> object:
        text = f"{done * 100 // total if total else 100}% complete"
        if text != self._last and time.monotonic() >= self._next:
            self._last, self._next = text, time.monotonic() + SAY_SECONDS
            set_both(self._pair, MIGRATION_EXECUTING, text)
        return None if self._progress is None else self._progress(done, total)


def bring_all(handle: ImageHandle, progress: Progress | None = None) -> None:
    """Everything that the source has and the destination has not. EINVAL: it does not migrate."""
    if not handle.header.migrates:
        raise OSError(errno.EINVAL, "the image does not migrate, or everything is here")
    numbers = _wanted(handle)
    done = 0
    while done < len(numbers):
        # An operation of its own each time: between two of them others get the lock that wait for it.
        with handle.exclusive() as header:
            if not header.migrates:
                return
            stretch = numbers[done : done + STRETCH]
            missing = _absent(handle, stretch)

            def step(count: int, base: int = done) -> None:
                report(progress, base + count, len(numbers))

            each(lambda objno, header=header: _bring(handle, header, objno), missing, step)  # type: ignore[misc]
            done += len(stretch)
            report(progress, done, len(numbers))
    with handle.exclusive():
        with handle.quiesced():
            pass  # what a request was just bringing has come, too
        handle.data.flush()


def bring_hidden(handle: ImageHandle) -> None:
    """What only snapshots hold, beyond the end of HEAD. Before HEAD grows: a write there looks for nothing below."""
    header = handle.header
    if header.migrates and header.migration is not None and header.migration.snap_seqs:
        each(lambda objno: _bring(handle, header, objno), [n for n in _wanted(handle) if _hidden(header, n)])


def _hidden(header: Header, objno: int) -> bool:
    return header.layout.used(objno, header.overlap_at(NOSNAP)) == 0


def _bring(handle: ImageHandle, header: Header, objno: int) -> None:
    if _hidden(header, objno):
        bring(handle, header, objno)  # no request gets there
        return
    handle.data.copyup(objno)
    if header.clone_of.exists and not exists(handle.data_ctx, handle.objects.oid(objno)):
        # Nothing but zeros at the source, but later the parent of both would be seen in its place.
        map_keeper(handle).exists(objno)
        with ignoring(errno.EEXIST):
            handle.data_ctx.write(handle.objects.oid(objno), [Create(exclusive=True)], header.snapc)


def _absent(handle: ImageHandle, numbers: Sequence[int]) -> list[int]:
    """An object map is sure of what it calls absent only: it says of an object that it exists before that is true, and
    a crash may have come in between."""
    known = known_states(handle) or b""
    sure = {number for number in numbers if number < len(known) and known[number] == NONEXISTENT}
    return [n for n in numbers if n in sure or not exists(handle.data_ctx, handle.objects.oid(n))]


def _wanted(handle: ImageHandle) -> list[int]:
    """Objects of the destination that hold a byte of an object of the source."""
    header = handle.header
    spec = header.migration
    assert spec is not None
    layout = header.layout
    if header.imports:
        return _of_import(handle, header)
    ctx = handle.store.open(spec.pool_id, spec.pool_namespace)
    with ImageHandle.open(ctx, image_id=spec.image_id, read_only=True, alone=True) as source:
        theirs = source.header.layout
        found: Iterable[int]
        if spec.flatten and source.header.parent.exists:
            found = range(layout.objects(header.overlap_at(NOSNAP)))
        elif theirs == layout:
            found = any_version(source)
        else:
            found = {
                piece.objno
                for number in any_version(source)
                for start, length in theirs.unmap(number, 0, theirs.object_size)
                for piece in layout.map(start, length)
            }
    end = max(layout.objects(size) for size in (header.size, *(snap.size for snap in header.snaps.values())))
    return sorted(number for number in found if number < end)


def _of_import(handle: ImageHandle, header: Header) -> list[int]:
    source = source_of(handle, header)
    found: set[int] = set()
    points = [*range(len(source.snapshots)), None]
    for before, point in zip([None, *points], points, strict=False):
        size = source.size if point is None else source.snapshots[point].size
        for extent in source.extents(0, size, point, before):
            found.update(piece.objno for piece in header.layout.map(extent.offset, extent.length))
    end = max(header.layout.objects(size) for size in (header.size, *(snap.size for snap in header.snaps.values())))
    return sorted(number for number in found if number < end)

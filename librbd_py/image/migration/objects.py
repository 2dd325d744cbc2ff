"""One object of an image that migrates, brought over with all that the source's snapshots hold of it.

It is written as it came to be, as `transfer_data` does it: what the oldest snapshot holds first, then what each later
one and HEAD differ in, under the snap context of its time, so that the store makes the versions. librbd does the same.

Between the first of these writes and the last one HEAD shows too old a version, so the header says which object
is under way. Whoever owns the image next completes those first (`complete`). Which writes were done, the object's own
snap set tells.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from librbd_py.format import object_map as fm
from librbd_py.store.api import NO_SNAPS, NOSNAP, SNAPDIR, Exec, ListSnaps, OmapGetVals, OmapRmKeys, OmapSet, SnapSet

from ..cls import call, u8, u64
from ..content import read_view
from ..header import map_oid
from ..map_check import version_at
from ..objects import exists, ignoring
from ..transfer_data import change, snap_context
from ..view import ViewSpec

if TYPE_CHECKING:
    from ..handle_view import HandleView

NOTE = b"rbdpy_bringing_"  # keys in the header's omap: objects whose versions are being written


class Bringer:
    """`fetch` of the view of a handle that may write."""

    def __init__(self, handle: HandleView) -> None:
        self._handle = handle
        self._looked = False
        self._busy: set[int] = set()
        self._free = threading.Condition()

    def __call__(self, objno: int) -> bool:
        if not self._looked and not self._handle.uses_lock:
            complete(self._handle)
        self._looked = True
        with self._one(objno):
            return bring(self._handle, objno)

    @contextmanager
    def _one(self, objno: int) -> Iterator[None]:
        """Requests of two views may ask for the same one."""
        with self._free:
            self._free.wait_for(lambda: objno not in self._busy)
            self._busy.add(objno)
        try:
            yield
        finally:
            with self._free:
                self._busy.discard(objno)
                self._free.notify_all()


@dataclass(frozen=True)
class Step:
    """A version that differs from the one before. `older`: the destination's snapshots from before it, ascending."""

    older: tuple[int, ...]
    content: bytes | None  # None: there is no object

    @property
    def seq(self) -> int:
        return self.older[-1] if self.older else 0


class History:
    """Of one object of the destination, in terms of the source."""

    def __init__(self, handle: HandleView, objno: int) -> None:
        header = handle._header
        spec = header.migration
        assert spec is not None
        self.handle = handle
        self.objno = objno
        self.flatten = spec.flatten
        pairs = sorted(spec.snap_seqs.items())
        # Oldest first: (snapshot of the source, of the destination); those that were removed since are left out.
        self.points = [(here, there) for here, there in pairs if there in header.snaps] + [(NOSNAP, NOSNAP)]
        self.newer = [number for number in header.snaps if not pairs or number > pairs[-1][1]]
        self._snapsets: dict[int, SnapSet | None] = {}

    def _view(self, there: int) -> ViewSpec:
        return self.handle.view_at(there)

    def _snapset(self, view: ViewSpec, objno: int) -> SnapSet | None:
        if objno not in self._snapsets:
            self._snapsets[objno] = None
            with ignoring(errno.ENOENT):
                self._snapsets[objno] = view.data.ctx.read(view.data.oid(objno), [ListSnaps()], SNAPDIR)[0]
        return self._snapsets[objno]

    def _versions(self, view: ViewSpec, here: int) -> tuple[object, ...]:
        """Says which versions of which objects of the source make up this one at a point; empty: none."""
        source = view.parent
        if source is None:
            return ()
        ranges = view.layout.within(self.objno, 0, view.layout.object_size, view.overlap)
        numbers = sorted({piece.objno for start, length in ranges for piece in source.layout.map(start, length)})
        found = []
        for number in numbers:
            snapset = self._snapset(source, number)
            found.append(None if snapset is None else version_at(snapset, here))
        if any(version is not None for version in found) or (self.flatten and source.parent is not None):
            return (*found, sum(length for _, length in ranges))
        return ()

    def content(self, there: int) -> bytes:
        """What shows through at a point, without the zeros at its end: the object's beginning."""
        view = self._view(there)
        if view.parent is None:
            return b""
        ranges = view.layout.within(self.objno, 0, view.layout.object_size, view.overlap)
        return b"".join(read_view(view.parent, start, length) for start, length in ranges).rstrip(b"\0")

    @cached_property
    def steps(self) -> list[tuple[Step, int]]:
        """With the snapshot (or HEAD) that sees it first; contents are read when they are written."""
        found: list[tuple[Step, int]] = []
        before: tuple[object, ...] = ()
        for at, (here, there) in enumerate(self.points):
            versions = self._versions(self._view(there), here)
            if versions != before:
                older = tuple(number for _, number in self.points[:at])
                found.append((Step(older, b"" if versions else None), there))
            before = versions
        return found


def bring(handle: HandleView, objno: int) -> bool:
    """Whether there is an object in HEAD now. What was begun is completed; what is here already is left alone."""
    history = History(handle, objno)
    oid = handle.objects.oid(objno)
    begun: SnapSet | None = None
    with ignoring(errno.ENOENT):
        begun = handle.data_ctx.read(oid, [ListSnaps()], SNAPDIR)[0]
    steps = history.steps
    left = [at for at, (step, _) in enumerate(steps) if begun is None or step.seq > begun.seq]
    if left:
        with _noted(handle, objno, len(left) > 1):
            _update_maps(history)
            old = None
            if left[0]:
                step, there = steps[left[0] - 1]
                old = None if step.content is None else history.content(there)
            for at in left:
                step, there = steps[at]
                new = None if step.content is None else history.content(there)
                if new is None and old is None:
                    continue
                with ignoring(*((errno.ENOENT,) if new is None else ())):
                    ops = change(old, new, 1 << handle.objects.order)
                    handle.data_ctx.write(oid, ops, snap_context(step.older))
                old = new
    if exists(handle.data_ctx, oid):
        return True
    content = history.content(NOSNAP)  # of the parent that the source is a clone of
    if not content or (begun is not None and any(clone.clone_id != NOSNAP for clone in begun.clones)):
        return False
    handle.data.object_map.exists(objno)
    handle.data_ctx.write(oid, [Exec("rbd", "copyup", content)], NO_SNAPS)
    return True


@contextmanager
def _noted(handle: HandleView, objno: int, several: bool) -> Iterator[None]:
    if not several:
        yield
        return
    key = NOTE + b"%016x" % objno
    handle.ctx.write(handle.oid, [OmapSet({key: b""})])
    yield
    handle.ctx.write(handle.oid, [OmapRmKeys([key])])


def _update_maps(history: History) -> None:
    """Before the object comes into being. HEAD's map is called changed: that is never wrong."""
    handle = history.handle
    steps = {there: step.content is not None for step, there in history.steps}
    present = False
    for there in [number for _, number in history.points[:-1]]:
        fresh = there in steps
        present = steps.get(there, present)
        if present:
            _snapshot_map(handle, there, history.objno, fm.EXISTS if fresh else fm.EXISTS_CLEAN)
    fresh, present = NOSNAP in steps, steps.get(NOSNAP, present)
    if not present:
        return
    for there in history.newer:
        _snapshot_map(handle, there, history.objno, fm.EXISTS if fresh else fm.EXISTS_CLEAN)
        fresh = False
    handle.data.object_map.exists(history.objno)


def _snapshot_map(handle: HandleView, snap_id: int, objno: int, state: int) -> None:
    update = call("object_map_update", u64(objno), u64(objno + 1), u8(state), u8(0))
    with ignoring(errno.ERANGE, errno.ENOENT):  # the snapshot was smaller, or has no map
        handle.ctx.write(map_oid(handle.id, snap_id), [update])


def complete(handle: HandleView) -> None:
    """Of an image that migrates, by whoever may write: the objects that a crash left between two versions."""
    if not handle._header.migrates:
        return
    rows, _ = handle.ctx.read(handle.oid, [OmapGetVals(prefix=NOTE)])[0]
    for key in rows:
        bring(handle, int(key.removeprefix(NOTE), 16))
        handle.ctx.write(handle.oid, [OmapRmKeys([key])])

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
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from librbd_py.format import object_map as fm
from librbd_py.format.values import dataclass
from librbd_py.store.api import (
    NO_SNAPS,
    NOSNAP,
    SNAPDIR,
    Exec,
    ListSnaps,
    OmapGetVals,
    OmapRmKeys,
    OmapSet,
    Op,
    Read,
    SnapSet,
)

from ..cls import call, u8, u64
from ..content import read_view
from ..header import Header, map_oid
from ..map_check import version_at
from ..objects import NUMBER, exists, ignoring
from ..transfer_data import change, snap_context
from ..view import ViewSpec

if TYPE_CHECKING:
    from librbd_py.source import Source

    from ..handle_view import HandleView

KEPT = 4  # objects that a reader of an import keeps
NOTE = b"rbdpy_bringing_"  # keys in the header's omap: objects whose versions are being written


class Bringer:
    """`fetch` of a view of a handle that may write. It goes by the header of that view, whatever became of it since."""

    def __init__(self, handle: HandleView, header: Header) -> None:
        self._handle = handle
        self._header = header
        self._looked = False

    def __call__(self, objno: int) -> bool:
        if not self._looked and not self._handle.uses_lock:
            complete(self._handle, self._header)
        self._looked = True
        with self._one(objno):
            return bring(self._handle, self._header, objno)

    @contextmanager
    def _one(self, objno: int) -> Iterator[None]:
        """Requests of two views may ask for the same one."""
        handle = self._handle
        with handle.brought:
            handle.brought.wait_for(lambda: objno not in handle.bringing)
            handle.bringing.add(objno)
        try:
            yield
        finally:
            with handle.brought:
                handle.bringing.discard(objno)
                handle.brought.notify_all()


class Reader:
    """`fetch` of a view of an import that changes nothing: objects stay away, and are kept for the next reads."""

    def __init__(self, handle: HandleView, header: Header, there: int) -> None:
        self._handle = handle
        self._header = header
        self._there = there
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._guard = threading.Lock()

    def __call__(self, objno: int) -> bytes | bool:
        with self._guard:
            found = self._kept.get(objno)
        if found is None:
            found = history_of(self._handle, self._header, objno).content(self._there)
            with self._guard:
                self._kept[objno] = found
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        return found or False


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

    def __init__(self, handle: HandleView, header: Header, objno: int) -> None:
        spec = header.migration
        assert spec is not None
        self.handle = handle
        self.header = header
        self.objno = objno
        self.flatten = spec.flatten
        pairs = sorted(spec.snap_seqs.items())
        # Oldest first: (snapshot of the source, of the destination); those that were removed since are left out.
        self.points = [(here, there) for here, there in pairs if there in header.snaps] + [(NOSNAP, NOSNAP)]
        self.newer = [number for number in header.snaps if not pairs or number > pairs[-1][1]]
        self._snapsets: dict[int, SnapSet | None] = {}

    def _view(self, there: int) -> ViewSpec:
        return self.handle.view_at(there, whole=False, header=self.header)

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

    def now(self, oid: str) -> bytes | None:
        """What the destination's HEAD has of it."""
        with ignoring(errno.ENOENT):
            data: bytes = self.handle.data_ctx.read(oid, [Read()])[0]
            return data
        return None

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


class ImportHistory(History):
    """The source is no image of this store. Its snapshots have the ids 1, 2, ..., oldest first."""

    def __init__(self, handle: HandleView, header: Header, objno: int) -> None:
        super().__init__(handle, header, objno)
        self.source = source_of(handle, header)
        self._last: tuple[object, ...] = ()
        self._since: int | None = None

    def _ranges(self, there: int, at: int | None) -> list[tuple[int, int]]:
        view = self._view(there)
        size = self.source.size if at is None else self.source.snapshots[at].size
        return view.layout.within(self.objno, 0, view.layout.object_size, min(view.overlap, size))

    def _versions(self, view: ViewSpec, here: int) -> tuple[object, ...]:
        """Asked in order. A new one wherever the source names a change."""
        from librbd_py.source import DATA  # here: few images are an import in progress

        at = None if here == NOSNAP else here - 1
        size = self.source.size if at is None else self.source.snapshots[at].size
        ranges = view.layout.within(self.objno, 0, view.layout.object_size, min(view.overlap, size))
        total = sum(length for _, length in ranges)
        changed = any(
            extent.kind is DATA or self._last
            for start, length in ranges
            for extent in self.source.extents(start, length, at, self._since)
        )
        self._since = at
        if changed or (self._last and self._last[-1] != total):
            self._last = (here, total)
        return self._last

    def content(self, there: int) -> bytes:
        here = next(here for here, mine in self.points if mine == there) if there not in self.newer else NOSNAP
        at = None if here == NOSNAP else here - 1
        return b"".join(self.source.read(start, length, at) for start, length in self._ranges(there, at)).rstrip(b"\0")


def history_of(handle: HandleView, header: Header, objno: int) -> History:
    return ImportHistory(handle, header, objno) if header.imports else History(handle, header, objno)


def source_of(handle: HandleView, header: Header) -> Source:
    """What an import reads from, opened at first use."""
    from .imported import Imported

    assert header.migration is not None
    with handle._state:
        if handle.imported is None:
            handle.imported = Imported(header.migration.source_spec, handle.store)
        return handle.imported.source


def bring(handle: HandleView, header: Header, objno: int, again: bool = False) -> bool:
    """Whether there is an object in HEAD now. What is here already is left alone, but for the last of its versions when
    that may have been cut short (`again`)."""
    history = history_of(handle, header, objno)
    oid = handle.objects.oid(objno)
    begun: SnapSet | None = None
    with ignoring(errno.ENOENT):
        begun = handle.data_ctx.read(oid, [ListSnaps()], SNAPDIR)[0]
    steps = history.steps
    least = -1 if begun is None else begun.seq if again else begun.seq + 1
    left = [at for at, (step, _) in enumerate(steps) if step.seq >= least]
    if left:
        # Only the copy-up of a first version that all snapshots share is done or not done whatever happens.
        whole = begun is None and len(left) == 1 and not steps[0][0].older
        with _noted(handle, objno, not whole):
            _update_maps(history)
            old = history.now(oid)
            for at in left:
                step, there = steps[at]
                new = None if step.content is None else history.content(there)
                if new is None and old is None:
                    continue
                with ignoring(*((errno.ENOENT,) if new is None else ())):
                    if whole:
                        ops: list[Op] = [Exec("rbd", "copyup", new or b"")]
                    else:
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


def complete(handle: HandleView, header: Header) -> None:
    """Of an image that migrates, by whoever may write: the objects that a crash left between two versions."""
    if not header.migrates:
        return
    rows, _ = handle.ctx.read(handle.oid, [OmapGetVals(prefix=NOTE)])[0]
    for key in rows:
        number = key.removeprefix(NOTE).decode("ascii", "replace")
        if NUMBER.fullmatch(number):  # else it is nobody's
            bring(handle, header, int(number, 16), again=True)
        handle.ctx.write(handle.oid, [OmapRmKeys([key])])

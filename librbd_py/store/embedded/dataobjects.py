"""Objects whose data is in an image's layout: `rbd_data.<id>.*` and the HEAD object map.

Their xattrs and omap are in meta.db, so a write list may touch two places. Everything is checked first; SQLite's
statements come before the layout is changed, and COMMIT after it. A crash in between leaves the data changed and the
keys as they were; a list with several data steps may stop between two of them. Guests' data is under no stronger
promise, and the operations RBD uses change one or the other.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

from librbd_py.format import object_map
from librbd_py.format.encoding import DecodeError

from .. import record
from ..api import NOSNAP, Client, CloneInfo, SnapContext, SnapSet, WatcherInfo
from ..layout import Layout
from ..record import Changes, Extents, ObjectState, Step
from . import content
from .layouts import HeaderSnaps, LayoutRow, header_snaps, image_snaps, keep_map, map_data
from .objects import Row, StoredTransaction, is_keys_step, keys_step, load_row, next_version, snap_removed
from .schema import MAP_IN_LAYOUT, SIDE
from .steps import step as crash_point

COMPARE = 64 << 10  # bytes compared at once


class DataState:
    """One version of a data object. Clones have no xattrs and no omap: nobody puts any on data objects."""

    def __init__(
        self, layout: Layout, objno: int, snap_id: int, size: int, mtime: Callable[[], int], side: StoredKeys | None
    ) -> None:
        self._layout = layout
        self._objno = objno
        self._snap = snap_id
        self.size = size
        self._mtime = mtime
        self._side = side

    @property
    def mtime_ns(self) -> int:
        return self._mtime()

    def read(self, offset: int, length: int) -> bytes:
        return self._layout.read(self._objno, offset, min(length, self.size - offset), self._snap)

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        length = min(length, self.size - offset)
        return self._layout.extents(self._objno, offset, length, self._snap) if length > 0 else []

    def xattr(self, name: str) -> bytes | None:
        return self._side.xattr(name) if self._side is not None else None

    def xattrs(self) -> dict[str, bytes]:
        return self._side.xattrs() if self._side is not None else {}

    def omap_get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        return self._side.omap_get(keys) if self._side is not None else {}

    def omap_rows(self, start_after: bytes, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        return self._side.omap_rows(start_after, prefix) if self._side is not None else iter(())


class StoredKeys:
    """xattrs and omap of a row of `objects`."""

    def __init__(self, c: sqlite3.Connection, number: int) -> None:
        self._c = c
        self._number = number

    def xattr(self, name: str) -> bytes | None:
        return content.xattr(self._c, self._number, name)

    def xattrs(self) -> dict[str, bytes]:
        return content.xattrs(self._c, self._number)

    def omap_get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        return content.omap_get(self._c, self._number, keys)

    def omap_rows(self, start_after: bytes, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        return content.omap_rows(self._c, self._number, start_after, prefix)


class DataTransaction:
    """`copyup`: the list writes only what must not be seen half made (see STORE_COPYUP). `overlaps`: list_snaps wants
    to know what clones share; that is found by comparing, so only then."""

    def __init__(
        self,
        c: sqlite3.Connection,
        place: tuple[int, str, str],
        client: Client,
        now_ns: int,
        row: LayoutRow,
        objno: int,
        layout: Layout,
        mtime: Callable[[], int],
        watchers: Callable[[], list[WatcherInfo]],
        *,
        copyup: bool = False,
        overlaps: bool = False,
    ) -> None:
        self.c = c
        self.pool_id, self.namespace, self.oid = place
        self.client = client
        self.now_ns = now_ns
        self.changed_data = False
        self.removed = False
        self._row = row
        self._objno = objno
        self._layout = layout
        self._mtime = mtime
        self._watchers = watchers
        self._copyup = copyup
        self._overlaps = overlaps
        self._size = layout.stat(objno)
        self._side: Row | None = load_row(c, *place)
        self._snapset: SnapSet | None = None

    def head(self) -> ObjectState | None:
        if self._size is None:
            return None
        keys = StoredKeys(self.c, self._side.id) if self._side is not None else None
        return DataState(self._layout, self._objno, NOSNAP, self._size, self._mtime, keys)

    def version(self) -> int:
        """Guests' writes are not counted; changes through operation lists are."""
        if self._size is None:
            return 0
        return self._side.version if self._side is not None else 1

    def snapset(self) -> SnapSet:
        if self._snapset is None:
            rows = self._layout.clones(self._objno)
            snaps = header_snaps(self.c, self._row) if rows else HeaderSnaps([], 0)
            clones = [self._clone_info(*row, snaps) for row in rows]
            clones = [clone for clone in clones if clone.snaps]  # others wait to be trimmed
            if self._overlaps:
                clones = self._with_overlaps(clones)
            self._snapset = SnapSet(self._layout.snap_seq(self._objno), tuple(clones))
        return self._snapset

    def _clone_info(self, clone_id: int, lowest: int, size: int, snaps: HeaderSnaps) -> CloneInfo:
        return CloneInfo(clone_id, tuple(image_snaps(self.c, self._row, lowest, clone_id, snaps)), size)

    def _with_overlaps(self, clones: list[CloneInfo]) -> list[CloneInfo]:
        newer: list[tuple[int, int]] = [(clone.clone_id, clone.size) for clone in clones[1:]]
        if self._size is not None:
            newer.append((NOSNAP, self._size))
        return [
            CloneInfo(clone.clone_id, clone.snaps, clone.size, self._shared(clone, newer[i]))
            if i < len(newer)
            else clone
            for i, clone in enumerate(clones)
        ]

    def _shared(self, clone: CloneInfo, newer: tuple[int, int]) -> Extents:
        """Where a clone and the next newer version hold the same bytes."""
        out: list[tuple[int, int]] = []
        for at in range(0, min(clone.size, newer[1]), COMPARE):
            length = min(COMPARE, clone.size - at, newer[1] - at)
            old = self._layout.read(self._objno, at, length, clone.clone_id).ljust(length, b"\0")
            new = self._layout.read(self._objno, at, length, newer[0]).ljust(length, b"\0")
            for begin in range(0, length, 4096):
                size = min(4096, length - begin)
                if old[begin : begin + size] != new[begin : begin + size]:
                    continue
                if out and out[-1][0] + out[-1][1] == at + begin:
                    out[-1] = (out[-1][0], out[-1][1] + size)
                else:
                    out.append((at + begin, size))
        return tuple(out)

    def clone(self, clone_id: int) -> ObjectState:
        size = next(clone.size for clone in self.snapset().clones if clone.clone_id == clone_id)
        return DataState(self._layout, self._objno, clone_id, size, self._mtime, None)

    def is_removed_snap(self, snap_id: int) -> bool:
        return snap_removed(self.c, self.pool_id, snap_id)

    def watchers(self) -> list[WatcherInfo]:
        return self._watchers()

    # --- changes

    def apply(self, changes: Changes) -> None:
        for step in changes.steps:
            end = step.offset + len(step.data) if isinstance(step, record.PutData) else 0
            if end > self._layout.object_size or (
                isinstance(step, record.SetSize) and step.size > self._layout.object_size
            ):
                raise OSError(errno.EFBIG, f"{self.oid}: objects of this image have {self._layout.object_size} bytes")
        existed = self._size is not None
        self._apply_keys(changes, existed)
        self.changed_data = any(not is_keys_step(step) for step in changes.steps) or not existed
        crash_point("data: keys written")
        steps = [step for step in changes.steps if not is_keys_step(step)]
        # With snapshots in the context the object is not theirs; RBD sends its copy-ups without.
        if self._copyup and not existed and not changes.snapc.ids:
            steps = self._copy_up(steps)
        exists = self._layout.stat(self._objno) is not None
        if changes.clone is not None and exists:
            # Nothing is zeroed, but the snapshot gets its clone: also when the list only touches the object.
            self._layout.zero(self._objno, 0, 0, changes.snapc)
        for step in steps:
            exists = self._step(step, exists, changes.snapc)
        if changes.exists and not exists:
            self._layout.truncate(self._objno, 0, changes.snapc, create=True)
        self.removed = existed and not changes.exists
        crash_point("data: written")

    def _apply_keys(self, changes: Changes, existed: bool) -> None:
        side = self._side
        if side is not None and (not existed or not changes.exists):
            content.drop(self.c, side.id)  # of an earlier object of that name
        if not changes.exists:
            if side is not None:
                self.c.execute("DELETE FROM objects WHERE id=?", (side.id,))
            return
        steps = [step for step in changes.steps if is_keys_step(step)]
        if not steps and side is None:
            return
        if side is None:
            cursor = self.c.execute(
                "INSERT INTO objects(pool, ns, oid, kind, present, size, mtime, version, snap_seq) "
                "VALUES (?,?,?,?,0,0,?,0,0)",
                (self.pool_id, self.namespace, self.oid, SIDE, self.now_ns),
            )
            assert cursor.lastrowid is not None
            number = cursor.lastrowid
        else:
            number = side.id
        for step in steps:
            keys_step(self.c, number, step)
        self.c.execute("UPDATE objects SET mtime=?, version=? WHERE id=?", (self.now_ns, next_version(self.c), number))

    def _copy_up(self, steps: list[Step]) -> list[Step]:
        """What the class method wrote goes in as one copy-up; the rest of the list follows."""
        puts = list(takewhile(lambda step: isinstance(step, record.PutData | record.Touch), steps))
        data = bytearray()
        for step in puts:
            if isinstance(step, record.PutData):
                end = step.offset + len(step.data)
                if end > len(data):
                    data.extend(bytes(end - len(data)))
                data[step.offset : end] = step.data
        self._layout.copyup(self._objno, bytes(data))
        return steps[len(puts) :]

    def _step(self, step: Step, exists: bool, snapc: SnapContext) -> bool:
        layout, objno = self._layout, self._objno
        if isinstance(step, record.Delete):
            if exists:
                layout.remove(objno, snapc)
            return False
        if not exists and isinstance(step, record.Touch | record.ZeroData | record.SetSize):
            layout.truncate(objno, 0, snapc, create=True)
        match step:
            case record.Touch():
                pass
            case record.PutData():
                layout.write(objno, step.offset, step.data, snapc)
            case record.ZeroData():
                layout.zero(objno, step.offset, step.length, snapc)
            case record.SetSize():
                layout.truncate(objno, step.size, snapc)
            case record.Restore():
                layout.rollback(objno, step.snap_id, snapc)
            case _:
                raise AssertionError(step)
        return True


class MapTransaction(StoredTransaction):
    """The HEAD object map of an image with a layout. Its row is ordinary, its data is kept in the layout's index, so
    that C keeps the map true with a store to memory. Bytes the layout could not give back exactly stay in meta.db.

    The layout's copy is durable before COMMIT. A crash in between leaves the layout with a newer map than the row
    knows; the row has no data of its own then, so readers see the newer map, as if the write had come through.
    """

    layout: Layout

    def head(self) -> ObjectState | None:
        row = self.row
        if row is None or not row.present:
            return None
        if row.kind != MAP_IN_LAYOUT:
            return super().head()
        return MapState(self.c, row, lambda: map_data(self.layout))

    def apply(self, changes: Changes) -> None:
        row = self.row
        kept = row is not None and row.kind == MAP_IN_LAYOUT
        if all(is_keys_step(step) or isinstance(step, record.Touch) for step in changes.steps) and kept:
            # Only keys, as with every lock and unlock of the map.
            super().apply(changes)
            self._mark_kept(changes.size)
            return
        if kept:
            assert row is not None
            data = map_data(self.layout)
            if data:
                content.write_data(self.c, row.id, 0, data)
        super().apply(changes)
        after = load_row(self.c, self.pool_id, self.namespace, self.oid)
        if after is None or not after.present:
            if kept:
                self.layout.set_map_states(None)
            return
        data = content.read_data(self.c, after.id, 0, after.size) if after.size else b""
        if keep_map(self.layout, data):
            crash_point("map: kept")
            content.cut_data(self.c, after.id, 0)
            self._mark_kept(after.size)

    def _mark_kept(self, size: int) -> None:
        self.c.execute(
            "UPDATE objects SET kind=?, size=? WHERE pool=? AND ns=? AND oid=?",
            (MAP_IN_LAYOUT, size, self.pool_id, self.namespace, self.oid),
        )


class SnapMapView(StoredTransaction):
    """The object map of a snapshot, for readers. It is an ordinary object; but what was copied up after it was stored
    belongs to the snapshot too, and they see it. A change is made to what is stored: what is found on the way may be an
    object between two of the versions that a migration or a copy writes, and would stay."""

    complete: Callable[[bytes], bytes]

    def head(self) -> ObjectState | None:
        row = self.row
        if row is None or not row.present:
            return None
        return MapState(self.c, row, lambda: self._data(row))

    def _data(self, row: Row) -> bytes:
        return self.complete(content.read_data(self.c, row.id, 0, row.size) if row.size else b"")


def complete_map(c: sqlite3.Connection, row: LayoutRow, snap_id: int, layout: Layout, data: bytes) -> bytes:
    """The object map of a snapshot with what copy-ups gave it. What is no map stays as it is."""
    try:
        states = object_map.decode(data)
    except DecodeError:
        return data
    if object_map.encode(states) != data:
        return data
    before = max((snap for snap in header_snaps(c, row).listed if snap < snap_id), default=0)
    return object_map.encode(states) if layout.complete_snap_map(snap_id, before, states) else data


class MapState(StoredKeys):
    """Head of a map whose bytes are made when they are read."""

    def __init__(self, c: sqlite3.Connection, row: Row, make: Callable[[], bytes]) -> None:
        super().__init__(c, row.id)
        self.mtime_ns = row.mtime
        self._make = make
        self._bytes: bytes | None = None

    def _data(self) -> bytes:
        if self._bytes is None:
            self._bytes = self._make()
        return self._bytes

    @property
    def size(self) -> int:
        return len(self._data())

    def read(self, offset: int, length: int) -> bytes:
        return self._data()[offset : offset + length]

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        stop = min(offset + length, self.size)
        return [(offset, stop - offset)] if stop > offset else []

"""Which objects live in layouts: registration, lookup, removal. A layout is the folder data/<n> of one image.

A crash can leave, and the next to come repairs:
  * a folder without a row (cut before COMMIT of its registration): replaced when its number is given again;
  * a row in `trash` with a folder data/<n> or data/trash-<n>: removed by whoever opens the store next.
"""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from librbd_py.format import object_map

from .. import layout as native
from ..api import NO_SNAPS
from ..layout import Layout
from ..record import LayoutSpec
from . import content
from .folder import DIRECTORY, Folder
from .objects import drop_object, load_row, next_number, snap_removed
from .schema import MAP_IN_LAYOUT, ORDINARY, SIDE
from .steps import step

KEEP = 16  # layouts that stay open after a generic operation
ORDERS = range(12, 26)
MAX_OBJNO = 1 << 40  # C refuses far smaller ones with EFBIG
_MAP = "rbd_object_map."
_HEADER = "rbd_header."
_OBJNO = re.compile(r"[0-9a-f]{16}")


class LayoutRow(NamedTuple):
    folder: int
    pool: int
    namespace: str
    prefix: str
    order: int
    header_pool: int
    header: str


_COLUMNS = "folder, pool, ns, prefix, objorder, header_pool, header"


def find_data(c: sqlite3.Connection, pool: int, namespace: str, oid: str) -> tuple[LayoutRow, int] | None:
    """The layout that holds this data object, and its number."""
    if len(oid) < 18 or oid[-17] != "." or not _OBJNO.fullmatch(oid[-16:]):
        return None
    row = find(c, pool, namespace, oid[:-17])
    return None if row is None else (row, int(oid[-16:], 16))


def find(c: sqlite3.Connection, pool: int, namespace: str, prefix: str) -> LayoutRow | None:
    found = c.execute(
        f"SELECT {_COLUMNS} FROM layouts WHERE pool=? AND ns=? AND prefix=?", (pool, namespace, prefix)
    ).fetchone()
    return None if found is None else LayoutRow(*found)


def find_map(c: sqlite3.Connection, pool: int, namespace: str, oid: str) -> LayoutRow | None:
    """The layout of the image whose HEAD object map this is."""
    if not oid.startswith(_MAP):
        return None
    return of_header(c, pool, namespace, _HEADER + oid[len(_MAP) :])


def find_snap_map(c: sqlite3.Connection, pool: int, namespace: str, oid: str) -> tuple[LayoutRow, int] | None:
    """The layout of the image of which this is a snapshot's object map, and the snapshot."""
    if not oid.startswith(_MAP) or len(oid) < 18 or oid[-17] != "." or not _OBJNO.fullmatch(oid[-16:]):
        return None
    row = find_map(c, pool, namespace, oid[:-17])
    return None if row is None else (row, int(oid[-16:], 16))


def of_header(c: sqlite3.Connection, pool: int, namespace: str, header: str) -> LayoutRow | None:
    found = c.execute(
        f"SELECT {_COLUMNS} FROM layouts WHERE header_pool=? AND ns=? AND header=?", (pool, namespace, header)
    ).fetchone()
    return None if found is None else LayoutRow(*found)


def header_of(pool: int, prefix: str) -> tuple[int, str]:
    """(pool, header object) of the image whose data objects have this prefix; "" when it is nobody's."""
    match = re.fullmatch(r"rbd_data\.(?:(\d{1,18})\.)?([0-9A-Za-z]+)", prefix, re.ASCII)
    if match is None:
        return pool, ""
    return (int(match[1]) if match[1] else pool), _HEADER + match[2]


class HeaderSnaps(NamedTuple):
    """Snapshot ids are the pool's, given to any image. Those of one image: what its header lists, and every id above
    the header's snap_seq, for it may be about to be added (snapshot_add refuses lower ones)."""

    listed: list[int]
    seq: int


def header_snaps(c: sqlite3.Connection, row: LayoutRow) -> HeaderSnaps:
    header = load_row(c, row.header_pool, row.namespace, row.header)
    if header is None or not header.present:
        return HeaderSnaps([], 0)
    seq = content.omap_get(c, header.id, [b"snap_seq"]).get(b"snap_seq", b"")
    listed: list[int] = []
    for key, _ in content.omap_rows(c, header.id, b"", b"snapshot_"):
        try:
            listed.append(int(key[len(b"snapshot_") :], 16))
        except ValueError:
            pass  # damaged key: not a snapshot
    return HeaderSnaps(sorted(listed), int.from_bytes(seq, "little") if len(seq) == 8 else 0)


def image_snaps(c: sqlite3.Connection, row: LayoutRow, above: int, up_to: int, snaps: HeaderSnaps) -> list[int]:
    """Existing snapshots s of the image with above < s <= up_to, ascending."""
    known = [s for s in snaps.listed if above < s <= up_to and not snap_removed(c, row.pool, s)]
    fresh = range(max(above, snaps.seq) + 1, up_to + 1)
    return known + [s for s in fresh if not snap_removed(c, row.pool, s)]


class Layouts:
    """The open layouts of one store."""

    def __init__(self, data: Folder) -> None:
        self._data = data
        self._lock = threading.Lock()  # guards the next two
        self._kept: OrderedDict[int, Layout] = OrderedDict()
        self._dirty: set[int] = set()  # changed by generic operations and not flushed since

    def acquire(self, row: LayoutRow) -> Layout:
        try:
            return native.acquire(self._data.fd, str(row.folder), row.order)
        except OSError as error:
            path = f"{self._data.path}/{row.folder}"
            raise OSError(
                error.errno, f"{path} (data of {row.prefix}): {error.strerror}; run `rbdpy store check`"
            ) from error

    @contextmanager
    def use(self, row: LayoutRow) -> Iterator[Layout]:
        """Stays open for a while: the next operation is likely on the same image."""
        layout = self.acquire(row)
        try:
            yield layout
        finally:
            with self._lock:
                old = self._kept.pop(row.folder, None)
                self._kept[row.folder] = layout
                gone = [self._kept.popitem(last=False)[1]] if len(self._kept) > KEEP else []
                if old is not None:
                    gone.append(old)
            for item in gone:
                item.release()

    def mark_dirty(self, row: LayoutRow) -> None:
        with self._lock:
            self._dirty.add(row.folder)

    def flush_dirty(self) -> None:
        """Data that generic operations changed becomes durable before a later change of metadata does. Raises when
        that fails; the metadata must not change then."""
        with self._lock:
            kept = [(folder, self._kept[folder].hold()) for folder in self._dirty if folder in self._kept]
            self._dirty.intersection_update(folder for folder, _ in kept)  # others were closed: that made them durable
        try:
            for folder, layout in kept:
                layout.flush()
                with self._lock:
                    self._dirty.discard(folder)
        finally:
            for _, layout in kept:
                layout.release()

    def forget(self, folder: int) -> None:
        with self._lock:
            layout = self._kept.pop(folder, None)
            self._dirty.discard(folder)
        if layout is not None:
            layout.release()

    def close(self) -> None:
        with self._lock:
            kept, self._kept = list(self._kept.values()), OrderedDict()
        for layout in kept:
            layout.release()

    # --- registration; `c` is inside a write transaction

    def register(self, c: sqlite3.Connection, place: tuple[int, str, str], spec: LayoutSpec) -> None:
        """The image with this header keeps its data in a layout. One whose data cannot (an order C does not know, a
        pool that is not there, objects with clones of their own) stays with ordinary objects."""
        pool, namespace, header = place
        known = find(c, spec.data_pool, namespace, spec.object_prefix)
        if known is not None:
            if not known.header:
                c.execute("UPDATE layouts SET header_pool=?, header=? WHERE folder=?", (pool, header, known.folder))
            return
        if spec.order not in ORDERS or spec.object_prefix == "" or not _pool_exists(c, spec.data_pool):
            return
        row = LayoutRow(0, spec.data_pool, namespace, spec.object_prefix, spec.order, pool, header)
        try:
            self.create(c, row)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise

    def create(self, c: sqlite3.Connection, row: LayoutRow) -> LayoutRow:
        """The folder is durable before the row is. EOPNOTSUPP when ordinary objects in the way cannot move."""
        present = _ordinary(c, row)
        row = row._replace(folder=next_number(c, "folder"))
        name = str(row.folder)
        step("layout: before folder")
        # Nobody can own this number: it was given in a transaction that did not commit.
        self._data.remove_folder(name)
        layout = native.acquire(self._data.fd, name, row.order, create=True)
        try:
            step("layout: folder made")
            c.execute(f"INSERT INTO layouts({_COLUMNS}) VALUES (?,?,?,?,?,?,?)", row)
            self._adopt(c, row, layout, present)
        except BaseException:
            layout.release()
            self._data.remove_folder(name)  # still under the write lock: nobody else is given this number
            raise
        layout.release()  # durable
        self._data.sync()
        step("layout: ready")
        return row

    def _adopt(
        self, c: sqlite3.Connection, row: LayoutRow, layout: Layout, present: Sequence[tuple[int, int, int]]
    ) -> None:
        """Data objects that were written before their header (a pool that is being restored) move into the layout."""
        for number, objno, size in present:
            for offset, length in content.data_extents(c, number, 0, size) if size else ():
                layout.write(objno, offset, content.read_data(c, number, offset, length), NO_SNAPS)
            layout.truncate(objno, size, NO_SNAPS, create=True)
            content.cut_data(c, number, 0)
            c.execute("UPDATE objects SET kind=?, present=0, size=0 WHERE id=?", (SIDE, number))
        image_map = load_row(c, row.header_pool, row.namespace, _MAP + row.header[len(_HEADER) :])
        if row.header and image_map is not None and image_map.present and image_map.kind == ORDINARY:
            data = content.read_data(c, image_map.id, 0, image_map.size) if image_map.size else b""
            if keep_map(layout, data):
                content.cut_data(c, image_map.id, 0)
                c.execute("UPDATE objects SET kind=? WHERE id=?", (MAP_IN_LAYOUT, image_map.id))

    def unregister(self, c: sqlite3.Connection, row: LayoutRow) -> None:
        """Its objects are gone when this commits; finish_trash() removes the folder."""
        c.execute("DELETE FROM layouts WHERE folder=?", (row.folder,))
        c.execute("INSERT OR REPLACE INTO trash VALUES (?)", (row.folder,))
        begin, end = f"{row.prefix}.", f"{row.prefix}/"
        for number, oid in c.execute(
            "SELECT id, oid FROM objects WHERE pool=? AND ns=? AND oid>=? AND oid<? AND kind=?",
            (row.pool, row.namespace, begin, end, SIDE),
        ).fetchall():
            if _OBJNO.fullmatch(oid[len(begin) :]):
                drop_object(c, number)
        if not row.header:
            return
        image_map = load_row(c, row.header_pool, row.namespace, _MAP + row.header[len(_HEADER) :])
        if image_map is not None and image_map.kind == MAP_IN_LAYOUT:
            data = b""  # the object map outlives its header for a moment when an image is removed
            try:
                with self.use(row) as layout:
                    data = map_data(layout)
            except OSError:
                pass  # a damaged layout must not keep its image from being removed
            content.write_data(c, image_map.id, 0, data)
            c.execute("UPDATE objects SET kind=?, size=? WHERE id=?", (ORDINARY, len(data), image_map.id))

    def remove_folder(self, folder: int) -> None:
        """Idempotent; any number of processes at once."""
        self.forget(folder)
        self._data.rename(str(folder), f"trash-{folder}")
        step("layout: renamed to trash")
        self._data.remove_folder(f"trash-{folder}")
        self._data.sync()
        step("layout: folder removed")

    # --- snapshots

    def trim(self, c: sqlite3.Connection, row: LayoutRow, removed: int, next_id: int) -> None:
        """After snapshot `removed` of the pool went away. Clones are named after the newest snapshot they serve, which
        is one of the image's; so a clone that serves the removed one for nobody else is either named after it or after
        one that was removed before."""
        clones = self.clone_ids(row)
        candidates = [clone for clone in clones if clone >= removed]
        if not candidates:
            return
        snaps = header_snaps(c, row)
        if candidates[0] != removed and image_snaps(c, row, candidates[0] - 1, candidates[0], snaps):
            return
        live = image_snaps(c, row, 0, clones[-1], snaps)
        with self.use(row) as layout:
            layout.trim([*live, next_id])

    def clone_ids(self, row: LayoutRow) -> list[int]:
        """Ascending. Quick: snap_remove asks every image of the pool."""
        fd = os.open(str(row.folder), DIRECTORY, dir_fd=self._data.fd)
        try:
            names = os.listdir(fd)
        finally:
            os.close(fd)
        return sorted(int(name[6:-4]) for name in names if name.endswith(".idx") and name[6:-4].isdecimal())

    def mtime_ns(self, row: LayoutRow) -> int:
        """When anything was last written to the image: layouts keep no time per object."""
        folder = self._data.sub(str(row.folder))
        try:
            status = folder.stat("head.0")
        finally:
            folder.close()
        return status.st_mtime_ns if status is not None else 0

    def allocated(self, row: LayoutRow) -> int:
        """Bytes on disk."""
        folder = self._data.sub(str(row.folder))
        try:
            stats = [folder.stat(name) for name in folder.names() if name.startswith(("head.", "clone."))]
        finally:
            folder.close()
        return sum(status.st_blocks * 512 for status in stats if status is not None)


def _pool_exists(c: sqlite3.Connection, pool: int) -> bool:
    return c.execute("SELECT 1 FROM pools WHERE id=?", (pool,)).fetchone() is not None


def _ordinary(c: sqlite3.Connection, row: LayoutRow) -> list[tuple[int, int, int]]:
    """(objects.id, object number, size) of ordinary objects that are the layout's by name. EOPNOTSUPP."""
    begin, end = f"{row.prefix}.", f"{row.prefix}/"
    found: list[tuple[int, int, int]] = []
    for number, oid, present, size, snap_seq in c.execute(
        "SELECT id, oid, present, size, snap_seq FROM objects WHERE pool=? AND ns=? AND oid>=? AND oid<?",
        (row.pool, row.namespace, begin, end),
    ).fetchall():
        tail = oid[len(begin) :]
        if not _OBJNO.fullmatch(tail):
            continue
        objno = int(tail, 16)
        if not present or snap_seq or size > 1 << row.order or objno >= MAX_OBJNO:
            raise OSError(errno.EOPNOTSUPP, f"{oid} was written before its image existed and cannot be taken over")
        found.append((number, objno, size))
    return found


def map_data(layout: Layout) -> bytes:
    """The bytes of the HEAD object map that the layout keeps; empty when it keeps none."""
    states = layout.map_states()
    return b"" if states is None else object_map.encode(states)


def keep_map(layout: Layout, data: bytes) -> bool:
    """Gives the layout this HEAD object map to keep. False, and it keeps none, when `data` is not exactly what it
    would be read back as."""
    states: bytearray | None = None
    if data:
        try:
            states = object_map.decode(data)
            if object_map.encode(states) != data:
                states = None
        except OSError:
            states = None
    layout.set_map_states(None if states is None else bytes(states))
    return states is not None

"""What the verification of images reads in an embedded store: its tables, and the layouts of data objects."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence

from librbd_py.format import features, names

from .. import layout as native
from ..check.images import Header
from ..check.records import ERROR, WARNING, Report, Space
from . import content
from .folder import Folder
from .layouts import LayoutRow, of_header
from .objects import Row, load_row
from .schema import MAP_IN_LAYOUT

Headers = dict[tuple[int, str, str], Header]


class Rows:
    """Records of meta.db."""

    def __init__(self, c: sqlite3.Connection) -> None:
        self._c = c

    def spaces(self) -> list[Space]:
        return sorted(self._c.execute("SELECT DISTINCT pool, ns FROM objects WHERE present").fetchall())

    def objects(self, pool: int, namespace: str, prefix: str) -> list[str]:
        rows = self._c.execute(
            "SELECT oid FROM objects WHERE present AND pool=? AND ns=? AND oid>=? AND oid<? ORDER BY oid",
            (pool, namespace, prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)),
        )
        return [oid for (oid,) in rows.fetchall()]

    def _row(self, pool: int, namespace: str, oid: str) -> Row | None:
        row = load_row(self._c, pool, namespace, oid)
        return row if row is not None and row.present else None

    def omap(self, pool: int, namespace: str, oid: str) -> dict[bytes, bytes] | None:
        row = self._row(pool, namespace, oid)
        return None if row is None else dict(content.omap_rows(self._c, row.id, b"", b""))

    def data(self, pool: int, namespace: str, oid: str) -> bytes | None:
        row = self._row(pool, namespace, oid)
        if row is None:
            return None
        return content.read_data(self._c, row.id, 0, row.size) if row.size else b""

    def drop(self, pool: int, namespace: str, oid: str, keys: Sequence[bytes]) -> None:
        row = self._row(pool, namespace, oid)
        if row is not None:
            content.omap_drop(self._c, row.id, list(keys))


class Layouts:
    def __init__(self, c: sqlite3.Connection, data: Folder) -> None:
        self._c = c
        self._data = data

    def _of(self, header: Header) -> LayoutRow | None:
        return of_header(self._c, header.pool, header.namespace, header.oid)

    def problem(self, header: Header) -> tuple[str, str, str] | None:
        layout = self._of(header)
        if layout is None:
            return WARNING, "has no layout: its data objects are ordinary ones", "open the image once"
        if header.order is not None and layout.order != header.order:
            what = f"order {header.order}, but its data is laid out with order {layout.order}"
            return ERROR, what, "copy what can be read from the image, then remove it"
        return None

    def keeps_map(self, header: Header) -> bool:
        row = load_row(self._c, header.pool, header.namespace, names.object_map(header.image_id))
        return row is not None and bool(row.present) and row.kind == MAP_IN_LAYOUT

    def map_states(self, header: Header) -> bytes | None:
        layout = self._opened(header)
        if layout is None:
            return None
        try:
            return layout.map_states()
        finally:
            layout.release()

    def numbers(self, header: Header) -> Iterable[int]:
        layout = self._opened(header)
        if layout is None:
            return ()
        try:
            return list(layout.objects())
        finally:
            layout.release()

    def exists(self, header: Header, number: int) -> bool:
        return True

    def _opened(self, header: Header) -> native.Layout | None:
        row = self._of(header)
        if row is None:
            return None
        try:
            return native.acquire(self._data.fd, str(row.folder), row.order)
        except OSError:
            return None  # reported with the layout


def believes_map(headers: Headers, row: LayoutRow) -> bool:
    """Whether readers believe the object map that the layout keeps."""
    header = headers.get((row.header_pool, row.namespace, row.header[len(names.HEADER_PREFIX) :]))
    if header is None or header.features is None:
        return True
    return bool(header.features & features.OBJECT_MAP and not (header.flags or 0) & features.FLAG_OBJECT_MAP_INVALID)


def check_snapshots(report: Report, c: sqlite3.Connection, headers: Headers, row: LayoutRow, data: Folder) -> None:
    """What an image keeps for snapshots that it does not have."""
    if data.stat(str(row.folder)) is None:
        return
    folder = data.sub(str(row.folder))
    try:
        found = folder.names()
    finally:
        folder.close()
    clones = [int(name[6:-4]) for name in found if name.startswith("clone.") and name[6:-4].isdecimal()]
    header = headers.get((row.header_pool, row.namespace, row.header[len(names.HEADER_PREFIX) :]))
    for snap in clones if header is not None and not header.problems else ():
        if header is not None and snap not in header.snaps and not _removed(c, row.pool, snap):
            what = f"keeps data for snapshot {snap} of pool {row.pool}, which the image does not have"
            where = f"data/{row.folder} ({row.prefix})"
            report.found(WARNING, where, what, "remove the snapshot's id from the pool")


def _removed(c: sqlite3.Connection, pool: int, snap: int) -> bool:
    found = c.execute(
        "SELECT 1 FROM removed_snaps WHERE pool=? AND first<=? AND last>=?", (pool, snap, snap)
    ).fetchone()
    return found is not None

"""Verification of an embedded store: what operations on images that were cut short left behind."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from librbd_py.format import names, trash
from librbd_py.format.encoding import DecodeError, Decoder
from librbd_py.format.header import TrashNamespace

from . import content
from .folder import Folder
from .layouts import LayoutRow
from .objects import load_row

if TYPE_CHECKING:
    from .check import Checker
    from .check_images import Header

_WARNING = "warning"
_STATES = {trash.STATE_MOVING: "moved to the trash", trash.STATE_RESTORING: "restored"}
Headers = dict[tuple[int, str, str], "Header"]  # (pool, namespace, image id)


class Leftovers:
    def __init__(self, checker: Checker, c: sqlite3.Connection, headers: Headers) -> None:
        self._checker = checker
        self._c = c
        self._headers = headers

    def run(self) -> None:
        for pool, namespace in self._c.execute("SELECT DISTINCT pool, ns FROM objects WHERE present").fetchall():
            self._trash(pool, namespace)
            self._ids(pool, namespace)
            self._maps(pool, namespace)
            self._old_children(pool, namespace)
        for header in self._headers.values():
            for snap in header.snaps.values():
                if isinstance(snap.namespace, TrashNamespace) and not header.children(snap.id):
                    what = (
                        f"snapshot {snap.id} ({snap.namespace.original_name!r}) is in the trash and no clone needs it"
                    )
                    self._found(header.oid, what, "remove it again, by its id")

    def _found(self, where: str, what: str, advice: str) -> None:
        self._checker.found(_WARNING, where, what, advice)

    def _omap(self, pool: int, namespace: str, oid: str) -> tuple[int, dict[bytes, bytes]]:
        row = load_row(self._c, pool, namespace, oid)
        if row is None or not row.present:
            return 0, {}
        return row.id, dict(content.omap_rows(self._c, row.id, b"", b""))

    def _objects(self, pool: int, namespace: str, prefix: str) -> list[str]:
        rows = self._c.execute(
            "SELECT oid FROM objects WHERE present AND pool=? AND ns=? AND oid>=? AND oid<? ORDER BY oid",
            (pool, namespace, prefix, prefix[:-1] + "/"),
        )
        return [oid for (oid,) in rows.fetchall()]

    def _leads_to(self, pool: int, namespace: str, name: str) -> str | None:
        """The id that the name stands for."""
        row = load_row(self._c, pool, namespace, names.id_object(name))
        if row is None or not row.present or not row.size:
            return None
        try:
            return Decoder(content.read_data(self._c, row.id, 0, row.size)).string()
        except DecodeError:
            return None

    def _trash(self, pool: int, namespace: str) -> None:
        number, rows = self._omap(pool, namespace, names.TRASH)
        for key, value in rows.items():
            where = f"pool {pool}{'/' + namespace if namespace else ''}, rbd_trash"
            try:
                source = Decoder(value)
                spec = trash.TrashImageSpec.decode_from(source)
            except DecodeError as error:
                self._found(where, f"entry {key!r} is damaged: {error.strerror}", "remove the entry")
                continue
            image_id = key[len(trash.KEY_PREFIX) :].decode(errors="replace")
            if self._leads_to(pool, namespace, spec.name) == image_id:
                self._checker.found(
                    _WARNING,
                    where,
                    f"image {image_id!r} is in the trash and can be opened as {spec.name!r}",
                    "remove the entry",
                    lambda key=key, number=number: content.omap_drop(self._c, number, [key]),  # type: ignore[misc]
                )
            elif spec.source == trash.SOURCE_REMOVING:
                what = f"image {image_id!r} ({spec.name!r}): its creation or removal was cut short"
                self._found(where, what, "remove it from the trash by its id")
            elif spec.source == trash.SOURCE_MIGRATION and not self._migrates(pool, namespace, image_id):
                what = f"image {image_id!r} ({spec.name!r}): its migration was cut short at the beginning or the end"
                self._found(where, what, "abort the migration by this name, or commit it by its new one")
            elif spec.state in _STATES:
                what = f"image {image_id!r} ({spec.name!r}) was being {_STATES[spec.state]} when that was cut short"
                self._found(where, what, "do it again")

    def _migrates(self, pool: int, namespace: str, image_id: str) -> bool:
        header = self._headers.get((pool, namespace, image_id))
        return header is not None and (header.migration is not None or header.copying is not None)

    def _ids(self, pool: int, namespace: str) -> None:
        known = self._omap(pool, namespace, names.DIRECTORY)[1]
        for oid in self._objects(pool, namespace, names.ID_PREFIX):
            name = oid[len(names.ID_PREFIX) :]
            if b"name_" + name.encode(errors="surrogateescape") not in known:
                self._found(oid, "names an image that has another name, or none", "finish renaming, or remove it")

    def _maps(self, pool: int, namespace: str) -> None:
        for oid in self._objects(pool, namespace, names.OBJECT_MAP_PREFIX):
            image_id, _, snap_id = oid[len(names.OBJECT_MAP_PREFIX) :].partition(".")
            header = self._headers.get((pool, namespace, image_id))
            if header is None or (snap_id and snap_id not in {f"{number:016x}" for number in header.snaps}):
                self._found(oid, "is the object map of nothing that exists", "remove it")

    def _old_children(self, pool: int, namespace: str) -> None:
        """Clones of format 1 are in a list in their own pool."""
        for key, value in self._omap(pool, namespace, names.CHILDREN)[1].items():
            try:
                children = Decoder(value).list(Decoder.string, 4)
            except DecodeError as error:
                self._found(names.CHILDREN, f"entry {key!r} is damaged: {error.strerror}", "flatten the clones")
                continue
            for image_id in children:
                header = self._headers.get((pool, namespace, image_id))
                if header is None or header.parent is None or not header.parent.exists:
                    what = f"lists {image_id!r}, which is no clone"
                    self._found(names.CHILDREN, what, "it goes when the parent's snapshot is unprotected")

    def snapshots(self, row: LayoutRow, data: Folder) -> None:
        """What an image keeps for snapshots that it does not have."""
        if data.stat(str(row.folder)) is None:
            return
        folder = data.sub(str(row.folder))
        try:
            found = folder.names()
        finally:
            folder.close()
        clones = [int(name[6:-4]) for name in found if name.startswith("clone.") and name[6:-4].isdecimal()]
        header = self._headers.get((row.header_pool, row.namespace, row.header[len(names.HEADER_PREFIX) :]))
        for snap in clones if header is not None and not header.problems else ():
            if header is not None and snap not in header.snaps and not self._removed(row.pool, snap):
                what = f"keeps data for snapshot {snap} of pool {row.pool}, which the image does not have"
                self._found(f"data/{row.folder} ({row.prefix})", what, "remove the snapshot's id from the pool")

    def _removed(self, pool: int, snap: int) -> bool:
        found = self._c.execute(
            "SELECT 1 FROM removed_snaps WHERE pool=? AND first<=? AND last>=?", (pool, snap, snap)
        ).fetchone()
        return found is not None

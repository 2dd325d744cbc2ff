"""Offline verification of an embedded store: every rule its tables and folders follow, each breach explained.

`check(path)` looks; `check(path, repair=True)` also mends what can be mended without losing anything. Nobody may be
using the store: the check holds run/guard, so nobody can begin to.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .. import layout as native
from ..check.groups import Groups
from ..check.images import ImageChecker
from ..check.leftovers import Leftovers
from ..check.records import ERROR, NOTE, RUN_REPAIR, WARNING, Finding
from ..record import MAX_OBJECT_SIZE
from . import objects, reserve
from .check_data import Layouts, Rows, believes_map, check_snapshots
from .client import GUARD, Presence, lock_file
from .database import Database
from .folder import Folder, wait_lock
from .layouts import ORDERS, LayoutRow
from .schema import APPLICATION_ID, CHUNK, CHUNK_SHIFT, MAP_IN_LAYOUT, ORDINARY, SIDE, STORE_VERSION, VERSION

MAX_FINDINGS = 1000  # of one rule


def check(path: str | os.PathLike[str], *, repair: bool = False) -> list[Finding]:
    """EBUSY while a client is alive; errors of opening the folder as in folder.py. [] when all is well."""
    root = Folder.open(os.path.abspath(os.fspath(path)))
    try:
        checker = Checker(root, repair)
        with _alone(root):
            checker.run()
        return checker.findings
    finally:
        root.close()


@contextmanager
def _alone(root: Folder) -> Iterator[None]:
    if root.stat("run") is None:  # nobody can be there
        yield
        return
    run = root.sub("run")
    try:
        guard = run.open_file(GUARD, os.O_RDWR | os.O_CREAT)
        try:
            wait_lock(lambda: lock_file(guard), 5, f"{run.path}/{GUARD}")
            alive = Presence(run, 0).others()
            if alive:
                raise OSError(errno.EBUSY, f"{root.path} is in use by {len(alive)} clients: stop them first")
            yield
        finally:
            os.close(guard)
    finally:
        run.close()


class Checker:
    def __init__(self, root: Folder, repair: bool) -> None:
        self.findings: list[Finding] = []
        self.repair = repair
        self._root = root

    def found(
        self, severity: str, where: str, what: str, advice: str, mend: Callable[[], object] | None = None
    ) -> None:
        """`mend` is called with --repair; the finding says whether it worked."""
        if mend is None or not self.repair:
            self.findings.append(Finding(severity, where, what, RUN_REPAIR if mend else advice))
            return
        try:
            mend()
        except (OSError, sqlite3.Error) as error:
            self.findings.append(Finding(severity, where, what, f"repairing it failed: {error}; {advice}"))
            return
        self.findings.append(Finding(NOTE, where, what, "repaired", repaired=True))

    def run(self) -> None:
        self._check_description()
        for name in self._root.names():
            if name not in ("store.json", "meta.db", "meta.db-wal", "meta.db-shm", "run", "data", reserve.NAME):
                self.found(WARNING, name, "is no part of a store", "remove it if you know that nobody needs it")
        if not self._root.check_file("meta.db"):
            self.found(ERROR, "meta.db", "is missing: the store's images cannot be found", "restore it from a backup")
            return
        db = Database(self._root.real_path("meta.db"), synchronous="FULL")
        try:
            if self._check_database(db):
                with db.write() as c:
                    Tables(self, c).run()
                self._check_folders(db)
        except OSError as error:
            self.found(ERROR, "meta.db", str(error.strerror or error), "restore it from a backup")
        finally:
            db.close()

    def _check_description(self) -> None:
        try:
            content = json.loads(self._root.read_file("store.json"))
            known = isinstance(content["version"], int) and str(uuid.UUID(content["fsid"])) == content["fsid"]
            if known and content["version"] != STORE_VERSION:
                raise OSError(errno.EPROTONOSUPPORT, f"store version {content['version']} is not known")
            if known:
                return
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FileNotFoundError):
            pass
        self.found(
            ERROR,
            "store.json",
            "is missing or damaged",
            "write it again",
            self._rewrite_description if self._root.check_file("meta.db") else None,
        )

    def _rewrite_description(self) -> None:
        """With a new fsid: it names the store to its users and is recorded nowhere else."""
        self._root.remove("store.json")
        text = {"format": "librbd-py embedded store", "version": STORE_VERSION, "fsid": str(uuid.uuid4())}
        self._root.write_new("store.json", json.dumps(text).encode() + b"\n")

    def _check_database(self, db: Database) -> bool:
        """Whether the tables are worth reading."""
        with db.read() as c:
            application = c.execute("PRAGMA application_id").fetchone()[0]
            version = c.execute("PRAGMA user_version").fetchone()[0]
            problems = [row[0] for row in c.execute(f"PRAGMA integrity_check({MAX_FINDINGS})")]
        if problems != ["ok"]:
            for problem in problems:
                self.found(ERROR, "meta.db", problem, "restore it from a backup, or salvage with `sqlite3 .recover`")
            return False
        if application != APPLICATION_ID:
            self.found(ERROR, "meta.db", "is not the database of a store", "restore it from a backup")
            return False
        if version != VERSION:
            self.found(ERROR, "meta.db", f"version {version} is not known", "use the program that wrote it")
            return False
        return True

    # --- folders

    def _check_folders(self, db: Database) -> None:
        if self._root.stat("data") is None:
            self.found(ERROR, "data", "the folder is missing", "restore it from a backup")
            return
        data = self._root.sub("data")
        try:
            with db.write() as c:
                rows = [LayoutRow(*row) for row in c.execute(_ALL_LAYOUTS)]
                trash = {row[0] for row in c.execute("SELECT folder FROM trash")}
                last = c.execute("SELECT value FROM counters WHERE name='folder'").fetchone()[0]
                self._check_names(c, data, {row.folder for row in rows}, trash, last)
                records = Rows(c)
                images = ImageChecker(self, records, Layouts(c, data))
                for row in rows:
                    self._check_layout(c, data, row, believes_map(images.headers, row))
                images.run()
                Leftovers(self, records, images.headers).run()
                Groups(self, records, images.headers).run()
                for row in rows:
                    check_snapshots(self, c, images.headers, row, data)
        finally:
            data.close()

    def _check_names(self, c: sqlite3.Connection, data: Folder, known: set[int], trash: set[int], last: int) -> None:
        for name in data.names():
            where = f"data/{name}"
            status = data.stat(name)
            folder = name.removeprefix("trash-")
            if status is None or not stat.S_ISDIR(status.st_mode) or not folder.isdecimal():
                self.found(WARNING, where, "is no part of a store", "remove it if you know that nobody needs it")
                continue
            number = int(folder)
            if number in known and folder == name:
                continue
            if number in trash or name.startswith("trash-") or number > last:
                what = "left by an image that was removed" if number <= last else "left by a creation that was cut off"
                self.found(
                    NOTE,
                    where,
                    what,
                    "open the store once",
                    lambda name=name: data.remove_folder(name),  # type: ignore[misc]
                )
            else:
                self.found(
                    WARNING,
                    where,
                    "no image refers to this folder",
                    "if meta.db was not restored from an older backup, remove the folder",
                )
        if self.repair:
            gone = [n for n in trash if data.stat(str(n)) is None and data.stat(f"trash-{n}") is None]
            c.executemany("DELETE FROM trash WHERE folder=?", [(number,) for number in gone])

    def _check_layout(self, c: sqlite3.Connection, data: Folder, row: LayoutRow, map_counts: bool) -> None:
        where = f"data/{row.folder} ({row.prefix})"
        if row.order not in ORDERS:
            self.found(ERROR, where, f"object order {row.order} is impossible", "restore meta.db from a backup")
            return
        if data.stat(str(row.folder)) is None:
            self.found(ERROR, where, "the folder with the image's data is missing", "restore it from a backup")
            return
        try:
            layout = native.acquire(data.fd, str(row.folder), row.order)
        except OSError as error:
            self.found(ERROR, where, f"cannot be opened: {error.strerror}", "restore it from a backup")
            return
        try:
            for line in layout.findings():
                if not map_counts and "object map says" in line:
                    continue
                self.found(ERROR, where, line, "copy what you need from the image, then remove it")
            begin = f"{row.prefix}."
            for number, oid in c.execute(
                "SELECT id, oid FROM objects WHERE pool=? AND ns=? AND oid>=? AND oid<? AND kind=?",
                (row.pool, row.namespace, begin, f"{row.prefix}/", SIDE),
            ).fetchall():
                if layout.stat(int(oid[len(begin) :], 16)) is None:
                    self.found(
                        NOTE,
                        oid,
                        "has attributes but no data: a crash, or a guest discarded it",
                        "ignore it",
                        lambda number=number: objects.drop_object(c, number),  # type: ignore[misc]
                    )
        finally:
            layout.release()


_ALL_LAYOUTS = "SELECT folder, pool, ns, prefix, objorder, header_pool, header FROM layouts"


class Tables:
    """Rules between the rows of meta.db. Inside one write transaction, which --repair uses."""

    def __init__(self, checker: Checker, c: sqlite3.Connection) -> None:
        self._checker = checker
        self._c = c

    def run(self) -> None:
        self._counters()
        self._pools()
        self._objects()
        self._content()
        self._clones()
        self._layouts()
        for pool, snap in self._c.execute("SELECT pool, snap FROM trims"):
            self._note(f"pool {pool}", f"snapshot {snap} was removed, clearing up was cut off", "open the store once")

    def _rows(self, sql: str, *values: object) -> list[tuple[object, ...]]:
        return self._c.execute(f"{sql} LIMIT {MAX_FINDINGS}", values).fetchall()

    def _note(self, where: str, what: str, advice: str) -> None:
        self._checker.found(NOTE, where, what, advice)

    def _error(self, where: str, what: str, sql: str = "", *values: object) -> None:
        """`sql` mends it."""
        mend = (lambda: self._c.execute(sql, values)) if sql else None
        self._checker.found(ERROR, where, what, "restore meta.db from a backup", mend)

    def _counters(self) -> None:
        """A number that is given twice would join two things that have nothing to do with each other."""
        highest = {
            "pool": "SELECT max(id) FROM pools",
            "folder": "SELECT max(folder) FROM (SELECT folder FROM layouts UNION SELECT folder FROM trash)",
            "version": "SELECT max(version) FROM objects",
            "gid": "SELECT max(gid) FROM trims",
        }
        for name, sql in highest.items():
            row = self._c.execute("SELECT value FROM counters WHERE name=?", (name,)).fetchone()
            top = self._c.execute(sql).fetchone()[0] or 0
            if row is None or row[0] < top:
                self._error(
                    f"counter {name}",
                    f"stands at {row[0] if row else 'nothing'}, but {top} was given",
                    "INSERT OR REPLACE INTO counters VALUES (?,?)",
                    name,
                    top,
                )

    def _pools(self) -> None:
        last: tuple[int, int] | None = None
        for pool, first, end in self._c.execute("SELECT pool, first, last FROM removed_snaps ORDER BY pool, first"):
            seq = self._c.execute("SELECT snap_seq FROM pools WHERE id=?", (pool,)).fetchone()
            if seq is None:
                self._error(f"pool {pool}", "has removed snapshots but does not exist")
            elif first < 1 or end < first or end > seq[0]:
                self._error(f"pool {pool}", f"removed snapshots {first} to {end}: only {seq[0]} were ever given")
            elif last is not None and last[0] == pool and first <= last[1] + 1:
                self._error(f"pool {pool}", f"removed snapshots {first} to {end} overlap the ones before")
            last = (pool, end)

    def _objects(self) -> None:
        for number, pool, oid in self._rows(
            "SELECT id, pool, oid FROM objects WHERE pool NOT IN (SELECT id FROM pools)"
        ):
            self._error(f"object {oid}", f"belongs to pool {pool}, which does not exist", _DROP_OBJECT, number)
        for oid, kind, present, size in self._rows(
            "SELECT oid, kind, present, size FROM objects WHERE kind NOT IN (?,?,?) OR present NOT IN (0,1) "
            "OR size NOT BETWEEN 0 AND ? OR (NOT present AND size>0)",
            ORDINARY,
            MAP_IN_LAYOUT,
            SIDE,
            MAX_OBJECT_SIZE,
        ):
            self._error(f"object {oid}", f"impossible: kind {kind}, present {present}, {size} bytes")
        for number, oid in self._rows(
            "SELECT id, oid FROM objects WHERE NOT present AND kind=? AND id NOT IN (SELECT object FROM clones)",
            ORDINARY,
        ):
            self._error(f"object {oid}", "neither exists nor has clones", _DROP_OBJECT, number)
        for number, oid in self._rows(
            "SELECT o.id, o.oid FROM objects o WHERE kind=? AND NOT EXISTS (SELECT 1 FROM layouts l WHERE "
            "l.pool=o.pool AND l.ns=o.ns AND l.prefix=substr(o.oid, 1, length(o.oid)-17))",
            SIDE,
        ):
            self._error(f"object {oid}", "attributes of a data object whose image does not exist", _DROP_OBJECT, number)
        for (oid,) in self._rows(
            "SELECT o.oid FROM objects o WHERE kind=? AND NOT EXISTS (SELECT 1 FROM layouts l WHERE "
            "l.header_pool=o.pool AND l.ns=o.ns AND l.header='rbd_header.'||substr(o.oid, 16))",
            MAP_IN_LAYOUT,
        ):
            self._error(f"object {oid}", "the layout that should keep this object map does not exist")

    def _content(self) -> None:
        owners = "(SELECT id FROM objects UNION ALL SELECT -id FROM clones)"
        for table, column in (("chunks", f"(id >> {CHUNK_SHIFT})"), ("xattrs", "content"), ("omap", "content")):
            for (content,) in self._rows(f"SELECT DISTINCT {column} FROM {table} WHERE {column} NOT IN {owners}"):
                self._error(
                    f"table {table}",
                    f"rows of content {content}, which nothing owns",
                    f"DELETE FROM {table} WHERE {column}=?",
                    content,
                )
        for (row,) in self._rows("SELECT id FROM chunks WHERE length(data) NOT BETWEEN 1 AND ?", CHUNK):
            self._error("table chunks", f"row {row} has an impossible length")
        sizes = "(SELECT id, size, oid, kind FROM objects UNION ALL SELECT -id, size, 'a clone', 0 FROM clones)"
        for oid, number in self._rows(
            f"SELECT DISTINCT s.oid, s.id FROM chunks c JOIN {sizes} s ON s.id=(c.id >> {CHUNK_SHIFT}) WHERE "
            f"((c.id & {(1 << CHUNK_SHIFT) - 1}) * {CHUNK} + length(c.data) > s.size) OR s.kind<>{ORDINARY}"
        ):
            self._error(f"object {oid}", f"content {number} has data behind its end or where it belongs in a layout")

    def _clones(self) -> None:
        rows = self._c.execute(
            "SELECT k.id, k.object, k.clone, k.snaps, k.overlap, k.size, o.oid, o.pool, o.snap_seq FROM clones k "
            "LEFT JOIN objects o ON o.id=k.object"
        ).fetchall()
        wanted: set[tuple[int, int, int]] = set()
        for number, owner, clone, snaps, overlap, size, oid, pool, seq in rows:
            where = f"object {oid}, clone {clone}"
            if oid is None:
                self._error(f"clone {number}", f"of object {owner}, which does not exist", _DROP_CLONE, number)
                continue
            try:
                ids = json.loads(snaps)
                ranges = json.loads(overlap)
                sound = (
                    bool(ids)
                    and ids == sorted(set(ids))
                    and all(isinstance(snap, int) for snap in ids)
                    and ids[-1] <= clone <= seq
                    and all(o >= 0 and n > 0 and o + n <= size for o, n in ranges)
                )
            except (ValueError, TypeError, RecursionError):
                sound = False
            if sound:
                wanted.update((pool, snap, number) for snap in ids)
            else:
                self._error(where, "its list of snapshots or of shared ranges is damaged")
        for pool, snap, number in self._rows("SELECT pool, snap, clone FROM clone_snaps"):
            if (pool, snap, number) in wanted:
                wanted.discard((pool, snap, number))
            else:
                self._error(
                    f"pool {pool}",
                    f"snapshot {snap} lists clone {number}, which does not serve it",
                    "DELETE FROM clone_snaps WHERE pool=? AND snap=? AND clone=?",
                    pool,
                    snap,
                    number,
                )
        for missing in sorted(wanted):
            self._error(
                f"pool {missing[0]}",
                f"snapshot {missing[1]} does not list clone {missing[2]}, which serves it",
                "INSERT INTO clone_snaps VALUES (?,?,?)",
                *missing,
            )

    def _layouts(self) -> None:
        for folder, prefix in self._rows("SELECT folder, prefix FROM layouts WHERE pool NOT IN (SELECT id FROM pools)"):
            self._error(f"data/{folder} ({prefix})", "belongs to a pool that does not exist")
        for folder, prefix, header in self._rows(
            "SELECT folder, prefix, header FROM layouts l WHERE header<>'' AND NOT EXISTS (SELECT 1 FROM objects o "
            "WHERE o.pool=l.header_pool AND o.ns=l.ns AND o.oid=l.header AND o.present)"
        ):
            self._checker.found(
                WARNING,
                f"data/{folder} ({prefix})",
                f"its header {header} does not exist",
                "the data can only be read as single objects; remove the folder's objects if nobody needs them",
            )


_DROP_OBJECT = "DELETE FROM objects WHERE id=?"
_DROP_CLONE = "DELETE FROM clones WHERE id=?"

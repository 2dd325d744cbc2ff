"""The list of watches in run/watch.db: who watches what. Worth nothing without the watcher's lock (client.py)."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable

from librbd_py.format.logs import logger

from ..api import WatcherInfo
from .client import Presence, address_of
from .database import Database, primary_code
from .folder import Folder
from .schema import WATCH_TABLES, statements

log = logger(__name__)

LOG_PAGES = 64  # the database is small, and copying costs no sync
LOG_ROOM = 512 << 10  # bytes: so many pages and what a transaction adds
Place = tuple[int, str, str]  # pool id, namespace, object name


class Registry:
    """Opened by the first who needs it. Losing it in a power cut loses nothing: its clients are gone as well."""

    def __init__(self, run: Folder, presence: Presence) -> None:
        self._presence = presence
        run.create_file("watch.db")
        run.check_file("watch.db")
        self._db = Database(run.real_path("watch.db"), synchronous="OFF", prepare=_prepare)
        with self._db.write():
            pass
        self._db.reserve(LOG_ROOM)

    def add(self, place: Place, cookie: int, timeout: int) -> None:
        with self._db.write() as c:
            c.execute("INSERT INTO watches VALUES (?,?,?,?,?,?)", (*place, self._presence.gid, cookie, timeout))

    def remove(self, place: Place, cookie: int) -> None:
        with self._db.write() as c:
            c.execute(
                "DELETE FROM watches WHERE pool=? AND ns=? AND oid=? AND gid=? AND cookie=?",
                (*place, self._presence.gid, cookie),
            )

    def registered(self, place: Place, cookie: int) -> bool:
        with self._db.read() as c:
            row = c.execute(
                "SELECT 1 FROM watches WHERE pool=? AND ns=? AND oid=? AND gid=? AND cookie=?",
                (*place, self._presence.gid, cookie),
            ).fetchone()
        return row is not None

    def watchers(self, place: Place) -> list[WatcherInfo]:
        """Of live clients. Those of dead ones are removed on the way."""
        with self._db.read() as c:
            rows = c.execute(
                "SELECT gid, cookie, timeout FROM watches WHERE pool=? AND ns=? AND oid=?", place
            ).fetchall()
        return [WatcherInfo(gid, cookie, address_of(gid), timeout) for gid, cookie, timeout in self._live(rows)]

    def _live(self, rows: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        dead = {gid for gid in {row[0] for row in rows} if not self._presence.alive(gid)}
        for gid in dead:
            self.drop_client(gid)
            self._presence.forget(gid)
        silent = [row for row in rows if row[0] not in dead and self._presence.silent(row[0], row[2])]
        gone = {row[:2] for row in silent if self._end(*row[:2])}
        return [row for row in rows if row[0] not in dead and row[:2] not in gone] if dead or gone else rows

    def _end(self, gid: int, cookie: int) -> bool:
        """A watch whose client was silent for longer than it lasts; running again it registers anew. False: it runs.
        The client beats before it looks, under the same lock, which of its watches are left."""
        with self._db.write() as c:
            if not self._presence.still_silent(gid):
                return False
            c.execute("DELETE FROM watches WHERE gid=? AND cookie=?", (gid, cookie))
        log.warning("client %d stands still: its watch %d has ended", gid, cookie)
        return True

    def settle(self) -> None:
        """Who was ending a watch has done so; who has not begun will see our last beat."""
        with self._db.write():
            pass

    def drop_client(self, gid: int) -> None:
        with self._db.write() as c:
            c.execute("DELETE FROM watches WHERE gid=?", (gid,))

    def clients(self) -> set[int]:
        """Those that watch anything."""
        with self._db.read() as c:
            return {gid for (gid,) in c.execute("SELECT DISTINCT gid FROM watches")}

    def drop_objects(self, places: Iterable[Place]) -> set[int]:
        """Removes every watch of these objects; the gids that had one."""
        gids: set[int] = set()
        for place in places:
            with self._db.read() as c:  # most objects have none: no write lock for them
                found = c.execute("SELECT 1 FROM watches WHERE pool=? AND ns=? AND oid=? LIMIT 1", place).fetchone()
            if found is None:
                continue
            with self._db.write() as c:
                rows = c.execute("DELETE FROM watches WHERE pool=? AND ns=? AND oid=? RETURNING gid", place).fetchall()
            gids.update(gid for (gid,) in rows)
        return gids

    def drop_pool(self, pool: int) -> set[int]:
        with self._db.write() as c:
            rows = c.execute("DELETE FROM watches WHERE pool=? RETURNING gid", (pool,)).fetchall()
        return {gid for (gid,) in rows}

    def close(self) -> None:
        self._db.close()

    def abandon(self) -> list[sqlite3.Connection]:
        return self._db.abandon()


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute(f"PRAGMA wal_autocheckpoint={LOG_PAGES}")
    for left in reversed(range(200)):
        try:
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            # Two clients change the mode at once: SQLite does not wait for that by itself.
            if primary_code(error) != sqlite3.SQLITE_BUSY or left == 0:
                raise
            time.sleep(0.005)
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name='watches_gid'").fetchone() is None:
        connection.execute("BEGIN IMMEDIATE")
        for statement in statements(WATCH_TABLES):
            connection.execute(statement)
        connection.execute("COMMIT")

"""Connections to one SQLite file, for any number of threads and processes.

A connection is used by one thread at a time and goes back to a pool. Readers see a snapshot and never wait; writers of
this process queue on a mutex, writers of different processes on SQLite's own lock.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from librbd_py.errors import OutcomeUnknown
from librbd_py.format.logs import logger

from .holders import writer_of

log = logger(__name__)

KEEP = 8  # idle connections that stay open
BUSY_MS = 5000  # SQLite's own waiting, per try
TRIES = 6
LOG_PAGES = 1000  # a log of so many pages is copied into the database and used from its start again
LOG_ROOM = 4608 << 10  # bytes: so many pages with their headers, and a transaction that comes in between

_ERRNO = {
    sqlite3.SQLITE_BUSY: errno.ETIMEDOUT,
    sqlite3.SQLITE_LOCKED: errno.ETIMEDOUT,
    sqlite3.SQLITE_NOMEM: errno.ENOMEM,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_CORRUPT: errno.EUCLEAN,
    sqlite3.SQLITE_NOTADB: errno.EUCLEAN,
    sqlite3.SQLITE_ERROR: errno.EUCLEAN,  # a table is missing: not our database any more
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_TOOBIG: errno.EFBIG,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_AUTH: errno.EACCES,
}


def primary_code(error: sqlite3.Error) -> int:
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def translated(error: sqlite3.Error, path: str) -> OSError:
    code = _ERRNO.get(primary_code(error), errno.EIO)
    hint = ""
    if code == errno.EUCLEAN:
        hint = "; the database is damaged: run `rbdpy store check`"
    elif code == errno.ETIMEDOUT:
        who = writer_of(path) or "another process"
        hint = f"; {who} keeps it locked for more than {BUSY_MS * TRIES // 1000} s"
        if "stopped" in who:
            hint += ": `rbdpy store unblock` ends it"
    return OSError(code, f"{path}: {error}{hint}")


class Database:
    """`path` is handed to SQLite. `prepare` runs once on every new connection."""

    def __init__(self, path: str, *, synchronous: str, prepare: Callable[[sqlite3.Connection], None] | None = None):
        self.path = path
        self._synchronous = synchronous
        self._prepare = prepare
        self._lock = threading.Lock()  # guards the next two
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        self._writing = threading.Lock()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=BUSY_MS / 1000, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        try:
            connection.execute(f"PRAGMA synchronous={self._synchronous}")
            connection.execute("PRAGMA trusted_schema=OFF")
            connection.execute("PRAGMA temp_store=MEMORY")
            connection.execute(f"PRAGMA wal_autocheckpoint={LOG_PAGES}")
            if self._prepare is not None:
                self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def take(self) -> sqlite3.Connection:
        with self._lock:
            if self._closed:
                raise OSError(errno.ENOTCONN, "the store is closed")
            if self._idle:
                return self._idle.pop()
        try:
            return self._connect()
        except sqlite3.Error as error:
            raise translated(error, self.path) from error

    def give_back(self, connection: sqlite3.Connection) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < KEEP and not connection.in_transaction:
                self._idle.append(connection)
                return
        connection.close()

    def reserve(self, size: int = LOG_ROOM) -> bool:
        """Gives the log the disk space that it will ever need, when there is that much: on a disk that guests have
        filled, images can still be opened and removed. Zeroes behind the log's end mean nothing to SQLite. (Only the
        log: closing a descriptor of the database itself would drop SQLite's locks.) False: the disk is full."""
        with self.read() as c:
            if c.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                return True
            c.execute("SELECT count(*) FROM sqlite_master").fetchone()  # makes the log
            try:
                fd = os.open(self.path + "-wal", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                return True
            try:
                if os.fstat(fd).st_size < size:
                    os.posix_fallocate(fd, 0, size)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EOPNOTSUPP):
                    raise
                return error.errno not in (errno.ENOSPC, errno.EDQUOT)
            finally:
                os.close(fd)
        return True

    def checkpoint(self) -> None:
        """Copies the log into the database, as far as there is room, so that it is used from its start again."""
        connection = self.take()
        try:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as error:
            log.warning("%s: its log cannot be copied: %s", self.path, error)
        finally:
            self.give_back(connection)

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """One snapshot of the database for the whole block."""
        connection = self.take()
        try:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise translated(error, self.path) from error
        finally:
            self.give_back(connection)

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Commits at the end of the block, or changes nothing when it raises.

        ETIMEDOUT when another process keeps the lock. OutcomeUnknown when the commit itself failed on the medium.
        """
        with self._writing:
            connection = self.take()
            try:
                self._begin(connection)
                try:
                    yield connection
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
                self._commit(connection)
            except sqlite3.Error as error:
                raise translated(error, self.path) from error
            finally:
                self.give_back(connection)

    def _begin(self, connection: sqlite3.Connection) -> None:
        for left in reversed(range(TRIES)):
            try:
                connection.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if primary_code(error) != sqlite3.SQLITE_BUSY or left == 0:
                    raise

    def _commit(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            # Frames may be in the log already; whether they count is decided by who reads it next.
            unknown = primary_code(error) == sqlite3.SQLITE_IOERR
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if unknown:
                text = f"{self.path}: {error}: the change may have been made or not"
                raise OutcomeUnknown(errno.EIO, text) from error
            raise

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def abandon(self) -> list[sqlite3.Connection]:
        """After a fork, in the child: never touch them again. The caller keeps them from being collected."""
        self._closed = True
        idle, self._idle = self._idle, []
        return idle

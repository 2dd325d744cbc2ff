"""Making and opening a store's folder. Any number of processes may create the same store at once."""

from __future__ import annotations

import errno
import json
import os
import re
import sqlite3

from librbd_py.format.values import dataclass

from . import reserve
from .database import Database, primary_code
from .folder import Folder, lock_folder
from .schema import APPLICATION_ID, STORE_VERSION, TABLES, VERSION, statements
from .steps import step

_OURS = r"store\.json(\..*\.new)?|meta\.db(-wal|-shm|-journal)?|reserve|run|data"
_FSID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


@dataclass
class Opened:
    root: Folder
    run: Folder
    data: Folder
    fsid: str
    db: Database

    def close(self) -> None:
        self.db.close()
        for folder in (self.run, self.data, self.root):
            folder.close()


def open_store(path: str, *, create: bool) -> Opened:
    """ENOENT when there is no store and `create` is not set; ENOTEMPTY when the folder holds something else; EUCLEAN
    for a damaged one; EPROTONOSUPPORT for one made by a newer version; EACCES, ELOOP from folder.py; ENOSPC when the
    disk is full and so is the room that was kept for that."""
    try:
        return _open_store(path, create)
    except OSError as error:
        _make_room(path, error)
    return _open_store(path, create)


def _make_room(path: str, error: OSError) -> None:
    """Raises what went wrong when there is no room to be made for it."""
    if error.errno not in reserve.FULL:
        raise error
    root = Folder.open(os.path.abspath(path))
    try:
        if not reserve.full(root, error):
            raise error
        if not reserve.give_up(root):
            raise OSError(errno.ENOSPC, f"{root.path}: the disk is full: {error.strerror}") from error
    finally:
        root.close()


def _open_store(path: str, create: bool) -> Opened:
    root = Folder.open(os.path.abspath(path), create=create)
    folders = [root]
    try:
        description = _describe(root, create)
        # run/ is volatile: somebody may have cleared it away.
        folders.append(root.sub("run", create=True))
        folders.append(root.sub("data", create=create))
        step("setup: folders made")
        db = _database(root, create)
        return Opened(*folders, description, db)  # type: ignore[call-arg,arg-type]
    except BaseException:
        for folder in folders:
            folder.close()
        raise


def _describe(root: Folder, create: bool) -> str:
    """fsid from store.json, which is written first, whole, and never again."""
    path = f"{root.path}/store.json"
    if not root.check_file("store.json"):
        strangers = [name for name in root.names() if not re.fullmatch(_OURS, name)]
        if strangers and create:
            raise OSError(errno.ENOTEMPTY, f"{root.path} is not a store and holds other things ({strangers[0]!r})")
        if not create:
            raise OSError(errno.ENOENT, f"{root.path} is not a store: there is no store.json")
        import uuid  # costs as much as the rest of connecting

        text = json.dumps({"format": "librbd-py embedded store", "version": STORE_VERSION, "fsid": str(uuid.uuid4())})
        step("setup: before store.json")
        root.write_new("store.json", text.encode() + b"\n")
        step("setup: store.json written")
    try:
        content = json.loads(root.read_file("store.json"))
        version, fsid = content["version"], content["fsid"]
        if not isinstance(version, int) or not re.fullmatch(_FSID, fsid):
            raise ValueError("fsid")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise OSError(errno.EUCLEAN, f"{path} is damaged; `rbdpy store check` can write a new one") from None
    if version != STORE_VERSION:
        raise OSError(errno.EPROTONOSUPPORT, f"{path}: store version {version}; this program knows {STORE_VERSION}")
    return str(fsid)


def _database(root: Folder, create: bool) -> Database:
    if not root.check_file("meta.db"):
        if not create:
            raise OSError(errno.EUCLEAN, f"{root.path}/meta.db is missing; run `rbdpy store check`")
        root.create_file("meta.db")
    for name in ("meta.db-wal", "meta.db-shm"):
        root.check_file(name)
    db = Database(root.real_path("meta.db"), synchronous="FULL")
    try:
        with db.read() as c:
            version, application = _versions(c)
        if version == 0 and application == 0 and create:
            _make_tables(root, db)
            with db.read() as c:
                version, application = _versions(c)
        if application != APPLICATION_ID:
            raise OSError(errno.EUCLEAN, f"{db.path} is not a store's database; run `rbdpy store check`")
        if version != VERSION:
            raise OSError(errno.EPROTONOSUPPORT, f"{db.path}: version {version}; this program knows {VERSION}")
        if not db.reserve() and reserve.give_up(root):
            db.reserve()
    except BaseException:
        db.close()
        raise
    return db


def _versions(c: sqlite3.Connection) -> tuple[int, int]:
    return c.execute("PRAGMA user_version").fetchone()[0], c.execute("PRAGMA application_id").fetchone()[0]


def _make_tables(root: Folder, db: Database) -> None:
    """The journal mode cannot change while others are connected, so creators take turns."""
    lock = lock_folder(root)
    try:
        c = db.take()
        try:
            for left in reversed(range(200)):
                try:
                    c.execute("PRAGMA journal_mode=WAL")
                    break
                except sqlite3.OperationalError as error:
                    if primary_code(error) != sqlite3.SQLITE_BUSY or left == 0:
                        raise
        finally:
            db.give_back(c)
        step("setup: before tables")
        with db.write() as c:
            if _versions(c) != (0, 0):
                return
            for statement in statements(TABLES):
                c.execute(statement)
            c.execute(f"PRAGMA user_version={VERSION}")
            c.execute(f"PRAGMA application_id={APPLICATION_ID}")
        step("setup: tables made")
        root.sync()
    finally:
        os.close(lock)

"""The embedded store: `Store` and `ObjectContext` of the contract on a folder of this machine."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from librbd_py.format.lock import EntityAddress
from librbd_py.format.logs import logger

from .. import api
from ..api import Client, PoolInfo, PoolStats
from ..executor import check_name
from . import fencing, reserve, snaps
from .client import Presence, address_of, gid_of
from .context import EmbeddedContext
from .layouts import LayoutRow, Layouts
from .life import this_process
from .messages import Fenced, Lost
from .notify import Dispatcher
from .objects import drop_object, next_number
from .registry import Place, Registry
from .setup import open_store
from .steps import step

log = logger(__name__)

MAX_POOL_NAME = 1024  # bytes
DEFAULT_BLOCKLIST_SECONDS = 3600  # what 0 means
WATCH_SECONDS = 30  # of silence, after which a watch ends; as Ceph's osd_client_watch_timeout
WATCH_VARIABLE = "RBDPY_WATCH_TIMEOUT"  # another number for the watches of this process

T = TypeVar("T")

_stores: weakref.WeakSet[EmbeddedStore] = weakref.WeakSet()
_abandoned: list[object] = []  # connections of a parent process: never touched, never collected


class EmbeddedStore(api.Store):
    """One client of the store in `path`. Each open is a client of its own, also twice in one process."""

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False) -> None:
        self._pid = os.getpid()
        self._closed = False
        self._opened = opened = open_store(os.fspath(path), create=create)
        self.path = opened.root.path
        self.fsid = opened.fsid
        self.watch_timeout = _watch_timeout()
        self.db = opened.db
        self.layouts = Layouts(opened.data)
        self._lock = threading.Lock()  # guards the next two
        self._registry: Registry | None = None
        self._dispatcher: Dispatcher | None = None
        try:
            self._presence = self.with_room(self._enter)
            gid = self._presence.gid
            self.client = Client(gid, address_of(gid))
            reserve.keep(opened.root)
        except BaseException:
            opened.close()
            raise
        _stores.add(self)
        try:
            self._finish_what_others_left()
        except BaseException:
            self.close()
            raise

    def _enter(self) -> Presence:
        with self.db.write() as c:
            gid = next_number(c, "gid")
        presence = Presence(self._opened.run, gid)
        presence.enter()
        return presence

    # --- for everybody in here

    def with_room(self, call: Callable[[], T]) -> T:
        """What must work on a full disk, too: done again with the room that was kept for it. It must change nothing
        when it fails."""
        try:
            return call()
        except OSError as error:
            if not reserve.full(self._opened.root, error) or not reserve.give_up(self._opened.root):
                raise
        self.db.checkpoint()  # at once, before guests have taken it
        return call()

    def keep_room(self) -> None:
        """ENOSPC when what is left is for removing. Asked before what adds to the metadata."""
        if reserve.spent(self._opened.root):
            raise OSError(errno.ENOSPC, f"{self.path}: the disk is full; what is left is kept for removing images")

    def check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise OSError(errno.EBADFD, "this store was opened before a fork: the child must open it itself")
        if self._closed:
            raise OSError(errno.ENOTCONN, "the store is closed")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """ESHUTDOWN for a fenced client."""
        self.check_usable()
        with _refusing_big_numbers(), self.db.read() as c:
            self._check_fence(c)
            yield c

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """ESHUTDOWN for a fenced client."""
        self.check_usable()
        with _refusing_big_numbers(), self.db.write() as c:
            self._check_fence(c)
            yield c

    def _check_fence(self, c: sqlite3.Connection) -> None:
        if self._is_fenced(c):
            raise OSError(errno.ESHUTDOWN, f"client {self.client.address} is blocklisted")

    def _is_fenced(self, c: sqlite3.Connection) -> bool:
        # The second entry stands for every client of the address.
        row = c.execute(
            "SELECT max(expires) FROM blocklist WHERE address IN (?,?)", (self.client.address, address_of(0))
        ).fetchone()
        return row[0] is not None and row[0] > time.time()

    def check_pool(self, c: sqlite3.Connection, pool: int) -> None:
        """ENOENT."""
        if c.execute("SELECT 1 FROM pools WHERE id=?", (pool,)).fetchone() is None:
            raise OSError(errno.ENOENT, f"there is no pool {pool}")

    def fenced(self) -> bool:
        self.check_usable()
        with self.db.read() as c:
            return self._is_fenced(c)

    @property
    def registry(self) -> Registry:
        self.check_usable()
        with self._lock:
            if self._registry is None:
                self._registry = self.with_room(lambda: Registry(self._opened.run, self._presence))
            return self._registry

    @property
    def dispatcher(self) -> Dispatcher:
        registry = self.registry
        with self._lock:
            if self._closed:
                raise OSError(errno.ENOTCONN, "the store is closed")
            if self._dispatcher is None:
                self._dispatcher = Dispatcher(self._presence, registry, self.fenced)
            return self._dispatcher

    def alive(self, gid: int) -> bool:
        return self._presence.alive(gid)

    def silence(self, gid: int) -> float | None:
        """Seconds since a client was seen running; None: it does not live, or watches nothing."""
        return self._presence.silence(gid)

    def end_watches(self, places: Sequence[Place]) -> None:
        """The objects are gone: so are their watches."""
        self._tell_lost(self.registry.drop_objects(places))

    def _tell_lost(self, gids: set[int]) -> None:
        if gids:
            self.dispatcher.tell(gids, Lost())

    def empty_trash(self, folders: Sequence[int]) -> None:
        """After the commit that put them there. What fails is left to whoever opens the store next."""
        with _tidying():
            for folder in folders:
                self.layouts.remove_folder(folder)
            if folders:
                with self.db.write() as c:
                    c.executemany("DELETE FROM trash WHERE folder=?", [(folder,) for folder in folders])

    def _finish_what_others_left(self) -> None:
        with self.reading() as c:
            folders = [folder for (folder,) in c.execute("SELECT folder FROM trash")]
        self.empty_trash(folders)
        self.finish_trims()

    def finish_trims(self) -> None:
        """Of this client, and of those who died at it. What fails is left to the next."""
        trims: list[tuple[int, int, int]] = []
        with _tidying(), self.reading() as c:
            trims = c.execute("SELECT pool, snap, gid FROM trims").fetchall()
        for pool, snap, gid in trims:
            with _tidying():
                if gid == self.client.gid or not self.alive(gid):
                    snaps.trim(self, pool, snap)

    # --- pools

    def pools(self) -> list[PoolInfo]:
        with self.reading() as c:
            return [PoolInfo(number, name) for number, name in c.execute("SELECT id, name FROM pools ORDER BY id")]

    def pool_create(self, name: str) -> int:
        try:
            length = len(name.encode())
        except UnicodeEncodeError:
            length = 0
        if not 0 < length <= MAX_POOL_NAME or "\0" in name or "/" in name or "@" in name:
            raise OSError(errno.EINVAL, f"{name!r} is no name for a pool")
        with self.writing() as c:
            if c.execute("SELECT 1 FROM pools WHERE name=?", (name,)).fetchone() is not None:
                raise OSError(errno.EEXIST, f"there is a pool named {name!r}")
            number = next_number(c, "pool")
            c.execute("INSERT INTO pools VALUES (?,?,0)", (number, name))
        return number

    def pool_remove(self, name: str) -> None:
        with self.writing() as c:
            row = c.execute("SELECT id FROM pools WHERE name=?", (name,)).fetchone()
            if row is None:
                raise OSError(errno.ENOENT, f"no pool named {name!r}")
            pool: int = row[0]
            folders: list[int] = []
            # Of both its images and those that keep only their data here.
            for found in c.execute(
                "SELECT folder, pool, ns, prefix, objorder, header_pool, header FROM layouts "
                "WHERE pool=? OR header_pool=?",
                (pool, pool),
            ).fetchall():
                layout = LayoutRow(*found)
                self.layouts.unregister(c, layout)
                folders.append(layout.folder)
            for (number,) in c.execute("SELECT id FROM objects WHERE pool=?", (pool,)).fetchall():
                drop_object(c, number)
            for table in ("removed_snaps", "trims", "clone_snaps"):
                c.execute(f"DELETE FROM {table} WHERE pool=?", (pool,))
            c.execute("DELETE FROM pools WHERE id=?", (pool,))
        step("pool: removed")
        self.empty_trash(folders)
        self._tell_lost(self.registry.drop_pool(pool))

    def pool_stats(self, pool_id: int) -> PoolStats:
        """Data of images counts as allocated on disk."""
        with self.reading() as c:
            self.check_pool(c, pool_id)
            count, size = c.execute(
                "SELECT count(*), total(size) FROM objects WHERE pool=? AND present", (pool_id,)
            ).fetchone()
            clones, cloned = c.execute(
                "SELECT count(*), total(k.size) FROM clones k JOIN objects o ON o.id=k.object WHERE o.pool=?",
                (pool_id,),
            ).fetchone()
            rows = [
                LayoutRow(*row)
                for row in c.execute(
                    "SELECT folder, pool, ns, prefix, objorder, header_pool, header FROM layouts WHERE pool=?",
                    (pool_id,),
                )
            ]
        count, total = count + clones, int(size + cloned)
        for row in rows:
            try:
                with self.layouts.use(row) as layout:
                    count += sum(1 for _ in layout.objects())
                    total += self.layouts.allocated(row)
            except OSError as error:
                if error.errno != errno.ENOENT:  # removed meanwhile
                    raise
        return PoolStats(total, count)

    def namespaces(self, pool_id: int) -> list[str]:
        with self.reading() as c:
            self.check_pool(c, pool_id)
            rows = c.execute(
                "SELECT DISTINCT ns FROM objects WHERE pool=? UNION SELECT ns FROM layouts WHERE pool=?",
                (pool_id, pool_id),
            )
            return sorted(row[0] for row in rows)

    def open(self, pool: str | int, namespace: str = "") -> EmbeddedContext:
        check_name("x", namespace)
        with self.reading() as c:
            column = "name" if isinstance(pool, str) else "id"
            row = c.execute(f"SELECT id FROM pools WHERE {column}=?", (pool,)).fetchone()
        if row is None:
            raise OSError(errno.ENOENT, f"there is no pool {pool!r}")
        return EmbeddedContext(self, row[0], namespace)

    # --- fencing

    def blocklist_add(self, address: str, seconds: int = 3600) -> None:
        """Kills the process in which that client lives, if any, and returns when it is gone: its images are writable by
        nobody then. Everything else in that process ends with it. A client in this very process is told instead, and
        its watches and operations end with ESHUTDOWN.

        EPERM: it lives and cannot be killed from here (another PID namespace, another user): it is not blocklisted
        either. ETIMEDOUT: it is, but its process does not end.
        """
        address = _canonical(address)
        gid = gid_of(address)
        with ExitStack() as stack:
            targets = self._presence.others() if gid == 0 else [] if gid in (None, self.client.gid) else [gid]
            found = [fencing.find(self._presence, target) for target in targets if target is not None]
            victims = [victim for victim in found if victim is not None]
            for victim in victims:
                stack.callback(victim.close)
            try:
                # First: one that stands still may keep the database's lock.
                for victim in victims:
                    victim.kill()
            finally:
                self._blocklist(address, gid, seconds)

    def _blocklist(self, address: str, gid: int | None, seconds: int) -> None:
        now = time.time()
        with self.writing() as c:
            c.execute("DELETE FROM blocklist WHERE expires<=?", (now,))
            c.execute(
                "INSERT OR REPLACE INTO blocklist VALUES (?,?)",
                (address, now + (seconds if seconds > 0 else DEFAULT_BLOCKLIST_SECONDS)),
            )
        victims = self.registry.clients() if gid == 0 else set() if gid is None else {gid}
        for victim in victims:
            self.registry.drop_client(victim)
        if victims:
            self.dispatcher.tell(victims, Fenced())

    def blocklist_remove(self, address: str) -> None:
        address = _canonical(address)
        with self.writing() as c:
            c.execute("DELETE FROM blocklist WHERE address=?", (address,))

    def blocklist(self) -> dict[str, float]:
        with self.reading() as c:
            return dict(c.execute("SELECT address, expires FROM blocklist WHERE expires>?", (time.time(),)))

    def process_of(self, address: str) -> api.ClientProcess | None:
        gid = gid_of(address)
        identity = None if gid is None else self._presence.identity(gid)
        if gid is None or identity is None:
            return None
        local = identity.pid_namespace == this_process().pid_namespace
        return api.ClientProcess(identity.pid, self._presence.silence(gid), local)

    # --- the end

    def close(self) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            dispatcher, registry = self._dispatcher, self._registry
        if dispatcher is not None:
            dispatcher.close()
        if registry is not None:
            registry.close()
        self.layouts.close()
        self._presence.leave()
        self._opened.db.close()
        reserve.keep_again(self._opened.root)
        self._opened.close()
        _stores.discard(self)

    def after_fork(self) -> None:
        """In the child: let go of what would keep the parent looking alive, and touch nothing else."""
        self._closed = True
        self._presence.after_fork()
        _abandoned.append((self.db.abandon(), self._registry and self._registry.abandon(), self.layouts))
        if self._dispatcher is not None:
            self._dispatcher.drop()


def _after_fork() -> None:
    for store in list(_stores):
        store.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _watch_timeout() -> int:
    try:
        return max(1, int(os.environ.get(WATCH_VARIABLE, "")))
    except ValueError:
        return WATCH_SECONDS


def _canonical(address: str) -> str:
    try:
        return EntityAddress.parse(address).text
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from None


@contextmanager
def _tidying() -> Iterator[None]:
    """The change itself is made and durable: a failure to clear up behind it is not the caller's."""
    try:
        yield
    except OSError as error:
        log.warning("clearing up was cut short and will be tried again: %s", error)


@contextmanager
def _refusing_big_numbers() -> Iterator[None]:
    try:
        yield
    except OverflowError as error:
        raise OSError(errno.EINVAL, f"a number is out of range: {error}") from error

"""The embedded store: `Store` and `ObjectContext` of the contract on a folder of this machine."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .. import api
from ..api import NO_SNAPS, NOSNAP, Client, NativeData, NotifyReply, PoolInfo, PoolStats, SnapContext, WatcherInfo
from ..executor import check_name, execute_read, execute_write, has_writes
from ..record import LayoutSpec
from . import layouts as layout_index
from . import snaps
from .client import Presence, address_of, gid_of
from .dataobjects import DataTransaction, MapTransaction
from .layouts import LayoutRow, Layouts
from .messages import Fenced, Lost
from .notify import Dispatcher, Watcher
from .objects import StoredTransaction, drop_object, next_number
from .registry import Place, Registry
from .schema import SIDE
from .setup import open_store
from .steps import step

MAX_POOL_NAME = 256  # bytes
MAX_TIMEOUT = 1 << 31  # seconds of a watch
_PAGE = 1000  # object names read at once

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
        self.db = opened.db
        self.layouts = Layouts(opened.data)
        self._lock = threading.Lock()  # guards the next two
        self._registry: Registry | None = None
        self._dispatcher: Dispatcher | None = None
        try:
            with self.db.write() as c:
                gid = next_number(c, "gid")
            self.client = Client(gid, address_of(gid))
            self._presence = Presence(opened.run, gid)
            self._presence.enter()
        except BaseException:
            opened.close()
            raise
        _stores.add(self)
        try:
            self._finish_what_others_left()
        except BaseException:
            self.close()
            raise

    # --- for everybody in here

    def check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise OSError(errno.EBADFD, "this store was opened before a fork: the child must open it itself")
        if self._closed:
            raise OSError(errno.ENOTCONN, "the store is closed")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        self.check_usable()
        with _refusing_big_numbers(), self.db.read() as c:
            yield c

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        self.check_usable()
        with _refusing_big_numbers(), self.db.write() as c:
            yield c

    def check_allowed(self, c: sqlite3.Connection, pool: int) -> None:
        """ESHUTDOWN for a fenced client, ENOENT for a pool that is not there."""
        known, expires = c.execute(
            "SELECT (SELECT 1 FROM pools WHERE id=?), (SELECT expires FROM blocklist WHERE address=?)",
            (pool, self.client.address),
        ).fetchone()
        if expires is not None and expires > time.time():
            raise OSError(errno.ESHUTDOWN, "this client is blocklisted")
        if known is None:
            raise OSError(errno.ENOENT, f"there is no pool {pool}")

    def fenced(self) -> bool:
        with self.reading() as c:
            row = c.execute("SELECT expires FROM blocklist WHERE address=?", (self.client.address,)).fetchone()
        return row is not None and row[0] > time.time()

    @property
    def registry(self) -> Registry:
        self.check_usable()
        with self._lock:
            if self._registry is None:
                self._registry = Registry(self._opened.run, self._presence)
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

    def end_watches(self, places: Sequence[Place]) -> None:
        """The objects are gone: so are their watches."""
        self._tell_lost(self.registry.drop_objects(places))

    def _tell_lost(self, gids: set[int]) -> None:
        if gids:
            self.dispatcher.tell(gids, Lost())

    def empty_trash(self, folders: Sequence[int]) -> None:
        """After the commit that put them there."""
        for folder in folders:
            self.layouts.remove_folder(folder)
        if folders:
            with self.writing() as c:
                c.executemany("DELETE FROM trash WHERE folder=?", [(folder,) for folder in folders])

    def _finish_what_others_left(self) -> None:
        with self.reading() as c:
            folders = [folder for (folder,) in c.execute("SELECT folder FROM trash")]
            trims = c.execute("SELECT pool, snap, gid FROM trims").fetchall()
        self.empty_trash(folders)
        for pool, snap, gid in trims:
            if not self.alive(gid):
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
            self.check_allowed(c, pool_id)
            count, size = c.execute(
                "SELECT count(*), total(size) FROM objects WHERE pool=? AND present", (pool_id,)
            ).fetchone()
            rows = [
                LayoutRow(*row)
                for row in c.execute(
                    "SELECT folder, pool, ns, prefix, objorder, header_pool, header FROM layouts WHERE pool=?",
                    (pool_id,),
                )
            ]
        total = int(size)
        for row in rows:
            try:
                with self.layouts.use(row) as layout:
                    count += sum(1 for _ in layout.objects())
                    total += self.layouts.allocated(row)
            except OSError as error:
                if error.errno != errno.ENOENT:  # removed meanwhile
                    raise
        return PoolStats(total, count)

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
        """The victim's watches end at once and it is told; an operation it has begun is not undone."""
        if not address or len(address) > 256:
            raise OSError(errno.EINVAL, f"{address!r} is no client address")
        now = time.time()
        with self.writing() as c:
            c.execute("DELETE FROM blocklist WHERE expires<=?", (now,))
            c.execute("INSERT OR REPLACE INTO blocklist VALUES (?,?)", (address, now + seconds))
        gid = gid_of(address)
        if gid is not None:
            self.registry.drop_client(gid)
            self.dispatcher.tell({gid}, Fenced())

    def blocklist_remove(self, address: str) -> None:
        with self.writing() as c:
            c.execute("DELETE FROM blocklist WHERE address=?", (address,))

    def blocklist(self) -> dict[str, float]:
        with self.reading() as c:
            return dict(c.execute("SELECT address, expires FROM blocklist WHERE expires>?", (time.time(),)))

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
        self._opened.close()
        _stores.discard(self)

    def after_fork(self) -> None:
        """In the child: let go of what would keep the parent looking alive, and touch nothing else."""
        self._closed = True
        self._presence.drop()
        _abandoned.append((self.db.abandon(), self._registry and self._registry.abandon(), self.layouts))
        if self._dispatcher is not None:
            self._dispatcher.drop()


def _after_fork() -> None:
    for store in list(_stores):
        store.after_fork()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def _refusing_big_numbers() -> Iterator[None]:
    try:
        yield
    except OverflowError as error:
        raise OSError(errno.EINVAL, f"a number is out of range: {error}") from error


class EmbeddedContext(api.ObjectContext):
    store: EmbeddedStore

    def __init__(self, store: EmbeddedStore, pool_id: int, namespace: str) -> None:
        self.store = store
        self.pool_id = pool_id
        self.namespace = namespace

    def _place(self, oid: str) -> Place:
        return (self.pool_id, self.namespace, oid)

    def _watchers(self, oid: str) -> list[WatcherInfo]:
        return self.store.registry.watchers(self._place(oid))

    @contextmanager
    def _transaction(
        self,
        c: sqlite3.Connection,
        oid: str,
        ops: Sequence[Any],
        header_changed: Callable[[LayoutSpec | None], None] = lambda spec: None,
    ) -> Iterator[StoredTransaction | DataTransaction]:
        """What holds this object."""
        store = self.store
        store.check_allowed(c, self.pool_id)
        place = self._place(oid)

        def watchers() -> list[WatcherInfo]:
            return self._watchers(oid)

        data = layout_index.find_data(c, *place)
        if data is not None:
            row, objno = data
            with store.layouts.use(row) as layout:
                tx = DataTransaction(
                    c,
                    place,
                    store.client,
                    time.time_ns(),
                    row,
                    objno,
                    layout,
                    lambda: store.layouts.mtime_ns(row),
                    watchers,
                    copyup=any(isinstance(op, api.Exec) and op.method in ("copyup", "sparse_copyup") for op in ops),
                    overlaps=any(isinstance(op, api.ListSnaps) for op in ops),
                )
                yield tx
                if tx.changed_data:
                    store.layouts.mark_dirty(row)
            return
        map_of = layout_index.find_map(c, *place)
        if map_of is not None:
            with store.layouts.use(map_of) as layout:
                image_map = MapTransaction(c, place, store.client, time.time_ns(), watchers, header_changed)
                image_map.layout = layout
                yield image_map
            return
        yield StoredTransaction(c, place, store.client, time.time_ns(), watchers, header_changed)

    def write(self, oid: str, ops: Sequence[Any], snapc: SnapContext = NO_SNAPS) -> list[Any]:
        """Durable on return, except the data of images, which is durable after the next change of metadata through
        this store, a flush of the image or close()."""
        check_name(oid, self.namespace)
        store = self.store
        folders: list[int] = []
        with store.writing() as c:

            def header_changed(spec: LayoutSpec | None) -> None:
                if spec is not None:
                    store.layouts.register(c, self._place(oid), spec)
                    return
                row = layout_index.of_header(c, *self._place(oid))
                if row is not None:
                    store.layouts.unregister(c, row)
                    folders.append(row.folder)

            with self._transaction(c, oid, ops, header_changed) as tx:
                results = execute_write(tx, ops, snapc)
            removed = tx.removed
            if isinstance(tx, StoredTransaction) and tx.changed:
                store.layouts.flush_dirty()
            step("write: before commit")
        step("write: committed")
        if removed:
            store.end_watches([self._place(oid)])
        store.empty_trash(folders)
        return results

    def read(self, oid: str, ops: Sequence[Any], snap_id: int = NOSNAP) -> list[Any]:
        check_name(oid, self.namespace)
        with self.store.reading() as c, self._transaction(c, oid, ops) as tx:
            return execute_read(tx, ops, snap_id)

    def exec_ops(self, oid: str, ops: Sequence[Any]) -> list[Any]:
        return self.write(oid, ops) if has_writes(ops) else self.read(oid, ops)

    def objects(self) -> Iterator[str]:
        after = ""
        while True:
            with self.store.reading() as c:
                self.store.check_allowed(c, self.pool_id)
                rows = c.execute(
                    "SELECT oid, present FROM objects WHERE pool=? AND ns=? AND oid>? AND kind<>? ORDER BY oid LIMIT ?",
                    (self.pool_id, self.namespace, after, SIDE, _PAGE),
                ).fetchall()
            yield from (oid for oid, present in rows if present)
            if len(rows) < _PAGE:
                break
            after = rows[-1][0]
        with self.store.reading() as c:
            found = c.execute(
                "SELECT folder, pool, ns, prefix, objorder, header_pool, header FROM layouts WHERE pool=? AND ns=?",
                (self.pool_id, self.namespace),
            ).fetchall()
        for row in (LayoutRow(*columns) for columns in found):
            try:
                with self.store.layouts.use(row) as layout:
                    yield from (f"{row.prefix}.{number:016x}" for number in layout.objects())
            except OSError as error:
                if error.errno != errno.ENOENT:  # removed meanwhile
                    raise

    # --- snapshots

    def snap_create(self) -> int:
        with self.store.writing() as c:
            self.store.check_allowed(c, self.pool_id)
            return snaps.create(c, self.pool_id)

    def snap_remove(self, snap_id: int) -> None:
        with self.store.writing() as c:
            self.store.check_allowed(c, self.pool_id)
            known = snaps.remove(c, self.pool_id, snap_id, self.store.client.gid)
        step("snap: recorded as removed")
        if known:
            snaps.trim(self.store, self.pool_id, snap_id)

    # --- watches

    def watch(
        self, oid: str, callback: api.NotifyCallback, error: api.WatchErrorCallback | None = None, timeout: int = 30
    ) -> EmbeddedWatch:
        if not 0 < timeout < MAX_TIMEOUT:
            raise OSError(errno.EINVAL, f"a watch timeout of {timeout} s")
        self._must_exist(oid)
        dispatcher = self.store.dispatcher
        watcher = dispatcher.watch(self._place(oid), callback, error, timeout)
        try:
            self._must_exist(oid)  # nobody would have told us, had it been removed just before we were listed
        except BaseException:
            dispatcher.unwatch(watcher)
            raise
        return EmbeddedWatch(dispatcher, watcher)

    def _must_exist(self, oid: str) -> None:
        self.read(oid, [api.AssertExists()])

    def notify(self, oid: str, payload: bytes, timeout_ms: int = 5000) -> NotifyReply:
        self._must_exist(oid)
        return self.store.dispatcher.notify(self._place(oid), bytes(payload), timeout_ms)

    def notify_ack(self, oid: str, notify_id: int, cookie: int, payload: bytes) -> None:
        self.store.check_usable()
        self.store.dispatcher.ack(notify_id, cookie, bytes(payload))

    # --- data for the engine

    def native_data(self, prefix: str, order: int) -> NativeData:
        """EINVAL when the image has another order or C does not know it; EOPNOTSUPP when ordinary objects of these
        names cannot become a layout."""
        check_name(f"{prefix}.{0:016x}", self.namespace)
        store = self.store
        with store.reading() as c:
            store.check_allowed(c, self.pool_id)
            row = layout_index.find(c, self.pool_id, self.namespace, prefix)
        if row is None:
            row = self._register(prefix, order)
        if row.order != order:
            raise OSError(errno.EINVAL, f"objects of {prefix} have order {row.order}, not {order}")
        layout = store.layouts.acquire(row)
        released = threading.Event()

        def close() -> None:
            if not released.is_set():
                released.set()
                layout.release()

        return NativeData(layout.handle, True, close, layout.own, layout.disown)

    def _register(self, prefix: str, order: int) -> LayoutRow:
        """For data objects without `rbd.create`: a pool that is being restored, or no image at all (tests)."""
        if order not in layout_index.ORDERS:
            raise OSError(errno.EINVAL, f"object order {order}; 12 to 25 are possible")
        with self.store.writing() as c:
            row = layout_index.find(c, self.pool_id, self.namespace, prefix)
            if row is None:
                header_pool, header = layout_index.header_of(self.pool_id, prefix)
                if header and layout_index.of_header(c, header_pool, self.namespace, header) is not None:
                    header_pool, header = self.pool_id, ""
                fresh = LayoutRow(0, self.pool_id, self.namespace, prefix, order, header_pool, header)
                row = self.store.layouts.create(c, fresh)
        return row


class EmbeddedWatch(api.Watch):
    def __init__(self, dispatcher: Dispatcher, watcher: Watcher) -> None:
        self._dispatcher = dispatcher
        self._watcher = watcher
        self._closed = False
        self.cookie = watcher.cookie

    def check(self) -> float:
        if self._closed:
            raise OSError(errno.ENOTCONN, "the watch is closed")
        return self._dispatcher.check(self._watcher)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._dispatcher.unwatch(self._watcher)

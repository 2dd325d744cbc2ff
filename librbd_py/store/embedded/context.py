"""One pool and namespace of the embedded store."""

from __future__ import annotations

import errno
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import api
from ..api import NO_SNAPS, NOSNAP, NativeData, NotifyReply, SnapContext, WatcherInfo
from ..executor import check_name, execute_read, execute_write, has_writes
from ..record import LayoutSpec
from . import layouts as layout_index
from . import snaps
from .dataobjects import DataTransaction, MapTransaction, SnapMapView, complete_map
from .layouts import LayoutRow
from .notify import Dispatcher, Watcher
from .objects import StoredTransaction
from .registry import Place
from .schema import SIDE
from .steps import step

if TYPE_CHECKING:
    from .store import EmbeddedStore

MAX_TIMEOUT = 1 << 31  # seconds of a watch
SMALL = 1024  # bytes that an operation may write when there is little room
ADDING = ("create", "metadata_set", "snapshot_add", "dir_add_image", "child_attach", "namespace_add")
_PAGE = 1000  # object names read at once


def _nothing_changes(spec: LayoutSpec | None) -> None:
    """For a transaction that only reads."""


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
        header_changed: Callable[[LayoutSpec | None], None] | None = None,
    ) -> Iterator[StoredTransaction | DataTransaction]:
        """What holds this object; without `header_changed` for reading only."""
        store = self.store
        store.check_pool(c, self.pool_id)
        place = self._place(oid)
        changed = header_changed or _nothing_changes

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
                image_map = MapTransaction(c, place, store.client, time.time_ns(), watchers, changed)
                image_map.layout = layout
                yield image_map
            return
        snap_map = layout_index.find_snap_map(c, *place) if header_changed is None else None
        if snap_map is not None:
            with store.layouts.use(snap_map[0]) as layout:
                of_snapshot = SnapMapView(c, place, store.client, time.time_ns(), watchers, changed)
                of_snapshot.complete = partial(complete_map, c, *snap_map, layout)
                yield of_snapshot
            return
        yield StoredTransaction(c, place, store.client, time.time_ns(), watchers, changed)

    def write(self, oid: str, ops: Sequence[Any], snapc: SnapContext = NO_SNAPS) -> list[Any]:
        """Durable on return, except the data of images, which is durable after the next change of metadata through
        this store, a flush of the image or close()."""
        check_name(oid, self.namespace)
        if any(map(_takes_room, ops)):
            self.store.keep_room()
            return self._write(oid, ops, snapc)
        return self.store.with_room(lambda: self._write(oid, ops, snapc))

    def _write(self, oid: str, ops: Sequence[Any], snapc: SnapContext) -> list[Any]:
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
                self.store.check_pool(c, self.pool_id)
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
            self.store.check_pool(c, self.pool_id)
            return snaps.create(c, self.pool_id)

    def snap_remove(self, snap_id: int) -> None:
        with self.store.writing() as c:
            self.store.check_pool(c, self.pool_id)
            known = snaps.remove(c, self.pool_id, snap_id, self.store.client.gid)
        step("snap: recorded as removed")
        if known:
            self.store.finish_trims()

    # --- watches

    def watch(
        self, oid: str, callback: api.NotifyCallback, error: api.WatchErrorCallback | None = None, timeout: int = 0
    ) -> EmbeddedWatch:
        timeout = timeout or self.store.watch_timeout
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
            store.check_pool(c, self.pool_id)
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

        return NativeData(
            layout.handle,
            True,
            close,
            layout.own,
            layout.disown,
            layout.write_back,
            layout.bulk,
            layout.reserve,
            layout.give_back,
        )

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


def _takes_room(op: Any) -> bool:
    """Adds something that a user asked for. What else is written, to remove things too (locks, flags), is small."""
    if isinstance(op, api.Exec):
        return op.method in ADDING or (len(op.data) > SMALL and "remove" not in op.method)
    if isinstance(op, api.Append):
        return True  # whatever its size: done again it might be there twice
    if isinstance(op, api.Write | api.WriteFull | api.WriteSame | api.SetXattr):
        data = op.value if isinstance(op, api.SetXattr) else op.data
        return len(data) > SMALL
    return isinstance(op, api.OmapSet) and sum(map(len, op.values.values())) > SMALL


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

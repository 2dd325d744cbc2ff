"""`rados` with coroutines. Import it from `librbd_py.aio`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

from librbd_py import rados as face
from librbd_py.errors import rados_errors
from librbd_py.format.values import dataclass, field
from librbd_py.store.api import ObjectContext
from librbd_py.store.api import Watch as StoreWatch

from .run import Face, coroutine, listing, post

PAGE = 256  # objects listed per trip to a thread
BACKLOG = 1024  # notifies a slow reader may leave waiting; later ones are acked empty and dropped


class AsyncRados(Face):
    """`async with AsyncRados(...) as cluster:` takes the arguments of `face.Rados`."""

    sync: face.Rados

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(face.Rados(*args, **kwargs))

    async def __aenter__(self) -> AsyncRados:
        await self.connect()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.shutdown()

    async def shutdown(self) -> None:
        """Waits for calls under way, then disconnects."""
        await self._outstanding.settle()
        await self._run(self.sync.shutdown)

    async def open_ioctx(self, ioctx_name: str) -> AsyncIoctx:
        return AsyncIoctx(await self._run(self.sync.open_ioctx, ioctx_name))

    async def open_ioctx2(self, pool_id: int) -> AsyncIoctx:
        return AsyncIoctx(await self._run(self.sync.open_ioctx2, pool_id))

    connect = coroutine(face.Rados.connect)
    conf_get = coroutine(face.Rados.conf_get)
    conf_set = coroutine(face.Rados.conf_set)
    conf_read_file = coroutine(face.Rados.conf_read_file)
    get_fsid = coroutine(face.Rados.get_fsid)
    get_instance_id = coroutine(face.Rados.get_instance_id)
    get_addrs = coroutine(face.Rados.get_addrs)
    get_cluster_stats = coroutine(face.Rados.get_cluster_stats)
    list_pools = coroutine(face.Rados.list_pools)
    pool_exists = coroutine(face.Rados.pool_exists)
    pool_lookup = coroutine(face.Rados.pool_lookup)
    pool_reverse_lookup = coroutine(face.Rados.pool_reverse_lookup)
    create_pool = coroutine(face.Rados.create_pool)
    delete_pool = coroutine(face.Rados.delete_pool)
    blocklist_add = coroutine(face.Rados.blocklist_add)
    get_pool_base_tier = coroutine(face.Rados.get_pool_base_tier)
    mgr_command = coroutine(face.Rados.mgr_command)
    mon_command = coroutine(face.Rados.mon_command)
    osd_command = coroutine(face.Rados.osd_command)
    pg_command = coroutine(face.Rados.pg_command)
    ping_monitor = coroutine(face.Rados.ping_monitor)
    wait_for_latest_osdmap = coroutine(face.Rados.wait_for_latest_osdmap)


class AsyncIoctx(Face):
    """`face.Ioctx` with coroutines; `sync` is the context itself, for calls that never block."""

    sync: face.Ioctx

    @property
    def context(self) -> ObjectContext:
        return self.sync.context

    @property
    def rados(self) -> face.Rados:
        return self.sync.rados

    async def __aenter__(self) -> AsyncIoctx:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Waits for calls under way."""
        await self._outstanding.settle()
        await self._run(self.sync.close)

    def get_namespace(self) -> str:
        return self.sync.get_namespace()

    def set_self_managed_snap_write(self, snaps: list[int]) -> None:
        self.sync.set_self_managed_snap_write(snaps)

    def set_read(self, snap_id: int) -> None:
        self.sync.set_read(snap_id)

    async def list_objects(self) -> AsyncIterator[face.Object]:
        names = await self._run(self.sync.list_objects)
        while page := await self._run(lambda: list(itertools.islice(names, PAGE))):
            for found in page:
                yield found

    async def watch(self, obj: str, timeout: int | None = None) -> AsyncWatch:
        """Notifies of an object: `async with await ioctx.watch(name) as watch: async for notify in watch: ...`."""
        watch = AsyncWatch(self.sync.context, obj)
        try:
            await self._run(watch._open, timeout)
        except asyncio.CancelledError:
            await asyncio.shield(self._outstanding.settle())
            await watch.close()
            raise
        return watch

    set_namespace = coroutine(face.Ioctx.set_namespace)
    write = coroutine(face.Ioctx.write)
    write_full = coroutine(face.Ioctx.write_full)
    writesame = coroutine(face.Ioctx.writesame)
    append = coroutine(face.Ioctx.append)
    read = coroutine(face.Ioctx.read)
    execute = coroutine(face.Ioctx.execute)
    remove_object = coroutine(face.Ioctx.remove_object)
    trunc = coroutine(face.Ioctx.trunc)
    cmpext = coroutine(face.Ioctx.cmpext)
    stat = coroutine(face.Ioctx.stat)
    get_xattr = coroutine(face.Ioctx.get_xattr)
    get_xattrs = listing(face.Ioctx.get_xattrs)
    set_xattr = coroutine(face.Ioctx.set_xattr)
    rm_xattr = coroutine(face.Ioctx.rm_xattr)
    get_pool_id = coroutine(face.Ioctx.get_pool_id)
    get_pool_name = coroutine(face.Ioctx.get_pool_name)
    get_stats = coroutine(face.Ioctx.get_stats)
    set_locator_key = coroutine(face.Ioctx.set_locator_key)
    get_last_version = coroutine(face.Ioctx.get_last_version)
    application_enable = coroutine(face.Ioctx.application_enable)
    application_list = listing(face.Ioctx.application_list)
    application_metadata_get = coroutine(face.Ioctx.application_metadata_get)
    application_metadata_list = listing(face.Ioctx.application_metadata_list)
    application_metadata_remove = coroutine(face.Ioctx.application_metadata_remove)
    application_metadata_set = coroutine(face.Ioctx.application_metadata_set)
    create_snap = coroutine(face.Ioctx.create_snap)
    list_snaps = listing(face.Ioctx.list_snaps)
    lookup_snap = coroutine(face.Ioctx.lookup_snap)
    remove_snap = coroutine(face.Ioctx.remove_snap)
    snap_rollback = coroutine(face.Ioctx.snap_rollback)
    create_self_managed_snap = coroutine(face.Ioctx.create_self_managed_snap)
    remove_self_managed_snap = coroutine(face.Ioctx.remove_self_managed_snap)
    rollback_self_managed_snap = coroutine(face.Ioctx.rollback_self_managed_snap)
    operate_write_op = coroutine(face.Ioctx.operate_write_op)
    operate_read_op = coroutine(face.Ioctx.operate_read_op)
    lock_exclusive = coroutine(face.Ioctx.lock_exclusive)
    lock_shared = coroutine(face.Ioctx.lock_shared)
    unlock = coroutine(face.Ioctx.unlock)
    notify = coroutine(face.Ioctx.notify)


@dataclass
class Notification:
    """A notify as it arrived. The notifier waits until it is acked (leaving it acks it empty)."""

    notify_id: int
    notifier_id: int
    watch_id: int
    data: bytes
    _watch: AsyncWatch = field(repr=False)
    _acked: bool = field(default=False, repr=False)

    async def ack(self, reply: bytes = b"") -> None:
        """Once; later calls do nothing."""
        if not self._acked:
            self._acked = True
            await self._watch._run(self._watch._ack, self.notify_id, self.watch_id, reply)


class AsyncWatch(Face):
    """A watch as an async iterator of Notification. Ends with NotConnected or ConnectionShutdown when it is lost.

    A notification that was not acked when the next one is fetched is acked empty.
    """

    def __init__(self, context: ObjectContext, oid: str) -> None:
        super().__init__(None)
        self._context = context
        self._oid = oid
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Notification | OSError | None] = asyncio.Queue()
        self._open_watch: StoreWatch | None = None
        self._closed = False
        self._current: Notification | None = None

    def _open(self, timeout: int | None) -> None:
        with rados_errors("watch error"):
            self._open_watch = self._context.watch(self._oid, self._notified, self._lost, timeout or 30)

    def get_id(self) -> int:
        return self._open_watch.cookie if self._open_watch is not None and not self._closed else 0

    def _notified(self, notify_id: int, notifier: int, cookie: int, payload: bytes) -> bytes | None:
        if self._closed or self._queue.qsize() >= BACKLOG:
            return b""
        post(self._loop, self._queue.put_nowait, Notification(notify_id, notifier, cookie, payload, self))
        return None

    def _lost(self, cookie: int, failure: OSError) -> None:
        post(self._loop, self._queue.put_nowait, failure)

    def _ack(self, notify_id: int, cookie: int, reply: bytes) -> None:
        with rados_errors("notify_ack error"):
            self._context.notify_ack(self._oid, notify_id, cookie, reply)

    def __aiter__(self) -> AsyncWatch:
        return self

    async def __anext__(self) -> Notification:
        if self._current is not None:
            await self._current.ack()
            self._current = None
        if self._closed:
            raise StopAsyncIteration
        item = await self._queue.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, OSError):
            with rados_errors("the watch is lost"):
                raise item
        self._current = item
        return item

    async def __aenter__(self) -> AsyncWatch:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the watch and the iteration; what nobody acked is acked empty."""
        if self._closed:
            return
        self._closed = True
        left = [self._current] if self._current is not None else []
        while not self._queue.empty():
            item = self._queue.get_nowait()
            if isinstance(item, Notification):
                left.append(item)
        self._queue.put_nowait(None)
        await asyncio.shield(self._run(self._end, [n for n in left if not n._acked]))

    def _end(self, left: list[Notification]) -> None:
        for notification in left:
            self._context.notify_ack(self._oid, notification.notify_id, notification.watch_id, b"")
        if self._open_watch is not None:
            self._open_watch.close()

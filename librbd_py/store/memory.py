"""The object store as a fake: a cluster in this process's memory. It passes the conformance suite the real ones pass.

`MemoryCluster` is the cluster; every `MemoryStore` on it is a client of its own, with its own identity and its own
dispatch thread, so one process can play several hosts. For tests of failure a client can fall silent (`suspend`) and
lose its watches (`lose_watches`).
"""

from __future__ import annotations

import errno
import itertools
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from librbd_py.format.lock import EntityAddress
from librbd_py.format.logs import logger

from . import executor
from .api import (
    NO_SNAPS,
    NOSNAP,
    Client,
    NativeData,
    NotifyCallback,
    NotifyReply,
    ObjectContext,
    Op,
    PoolInfo,
    PoolStats,
    SnapContext,
    Store,
    Watch,
    WatcherInfo,
    WatchErrorCallback,
)
from .memory_objects import MemoryTransaction, Place, Pool, trim_pool

log = logger(__name__)

DEFAULT_BLOCKLIST_SECONDS = 3600  # what 0 means


class MemoryCluster:
    """Everything the clients share. `clock`: nanoseconds since 1970, replaceable by tests of expiry."""

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self.clock = clock
        self.fsid = str(uuid.uuid4())
        self.mutex = threading.RLock()
        # All below under the mutex.
        self.pools: dict[int, Pool] = {}
        self.watches: dict[Place, list[MemoryWatch]] = {}
        self.blocklist: dict[str, float] = {}  # address -> clock's seconds of expiry
        self.notifies: dict[int, _Notify] = {}
        self._numbers = {name: itertools.count(first) for name, first in _FIRST.items()}

    def number(self, kind: str) -> int:
        with self.mutex:
            return next(self._numbers[kind])

    def connect(self) -> MemoryStore:
        return MemoryStore(self)

    def blocklisted(self, address: str) -> bool:
        now = self.clock() / 1e9
        for entry in (address, _whole_host(address)):
            expiry = self.blocklist.get(entry)
            if expiry is not None:
                if expiry > now:
                    return True
                del self.blocklist[entry]
        return False


_FIRST = {"gid": 4101, "nonce": 1000001, "pool": 1, "version": 1, "cookie": 94000000000001, "notify": 1}


def _whole_host(address: str) -> str:
    """The entry that stands for every client of the same IP address."""
    return f"{address.rpartition('/')[0]}/0"


def _canonical(address: str) -> str:
    try:
        return EntityAddress.parse(address).text
    except ValueError as e:
        raise OSError(errno.EINVAL, str(e)) from None


class _Notify:
    """One notify under way. Under the cluster's mutex but for `done`."""

    def __init__(self, waiting: set[tuple[int, int]]) -> None:
        self.waiting = waiting
        self.acks: dict[tuple[int, int], bytes] = {}
        self.done = threading.Event()
        self.settle()

    def answer(self, who: tuple[int, int], payload: bytes | None) -> None:
        """payload None: the watch went away."""
        if who in self.waiting:
            self.waiting.discard(who)
            if payload is not None:
                self.acks[who] = payload
        self.settle()

    def settle(self) -> None:
        if not self.waiting:
            self.done.set()


class MemoryWatch(Watch):
    def __init__(
        self,
        store: MemoryStore,
        place: Place,
        cookie: int,
        callback: NotifyCallback,
        error: WatchErrorCallback | None,
        timeout: int,
    ) -> None:
        self.store = store
        self.place = place
        self.cookie = cookie
        self.callback = callback
        self.error = error
        self.timeout = timeout
        self.broken: int | None = None  # errno once lost; under the cluster's mutex, as is `closed`
        self.closed = False

    @property
    def who(self) -> tuple[int, int]:
        return self.store.client.gid, self.cookie

    def check(self) -> float:
        with self.store.cluster.mutex:
            if self.broken is not None:
                raise OSError(self.broken, "the watch is lost")
            if self.closed or self.store.closed:
                raise OSError(errno.ENOTCONN, "the watch is closed")
        return 0.0

    def drop(self) -> None:
        """Takes it off the object; under the cluster's mutex."""
        held = self.store.cluster.watches.get(self.place, [])
        if self in held:
            held.remove(self)
            if not held:
                del self.store.cluster.watches[self.place]
        for notify in self.store.cluster.notifies.values():
            notify.answer(self.who, None)

    def lose(self, code: int) -> None:
        """The store gave it up; under the cluster's mutex."""
        if self.closed or self.broken is not None:
            return
        self.broken = code
        self.drop()
        if self.error is not None:
            self.store.dispatcher.put(lambda: self._report(code))

    def _report(self, code: int) -> None:
        if not self.closed and self.error is not None:
            self.error(self.cookie, OSError(code, "the watch is lost"))

    def deliver(self, notify_id: int, gid: int, payload: bytes) -> None:
        """On the client's dispatch thread."""
        if self.closed or self.broken is not None:
            return
        try:
            answer = self.callback(notify_id, gid, self.cookie, payload)
        except Exception:
            # The others must not wait for a callback that failed.
            log.exception("notify callback of watch %d on %s failed", self.cookie, self.place[2])
            answer = b""
        if answer is not None:
            self.store.acknowledge(notify_id, self.cookie, answer)

    def close(self) -> None:
        with self.store.cluster.mutex:
            if not self.closed:
                self.closed = True
                self.drop()
        self.store.dispatcher.barrier()


class _Dispatcher:
    """A client's callback thread: starts with the first piece of work, ends with the client."""

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._name = name
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None  # under _lock
        self._stopped = False  # under _lock
        self._running = threading.Event()
        self._running.set()

    def put(self, work: Callable[[], None]) -> None:
        with self._lock:
            if self._stopped:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._queue.put(work)

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            self._running.wait()
            if work is None:
                return
            try:
                work()
            except Exception:
                log.exception("%s: callback failed", self._name)

    def barrier(self) -> None:
        """Everything queued before has run. Nothing to wait for on the thread itself or while suspended."""
        with self._lock:
            thread = self._thread
            if thread is None or self._stopped or not self._running.is_set():
                return
        if thread is threading.current_thread():
            return
        passed = threading.Event()
        self.put(passed.set)
        while not passed.wait(0.05):
            if self._stopped or not self._running.is_set():
                return

    def suspend(self) -> None:
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            thread = self._thread
            self._queue.put(None)
        self._running.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()


class MemoryStore(Store):
    def __init__(self, cluster: MemoryCluster | None = None) -> None:
        self.cluster = cluster if cluster is not None else MemoryCluster()
        gid, nonce = self.cluster.number("gid"), self.cluster.number("nonce")
        self.client = Client(gid, f"127.0.0.1:0/{nonce}")
        self.fsid = self.cluster.fsid
        self.closed = False
        self.dispatcher = _Dispatcher(f"memory-store-{gid}")

    # --- faults, for tests

    def suspend(self) -> None:
        """No callback runs any more: notifies to this client time out. Its own operations still work."""
        self.dispatcher.suspend()

    def resume(self) -> None:
        self.dispatcher.resume()

    def lose_watches(self) -> None:
        """As after a network failure longer than the watch timeout."""
        with self.cluster.mutex:
            for watch in self._watches():
                watch.lose(errno.ENOTCONN)

    # ---

    def _watches(self) -> list[MemoryWatch]:
        return [watch for held in self.cluster.watches.values() for watch in held if watch.store is self]

    def check_alive(self) -> None:
        """Under the cluster's mutex."""
        if self.closed:
            raise OSError(errno.ENOTCONN, "the store is closed")
        if self.cluster.blocklisted(self.client.address):
            raise OSError(errno.ESHUTDOWN, f"client {self.client.address} is blocklisted")

    def pools(self) -> list[PoolInfo]:
        with self.cluster.mutex:
            self.check_alive()
            return [PoolInfo(pool.pool_id, pool.name) for pool in self.cluster.pools.values()]

    def pool_create(self, name: str) -> int:
        if not name or "\0" in name:
            raise OSError(errno.EINVAL, f"{name!r} cannot name a pool")
        with self.cluster.mutex:
            if any(pool.name == name for pool in self.pools()):
                raise OSError(errno.EEXIST, f"pool {name!r} exists")
            pool_id = self.cluster.number("pool")
            self.cluster.pools[pool_id] = Pool(pool_id, name)
            return pool_id

    def pool_remove(self, name: str) -> None:
        with self.cluster.mutex:
            self.check_alive()
            pool_id = self.pool_id(name)
            del self.cluster.pools[pool_id]
            for place, held in list(self.cluster.watches.items()):
                if place[0] == pool_id:
                    for watch in list(held):
                        watch.lose(errno.ENOTCONN)

    def pool_stats(self, pool_id: int) -> PoolStats:
        with self.cluster.mutex:
            self.check_alive()
            versions = [
                content
                for held in self.pool(pool_id).objects.values()
                for content in (held.head, *held.clones.values())
                if content is not None
            ]
            return PoolStats(sum(content.size for content in versions), len(versions))

    def pool(self, pool_id: int) -> Pool:
        """ENOENT. Under the cluster's mutex."""
        try:
            return self.cluster.pools[pool_id]
        except KeyError:
            raise OSError(errno.ENOENT, f"no pool with id {pool_id}") from None

    def namespaces(self, pool_id: int) -> list[str]:
        with self.cluster.mutex:
            self.check_alive()
            held = self.pool(pool_id).objects
            return sorted({space for (space, _), entry in held.items() if entry.head is not None})

    def open(self, pool: str | int, namespace: str = "") -> ObjectContext:
        executor.check_name("x", namespace)
        with self.cluster.mutex:
            self.check_alive()
            pool_id = self.pool_id(pool) if isinstance(pool, str) else self.pool(pool).pool_id
        return MemoryContext(self, pool_id, namespace)

    def blocklist_add(self, address: str, seconds: int = 3600) -> None:
        address = _canonical(address)
        with self.cluster.mutex:
            self.check_alive()
            expiry = self.cluster.clock() / 1e9 + (seconds if seconds > 0 else DEFAULT_BLOCKLIST_SECONDS)
            self.cluster.blocklist[address] = expiry
            for watch in [watch for held in self.cluster.watches.values() for watch in held]:
                if self.cluster.blocklisted(watch.store.client.address):
                    watch.lose(errno.ESHUTDOWN)

    def blocklist_remove(self, address: str) -> None:
        address = _canonical(address)
        with self.cluster.mutex:
            self.check_alive()
            self.cluster.blocklist.pop(address, None)

    def blocklist(self) -> dict[str, float]:
        with self.cluster.mutex:
            self.check_alive()
            now = self.cluster.clock() / 1e9
            return {address: expiry for address, expiry in self.cluster.blocklist.items() if expiry > now}

    def acknowledge(self, notify_id: int, cookie: int, payload: bytes) -> None:
        with self.cluster.mutex:
            notify = self.cluster.notifies.get(notify_id)
            if notify is not None:
                notify.answer((self.client.gid, cookie), payload)

    def close(self) -> None:
        with self.cluster.mutex:
            if self.closed:
                return
            self.closed = True
            for watch in self._watches():
                watch.closed = True
                watch.drop()
        self.dispatcher.stop()


class MemoryContext(ObjectContext):
    def __init__(self, store: MemoryStore, pool_id: int, namespace: str) -> None:
        self.store: MemoryStore = store
        self.pool_id = pool_id
        self.namespace = namespace
        self._cluster = store.cluster

    def _place(self, oid: str) -> Place:
        return self.pool_id, self.namespace, oid

    def _begin(self, oid: str) -> MemoryTransaction:
        """Under the cluster's mutex."""
        self.store.check_alive()
        executor.check_name(oid, self.namespace)
        place = self._place(oid)
        watchers = [
            WatcherInfo(watch.store.client.gid, watch.cookie, watch.store.client.address, watch.timeout)
            for watch in self._cluster.watches.get(place, [])
        ]
        return MemoryTransaction(
            self.store.pool(self.pool_id),
            place,
            self.store.client,
            self._cluster.clock(),
            self._cluster.number("version"),
            watchers,
        )

    def write(self, oid: str, ops: Sequence[Op], snapc: SnapContext = NO_SNAPS) -> list[Any]:
        with self._cluster.mutex:
            tx = self._begin(oid)
            existed = tx.head() is not None
            results = executor.execute_write(tx, ops, snapc)
            if existed and self._head(oid) is None:
                for watch in list(self._cluster.watches.get(self._place(oid), [])):
                    watch.lose(errno.ENOTCONN)
            return results

    def _head(self, oid: str) -> object | None:
        held = self.store.pool(self.pool_id).objects.get((self.namespace, oid))
        return None if held is None else held.head

    def read(self, oid: str, ops: Sequence[Op], snap_id: int = NOSNAP) -> list[Any]:
        with self._cluster.mutex:
            return executor.execute_read(self._begin(oid), ops, snap_id)

    def exec_ops(self, oid: str, ops: Sequence[Op]) -> list[Any]:
        return self.write(oid, ops) if executor.has_writes(ops) else self.read(oid, ops)

    def objects(self) -> Iterator[str]:
        with self._cluster.mutex:
            self.store.check_alive()
            held = self.store.pool(self.pool_id).objects
            return iter(
                [name for (space, name), entry in held.items() if space == self.namespace and entry.head is not None]
            )

    def snap_create(self) -> int:
        with self._cluster.mutex:
            self.store.check_alive()
            pool = self.store.pool(self.pool_id)
            pool.last_snap += 1
            return pool.last_snap

    def snap_remove(self, snap_id: int) -> None:
        with self._cluster.mutex:
            self.store.check_alive()
            pool = self.store.pool(self.pool_id)
            if 0 < snap_id <= pool.last_snap and snap_id not in pool.removed_snaps:
                pool.removed_snaps.add(snap_id)
                trim_pool(pool, snap_id)

    def watch(
        self, oid: str, callback: NotifyCallback, error: WatchErrorCallback | None = None, timeout: int = 0
    ) -> Watch:
        with self._cluster.mutex:
            executor.execute_read(self._begin(oid), [])
            cookie = self._cluster.number("cookie")
            watch = MemoryWatch(self.store, self._place(oid), cookie, callback, error, timeout or 30)
            self._cluster.watches.setdefault(watch.place, []).append(watch)
            return watch

    def notify(self, oid: str, payload: bytes, timeout_ms: int = 5000) -> NotifyReply:
        with self._cluster.mutex:
            executor.execute_read(self._begin(oid), [])
            notify_id = self._cluster.number("notify")
            watches = list(self._cluster.watches.get(self._place(oid), []))
            notify = _Notify({watch.who for watch in watches})
            self._cluster.notifies[notify_id] = notify
            gid, content = self.store.client.gid, bytes(payload)
            for watch in watches:
                watch.store.dispatcher.put(_delivery(watch, notify_id, gid, content))
        notify.done.wait(timeout_ms / 1000)
        with self._cluster.mutex:
            del self._cluster.notifies[notify_id]
            return NotifyReply(dict(sorted(notify.acks.items())), tuple(sorted(notify.waiting)))

    def notify_ack(self, oid: str, notify_id: int, cookie: int, payload: bytes) -> None:
        self.store.acknowledge(notify_id, cookie, bytes(payload))

    def native_data(self, prefix: str, order: int) -> NativeData:
        raise OSError(errno.EOPNOTSUPP, "this store keeps no data objects for the C data plane")


def _delivery(watch: MemoryWatch, notify_id: int, gid: int, payload: bytes) -> Callable[[], None]:
    return lambda: watch.deliver(notify_id, gid, payload)


_clusters: dict[str, MemoryCluster] = {}
_clusters_lock = threading.Lock()


def named_cluster(name: str) -> MemoryCluster:
    """The cluster every `memory:NAME` of this process means. It lives as long as the process."""
    with _clusters_lock:
        return _clusters.setdefault(name, MemoryCluster())

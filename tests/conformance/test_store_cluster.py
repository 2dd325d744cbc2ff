"""Several clients of one cluster: pools, namespaces, watches and notifies, fencing, locks, concurrency."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

import pytest
from store_fixtures import StoreCluster, io, store_cluster

from librbd_py.format import lock
from librbd_py.format.encoding import Encoder
from librbd_py.store import api
from librbd_py.store.api import ObjectContext

__all__ = ["io", "store_cluster"]

SOON = 20.0  # seconds that a test waits at most for what happens at once


def fails(code: int, call: Callable[..., Any], *args: Any, **named: Any) -> None:
    with pytest.raises(OSError) as caught:
        call(*args, **named)
    assert caught.value.errno == code, caught.value


# --- clients, pools, namespaces


def test_every_client_is_somebody_else(store_cluster: StoreCluster) -> None:
    clients = [store_cluster.client() for _ in range(3)]
    assert len({client.client.gid for client in clients}) == 3
    assert len({client.client.address for client in clients}) == 3
    assert len({client.fsid for client in clients}) == 1


def test_pools(store_cluster: StoreCluster) -> None:
    store = store_cluster.default
    fails(errno.ENOENT, store.open, "no such pool")
    fails(errno.ENOENT, store.open, 999999)
    name = store_cluster.pool()
    pool_id = store.pool_id(name)
    assert pool_id >= 1
    fails(errno.EEXIST, store.pool_create, name)
    other = store_cluster.client()
    assert (pool_id, name) in [(pool.pool_id, pool.name) for pool in other.pools()]
    other.open(pool_id).write("o", [api.WriteFull(b"x")])
    assert list(store.open(name).objects()) == ["o"]


def test_a_removed_pool_is_gone_and_its_id_with_it(store_cluster: StoreCluster) -> None:
    store = store_cluster.default
    first = store.pool_create("short-lived")
    io = store.open("short-lived")
    io.write("o", [api.Create()])
    store.pool_remove("short-lived")
    fails(errno.ENOENT, store.pool_remove, "short-lived")
    fails(errno.ENOENT, io.read, "o", [api.Stat()])
    second = store.pool_create("short-lived")
    assert second > first
    assert list(store.open("short-lived").objects()) == []
    store.pool_remove("short-lived")


def test_namespaces_are_apart(store_cluster: StoreCluster) -> None:
    pool = store_cluster.pool()
    store = store_cluster.default
    for namespace in ("", "a", "b"):
        store.open(pool, namespace).write("o", [api.WriteFull(namespace.encode())])
    store.open(pool, "a").write("only here", [api.Create()])
    assert store.open(pool, "a").read("o", [api.Read()]) == [b"a"]
    assert sorted(store.open(pool, "a").objects()) == ["o", "only here"]
    assert list(store.open(pool, "b").objects()) == ["o"]
    assert list(store.open(pool, "never used").objects()) == []


def test_snapshot_ids_are_the_pools_and_grow(store_cluster: StoreCluster) -> None:
    pool = store_cluster.pool()
    first, second = store_cluster.default.open(pool), store_cluster.client().open(pool, "n")
    ids = [context.snap_create() for context in (first, second, first)]
    assert ids == sorted(set(ids)) and ids[0] > 0


# --- watches


class Watcher:
    """Records what it hears; answers with `answer`, or later when that is None."""

    def __init__(self, io: ObjectContext, oid: str, answer: bytes | None = b"") -> None:
        self.heard: list[tuple[int, int, int, bytes]] = []
        self.errors: list[int] = []
        self.notified = threading.Event()
        self.failed = threading.Event()
        self.answer = answer
        self.watch = io.watch(oid, self._notified, self._failed)

    def _notified(self, notify_id: int, gid: int, cookie: int, payload: bytes) -> bytes | None:
        self.heard.append((notify_id, gid, cookie, payload))
        self.notified.set()
        return self.answer

    def _failed(self, cookie: int, error: OSError) -> None:
        self.errors.append(error.errno or 0)
        self.failed.set()


def test_a_watch_needs_an_object(io: ObjectContext) -> None:
    fails(errno.ENOENT, io.watch, "o", lambda *_: b"")
    fails(errno.ENOENT, io.notify, "o", b"")


def test_a_notify_reaches_every_watcher_and_gathers_their_answers(store_cluster: StoreCluster) -> None:
    pool = store_cluster.pool()
    contexts = [store_cluster.client().open(pool) for _ in range(3)]
    contexts[0].write("o", [api.Create()])
    watchers = [Watcher(context, "o", b"answer %d" % n) for n, context in enumerate(contexts)]
    reply = contexts[1].notify("o", b"hello")
    gid = contexts[1].store.client.gid
    expected = {(c.store.client.gid, w.watch.cookie): w.answer for c, w in zip(contexts, watchers, strict=True)}
    assert dict(reply.acks) == expected and reply.timed_out == ()
    for watcher in watchers:
        ((_, notifier, cookie, payload),) = watcher.heard
        assert (notifier, cookie, payload) == (gid, watcher.watch.cookie, b"hello")
    listed = contexts[0].read("o", [api.ListWatchers()])[0]
    assert {(row.gid, row.cookie): row.address for row in listed} == {
        (c.store.client.gid, w.watch.cookie): c.store.client.address for c, w in zip(contexts, watchers, strict=True)
    }
    for watcher in watchers:
        assert watcher.watch.check() < 30
        watcher.watch.close()
    assert contexts[0].read("o", [api.ListWatchers()])[0] == []


def test_nobody_watching_is_fine(io: ObjectContext) -> None:
    io.write("o", [api.Create()])
    reply = io.notify("o", b"x")
    assert dict(reply.acks) == {} and reply.timed_out == ()


def test_a_late_ack_and_a_silent_watcher(store_cluster: StoreCluster) -> None:
    pool = store_cluster.pool()
    io, late_io, silent_io = (store_cluster.client().open(pool) for _ in range(3))
    io.write("o", [api.Create()])
    late, silent = Watcher(late_io, "o", None), Watcher(silent_io, "o", None)

    def acknowledge() -> None:
        assert late.notified.wait(SOON)
        notify_id, _, cookie, _ = late.heard[0]
        late_io.notify_ack("o", notify_id, cookie, b"at last")

    thread = threading.Thread(target=acknowledge)
    thread.start()
    # Whole seconds: an OSD counts a notify's timeout in them.
    reply = io.notify("o", b"x", timeout_ms=1000)
    thread.join()
    assert dict(reply.acks) == {(late_io.store.client.gid, late.watch.cookie): b"at last"}
    assert reply.timed_out == ((silent_io.store.client.gid, silent.watch.cookie),)


def test_two_watches_of_one_client(io: ObjectContext) -> None:
    io.write("o", [api.Create()])
    one, two = Watcher(io, "o", b"1"), Watcher(io, "o", b"2")
    assert one.watch.cookie != two.watch.cookie
    assert sorted(io.notify("o", b"x").acks.values()) == [b"1", b"2"]
    one.watch.close()
    one.watch.close()
    assert list(io.notify("o", b"y").acks.values()) == [b"2"]
    assert len(one.heard) == 1 and len(two.heard) == 2


def test_watches_are_of_one_object_in_one_namespace(store_cluster: StoreCluster) -> None:
    pool = store_cluster.pool()
    contexts = [store_cluster.default.open(pool, namespace) for namespace in ("", "n")]
    for context in contexts:
        context.write("o", [api.Create()])
        context.write("p", [api.Create()])
    watcher = Watcher(contexts[0], "o")
    contexts[1].notify("o", b"1")
    contexts[0].notify("p", b"2")
    contexts[0].notify("o", b"3")
    assert [payload for *_, payload in watcher.heard] == [b"3"]


def test_a_callback_may_use_the_store(store_cluster: StoreCluster) -> None:
    pool = store_cluster.pool()
    io, other = store_cluster.default.open(pool), store_cluster.client().open(pool)
    io.write("o", [api.Create()])

    def callback(*_: Any) -> bytes:
        other.write("seen", [api.WriteFull(b"yes")])
        return b"done"

    other.watch("o", callback)
    assert list(io.notify("o", b"x").acks.values()) == [b"done"]
    assert io.read("seen", [api.Read()]) == [b"yes"]


def test_a_closed_client_watches_no_more(store_cluster: StoreCluster) -> None:
    pool = store_cluster.pool()
    io, leaving = store_cluster.default.open(pool), store_cluster.client()
    io.write("o", [api.Create()])
    Watcher(leaving.open(pool), "o")
    assert len(io.read("o", [api.ListWatchers()])[0]) == 1
    leaving.close()
    leaving.close()
    assert io.read("o", [api.ListWatchers()])[0] == []
    assert dict(io.notify("o", b"x").acks) == {}


def test_removing_the_object_ends_its_watches(io: ObjectContext) -> None:
    io.write("o", [api.Create()])
    watcher = Watcher(io, "o")
    io.write("o", [api.Remove()])
    assert watcher.failed.wait(SOON)
    assert watcher.errors == [errno.ENOTCONN]
    fails(errno.ENOTCONN, watcher.watch.check)
    watcher.watch.close()


# --- fencing


def test_a_blocklisted_client_can_do_nothing(store_cluster: StoreCluster) -> None:
    pool = store_cluster.pool()
    io, fenced_store = store_cluster.default.open(pool), store_cluster.client()
    fenced = fenced_store.open(pool)
    io.write("o", [api.WriteFull(b"x")])
    watcher = Watcher(fenced, "o")
    address = fenced_store.client.address
    io.store.blocklist_add(address, 600)
    assert address in io.store.blocklist()
    if store_cluster.kind != "ceph":  # there the new map needs a moment to arrive
        for call in (
            lambda: fenced.write("o", [api.WriteFull(b"late")]),
            lambda: fenced.read("o", [api.Read()]),
            lambda: fenced.exec("o", "lock", "get_info", lock.InfoRequest("l").encode()),
            lambda: fenced.notify("o", b""),
            lambda: fenced.watch("o", lambda *_: b""),
            fenced.snap_create,
        ):
            fails(errno.ESHUTDOWN, call)
    assert watcher.failed.wait(SOON)
    assert watcher.errors in ([errno.ESHUTDOWN], [errno.ENOTCONN])
    assert io.read("o", [api.ListWatchers()])[0] == []
    assert io.read("o", [api.Read()]) == [b"x"]
    assert dict(io.notify("o", b"x").acks) == {}
    io.store.blocklist_remove(address)
    assert address not in io.store.blocklist()
    fails(errno.EINVAL, io.store.blocklist_add, "nonsense")


def test_fencing_one_client_leaves_the_others_alone(store_cluster: StoreCluster) -> None:
    pool = store_cluster.pool()
    stores = [store_cluster.client() for _ in range(3)]
    stores[0].blocklist_add(stores[1].client.address)
    stores[2].open(pool).write("o", [api.WriteFull(b"2")])
    assert stores[0].open(pool).read("o", [api.Read()]) == [b"2"]


# --- class lock between clients


def take(io: ObjectContext, cookie: str = "auto 1", **more: Any) -> None:
    request = lock.LockRequest("rbd_lock", more.pop("type", lock.LOCK_EXCLUSIVE), cookie, "internal", **more)
    io.exec("o", "lock", "lock", request.encode())


def held(io: ObjectContext) -> lock.LockState:
    return lock.LockState.decode(io.exec("o", "lock", "get_info", lock.InfoRequest("rbd_lock").encode()))


def test_the_lock_is_one_clients_until_given_back_or_broken(store_cluster: StoreCluster) -> None:
    pool = store_cluster.pool()
    one, two = store_cluster.client().open(pool), store_cluster.client().open(pool)
    take(one)
    fails(errno.EBUSY, take, two)
    fails(errno.EEXIST, take, one)
    ((who, info),) = held(two).lockers.items()
    client = one.store.client
    assert who == lock.LockerId(lock.EntityName(8, client.gid), "auto 1")
    assert info.address.text == client.address and info.address.type == lock.ADDRESS_LEGACY
    guard = api.Exec(
        "lock", "assert_locked", lock.AssertRequest("rbd_lock", lock.LOCK_EXCLUSIVE, "auto 1", "internal").encode()
    )
    one.write("o", [guard, api.WriteFull(b"mine")])
    fails(errno.EBUSY, two.write, "o", [guard, api.WriteFull(b"yours")])
    fails(errno.ENOENT, two.exec, "o", "lock", "unlock", lock.UnlockRequest("rbd_lock", "auto 1").encode())
    two.exec("o", "lock", "break_lock", lock.BreakRequest("rbd_lock", who.entity, "auto 1").encode())
    fails(errno.EBUSY, one.write, "o", [guard, api.WriteFull(b"late")])
    take(two)
    assert one.read("o", [api.Read()]) == [b"mine"]
    two.exec("o", "lock", "unlock", lock.UnlockRequest("rbd_lock", "auto 1").encode())
    raw = one.read("o", [api.GetXattr("lock.rbd_lock")])[0]
    assert raw.hex() == "0101110000000000000001" + "08000000" + b"internal".hex()


def test_a_shared_lock_has_many_holders(store_cluster: StoreCluster) -> None:
    pool = store_cluster.pool()
    contexts = [store_cluster.client().open(pool) for _ in range(3)]
    for context in contexts:
        take(context, type=lock.LOCK_SHARED)
    assert len(held(contexts[0]).lockers) == 3
    fails(errno.EBUSY, take, store_cluster.client().open(pool))


# --- concurrency


def test_exclusive_creation_has_one_winner(store_cluster: StoreCluster) -> None:
    pool = store_cluster.pool()
    contexts = [store_cluster.client().open(pool) for _ in range(3)]
    for round_number in range(10):
        wins: list[int] = []
        start = threading.Barrier(len(contexts))

        def run(number: int, oid: str, start: threading.Barrier = start, wins: list[int] = wins) -> None:
            start.wait()
            try:
                contexts[number].write(oid, [api.Create(exclusive=True)])
                wins.append(number)
            except OSError as e:
                assert e.errno == errno.EEXIST

        threads = [threading.Thread(target=run, args=(n, f"o{round_number}")) for n in range(len(contexts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins) == 1


def test_guarded_increments_of_many_threads_lose_nothing(store_cluster: StoreCluster) -> None:
    """Compare-and-set on omap from two clients, two threads each."""
    pool = store_cluster.pool()
    contexts = [store_cluster.client().open(pool) for _ in range(2)]
    contexts[0].write("counter", [api.OmapSet({b"n": b"0"})])
    failures: list[OSError] = []

    def run(io: ObjectContext) -> None:
        done = 0
        while done < 15:
            value = io.read("counter", [api.OmapGetByKeys([b"n"])])[0][b"n"]
            new = b"%d" % (int(value) + 1)
            try:
                io.write("counter", [api.OmapCmp({b"n": (value, "eq")}), api.OmapSet({b"n": new}), api.Append(b".")])
                done += 1
            except OSError as e:
                if e.errno != errno.ECANCELED:
                    failures.append(e)
                    return

    threads = [threading.Thread(target=run, args=(io,)) for io in contexts for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert contexts[1].read("counter", [api.OmapGetByKeys([b"n"]), api.Read()]) == [{b"n": b"60"}, b"." * 60]


def test_directory_entries_of_two_clients_at_once(store_cluster: StoreCluster) -> None:
    pool = store_cluster.pool()
    contexts = [store_cluster.client().open(pool) for _ in range(2)]

    def run(number: int) -> None:
        for item in range(20):
            name, image = f"image-{number}-{item}", f"{number}a{item}"
            contexts[number].exec("rbd_directory", "rbd", "dir_add_image", Encoder().string(name).string(image).done())

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = contexts[0].read("rbd_directory", [api.OmapGetVals()])[0][0]
    assert len(rows) == 80

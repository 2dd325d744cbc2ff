"""Watch and exclusive lock of a header on a store, between several clients of one process."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from librbd_py.control import lock as lk
from librbd_py.control import lock_events as le
from librbd_py.control.driver import HeaderControl, Policy
from librbd_py.control.pool import control_pool
from librbd_py.format import lock as fl
from librbd_py.format import notify as nf
from librbd_py.store.api import Create, GetXattr, ListWatchers, NotifyReply, ObjectContext, Remove
from librbd_py.store.memory import MemoryCluster, MemoryStore

HEADER = "rbd_header.1045abc"
PATIENCE = 20.0  # seconds; only ever waited for when something is broken


class Image:
    """Callbacks that write down what they were told."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.events: list[str] = []
        self.failure: OSError | None = None
        self.fail_acquire: OSError | None = None
        self.fail_release: OSError | None = None
        self.peer_result: int | None = None
        self.peer_messages: list[nf.Message] = []

    def note(self, event: str) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def wait_for(self, true: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(true, PATIENCE), self.events

    def header_updated(self) -> None:
        self.note("refresh")

    def post_acquire(self) -> None:
        self.note("acquire")
        if self.fail_acquire is not None:
            raise self.fail_acquire

    def pre_release(self, final: bool) -> None:
        self.note("release")
        if self.fail_release is not None:
            raise self.fail_release

    def lost(self, failure: OSError) -> None:
        self.failure = failure
        self.note("lost")

    def peer_op(self, message: nf.Message, reply: Callable[[int | None], None]) -> None:
        self.peer_messages.append(message)
        self.note("peer")
        reply(self.peer_result)


class Client:
    def __init__(self, cluster: MemoryCluster, policy: Policy = "automatic") -> None:
        self.store = MemoryStore(cluster)
        self.ctx = self.store.open("rbd")
        self.image = Image()
        self.control = HeaderControl(self.ctx, HEADER, self.image, policy)

    def open(self) -> Client:
        self.control.open()
        return self

    def die(self) -> None:
        """Everything of it is gone from the store but what it wrote."""
        self.store.close()


class World:
    def __init__(self) -> None:
        self.cluster = MemoryCluster()
        self.store = MemoryStore(self.cluster)
        self.store.pool_create("rbd")
        self.ctx: ObjectContext = self.store.open("rbd")
        self.ctx.write(HEADER, [Create(True)])
        self.clients: list[Client] = []

    def client(self, policy: Policy = "automatic") -> Client:
        client = Client(self.cluster, policy).open()
        self.clients.append(client)
        return client

    def lock_state(self) -> fl.LockState:
        state: bytes = self.ctx.read(HEADER, [GetXattr("lock.rbd_lock")])[0]
        return fl.LockState.decode(state)

    def ask(self, message: nf.Message) -> NotifyReply:
        return self.ctx.notify(HEADER, nf.encode(message))


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for client in world.clients:
        client.control.close()
        client.store.close()
    world.store.close()


def test_a_free_lock_is_taken_with_the_cookie_of_the_watch(world: World) -> None:
    client = world.client()
    assert not client.control.is_owner
    assert client.control.owner() is None
    client.control.acquire(PATIENCE)
    assert client.control.is_owner
    assert client.image.events == ["acquire"]
    owner = client.control.owner()
    assert owner is not None
    assert owner.gid == client.store.client.gid
    assert owner.address == client.store.client.address
    assert owner.cookie == f"auto {client.control.watch_handle}" == client.control.lock_cookie
    state = world.lock_state()
    assert (state.type, state.tag, len(state.lockers)) == (fl.LOCK_EXCLUSIVE, "internal", 1)
    client.control.acquire(PATIENCE)  # again: nothing to do
    assert client.image.events == ["acquire"]


def test_release_drains_first_and_leaves_type_and_tag(world: World) -> None:
    client = world.client()
    client.control.acquire(PATIENCE)
    client.control.release()
    assert client.image.events == ["acquire", "release"]
    assert not client.control.is_owner
    assert client.control.owner() is None
    raw = world.ctx.read(HEADER, [GetXattr("lock.rbd_lock")])[0]
    assert raw.hex() == "01011100000000000000" + "01" + "08000000" + b"internal".hex()
    client.control.release()  # not held: nothing happens
    assert client.image.events == ["acquire", "release"]


def test_the_lock_wanders_between_living_clients_in_milliseconds(world: World) -> None:
    one, two = world.client(), world.client()
    one.control.acquire(PATIENCE)
    laps = []
    for _ in range(10):
        for client, other in ((two, one), (one, two)):
            begin = time.monotonic()
            client.control.acquire(PATIENCE)
            laps.append(time.monotonic() - begin)
            assert client.control.is_owner
            assert not other.control.is_owner
    assert sorted(laps)[len(laps) // 2] < 0.05
    assert one.image.events == ["acquire", "release"] * 10 + ["acquire"]
    assert not world.store.blocklist()


def test_the_old_owner_drains_before_the_new_one_begins(world: World) -> None:
    one, two = world.client(), world.client()
    order: list[str] = []
    one.image.note = lambda event: order.append(f"one {event}")  # type: ignore[method-assign]
    two.image.note = lambda event: order.append(f"two {event}")  # type: ignore[method-assign]
    one.control.acquire(PATIENCE)
    two.control.acquire(PATIENCE)
    assert order == ["one acquire", "one release", "two acquire"]


def test_many_clients_take_turns_and_never_own_together(world: World) -> None:
    clients = [world.client() for _ in range(4)]
    owners = 0
    worst = 0
    guard = threading.Lock()

    def acquired() -> None:
        nonlocal owners, worst
        with guard:
            owners += 1
            worst = max(worst, owners)

    def released(final: bool) -> None:
        nonlocal owners
        with guard:
            owners -= 1

    for client in clients:
        client.image.post_acquire = acquired  # type: ignore[method-assign]
        client.image.pre_release = released  # type: ignore[method-assign]

    def work(client: Client) -> None:
        for _ in range(8):
            client.control.acquire(PATIENCE)

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert worst == 1
    assert not world.store.blocklist()


def test_an_exclusive_owner_refuses(world: World) -> None:
    one, two = world.client("exclusive"), world.client()
    one.control.acquire(PATIENCE)
    with pytest.raises(OSError) as caught:
        two.control.acquire(PATIENCE)
    assert caught.value.errno == errno.EROFS
    assert one.control.is_owner
    one.control.set_policy("automatic")
    two.control.acquire(PATIENCE)
    assert not one.control.is_owner


@pytest.mark.parametrize(
    ("kind", "cookie", "tag"),
    [
        (fl.LOCK_EXCLUSIVE, "backup tonight", ""),
        (fl.LOCK_EXCLUSIVE, "auto 12", "mine"),
        (fl.LOCK_EXCLUSIVE, "auto 1x", "internal"),
        (fl.LOCK_SHARED, "auto 12", "internal"),
    ],
)
def test_a_lock_of_another_kind_is_left_alone(world: World, kind: int, cookie: str, tag: str) -> None:
    stranger = MemoryStore(world.cluster)
    request = fl.LockRequest(fl.RBD_LOCK_NAME, kind, cookie, tag)
    stranger.open("rbd").exec(HEADER, "lock", "lock", request.encode())
    stranger.close()
    client = world.client()
    with pytest.raises(OSError) as caught:
        client.control.acquire(PATIENCE)
    assert caught.value.errno == errno.EBUSY
    assert [locker.cookie for locker in world.lock_state().lockers] == [cookie]
    assert not world.store.blocklist()


def test_a_dead_owner_is_fenced_before_its_lock_is_broken(world: World) -> None:
    one, two = world.client(), world.client()
    one.control.acquire(PATIENCE)
    broken_while: list[bool] = []
    execute = two.ctx.exec

    def spy(oid: str, cls: str, method: str, data: bytes = b"") -> bytes:
        if method == "break_lock":
            broken_while.append(one.store.client.address in world.store.blocklist())
        return execute(oid, cls, method, data)

    two.ctx.exec = spy  # type: ignore[method-assign]
    one.die()
    two.control.acquire(PATIENCE)
    assert two.control.is_owner
    assert broken_while == [True]
    world.clients.remove(one)


def test_a_living_but_silent_owner_is_not_fenced(world: World) -> None:
    one, two = world.client(), world.client()
    one.control.acquire(PATIENCE)
    one.store.suspend()
    with pytest.raises(OSError) as caught:
        two.control.acquire(0.2)
    assert caught.value.errno == errno.ETIMEDOUT
    assert not world.store.blocklist()
    assert one.control.is_owner
    one.store.resume()
    two.control.acquire(PATIENCE)


def test_a_lost_watch_comes_back_with_a_new_handle_and_cookie(world: World) -> None:
    client = world.client()
    client.control.acquire(PATIENCE)
    before = client.control.watch_handle
    seq = client.control.header_seq
    client.store.lose_watches()
    client.image.wait_for(lambda: "refresh" in client.image.events)
    other = world.client()  # its request comes after the new cookie is in, or waits for it
    other.control.acquire(PATIENCE)
    client.control.acquire(PATIENCE)
    assert client.control.watch_handle != before
    assert client.control.lock_cookie == f"auto {client.control.watch_handle}"
    assert client.control.header_seq > seq
    assert "lost" not in client.image.events


def test_losing_the_watch_keeps_the_lock_and_renews_its_cookie(world: World) -> None:
    client = world.client()
    client.control.acquire(PATIENCE)
    announced = threading.Event()

    def watcher(notify_id: int, notifier: int, cookie: int, payload: bytes) -> bytes:
        if isinstance(nf.decode(payload), nf.AcquiredLock):
            announced.set()
        return b""

    with_watch = world.ctx.watch(HEADER, watcher)
    client.store.lose_watches()
    assert announced.wait(PATIENCE)
    assert client.control.is_owner
    assert client.image.events.count("acquire") == 1
    assert [locker.cookie for locker in world.lock_state().lockers] == [f"auto {client.control.watch_handle}"]
    with_watch.close()


def test_a_fenced_owner_learns_it_and_can_close(world: World) -> None:
    client = world.client()
    client.control.acquire(PATIENCE)
    world.store.blocklist_add(client.store.client.address)
    client.image.wait_for(lambda: client.image.failure is not None)
    assert client.image.failure is not None
    assert client.image.failure.errno == errno.ESHUTDOWN
    assert not client.control.is_owner
    with pytest.raises(OSError) as caught:
        client.control.acquire(PATIENCE)
    assert caught.value.errno == errno.ESHUTDOWN
    client.control.release()
    client.control.close()
    assert client.image.events == ["acquire", "lost"]


def test_waiting_for_the_lock_ends_when_fenced(world: World) -> None:
    one, two = world.client(), world.client()
    one.control.acquire(PATIENCE)
    one.store.suspend()
    future = two.control.request_acquire()
    world.store.blocklist_add(two.store.client.address)
    failure = future.exception(PATIENCE)
    assert isinstance(failure, OSError)
    assert failure.errno == errno.ESHUTDOWN
    one.store.resume()


def test_the_data_path_can_say_that_it_was_fenced(world: World) -> None:
    client = world.client()
    client.control.acquire(PATIENCE)
    client.control.fenced()
    client.image.wait_for(lambda: client.image.failure is not None)
    assert not client.control.is_owner


def test_removing_the_image_is_told_once(world: World) -> None:
    client = world.client()
    world.ctx.write(HEADER, [Remove()])
    client.image.wait_for(lambda: client.image.failure is not None)
    assert client.image.failure is not None
    assert client.image.failure.errno == errno.ENOENT


def test_an_image_that_cannot_get_ready_gives_the_lock_back(world: World) -> None:
    client = world.client()
    client.image.fail_acquire = OSError(errno.EIO, "no object map")
    with pytest.raises(OSError) as caught:
        client.control.acquire(PATIENCE)
    assert caught.value.errno == errno.EIO
    client.image.fail_acquire = None
    client.control.acquire(PATIENCE)
    assert client.control.is_owner


def test_an_image_that_does_not_drain_keeps_the_lock(world: World) -> None:
    client = world.client()
    client.control.acquire(PATIENCE)
    client.image.fail_release = OSError(errno.EIO, "flush failed")
    with pytest.raises(OSError) as caught:
        client.control.release()
    assert caught.value.errno == errno.EIO
    assert client.control.is_owner
    client.image.fail_release = None
    client.control.release()
    assert not client.control.is_owner


def test_closing_reports_a_failed_flush_and_still_lets_go(world: World) -> None:
    client = world.client()
    client.control.acquire(PATIENCE)
    client.image.fail_release = OSError(errno.EIO, "flush failed")
    with pytest.raises(OSError) as caught:
        client.control.close()
    assert caught.value.errno == errno.EIO
    assert client.control.owner() is None
    client.control.close()


def test_closing_an_image_that_still_writes_can_be_repeated(world: World) -> None:
    client = world.client()
    client.control.acquire(PATIENCE)
    client.image.fail_release = OSError(errno.ETIMEDOUT, "still writing")
    with pytest.raises(OSError) as caught:
        client.control.close()
    assert caught.value.errno == errno.ETIMEDOUT
    assert client.control.is_owner
    client.image.fail_release = None
    client.control.close()
    assert client.control.owner() is None


def test_header_updates_are_seen_before_the_notifier_goes_on(world: World) -> None:
    one, two = world.client(), world.client()
    seq = two.control.header_seq
    one.control.notify_header_update()
    assert two.control.header_seq == seq + 1
    two.image.wait_for(lambda: "refresh" in two.image.events)


def test_acks_are_those_of_librbd(world: World) -> None:
    owner, other = world.client("exclusive"), world.client()
    owner.control.acquire(PATIENCE)
    owner_key = (owner.store.client.gid, owner.control.watch_handle)
    other_key = (other.store.client.gid, other.control.watch_handle)
    me = nf.ClientId(1, 2)
    ok = bytes.fromhex("01010400000000000000")

    acks = world.ask(nf.HeaderUpdate()).acks
    assert (acks[owner_key], acks[other_key]) == (ok, ok)
    acks = world.ctx.notify(HEADER, b"").acks
    assert (acks[owner_key], acks[other_key]) == (ok, ok)
    acks = world.ask(nf.AcquiredLock(me)).acks
    assert (acks[owner_key], acks[other_key]) == (b"", b"")
    acks = world.ask(nf.ReleasedLock(me)).acks
    assert (acks[owner_key], acks[other_key]) == (b"", b"")
    acks = world.ask(nf.RequestLock(me)).acks
    assert (acks[owner_key], acks[other_key]) == (nf.encode_response(-errno.EROFS), b"")
    acks = world.ask(nf.Unknown(77, b"??")).acks
    assert (acks[owner_key], acks[other_key]) == (nf.encode_response(-errno.EOPNOTSUPP), b"")
    acks = world.ctx.notify(HEADER, b"\x07\x01\xff\xff\xff\xffjunk").acks
    assert (acks[owner_key], acks[other_key]) == (b"", b"")
    assert owner.control.is_owner

    owner.control.set_policy("automatic")
    acks = world.ask(nf.RequestLock(me)).acks
    assert (acks[owner_key], acks[other_key]) == (ok, b"")
    owner.image.wait_for(lambda: "release" in owner.image.events)


def test_what_is_announced_is_byte_for_byte_librbds(world: World) -> None:
    heard: list[bytes] = []
    done = threading.Event()

    def watcher(notify_id: int, notifier: int, cookie: int, payload: bytes) -> bytes:
        heard.append(payload)
        if len(heard) == 2:
            done.set()
        return b""

    watch = world.ctx.watch(HEADER, watcher)
    client = world.client()
    client.control.acquire(PATIENCE)
    handle = client.control.watch_handle
    assert handle is not None
    client.control.release()
    assert done.wait(PATIENCE)
    who = client.store.client.gid.to_bytes(8, "little") + handle.to_bytes(8, "little")
    assert heard == [
        bytes.fromhex("07011400000000000000") + who,
        bytes.fromhex("07011400000001000000") + who,
    ]
    watch.close()


def test_a_proxied_operation_reaches_the_owner_alone(world: World) -> None:
    owner, other = world.client(), world.client()
    owner.control.acquire(PATIENCE)
    request = nf.AsyncRequestId(nf.ClientId(1, 2), 3)
    owner.image.peer_result = 0
    acks = world.ask(nf.Resize(1 << 20, request, True)).acks
    assert sorted(acks.values()) == [b"", nf.encode_response(0)]
    assert owner.image.peer_messages == [nf.Resize(1 << 20, request, True)]
    assert other.image.peer_messages == []
    world.ask(nf.AsyncProgress(request, 1, 2))
    assert other.image.peer_messages == [nf.AsyncProgress(request, 1, 2)]


def test_a_control_opens_only_where_there_is_a_header(world: World) -> None:
    missing = HeaderControl(world.ctx, "rbd_header.none", Image())
    with pytest.raises(OSError) as caught:
        missing.open()
    assert caught.value.errno == errno.ENOENT
    world.ctx.write("rbd_header.none", [Create(True)])
    missing.open()
    missing.close()
    missing.close()


def fail(client: Client, method: str, code: int) -> list[int]:
    """Class calls of this name fail until the list that is returned is emptied."""
    failing = [code]
    execute = client.ctx.exec

    def spy(oid: str, cls: str, called: str, data: bytes = b"") -> bytes:
        if called == method and failing:
            raise OSError(failing[0], f"{method} fails")
        return execute(oid, cls, called, data)

    client.ctx.exec = spy  # type: ignore[method-assign]
    return failing


def test_a_lock_that_cannot_be_unlocked_does_not_stop_the_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three attempts; then the image is given up, its watch ends, and the next owner breaks the lock."""
    monkeypatch.setattr(lk, "REFUSED_SECONDS", 0.01)
    one, two = world.client(), world.client()
    one.control.acquire(PATIENCE)
    fail(one, "unlock", errno.EIO)
    two.control.acquire(PATIENCE)
    assert one.image.failure is not None and one.image.failure.errno == errno.EIO
    assert one.store.client.address in world.store.blocklist()
    one.control.close()
    one.control.close()
    assert one.image.events == ["acquire", "release", "lost"]
    assert [watcher.gid for watcher in world.ctx.read(HEADER, [ListWatchers()])[0]] == [two.store.client.gid]


def test_a_store_that_recovers_meanwhile_costs_the_image_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more attempt to unlock when nothing can be under way any more: nobody has to be fenced."""
    monkeypatch.setattr(lk, "REFUSED_SECONDS", 0.01)
    one, two = world.client(), world.client()
    one.control.acquire(PATIENCE)
    failing = fail(one, "unlock", errno.EIO)
    lost = one.image.lost
    one.image.lost = lambda failure: (failing.clear(), lost(failure))  # type: ignore
    two.control.acquire(PATIENCE)
    assert one.image.failure is not None and not world.store.blocklist()


def test_who_cannot_release_says_so(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Peers are promised the lock once, then told why it does not come, and get it when it can go."""
    one, two = world.client(), world.client()
    one.control.acquire(PATIENCE)

    def asked() -> int | None:
        message = nf.RequestLock(nf.ClientId(two.store.client.gid, 1))
        return one.control._lock_event(le.PeerRequested(message.client.gid, message.client.handle))

    for code, told in ((errno.EIO, errno.EIO), (errno.ETIMEDOUT, errno.EAGAIN), (errno.EROFS, errno.EIO)):
        one.image.fail_release = OSError(code, "it does not drain")
        assert asked() in (0, errno.EIO, errno.EAGAIN)
        one.image.wait_for(lambda: one.control.is_owner)
        assert one.control._lock.kept == told
    with pytest.raises(OSError, match=r"does not give up the lock and says: Input/output error") as caught:
        two.control.acquire(0.5)
    assert caught.value.errno == errno.ETIMEDOUT
    one.image.wait_for(lambda: one.control.is_owner)
    one.image.fail_release = None
    two.control.acquire(PATIENCE)
    one.control.acquire(PATIENCE)
    one.image.wait_for(lambda: one.control.is_owner)
    assert asked() == 0  # that was then


def test_who_offers_cannot_stand_by(world: World) -> None:
    one = world.client()
    assert one.control.offer("uuid:1", PATIENCE)
    with pytest.raises(OSError) as caught:
        one.control.stand_by("uuid:1")
    assert caught.value.errno == errno.EBUSY
    assert one.control.offered and one.control.offered_to("uuid:1")
    one.control.take_back()


def test_standing_by_fails_when_the_owner_cannot_be_read(world: World) -> None:
    one = world.client()
    reads = iter([one.control.owner(), OSError(errno.ETIMEDOUT, "no answer")])

    def owner() -> object:
        answer = next(reads)
        if isinstance(answer, OSError):
            raise answer
        return answer

    one.control.owner = owner  # type: ignore
    with pytest.raises(OSError) as caught:
        one.control.stand_by("uuid:1")
    assert caught.value.errno == errno.ETIMEDOUT
    assert not one.control.moving and not one.control.standing_by
    one.control.acquire(PATIENCE)


def test_a_backup_does_not_take_what_is_offered_to_some_vm(world: World) -> None:
    one, backup, server = world.client(), world.client(), world.client()
    assert one.control.offer("*", PATIENCE)
    with pytest.raises(OSError, match=os.strerror(errno.EAGAIN)) as caught:
        backup.control.acquire(0.3)
    assert caught.value.errno == errno.ETIMEDOUT and one.control.offered
    server.control.heir = True
    server.control.acquire(PATIENCE)
    assert not world.store.blocklist()


def test_closing_gives_the_lock_and_the_watch_back(world: World) -> None:
    client = world.client()
    client.control.acquire(PATIENCE)
    client.control.close()
    assert client.image.events == ["acquire", "release"]
    assert world.ask(nf.HeaderUpdate()).acks == {}
    assert client.control.owner() is None
    with pytest.raises(OSError) as caught:
        client.control.acquire(PATIENCE)
    assert caught.value.errno == errno.ESHUTDOWN


def test_an_idle_image_costs_no_thread(world: World) -> None:
    store = MemoryStore(world.cluster)
    ctx = store.open("rbd")
    controls = []
    warm = HeaderControl(ctx, HEADER, Image())
    warm.open()
    before = threading.active_count()
    for number in range(200):
        name = f"rbd_header.many{number}"
        ctx.write(name, [Create(True)])
        controls.append(HeaderControl(ctx, name, Image()))
        controls[-1].open()
    assert threading.active_count() <= before
    for control in controls:
        control.acquire(PATIENCE)
    assert control_pool().threads <= 16  # usual ones, and a few if the machine is slow
    for control in [*controls, warm]:
        control.close()
    store.close()

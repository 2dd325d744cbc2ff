"""Watches and notifies of the embedded store between clients of one process; other processes are in tests/fault."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from librbd_py.store.api import AssertExists, Create, ListWatchers, Remove
from librbd_py.store.embedded import EmbeddedStore, messages
from librbd_py.store.embedded.context import EmbeddedContext
from librbd_py.store.embedded.messages import Ack, Fenced, Lost, Message, Notify

DEADLINE = 20.0  # seconds; reached only when something is broken


class Clients:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.open: list[EmbeddedStore] = []

    def connect(self) -> EmbeddedStore:
        self.open.append(EmbeddedStore(self.path, create=True))
        return self.open[-1]

    def io(self) -> EmbeddedContext:
        return self.connect().open("rbd")


@pytest.fixture
def clients(tmp_path: Path) -> Iterator[Clients]:
    made = Clients(tmp_path / "store")
    yield made
    for store in made.open:
        store.close()


@contextmanager
def refused(code: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == code, caught.value


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.002)


def test_every_watcher_answers_and_the_notifier_is_one_of_them(clients: Clients) -> None:
    a, b = clients.io(), clients.io()
    a.write("o", [Create()])
    seen: list[tuple[int, int, int, bytes]] = []
    first = a.watch("o", lambda *call: seen.append(call) or b"first")
    second = b.watch("o", lambda *call: b"second")
    third = b.watch("o", lambda *call: b"")
    reply = a.notify("o", b"payload")
    gid_a, gid_b = a.store.client.gid, b.store.client.gid
    assert reply.acks == {
        (gid_a, first.cookie): b"first",
        (gid_b, second.cookie): b"second",
        (gid_b, third.cookie): b"",
    }
    assert reply.timed_out == ()
    assert [call[1:] for call in seen] == [(gid_a, first.cookie, b"payload")]
    rows = {(w.gid, w.cookie, w.address, w.timeout) for w in a.read("o", [ListWatchers()])[0]}
    assert rows == {
        (gid_a, first.cookie, a.store.client.address, 30),
        (gid_b, second.cookie, b.store.client.address, 30),
        (gid_b, third.cookie, b.store.client.address, 30),
    }
    second.close()
    third.close()
    assert b.notify("o", b"").acks.keys() == {(gid_a, first.cookie)}


@pytest.mark.parametrize("size", [0, 1, 65536, messages.MAX_PAYLOAD])
def test_payloads_arrive_whole_in_both_directions(clients: Clients, size: int) -> None:
    a, b = clients.io(), clients.io()
    a.write("o", [Create()])
    b.watch("o", lambda notify_id, gid, cookie, payload: payload[::-1])
    payload = random.Random(size).randbytes(size)
    assert list(a.notify("o", payload, DEADLINE * 1000).acks.values()) == [payload[::-1]]


def test_a_larger_payload_is_refused(clients: Clients) -> None:
    a = clients.io()
    a.write("o", [Create()])
    with refused(errno.EMSGSIZE):
        a.notify("o", bytes(messages.MAX_PAYLOAD + 1))


def test_late_and_missing_acks(clients: Clients) -> None:
    a, b = clients.io(), clients.io()
    a.write("o", [Create()])
    asked: list[tuple[int, int]] = []
    watch = b.watch("o", lambda notify_id, gid, cookie, payload: asked.append((notify_id, cookie)))
    reply = a.notify("o", b"", 50)
    assert reply.acks == {} and reply.timed_out == ((b.store.client.gid, watch.cookie),)
    b.notify_ack("o", *asked[0], b"too late")
    thread = threading.Thread(target=lambda: (eventually(lambda: len(asked) == 2), b.notify_ack("o", *asked[1], b"x")))
    thread.start()
    reply = a.notify("o", b"", DEADLINE * 1000)
    thread.join()
    assert list(reply.acks.values()) == [b"x"]


def test_a_callback_that_fails_does_not_keep_the_notifier_waiting(
    clients: Clients, caplog: pytest.LogCaptureFixture
) -> None:
    a = clients.io()
    a.write("o", [Create()])

    def callback(*call: object) -> bytes:
        raise ValueError("on purpose")

    a.watch("o", callback)
    assert list(a.notify("o", b"", DEADLINE * 1000).acks.values()) == [b""]
    assert "on purpose" in caplog.text


def test_a_callback_may_use_the_store_but_not_wait_for_a_notify(clients: Clients) -> None:
    a = clients.io()
    a.write("o", [Create()])

    def callback(*call: object) -> bytes:
        a.read("o", [AssertExists()])
        with refused(errno.EDEADLK):
            a.notify("o", b"")
        return b"fine"

    a.watch("o", callback)
    assert list(a.notify("o", b"", DEADLINE * 1000).acks.values()) == [b"fine"]


def test_closing_waits_for_a_running_callback_unless_it_is_the_callback(clients: Clients) -> None:
    a, b = clients.io(), clients.io()
    a.write("o", [Create()])
    inside, go = threading.Event(), threading.Event()

    def callback(*call: object) -> bytes:
        inside.set()
        assert go.wait(DEADLINE)
        return b""

    watch = a.watch("o", callback)
    notifier = threading.Thread(target=lambda: b.notify("o", b"", DEADLINE * 1000))
    notifier.start()
    assert inside.wait(DEADLINE)
    closed = threading.Event()
    closer = threading.Thread(target=lambda: (watch.close(), closed.set()))
    closer.start()
    assert not closed.wait(0.02)
    go.set()
    assert closed.wait(DEADLINE)
    closer.join()
    notifier.join()
    own = a.watch("o", lambda *call: own.close() or b"closed itself")
    assert list(b.notify("o", b"", DEADLINE * 1000).acks.values()) == [b"closed itself"]
    assert b.notify("o", b"").acks == {}
    own.close()
    with refused(errno.ENOTCONN):
        own.check()


def test_removing_the_object_ends_its_watches(clients: Clients) -> None:
    a, b = clients.io(), clients.io()
    a.write("o", [Create()])
    a.write("other", [Create()])
    failures: list[tuple[int, int | None]] = []
    watch = a.watch("o", lambda *call: b"", lambda cookie, error: failures.append((cookie, error.errno)))
    other = a.watch("other", lambda *call: b"", lambda cookie, error: failures.append((cookie, error.errno)))
    assert watch.check() >= 0
    b.write("o", [Remove()])
    eventually(lambda: failures == [(watch.cookie, errno.ENOTCONN)])
    with refused(errno.ENOTCONN):
        watch.check()
    other.check()
    with refused(errno.ENOENT):
        a.watch("o", lambda *call: b"")
    with refused(errno.ENOENT):
        a.notify("o", b"")
    b.write("o", [Create()])
    assert a.read("o", [ListWatchers()])[0] == []


def test_a_blocklisted_client_fails_everywhere_and_its_watches_end(clients: Clients) -> None:
    a, b = clients.io(), clients.io()
    a.write("o", [Create()])
    failures: list[int | None] = []
    watch = a.watch("o", lambda *call: b"", lambda cookie, error: failures.append(error.errno))
    b.store.blocklist_add(a.store.client.address)
    eventually(lambda: failures == [errno.ESHUTDOWN])
    assert b.read("o", [ListWatchers()])[0] == []
    for attempt in (
        lambda: a.read("o", [AssertExists()]),
        lambda: a.write("o", [Create()]),
        lambda: a.notify("o", b""),
        lambda: a.watch("o", lambda *call: b""),
        lambda: a.snap_create(),
        lambda: list(a.objects()),
        lambda: a.store.pool_create("x"),
        lambda: a.store.blocklist_remove(a.store.client.address),
        lambda: a.native_data("rbd_data.x", 22),
        watch.check,
    ):
        with refused(errno.ESHUTDOWN):
            attempt()
    assert a.store.client.address in b.store.blocklist()
    b.store.blocklist_remove(a.store.client.address)
    a.read("o", [AssertExists()])
    with refused(errno.ESHUTDOWN):  # a watch that was lost stays lost
        watch.check()


def test_a_blocklisted_notifier_does_not_wait_for_its_timeout(clients: Clients) -> None:
    a, b = clients.io(), clients.io()
    a.write("o", [Create()])
    b.watch("o", lambda *call: None)
    caught: list[int | None] = []

    def notify() -> None:
        try:
            a.notify("o", b"", 600_000)
        except OSError as error:
            caught.append(error.errno)

    thread = threading.Thread(target=notify)
    thread.start()
    b.store.blocklist_add(a.store.client.address)
    thread.join(DEADLINE)
    assert caught == [errno.ESHUTDOWN]


def test_a_thousand_watches_are_cheap(clients: Clients) -> None:
    a, b = clients.io(), clients.io()
    for i in range(50):
        a.write(f"o{i}", [Create()])
    a.watch("o0", lambda *call: b"").close()  # thread, socket and database exist
    threads = threading.active_count()
    begin = time.process_time()
    watches = [a.watch(f"o{i % 50}", lambda *call: b"") for i in range(1000)]
    took = time.process_time() - begin
    assert threading.active_count() == threads
    assert took < 0.9, f"{took * 1000:.0f} us of CPU per watch"
    assert len(b.notify("o7", b"", DEADLINE * 1000).acks) == 20
    assert len({watch.cookie for watch in watches}) == 1000
    for watch in watches:
        watch.close()


def test_a_store_in_a_long_path(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 120) / ("e" * 120)
    folder.mkdir(parents=True)
    with EmbeddedStore(folder / "store", create=True) as one, EmbeddedStore(folder / "store") as two:
        one.open("rbd").write("o", [Create()])
        two.open("rbd").watch("o", lambda *call: b"far away")
        assert list(one.open("rbd").notify("o", b"").acks.values()) == [b"far away"]


def test_closing_a_store_leaves_nothing_in_run(clients: Clients) -> None:
    a, b = clients.io(), clients.io()
    a.write("o", [Create()])
    a.watch("o", lambda *call: b"")
    b.watch("o", lambda *call: b"")
    a.store.close()
    assert [w.gid for w in b.read("o", [ListWatchers()])[0]] == [b.store.client.gid]
    run = clients.path / "run"
    assert sorted(p.name for p in run.iterdir() if p.suffix in (".lock", ".sock")) == [
        f"{b.store.client.gid}.lock",
        f"{b.store.client.gid}.sock",
    ]
    with refused(errno.ENOTCONN):
        a.read("o", [AssertExists()])
    with refused(errno.ENOTCONN):
        a.notify("o", b"")


def test_closing_the_store_ends_a_notify_that_waits(clients: Clients) -> None:
    a, b = clients.io(), clients.io()
    a.write("o", [Create()])
    asked = threading.Event()
    b.watch("o", lambda *call: asked.set())
    caught: list[int | None] = []

    def notify() -> None:
        try:
            a.notify("o", b"", 600_000)
        except OSError as error:
            caught.append(error.errno)

    thread = threading.Thread(target=notify)
    thread.start()
    assert asked.wait(DEADLINE)
    a.store.close()
    thread.join(DEADLINE)
    assert caught == [errno.ENOTCONN]


# --- hostile datagrams

EXAMPLES: list[Message] = [
    Notify(1 << 32 | 5, 4101, 1, "ns", "rbd_header.abc", (1, 2, 1 << 63), b"payload"),
    Notify(0, 0, -1, "", "", (), b""),
    Ack(1, 2, 3, False, b"x" * 100),
    Ack((1 << 64) - 1, 2, 3, True, b""),
    Lost(),
    Fenced(),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_messages_survive_encoding(message: Message) -> None:
    assert messages.decode(messages.encode(message)) == message


def test_damaged_messages_are_never_more_than_ignored() -> None:
    rng = random.Random(7)
    for message in EXAMPLES:
        good = messages.encode(message)
        for cut in range(len(good)):
            assert messages.decode(good[:cut]) is None
        assert messages.decode(good + b"\0") is None
        for _ in range(300):
            bad = bytearray(good)
            for _ in range(rng.randrange(1, 4)):
                bad[rng.randrange(len(bad))] = rng.randrange(256)
            messages.decode(bytes(bad))  # any value, no exception
    for _ in range(300):
        assert messages.decode(rng.randbytes(rng.randrange(100))) is None


def test_a_client_survives_whatever_is_sent_to_its_socket(clients: Clients) -> None:
    a, b = clients.io(), clients.io()
    a.write("o", [Create()])
    calls: list[bytes] = []
    failures: list[object] = []
    watch = a.watch("o", lambda *call: calls.append(call[3]) or b"ok", lambda *call: failures.append(call))
    path = str(clients.path / "run" / f"{a.store.client.gid}.sock")
    rng = random.Random(3)
    hostile = [rng.randbytes(rng.randrange(2000)) for _ in range(50)]
    for message in (
        Notify(1, 2, 1, "", "other", (watch.cookie,), b"wrong object"),
        Notify(1, 2, 1, "", "o", (watch.cookie + 1, 0, 1 << 63), b"wrong cookie"),
        Notify(1, 2, 2, "", "o", (watch.cookie,), b"wrong pool"),
        Ack(12345, a.store.client.gid, watch.cookie, False, b"no such notify"),
        Lost(),
        Fenced(),
    ):
        hostile.append(messages.encode(message))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.settimeout(DEADLINE)
        for datagram in hostile:
            s.sendto(datagram, path)
        reader, writer = os.pipe()
        s.connect(path)
        socket.send_fds(s, [b"with a descriptor"], [writer])
        os.close(writer)
    assert list(b.notify("o", b"real", DEADLINE * 1000).acks.values()) == [b"ok"]
    assert calls == [b"real"] and failures == []
    assert os.read(reader, 1) == b""  # nobody kept the other end
    os.close(reader)
    watch.check()


def test_a_flood_of_notifies_to_a_slow_client_is_answered_or_times_out(clients: Clients) -> None:
    """The receiver's queue in the kernel holds few datagrams: senders wait for room, and nobody is lost."""
    a, b = clients.io(), clients.io()
    a.write("o", [Create()])
    go = threading.Event()
    b.watch("o", lambda *call: (go.wait(DEADLINE), b"slow")[1])
    replies: list[bytes] = []
    lock = threading.Lock()

    def notify() -> None:
        reply = a.notify("o", bytes(100_000), DEADLINE * 1000)
        with lock:
            replies.extend(reply.acks.values())

    threads = [threading.Thread(target=notify) for _ in range(40)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(2 * DEADLINE)
    assert replies == [b"slow"] * 40

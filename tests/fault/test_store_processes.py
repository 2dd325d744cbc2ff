"""Many processes on one embedded store: creation, racing writers, notifies, death and paralysis of each side."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from librbd_py.store.api import AssertExists, Create, ListWatchers, OmapGetVals, OmapSet, Read, Remove, WriteFull
from librbd_py.store.embedded import EmbeddedStore, check
from tests.fault.store_workers import DEADLINE, Workers, workers

WATCHER = """
store = EmbeddedStore(path)
io = store.open("rbd")
answer = sys.argv[2].encode()
failed = lambda cookie, error: say("error", error.errno)
w = io.watch("o", lambda notify_id, gid, cookie, payload: (say("heard", len(payload)), answer)[1], failed)
say(store.client.gid, w.cookie, store.client.address)
while (line := hear()):
    if line == "close": w.close()
    elif line == "check":
        try: w.check(); say("fine")
        except OSError as e: say("lost", e.errno)
store.close()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def pack(path: Path) -> Iterator[Workers]:
    with workers(path) as made:
        yield made


@pytest.fixture
def store(path: Path) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(path, create=True) as made:
        made.open("rbd").write("o", [Create()])
        yield made


def watching(line: str) -> tuple[int, int]:
    gid, cookie, _ = line.split()
    return int(gid), int(cookie)


def test_many_processes_create_the_same_store_at_once(pack: Workers, path: Path) -> None:
    program = """
say("ready"); hear()
store = EmbeddedStore(path, create=True)
io = store.open("rbd")
io.write(f"o{store.client.gid}", [Create(exclusive=True)])
io.watch(f"o{store.client.gid}", lambda *c: b"")
say(store.fsid, store.client.gid, store.client.address)
hear(); store.close()
"""
    for _ in range(2):
        crowd = [pack.start(program) for _ in range(6)]
        for worker in crowd:
            worker.hear()
        for worker in crowd:
            worker.say("go")
        said = [worker.hear().split() for worker in crowd]
        assert len({fsid for fsid, _, _ in said}) == 1
        assert len({gid for _, gid, _ in said}) == len({address for _, _, address in said}) == 6
        for worker in crowd:
            worker.say("end")
        for worker in crowd:
            worker.finish()
    with EmbeddedStore(path) as store:
        assert len(list(store.open("rbd").objects())) == 12
        assert [pool.name for pool in store.pools()] == ["rbd"]


def test_writers_of_many_processes_lose_no_update(pack: Workers, store: EmbeddedStore) -> None:
    program = """
store = EmbeddedStore(path)
io = store.open("rbd")
say("ready"); hear()
won = 0
for name in range(30):
    try: io.write(f"race{name}", [Create(exclusive=True)]); won += 1
    except FileExistsError: pass
for _ in range(40):
    while True:
        old = io.read("counter", [OmapGetVals()])[0][0][b"n"]
        try:
            io.write("counter", [OmapCmp({b"n": (old, "eq")}), OmapSet({b"n": b"%d" % (int(old) + 1)})])
            break
        except OSError as e:
            if e.errno != errno.ECANCELED: raise
say(won)
store.close()
"""
    # A comparison of keys is ENOENT where there is no object, as on an OSD.
    store.open("rbd").write("counter", [OmapSet({b"n": b"0"})])
    crowd = [pack.start(program) for _ in range(4)]
    for worker in crowd:
        worker.hear()
    for worker in crowd:
        worker.say("go")
    assert sum(int(worker.hear()) for worker in crowd) == 30
    for worker in crowd:
        worker.finish()
    assert store.open("rbd").read("counter", [OmapGetVals()])[0][0] == {b"n": b"160"}


def test_a_notify_reaches_watchers_in_other_processes(pack: Workers, store: EmbeddedStore) -> None:
    io = store.open("rbd")
    crowd = [pack.start(WATCHER, f"answer{i}") for i in range(3)]
    known = {watching(worker.hear()): f"answer{i}".encode() for i, worker in enumerate(crowd)}
    assert {(w.gid, w.cookie) for w in io.read("o", [ListWatchers()])[0]} == set(known)
    reply = io.notify("o", bytes(65536), DEADLINE * 1000)
    assert reply.acks == known and reply.timed_out == ()
    assert [worker.hear() for worker in crowd] == ["heard 65536"] * 3
    crowd[0].say("close")
    crowd[0].say("check")
    assert crowd[0].hear() == f"lost {errno.ENOTCONN}"
    assert len(io.notify("o", b"", DEADLINE * 1000).acks) == 2


def test_a_killed_watcher_is_gone_at_once(pack: Workers, store: EmbeddedStore) -> None:
    io = store.open("rbd")
    first, second = pack.start(WATCHER, "first"), pack.start(WATCHER, "second")
    first.hear()
    left = watching(second.hear())
    first.kill()
    assert [(w.gid, w.cookie) for w in io.read("o", [ListWatchers()])[0]] == [left]
    begin = time.monotonic()
    reply = io.notify("o", b"", DEADLINE * 1000)
    assert reply.acks == {left: b"second"} and reply.timed_out == ()
    assert time.monotonic() - begin < DEADLINE / 2
    assert {p.name for p in Path(store.path, "run").glob("*.lock")} == {f"{left[0]}.lock", f"{store.client.gid}.lock"}


def test_a_watcher_killed_during_a_notify_does_not_keep_it_waiting(pack: Workers, store: EmbeddedStore) -> None:
    program = """
store = EmbeddedStore(path)
w = store.open("rbd").watch("o", lambda *call: os.kill(os.getpid(), signal.SIGKILL))
say("ready"); hear()
"""
    victim = pack.start(program)
    victim.hear()
    begin = time.monotonic()
    reply = store.open("rbd").notify("o", b"", DEADLINE * 1000)
    assert (reply.acks, reply.timed_out) == ({}, ())
    assert time.monotonic() - begin < DEADLINE / 2


def test_a_stopped_watcher_times_out_and_works_again_afterwards(pack: Workers, store: EmbeddedStore) -> None:
    io = store.open("rbd")
    asleep, awake = pack.start(WATCHER, "asleep"), pack.start(WATCHER, "awake")
    silent, loud = watching(asleep.hear()), watching(awake.hear())
    asleep.stop()
    reply = io.notify("o", b"", 100)
    assert reply.acks == {loud: b"awake"} and reply.timed_out == (silent,)
    assert len(io.read("o", [ListWatchers()])[0]) == 2
    asleep.resume()
    reply = io.notify("o", b"x", DEADLINE * 1000)
    assert reply.acks == {loud: b"awake", silent: b"asleep"}
    assert [asleep.hear(), asleep.hear()] == ["heard 0", "heard 1"]  # the first arrived late, its ack is ignored


def test_a_stopped_watcher_does_not_silence_the_others(pack: Workers, store: EmbeddedStore) -> None:
    """Its queue in the kernel fills up, and what lies in there is charged to senders."""
    io = store.open("rbd")
    asleep, awake = pack.start(WATCHER, "asleep"), pack.start(WATCHER, "awake")
    silent, loud = watching(asleep.hear()), watching(awake.hear())
    asleep.stop()
    for _ in range(30):
        reply = io.notify("o", bytes(100_000), 15)
        assert silent in reply.timed_out
    reply = io.notify("o", b"", 500)
    assert reply.acks == {loud: b"awake"} and reply.timed_out == (silent,)
    asleep.kill()
    assert io.notify("o", b"", DEADLINE * 1000).timed_out == ()


def test_a_notifier_that_is_killed_leaves_its_watchers_in_order(pack: Workers, store: EmbeddedStore) -> None:
    io = store.open("rbd")
    heard: list[int] = []
    watch = io.watch("o", lambda notify_id, gid, cookie, payload: heard.append(notify_id))
    notifier = pack.start(
        """
store = EmbeddedStore(path)
say("ready")
store.open("rbd").notify("o", b"x", 600_000)
"""
    )
    notifier.hear()
    end = time.monotonic() + DEADLINE
    while not heard:
        assert time.monotonic() < end
        time.sleep(0.002)
    notifier.kill()
    io.notify_ack("o", heard[0], watch.cookie, b"to nobody")
    watch.close()
    io.watch("o", lambda *call: b"fine")
    assert list(io.notify("o", b"", DEADLINE * 1000).acks.values()) == [b"fine"]


def test_blocklisting_kills_the_process_of_a_client(pack: Workers, store: EmbeddedStore) -> None:
    victim, other = pack.start(WATCHER, "victim"), pack.start(WATCHER, "other")
    gid, _, address = victim.hear().split()
    left = watching(other.hear())
    store.blocklist_add(address)
    assert not store.alive(int(gid))  # on return, and not some time later
    assert victim.process.wait(DEADLINE) == -signal.SIGKILL
    assert store.open("rbd").notify("o", b"", DEADLINE * 1000).acks == {left: b"other"}
    assert address in store.blocklist()
    store.blocklist_add(address)  # of the dead it only says so


def test_removing_an_object_reaches_a_watcher_in_another_process(pack: Workers, store: EmbeddedStore) -> None:
    watcher = pack.start(WATCHER, "watcher")
    watcher.hear()
    store.open("rbd").write("o", [Remove()])
    assert watcher.hear() == f"error {errno.ENOTCONN}"


def test_the_child_of_a_fork_is_refused_and_does_not_keep_its_parent_alive(pack: Workers, store: EmbeddedStore) -> None:
    program = """
store = EmbeddedStore(path)
io = store.open("rbd")
w = io.watch("o", lambda *call: b"")
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    for attempt in (lambda: io.read("o", [AssertExists()]), lambda: io.write("o", [Create()]), w.check,
                    lambda: io.notify("o", b""), store.pools, lambda: io.native_data("rbd_data.x", 22)):
        try: attempt(); say("worked")
        except OSError as e: assert e.errno == errno.EBADFD and "fork" in str(e), e
    store.close()
    own = EmbeddedStore(path)
    own.open("rbd").write("from the child", [Create()])
    own.close()
    say("child", os.getpid())
    os.close(writer)
    os.read(reader, 1)  # lives as long as the test wants
    os._exit(0)
io.write("from the parent", [Create()])
say("parent", os.getpid())
hear()
os.kill(os.getpid(), signal.SIGKILL)
"""
    io = store.open("rbd")
    parent = pack.start(program)
    said = dict(parent.hear().split() for _ in range(2))
    child = said["child"]
    try:
        assert len(io.read("o", [ListWatchers()])[0]) == 1
        assert len(io.notify("o", b"", DEADLINE * 1000).acks) == 1
        parent.kill()
        os.kill(int(child), 0)  # it is still there
        assert io.read("o", [ListWatchers()])[0] == []
    finally:
        os.kill(int(child), 9)
    assert {"from the parent", "from the child"} <= set(io.objects())


def test_removing_an_image_under_a_process_that_uses_its_data(pack: Workers, store: EmbeddedStore) -> None:
    """Its writes go to files that have no name any more, and to nobody else's."""
    program = """
from librbd_py.native import ffi, lib
store = EmbeddedStore(path)
io = store.open("rbd")
data = io.native_data("rbd_data.abc", 16)
say(lib.rbdn_obj_write(data.handle, 1, 0, b"before", 6, 0, ffi.NULL, 0)); hear()
say(lib.rbdn_obj_write(data.handle, 1, 0, b"after!", 6, 0, ffi.NULL, 0), lib.rbdn_store_flush(data.handle)); hear()
data.close(); store.close()
"""
    io = store.open("rbd")
    io.native_data("rbd_data.abc", 16).close()
    io.write("rbd_header.abc", [Create()])
    user = pack.start(program)
    assert user.hear() == "0"
    io.write("rbd_header.abc", [Remove()])
    assert list(Path(store.path, "data").iterdir()) == []
    io.native_data("rbd_data.abc", 16).close()
    io.write("rbd_header.abc", [Create()])
    user.say("write")
    assert user.hear() == "0 0"
    with pytest.raises(FileNotFoundError):
        io.read(f"rbd_data.abc.{1:016x}", [AssertExists()])
    user.say("end")
    user.finish()


def test_two_processes_write_one_image_through_operations(pack: Workers, store: EmbeddedStore) -> None:
    io = store.open("rbd")
    io.native_data("rbd_data.abc", 16).close()
    program = """
store = EmbeddedStore(path)
io = store.open("rbd")
me = int(sys.argv[2])
for i in range(60):
    io.write(f"rbd_data.abc.{2 * i + me:016x}", [Write(0, b"%d" % me * 100)])
    io.write(f"rbd_data.abc.{1000:016x}", [Append(b"x")])
store.close()
"""
    crowd = [pack.start(program, str(i)) for i in range(2)]
    for worker in crowd:
        worker.finish()
    for number in range(120):
        assert io.read(f"rbd_data.abc.{number:016x}", [Read()]) == [b"%d" % (number % 2) * 100]
    assert io.read(f"rbd_data.abc.{1000:016x}", [Read()]) == [b"x" * 120]


def test_a_process_that_holds_the_write_lock_and_stops_only_delays(pack: Workers, store: EmbeddedStore) -> None:
    program = """
store = EmbeddedStore(path)
with store.db.write() as c:
    c.execute("UPDATE counters SET value=value+1 WHERE name='version'")
    say("holding"); hear()
say("done"); hear()
"""
    holder = pack.start(program)
    holder.hear()
    holder.stop()
    io = store.open("rbd")
    assert io.read("o", [Read()]) == [b""]  # readers do not wait
    writer = pack.start('store = EmbeddedStore(path); store.open("rbd").write("late", [Create()]); store.close()')
    holder.say("go on")
    holder.resume()
    assert holder.hear() == "done"
    writer.finish()
    io.write("o", [OmapSet({b"k": b"v"})])


def test_the_check_refuses_a_store_in_use_and_then_finds_nothing(pack: Workers, path: Path) -> None:
    with EmbeddedStore(path, create=True) as store:
        store.open("rbd").write("o", [WriteFull(b"x")])
    user = pack.start(WATCHER, "x")
    user.hear()
    with pytest.raises(OSError) as caught:
        check.check(path)
    assert caught.value.errno == errno.EBUSY
    user.kill()
    assert check.check(path) == []

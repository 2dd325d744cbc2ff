"""Clients of the embedded store that stand still: who waits long enough may take their place, and then they are killed;
who is merely slow is left alone, and who cannot be killed is not fenced at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from librbd_py.store.api import Create, ListWatchers, ObjectContext, Read, WriteFull
from librbd_py.store.embedded import EmbeddedStore, life
from librbd_py.store.embedded.client import SURE_SECONDS
from librbd_py.store.embedded.store import WATCH_VARIABLE
from tests.fault.store_workers import DEADLINE, Worker, Workers, workers

WATCH_SECONDS = 1
SILENT_SECONDS = WATCH_SECONDS + 2 * life.BEAT

WATCHER = """
store = EmbeddedStore(path)
failed = lambda cookie, error: say("error", error.errno)
w = store.open("rbd").watch("o", lambda *call: b"", failed)
say(store.client.gid, w.cookie, store.client.address)
while (line := hear()):
    if line == "again":
        w = store.open("rbd").watch("o", lambda *call: b"", failed)
        say(w.cookie)
store.close()
"""
LIAR = """
from librbd_py.store.embedded import life
me = life.this_process()
life.this_process = lambda: life.Identity(int(sys.argv[2]), me.started + 1, me.pid_namespace, me.time_namespace)
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedStore]:
    monkeypatch.setenv(WATCH_VARIABLE, str(WATCH_SECONDS))
    with EmbeddedStore(tmp_path / "store", create=True) as made:
        made.open("rbd").write("o", [Create()])
        yield made


@pytest.fixture
def pack(store: EmbeddedStore) -> Iterator[Workers]:
    with workers(Path(store.path)) as made:
        yield made


@pytest.fixture
def io(store: EmbeddedStore) -> ObjectContext:
    return store.open("rbd")


def watchers(io: ObjectContext) -> list[int]:
    """Their cookies."""
    return [row.cookie for row in io.read("o", [ListWatchers()])[0]]


def silent(store: EmbeddedStore, gid: int) -> float:
    silence = store.silence(gid)
    assert silence is not None
    return silence


def stand_still(store: EmbeddedStore, worker: Worker, gid: int) -> None:
    """Until others have waited for it long enough."""
    worker.stop()
    end = time.monotonic() + DEADLINE
    while silent(store, gid) <= SILENT_SECONDS:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_who_stands_still_loses_its_watch_and_notices(store: EmbeddedStore, io: ObjectContext, pack: Workers) -> None:
    one, two = pack.start(WATCHER), pack.start(WATCHER)
    gid, cookie, _ = one.hear().split()
    other = int(two.hear().split()[1])
    stand_still(store, one, int(gid))
    assert store.alive(int(gid))  # so the files of its images are still its own
    assert watchers(io) == [other]
    assert io.notify("o", b"", DEADLINE * 1000).timed_out == ()  # nobody waits for it any more
    assert not store.blocklist()
    one.resume()
    assert one.hear() == f"error {errno.ENOTCONN}"
    one.say("again")
    again = int(one.hear())
    assert again != int(cookie)
    assert sorted(watchers(io)) == sorted([again, other])


def test_a_pause_shorter_than_the_watch_is_nothing(store: EmbeddedStore, io: ObjectContext, pack: Workers) -> None:
    slow = pack.start(WATCHER)
    gid, cookie, _ = slow.hear().split()
    for _ in range(2):
        slow.stop()
        time.sleep(WATCH_SECONDS)  # the pause itself
        assert watchers(io) == [int(cookie)]
        slow.resume()
        end = time.monotonic() + DEADLINE
        while silent(store, int(gid)) > life.BEAT:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert watchers(io) == [int(cookie)]


def test_when_everybody_stood_still_nobody_is_dead(store: EmbeddedStore, io: ObjectContext, pack: Workers) -> None:
    """After a pause of the whole machine the first to run sees the others silent, and must give them a moment."""
    one = pack.start(WATCHER)
    gid, cookie, _ = one.hear().split()
    stand_still(store, one, int(gid))
    timer = threading.Timer(SURE_SECONDS / 4, one.resume)
    timer.start()
    assert watchers(io) == [int(cookie)]
    timer.join()
    assert io.notify("o", b"", DEADLINE * 1000).timed_out == ()


def test_a_zombie_is_killed_and_writes_nothing_more(store: EmbeddedStore, io: ObjectContext, pack: Workers) -> None:
    """One that stands still between any check and the write behind it."""
    program = """
store = EmbeddedStore(path)
io = store.open("rbd")
w = io.watch("o", lambda *call: b"")
data = io.native_data("rbd_data.abc", 22)
from librbd_py.native import ffi, lib
data.own(5)
write = lambda: lib.rbdn_obj_write(data.handle, 0, 0, b"zombie", 6, 0, ffi.NULL, 0)
assert write() == 0
say(store.client.gid, store.client.address)
while write() == 0: pass
"""
    io.native_data("rbd_data.abc", 22).close()
    zombie = pack.start(program)
    gid, address = zombie.hear().split()
    stand_still(store, zombie, int(gid))
    mine = io.native_data("rbd_data.abc", 22)
    with pytest.raises(TimeoutError):
        mine.own(0.05)
    store.blocklist_add(address)
    mine.own(5)
    name = f"rbd_data.abc.{0:016x}"
    assert io.read(name, [Read()]) == [b"zombie"]
    io.write(name, [WriteFull(b"after")])
    zombie.resume()
    assert zombie.process.wait(DEADLINE) == -signal.SIGKILL
    assert io.read(name, [Read()]) == [b"after"]
    mine.disown()
    mine.close()


def test_who_cannot_be_killed_is_not_fenced(store: EmbeddedStore, io: ObjectContext) -> None:
    program = "import sys\nfrom librbd_py.store.embedded import EmbeddedStore\nstore = EmbeddedStore(sys.argv[1])\n"
    program += "store.open('rbd').watch('o', lambda *call: b'')\n"
    program += "print(store.client.address, flush=True); sys.stdin.read()\n"
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", program, store.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as contained:
        assert contained.stdout is not None
        address = contained.stdout.readline().strip()
        with pytest.raises(PermissionError, match="another PID namespace"):
            store.blocklist_add(address)
        assert contained.poll() is None and len(watchers(io)) == 1
        assert not store.blocklist()
        contained.kill()
    end = time.monotonic() + DEADLINE
    while watchers(io):
        assert time.monotonic() < end
    store.blocklist_add(address)
    assert list(store.blocklist()) == [address]


@pytest.mark.parametrize("there", [True, False], ids=["somebody else's", "nobody's"])
def test_a_number_that_was_given_again_hits_nobody(store: EmbeddedStore, pack: Workers, there: bool) -> None:
    innocent = subprocess.Popen(["sleep", "60"])
    try:
        if not there:
            innocent.kill()
            innocent.wait()
        worker = pack.start(LIAR + WATCHER, str(innocent.pid))
        address = worker.hear().split()[2]
        with pytest.raises(PermissionError, match="is gone, but not the lock"):
            store.blocklist_add(address)
        assert worker.process.poll() is None and not store.blocklist()
        assert not there or innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_a_client_of_an_older_program_is_alive_and_not_fenced(store: EmbeddedStore) -> None:
    """It locks its whole file and says nothing."""
    name = Path(store.path, "run", "4999.lock")
    fd = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        life.lock_byte(fd, 0, 0)
        assert store.alive(4999) and store.silence(4999) is None
        with pytest.raises(PermissionError, match="does not say"):
            store.blocklist_add("127.0.0.1:0/4999")
    finally:
        os.close(fd)
    assert not store.alive(4999)


def test_signs_of_life_cost_nothing_to_speak_of(store: EmbeddedStore, io: ObjectContext) -> None:
    watch = io.watch("o", lambda *call: b"")
    mine = life.Life(os.open(Path(store.path, "run", "5000.lock"), os.O_RDWR | os.O_CREAT, 0o600))
    begin = time.process_time()
    for _ in range(1000):
        mine.beat()
    assert time.process_time() - begin < 0.2  # 200 us each, one a second
    mine.drop()
    watch.close()

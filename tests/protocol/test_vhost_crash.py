"""vhost-user-blk when the serving process is killed: the front end keeps memory and in-flight table, connects to the
next process, and every request completes once, in the order it was made.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vhost_frontend import F_LOG_ALL, OK, PAGE, SET_LOG_BASE, T_FLUSH, T_IN, T_OUT, Frontend, Memory, Queue
from vhost_server import ROOT, Server, fake_server, real_server, wait_until

NUM = 128


class Pair:
    """A server that can be killed and a front end that survives it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.memory = Memory()
        self.queues = [Queue(self.memory, NUM) for _ in range(2)]
        self.inflight: tuple[int, bytes] | None = None
        self.server = self.start()
        self.front = self.connect()

    def start(self) -> Server:
        return fake_server(self.folder, str(self.folder / "data"))

    def connect(self) -> Frontend:
        front = Frontend(self.server.path)
        front.negotiate()
        front.inflight = self.inflight
        if not front.inflight:
            front.get_inflight(2, NUM)
            self.inflight = front.inflight
        front.set_inflight()
        front.set_features()
        front.set_memory(self.memory)
        for n, queue in enumerate(self.queues):
            front.start(n, queue, base=queue.used_idx())  # as QEMU does
        return front

    def kill(self) -> None:
        self.server.kill()
        self.front.sock.close()

    def again(self) -> None:
        self.server = self.start()
        self.front = self.connect()

    def offer(self, sector: int, data: bytes, queue: int = 0) -> int:
        head, _, _ = self.front.build(T_OUT, sector, data, queue=queue)
        self.queues[queue].offer(head)
        self.queues[queue].kick_now()
        return head

    def table(self, queue: int = 0) -> tuple[int, int, dict[int, tuple[int, int]]]:
        """(last_batch_head, used_idx, {head in flight: (counter, next)}) of a queue."""
        assert self.inflight
        size = -(-(16 + 16 * NUM) // 64) * 64
        raw = os.pread(self.inflight[0], size, queue * size)
        _, version, num, last, used = struct.unpack_from("<QHHHH", raw)
        assert (version, num) == (1, NUM)
        entries = [struct.unpack_from("<B5xHQ", raw, 16 + 16 * n) for n in range(NUM)]
        return last, used, {n: (counter, following) for n, (busy, following, counter) in enumerate(entries) if busy}

    def poke(self, offset: int, data: bytes, queue: int = 0) -> None:
        assert self.inflight
        size = -(-(16 + 16 * NUM) // 64) * 64
        os.pwrite(self.inflight[0], data, queue * size + offset)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.front.close()
    pair.queues[1].close() if pair.queues[1] not in pair.front.queues else None
    if pair.server.process.returncode is None:
        pair.server.close()


def test_requests_in_flight_are_done_again_those_completed_are_not(pair: Pair) -> None:
    q = pair.queues[0]
    pair.server.ok(f"hold 0 {512 * 8}")  # sectors 0..7 wait, the others overtake them
    waiting = {pair.offer(sector, bytes([sector]) * 512): sector for sector in range(8)}
    pair.server.ok(f"hold 0 {512 * 8}")
    overtaking = {pair.offer(sector, bytes([sector]) * 512) for sector in range(8, 16)}
    assert {head for head, _ in q.wait(8)} == overtaking
    _, used, busy = pair.table()
    assert (used, set(busy)) == (8, set(waiting))
    pair.kill()
    pair.again()
    assert {head for head, _ in q.wait(8)} == set(waiting)
    stats = pair.server.stats()
    assert (stats.resubmitted, stats.submitted) == (8, 8)
    assert pair.table()[1:] == (16, {})
    for sector in range(16):
        assert pair.front.read(sector, 512) == bytes([sector]) * 512
    assert pair.front.stop(0) == 32


def test_order_of_requests_is_kept(pair: Pair) -> None:
    """Writes of one sector, whose heads do not follow their order."""
    q = pair.queues[0]
    random.Random(5).shuffle(q.free)
    pair.server.ok("hold 0 512")
    for n in range(20):
        pair.offer(0, struct.pack("<I", n) * 128)
    wait_until(lambda: pair.server.stats().submitted == 20, "submitted")
    pair.kill()
    pair.again()
    q.wait(20)
    assert pair.front.read(0, 512) == struct.pack("<I", 19) * 128


def test_requests_offered_while_nobody_served(pair: Pair) -> None:
    q = pair.queues[0]
    pair.server.ok("hold 0 512")
    first = pair.offer(0, b"1" * 512)
    wait_until(lambda: pair.server.stats().submitted == 1, "submitted")
    pair.kill()
    second = pair.offer(0, b"2" * 512)
    pair.again()
    assert [head for head, _ in q.wait(2)] == [first, second]
    assert pair.front.read(0, 512) == b"2" * 512
    assert pair.server.stats().resubmitted == 1


@pytest.mark.parametrize("cleared", [0, 1, 3])
def test_killed_between_the_used_index_and_the_marks(pair: Pair, cleared: int) -> None:
    """The last batch was published but (in part) still marked: it must not be done again."""
    q = pair.queues[0]
    pair.server.ok("hold 0 512")
    slow = pair.offer(0, b"s" * 512)
    heads = [pair.offer(sector, b"f" * 512) for sector in (8, 16, 24)]
    q.wait(3)
    pair.kill()
    last, used, busy = pair.table()
    assert (used, set(busy)) == (3, {slow})
    # take back what comes after the index: used_idx, and the marks of the batch from its end
    pair.poke(14, struct.pack("<H", 0))
    head = last
    for n, _ in enumerate(heads):
        if n >= cleared:
            pair.poke(16 + 16 * head, b"\1")
        head = struct.unpack("<H", os.pread(pair.inflight[0], 2, 16 + 16 * head + 6))[0] if pair.inflight else 0
    pair.again()
    assert q.wait() == [(slow, 1)]
    assert pair.server.stats().resubmitted == 1


def test_killed_before_the_used_index(pair: Pair) -> None:
    """Linked into a batch that was never published: done again."""
    q = pair.queues[0]
    pair.server.ok("hold 0 512")
    heads = [pair.offer(0, bytes([n]) * 512) for n in range(3)]
    wait_until(lambda: pair.server.stats().submitted == 3, "submitted")
    pair.kill()
    pair.poke(16 + 16 * heads[2] + 6, struct.pack("<H", heads[1]))
    pair.poke(12, struct.pack("<H", heads[2]))
    pair.again()
    assert [head for head, _ in q.wait(3)] == heads
    assert pair.front.read(0, 512) == bytes([2]) * 512


def test_clean_stop_leaves_nothing_in_flight(pair: Pair) -> None:
    for n in range(5):
        assert pair.front.write(n, bytes([n]) * 512) == OK
    assert pair.front.stop(0) == 5
    assert pair.table()[1:] == (5, {})
    pair.kill()
    pair.queues[0].signalled()
    pair.again()
    assert pair.queues[0].signalled()  # the one for the last entries may have died with the process
    assert pair.front.read(3, 512) == bytes([3]) * 512
    assert pair.server.stats().resubmitted == 0


def test_front_end_that_reconnects_to_the_living_process(pair: Pair) -> None:
    """The old connection's requests end first, and those not seen by the guest are done again."""
    q = pair.queues[0]
    pair.server.ok("hold 0 512")
    head = pair.offer(0, b"r" * 512)
    wait_until(lambda: pair.server.stats().submitted == 1, "submitted")
    pair.front.sock.close()
    pair.front = pair.connect()
    pair.queues[1].offer(pair.front.build(T_FLUSH, queue=1)[0])
    pair.queues[1].kick_now()
    with pytest.raises(TimeoutError):
        pair.queues[1].wait(timeout=0.05)
    assert pair.server.stats().submitted == 1
    pair.server.ok("hold 0 0")
    assert q.wait() == [(head, 1)]
    pair.queues[1].wait()
    assert pair.front.read(0, 512) == b"r" * 512
    assert pair.server.stats().resubmitted == 1


def test_request_done_again_is_logged_if_logging_began_meanwhile(pair: Pair) -> None:
    pair.server.ok("hold 0 512")
    q = pair.queues[0]
    head, at, _ = pair.front.build(T_IN, 0, want=512)
    q.offer(head)
    q.kick_now()
    wait_until(lambda: pair.server.stats().submitted == 1, "submitted")
    pair.kill()
    pair.server = pair.start()
    pair.server.ok("hold 0 512")
    pair.front = pair.connect()
    log = os.memfd_create("log")
    os.ftruncate(log, 4096)
    pair.front.ask(SET_LOG_BASE, struct.pack("<QQ", 4096, 0), [log])
    pair.front.set_features(1 << F_LOG_ALL)
    assert not any(os.pread(log, 4096, 0))
    pair.server.ok("hold 0 0")
    q.wait()
    assert os.pread(log, 1, at // PAGE // 8)[0] >> at // PAGE % 8 & 1
    os.close(log)


def vufe() -> Path:
    source, target = ROOT / "native/bench/vufe.c", ROOT / "build/native/vufe"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", str(source), "-o", str(temporary)], check=True)
        temporary.rename(target)
    return target


def run_vufe(server: Server, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen([vufe(), server.path, *options], stdout=subprocess.PIPE, text=True)


def result_of(process: subprocess.Popen[str]) -> dict[str, float]:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    result: dict[str, float] = json.loads(out)
    return result


@pytest.mark.parametrize("kind", ["memory", "engine"])
def test_killed_again_and_again_under_load_nothing_is_lost(tmp_path: Path, kind: str) -> None:
    start: Callable[[], Server]
    if kind == "memory":
        start = lambda: fake_server(tmp_path, str(tmp_path / "data"), "async", size=16 << 20)  # noqa: E731
    else:
        start = lambda: real_server(tmp_path, str(tmp_path / "store"), size=16 << 20)  # noqa: E731
    kills = 6
    server = start()
    seed = random.Random(kind)
    load = run_vufe(server, "mode=verify", "seconds=4", "qd=32", "queues=3", "wait=event", "reconnect=1", "warmup=0")
    try:
        for _ in range(kills):
            time.sleep(0.1 + seed.random() * 0.3)  # the moment of the kill is what varies
            server.kill()
            server = start()
        result = result_of(load)
    finally:
        with contextlib.suppress(ProcessLookupError):
            load.kill()
        load.wait()
        if load.stdout:
            load.stdout.close()
    server.close()
    assert result["mismatches"] == result["errors"] == 0
    assert result["reconnects"] == kills
    assert result["ios"] > 1000


def test_load_generator_notices_lies(tmp_path: Path) -> None:
    """The verifier is worth something only if it fails when data is wrong: the null store forgets what is written."""
    server = real_server(tmp_path, "null")
    load = run_vufe(server, "mode=verify", "seconds=0.2", "span=1048576")
    out, _ = load.communicate(timeout=60)
    assert load.returncode == 1
    assert json.loads(out)["mismatches"] > 0
    server.close()

"""vhost-user-blk while a guest is migrated: what a back end leaves behind that dies before the guest has moved.

QEMU 7.2 moves a guest without its back end. It forgets the in-flight table then, and reads no more of the dirty log.
"""

from __future__ import annotations

import os
import struct

import pytest
from test_vhost_migration import Log, arrived, begin
from vhost_frontend import F_LOG_ALL, PAGE, SET_LOG_BASE, T_IN, T_OUT, Frontend, Memory, Queue, frontend
from vhost_server import Server, fake_server, wait_until

MEANWHILE = 0.1  # seconds in which nothing may happen
HOLD, LET_GO = "hold 0 4096", "hold 0 0"  # requests to the first 8 sectors wait; they go on, the last one first


def offer(front: Frontend, kind: int, sector: int, data: bytes = b"", want: int = 0) -> int:
    head, _, _ = front.build(kind, sector, data, want)
    front.queues[0].offer(head)
    front.queues[0].kick_now()
    return head


def submitted(vhost: Server, count: int) -> None:
    wait_until(lambda: vhost.stats().submitted == count, f"{count} submitted")


@pytest.mark.parametrize("vhost", [(), ("async",)], indirect=True, ids=["inline", "other threads"])
def test_requests_are_used_in_their_order_while_writes_are_logged(vhost: Server) -> None:
    log = Log()
    with frontend(vhost.path) as front:
        queue = front.queues[0]
        begin(front, log)
        vhost.ok(HOLD)
        heads = [offer(front, T_OUT, 0, b"w" * 512), offer(front, T_IN, 8, want=512)]
        heads += [offer(front, T_IN, 16, want=512), offer(front, T_OUT, 1, b"x" * 512)]
        submitted(vhost, 4)
        with pytest.raises(TimeoutError):
            queue.wait(1, MEANWHILE)
        vhost.ok(LET_GO)
        assert [head for head, _ in queue.wait(4)] == heads
        assert front.read(0, 512) == b"w" * 512
    log.close()


def test_without_a_log_nobody_waits(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        queue = front.queues[0]
        vhost.ok(HOLD)
        write, read = offer(front, T_OUT, 0, b"w" * 512), offer(front, T_IN, 8, want=512)
        assert queue.wait(1)[0][0] == read
        vhost.ok(LET_GO)
        assert queue.wait(1)[0][0] == write


def test_order_begins_and_ends_with_requests_under_way(vhost: Server) -> None:
    log = Log()
    with frontend(vhost.path) as front:
        queue = front.queues[0]
        vhost.ok(HOLD)
        first, second = offer(front, T_OUT, 0, b"1" * 512), offer(front, T_OUT, 1, b"2" * 512)
        submitted(vhost, 2)
        begin(front, log)
        reads = [offer(front, T_IN, 8, want=512), offer(front, T_IN, 16, want=512)]
        submitted(vhost, 4)
        with pytest.raises(TimeoutError):
            queue.wait(1, MEANWHILE)
        front.set_features()  # the migration was given up: what is done is shown, behind the writes that are not
        assert [head for head, _ in queue.wait(2)] == reads
        begin(front, log)
        last = offer(front, T_IN, 24, want=512)
        vhost.ok(LET_GO)
        assert [head for head, _ in queue.wait(3)] == [first, second, last]
        assert front.read(1, 512) == b"2" * 512
    log.close()


def test_who_begins_at_the_used_index_misses_nothing(vhost: Server) -> None:
    """As QEMU starts the next host's back end when it has lost ours: no table, the used index of the ring."""
    log, memory = Log(), Memory()
    with frontend(vhost.path, memory=memory) as source:
        queue = source.queues[0]
        begin(source, log)
        vhost.ok(HOLD)
        done = offer(source, T_IN, 24, want=512)
        assert queue.wait(1)[0][0] == done
        write, read = offer(source, T_OUT, 3, b"3" * 512), offer(source, T_IN, 8, want=512)
        submitted(vhost, 3)
        source.sock.close()
        vhost.ok(LET_GO)
        target = arrived(vhost, memory, queue)
        target.start(0, queue, base=queue.used_idx())
        assert sorted(head for head, _ in queue.wait(2)) == sorted((write, read))
        assert target.read(3, 512) == b"3" * 512
        target.sock.close()
        assert target.inflight
        os.close(target.inflight[0])
    log.close()


def test_rings_that_ran_before_their_log_came_mark_everything(vhost: Server) -> None:
    """QEMU 7.2 when its back end was restarted in the middle of a migration: SET_FEATURES, rings, SET_LOG_BASE."""
    memory, log = Memory(4 << 20, guest=PAGE * 3), Log()
    front = Frontend(vhost.path)
    try:
        front.negotiate()
        front.get_inflight(1, 128)
        front.set_inflight()
        front.set_features(1 << F_LOG_ALL)
        front.set_memory(memory)
        queue = Queue(memory)
        front.start(0, queue)
        front.read(0, 512)
        log.give(front)
        everything = set(range(3, 3 + (4 << 20) // PAGE))
        assert log.pages() == everything
        front.set_addr(0, queue, flags=1, log=queue.used)
        front.read(0, 512)
        assert log.pages() < everything
        log.give(front)  # it only grows: nothing was missed
        assert len(log.pages()) < 8
    finally:
        front.close()
    log.close()


def test_what_is_not_shown_is_done_again_by_the_next_back_end(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Killed with a read that is done and waits behind a write that is not."""
    first = fake_server(tmp_path_factory.mktemp("first"))
    log, memory = Log(), Memory()
    with frontend(first.path, memory=memory) as front:
        queue, table = front.queues[0], front.inflight
        begin(front, log)
        first.ok(HOLD)
        write, read = offer(front, T_OUT, 3, b"3" * 512), offer(front, T_IN, 8, want=512)
        submitted(first, 2)
        first.kill()
        second = fake_server(tmp_path_factory.mktemp("second"))
        again = Frontend(second.path)
        again.negotiate()
        again.inflight = table
        again.set_inflight()
        again.set_features(1 << F_LOG_ALL)
        again.set_memory(memory)
        again.start(0, queue, base=queue.used_idx())
        again.ask(SET_LOG_BASE, struct.pack("<QQ", log.size, 0), [log.fd])
        assert [head for head, _ in queue.wait(2)] == [write, read]
        assert second.stats().resubmitted == 2
        again.sock.close()
        second.close()
    log.close()

"""vhost-user-blk and the dirty log of a live migration: every page we wrote to is marked, and none other."""

from __future__ import annotations

import os
import struct

import pytest
from vhost_frontend import (
    F_EVENT_IDX,
    F_LOG_ALL,
    OK,
    PAGE,
    SET_LOG_BASE,
    SET_LOG_FD,
    T_GET_ID,
    T_IN,
    T_OUT,
    Frontend,
    Memory,
    Queue,
    frontend,
)
from vhost_server import Server, wait_until

LOG = 4096


class Log:
    """The log as QEMU keeps it: a memfd with a bit per page, read and cleared."""

    def __init__(self, size: int = LOG) -> None:
        self.size = size
        self.fd = os.memfd_create("log")
        os.ftruncate(self.fd, size)

    def pages(self) -> set[int]:
        """Pages marked since the last call."""
        raw = os.pread(self.fd, self.size, 0)
        os.pwrite(self.fd, bytes(self.size), 0)
        return {n * 8 + bit for n, byte in enumerate(raw) for bit in range(8) if byte >> bit & 1}

    def give(self, front: Frontend) -> None:
        front.ask(SET_LOG_BASE, struct.pack("<QQ", self.size, 0), [self.fd])

    def close(self) -> None:
        os.close(self.fd)


def begin(front: Frontend, log: Log) -> None:
    log.give(front)
    front.set_features(1 << F_LOG_ALL)
    for n, queue in enumerate(front.queues):
        front.set_addr(n, queue, flags=1, log=queue.used)


def page_of(address: int) -> int:
    return address // PAGE


def used_pages(queue: Queue) -> set[int]:
    """Pages of the used ring: what is written there is nobody's data."""
    return set(range(page_of(queue.used), page_of(queue.used + 6 + 8 * queue.num - 1) + 1))


@pytest.mark.parametrize("vhost", [(), ("async",)], indirect=True, ids=["inline", "other threads"])
@pytest.mark.parametrize("drop", [0, 1 << F_EVENT_IDX])
def test_pages_written_are_marked_and_none_other(vhost: Server, drop: int) -> None:
    log = Log()
    with frontend(vhost.path, queues=2, drop=drop, memory=Memory(16 << 20)) as front:
        memory = front.queues[0].memory
        begin(front, log)
        log.pages()
        for number, queue in enumerate(front.queues):
            memory.next = -(-memory.next // PAGE) * PAGE
            header, status = memory.alloc(PAGE, PAGE), memory.alloc(PAGE, PAGE) + 100
            data = memory.alloc(8 * PAGE, PAGE)
            memory.write(header, struct.pack("<IIQ", T_IN, 0, 0))
            # 1.5 pages in the middle of two, one byte over a boundary, the last bytes of a page
            pieces = [(data + 2048, 6144, 2), (data + 4 * PAGE - 1, 2, 2), (data + 7 * PAGE - 510, 510, 2)]
            queue.offer(queue.add([(header, 16, 0), *pieces, (status, 1, 2)]))
            queue.kick_now()
            queue.wait()
            assert memory.read(status, 1) == b"\0"
            base = page_of(data)
            expected = {base, base + 1, base + 3, base + 4, base + 6, page_of(status)}
            marked = log.pages()
            rings = used_pages(front.queues[0]) | used_pages(front.queues[1])
            assert marked - rings == expected, number
            assert page_of(queue.used) in marked
        assert vhost.stats().dirty_pages > 0
    log.close()


def test_write_marks_only_its_status(vhost: Server) -> None:
    log = Log()
    with frontend(vhost.path) as front:
        queue = front.queues[0]
        begin(front, log)
        memory = queue.memory
        header, status, data = memory.alloc(PAGE, PAGE), memory.alloc(PAGE, PAGE), memory.alloc(8192, PAGE)
        memory.write(header, struct.pack("<IIQ", T_OUT, 0, 0))
        log.pages()
        queue.offer(queue.add([(header, 16, 0), (data, 8192, 0), (status, 1, 2)]))
        queue.kick_now()
        queue.wait()
        assert log.pages() - used_pages(queue) == {page_of(status)}
    log.close()


def test_identity_is_marked(vhost: Server) -> None:
    log = Log()
    with frontend(vhost.path) as front:
        queue = front.queues[0]
        begin(front, log)
        queue.memory.alloc(PAGE, PAGE)
        at = queue.memory.alloc(PAGE, PAGE)
        header, status = queue.memory.alloc(16), queue.memory.alloc(1, 1)
        queue.memory.write(header, struct.pack("<IIQ", T_GET_ID, 0, 0))
        log.pages()
        queue.offer(queue.add([(header, 16, 0), (at, 20, 2), (status, 1, 2)]))
        queue.kick_now()
        queue.wait()
        assert page_of(at) in log.pages()
    log.close()


def test_used_ring_is_marked_at_the_address_given_and_only_if_asked_for(vhost: Server) -> None:
    log = Log()
    with frontend(vhost.path) as front:
        queue = front.queues[0]
        log.give(front)
        front.set_features(1 << F_LOG_ALL)
        assert front.write(0, bytes(512)) == OK
        marked = log.pages()
        there = (3 << 20) + PAGE - 4  # the index ends one page, the entries begin the next
        front.set_addr(0, queue, flags=1, log=there)
        assert front.write(0, bytes(512)) == OK
        assert log.pages() - marked == {page_of(there), page_of(there) + 1}
        front.set_addr(0, queue, flags=0, log=there)
        log.pages()
        assert front.write(0, bytes(512)) == OK
        assert log.pages() <= marked
    log.close()


def test_logging_ends_with_the_feature(vhost: Server) -> None:
    log = Log()
    with frontend(vhost.path) as front:
        begin(front, log)
        front.read(0, 512)
        assert log.pages()
        front.set_features()
        front.set_addr(0, front.queues[0])
        log.pages()
        front.read(0, 512)
        assert log.pages() == set()
        # and begins again: a second migration
        begin(front, log)
        front.read(0, 512)
        assert log.pages()
    log.close()


def test_request_begun_before_logging_is_marked_when_it_ends(vhost: Server) -> None:
    log = Log()
    with frontend(vhost.path) as front:
        queue = front.queues[0]
        vhost.ok("block")
        queue.memory.alloc(PAGE, PAGE)
        head, data, _ = front.build(T_IN, 0, want=PAGE)
        queue.offer(head)
        queue.kick_now()
        wait_until(lambda: vhost.stats().submitted == 1, "submitted")
        begin(front, log)
        log.pages()
        vhost.ok("unblock")
        queue.wait()
        assert page_of(data) in log.pages()
    log.close()


def test_new_log_replaces_the_old_one_at_once(vhost: Server) -> None:
    first, second = Log(), Log(8192)
    with frontend(vhost.path) as front:
        begin(front, first)
        front.read(0, 512)
        second.give(front)
        first.pages()
        front.read(0, 512)
        assert first.pages() == set()
        assert second.pages()
    first.close()
    second.close()


def test_log_at_an_offset_and_memory_far_up(vhost: Server) -> None:
    memory = Memory(4 << 20, guest=1 << 30)
    log = Log((1 << 30) // PAGE // 8 + 8192)
    with frontend(vhost.path, memory=memory) as front:
        front.ask(SET_LOG_BASE, struct.pack("<QQ", log.size - 4096, 4096), [log.fd])
        front.set_features(1 << F_LOG_ALL)
        memory.alloc(PAGE, PAGE)
        head, data, _ = front.build(T_IN, 0, want=PAGE)
        front.queues[0].offer(head)
        front.queues[0].kick_now()
        front.queues[0].wait()
        assert page_of(data) in {page - 4096 * 8 for page in log.pages()}
    log.close()


def test_log_descriptor_is_taken_and_closed(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        before = vhost.fds()
        fd = os.eventfd(0)
        assert front.tell(SET_LOG_FD, b"", [fd]) == 0
        os.close(fd)
        assert vhost.fds() == before


def arrived(vhost: Server, memory: Memory, queue: Queue) -> Frontend:
    """The next host's front end, before it starts the ring: its in-flight table is a new one."""
    target = Frontend(vhost.path)
    target.negotiate()
    target.get_inflight(1, queue.num)
    target.set_inflight()
    target.set_features()
    target.set_memory(memory)
    return target


def test_ring_whose_used_index_was_left_behind(vhost: Server) -> None:
    """QEMU lost the dirty log of the source, whose back end was killed: guest memory here says 2 of 5 are done, and
    the machine's state, which QEMU sends, 5. Nothing is done twice, and the sixth is done."""
    memory = Memory()
    with frontend(vhost.path, memory=memory) as source:
        queue = source.queues[0]
        for n in range(5):
            assert source.write(n, bytes([n]) * 512) == 0
        assert queue.used_idx() == 5
        source.sock.close()
        memory.write(queue.used + 2, struct.pack("<H", 2))
        target = arrived(vhost, memory, queue)
        submitted = vhost.stats().submitted
        head = source.build(T_OUT, 4, bytes(512))[0]
        queue.offer(head)
        target.start(0, queue, base=5)
        wait_until(lambda: queue.used_idx() == 6, "done")
        assert [done for done, _ in queue.take()] == [head]
        assert vhost.stats().submitted == submitted + 1
        target.sock.close()
        os.close(target.inflight[0]) if target.inflight else None


def test_ring_moves_to_another_server_with_nothing_in_flight(vhost: Server) -> None:
    """The switch-over: stop with requests under way, go on elsewhere from the index given."""
    memory = Memory()
    with frontend(vhost.path, memory=memory) as source:
        queue = source.queues[0]
        heads = []
        vhost.ok("block")
        for n in range(5):
            heads.append(source.build(T_OUT, n, bytes([n]) * 512)[0])
            queue.offer(heads[-1])
        queue.kick_now()
        wait_until(lambda: vhost.stats().submitted == 5, "submitted")
        source.send(11, struct.pack("<II", 0, 0))
        vhost.ok("unblock")
        base = struct.unpack("<II", source.receive().payload)[1]
        assert base == 5
        assert len(queue.take()) == 5
        source.sock.close()
        target = arrived(vhost, memory, queue)
        target.start(0, queue, base=base)
        assert target.read(4, 512) == bytes([4]) * 512
        target.sock.close()
        os.close(target.inflight[0]) if target.inflight else None

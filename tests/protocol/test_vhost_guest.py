"""vhost-user-blk against a malicious guest: rings and descriptors that lie. Whatever it does, its request fails or its
queue is marked broken and signalled on the error descriptor; other queues and the process go on.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable

import pytest
from vhost_frontend import (
    F_INDIRECT,
    INDIRECT,
    IOERR,
    NEXT,
    OK,
    T_IN,
    T_OUT,
    WRITE,
    Frontend,
    Queue,
    frontend,
)
from vhost_server import BROKEN, Server, wait_until

NUM = 128


def header(q: Queue, kind: int = T_IN, sector: int = 0) -> int:
    at = q.memory.alloc(16)
    q.memory.write(at, struct.pack("<IIQ", kind, 0, sector))
    return at


def table(q: Queue, *entries: tuple[int, int, int, int]) -> int:
    """An indirect table of (address, length, flags, next)."""
    at = q.memory.alloc(16 * len(entries))
    q.memory.write(at, b"".join(struct.pack("<QIHH", *entry) for entry in entries))
    return at


def loop_of_one(q: Queue) -> None:
    q.set_desc(0, header(q), 16, NEXT, 0)
    q.offer(0)


def loop_of_two(q: Queue) -> None:
    q.set_desc(0, header(q), 16, NEXT, 1)
    q.set_desc(1, header(q), 16, NEXT, 0)
    q.offer(0)


def loop_of_all(q: Queue) -> None:
    for n in range(NUM):
        q.set_desc(n, q.memory.guest, 16, NEXT, (n + 1) % NUM)
    q.offer(0)


def loop_of_writable(q: Queue) -> None:
    q.set_desc(0, header(q), 16, NEXT, 1)
    q.set_desc(1, header(q), 16, NEXT | WRITE, 1)
    q.offer(0)


def loop_of_empty(q: Queue) -> None:
    q.set_desc(0, 0, 0, NEXT, 0)
    q.offer(0)


def next_outside(q: Queue) -> None:
    q.set_desc(0, header(q), 16, NEXT, NUM)
    q.offer(0)


def next_far_outside(q: Queue) -> None:
    q.set_desc(0, header(q), 16, NEXT, 0xFFFF)
    q.offer(0)


def head_outside(q: Queue) -> None:
    q.offer(NUM)


def head_far_outside(q: Queue) -> None:
    q.offer(0xFFFF)


def indirect_in_indirect(q: Queue) -> None:
    inner = table(q, (header(q), 16, 0, 0))
    q.set_desc(0, table(q, (inner, 16, INDIRECT, 0)), 16, INDIRECT)
    q.offer(0)


def indirect_with_next(q: Queue) -> None:
    q.set_desc(0, table(q, (header(q), 16, 0, 0)), 16, INDIRECT | NEXT, 1)
    q.offer(0)


def indirect_of_odd_length(q: Queue) -> None:
    q.set_desc(0, table(q, (header(q), 16, 0, 0)), 17, INDIRECT)
    q.offer(0)


def indirect_of_no_length(q: Queue) -> None:
    q.set_desc(0, header(q), 0, INDIRECT)
    q.offer(0)


def indirect_longer_than_the_ring(q: Queue) -> None:
    q.set_desc(0, q.memory.guest, 16 * (NUM + 1), INDIRECT)
    q.offer(0)


def indirect_huge(q: Queue) -> None:
    q.set_desc(0, q.memory.guest, 0xFFFFFFF0, INDIRECT)
    q.offer(0)


def indirect_loop(q: Queue) -> None:
    q.set_desc(0, table(q, (header(q), 16, NEXT, 1), (header(q), 16, NEXT, 0)), 32, INDIRECT)
    q.offer(0)


def indirect_next_outside(q: Queue) -> None:
    q.set_desc(0, table(q, (header(q), 16, NEXT, 2), (header(q), 16, 0, 0)), 32, INDIRECT)
    q.offer(0)


def readable_after_writable(q: Queue) -> None:
    q.offer(q.add([(header(q), 1, WRITE), (header(q), 16, 0)]))


def avail_jump(q: Queue) -> None:
    q.memory.write(q.avail + 2, struct.pack("<H", NUM + 1))


def avail_far_jump(q: Queue) -> None:
    q.memory.write(q.avail + 2, struct.pack("<H", 0x8000))


def avail_backwards(q: Queue) -> None:
    q.memory.write(q.avail + 2, struct.pack("<H", 0xFFFF))


BREAKING = [
    loop_of_one,
    loop_of_two,
    loop_of_all,
    loop_of_writable,
    loop_of_empty,
    next_outside,
    next_far_outside,
    head_outside,
    head_far_outside,
    indirect_in_indirect,
    indirect_with_next,
    indirect_of_odd_length,
    indirect_of_no_length,
    indirect_longer_than_the_ring,
    indirect_huge,
    indirect_loop,
    indirect_next_outside,
    readable_after_writable,
    avail_jump,
    avail_far_jump,
    avail_backwards,
]


@pytest.mark.parametrize("attack", BREAKING, ids=lambda f: f.__name__)
def test_queue_is_broken(vhost: Server, attack: Callable[[Queue], None]) -> None:
    with frontend(vhost.path, queues=2, num=NUM) as front:
        q = front.queues[0]
        attack(q)
        q.kick_now()
        assert q.broken()
        assert (BROKEN, 0) in vhost.events()
        # the other queue, and this one after the driver has set it up again
        assert front.write(0, b"z" * 512, queue=1) == OK
        front.stop(0)
        front.tell(34)
        fresh = Queue(q.memory, NUM)
        front.start(0, fresh)
        assert front.read(0, 512) == b"z" * 512
        assert vhost.stats().broken == 1


def test_indirect_without_negotiation_breaks_the_queue(vhost: Server) -> None:
    with frontend(vhost.path, drop=1 << F_INDIRECT) as front:
        q = front.queues[0]
        q.offer(front.build(T_IN, want=512, indirect=True)[0])
        q.kick_now()
        assert q.broken()


def test_head_offered_again_while_in_flight_breaks_the_queue(vhost: Server) -> None:
    with frontend(vhost.path, queues=2) as front:
        q = front.queues[0]
        vhost.ok("block")
        head, _, _ = front.build(T_IN, want=512)
        q.offer(head)
        q.kick_now()
        wait_until(lambda: vhost.stats().submitted == 1, "submitted")
        q.offer(head)
        q.kick_now()
        assert q.broken()
        vhost.ok("unblock")
        assert q.wait() == [(head, 513)]  # what was accepted before still ends
        assert front.read(0, 512, queue=1) == bytes(512)


OUTSIDE = [0x7FFFFFFF0000, (1 << 64) - 4096, (1 << 64) - 1, 4 << 20]


@pytest.mark.parametrize("where", OUTSIDE)
@pytest.mark.parametrize("kind", [T_IN, T_OUT])
def test_data_outside_memory_is_an_error_of_the_request(vhost: Server, where: int, kind: int) -> None:
    with frontend(vhost.path) as front:
        q = front.queues[0]
        for length in (512, 4096, 0xFFFFFE00):
            status = q.memory.alloc(1, 1)
            q.memory.write(status, b"\xff")
            head = q.add([(header(q, kind), 16, 0), (where, length, WRITE if kind == T_IN else 0), (status, 1, WRITE)])
            q.offer(head)
            q.kick_now()
            assert q.wait() == [(head, 1)]
            assert q.memory.read(status, 1)[0] == IOERR
        assert vhost.stats().submitted == 0
        assert front.read(0, 512) == bytes(512)


def test_data_reaching_over_the_end_of_memory_is_an_error_of_the_request(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        q = front.queues[0]
        end = q.memory.guest + q.memory.size
        for addr, length in ((end - 512, 1024), (end - 1, 512), (0, 0xFFFFFE00), (end - 512, 0xFFFFFFFF)):
            status = q.memory.alloc(1, 1)
            head = q.add([(header(q), 16, 0), (addr, length, WRITE), (status, 1, WRITE)])
            q.offer(head)
            q.kick_now()
            assert q.wait() == [(head, 1)]
            assert q.memory.read(status, 1)[0] == IOERR


def returned(front: Frontend, buffers: list[tuple[int, int, int]]) -> int:
    """Runs a chain that cannot be answered; its head comes back with the length given."""
    q = front.queues[0]
    head = q.add(buffers)
    q.offer(head)
    q.kick_now()
    ((got, length),) = q.wait()
    assert got == head
    return length


def test_request_without_a_usable_status_comes_back_untouched(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        q = front.queues[0]
        status = q.memory.alloc(1, 1)
        q.memory.write(status, b"\x77")
        assert returned(front, [(header(q), 16, 0)]) == 0
        assert returned(front, [(header(q), 16, 0), (status, 1, 0)]) == 0
        assert returned(front, [(header(q), 16, 0), (status, 0, WRITE)]) == 0
        assert returned(front, [(header(q), 16, 0), ((1 << 64) - 1, 1, WRITE)]) == 0
        assert returned(front, [(header(q), 16, 0), ((1 << 64) - 1, 2, WRITE)]) == 0
        assert returned(front, [((1 << 64) - 16, 16, INDIRECT)]) == 0
        assert returned(front, [(1 << 40, 16, INDIRECT)]) == 0
        assert returned(front, [(0, 0, 0)]) == 0
        assert q.memory.read(status, 1) == b"\x77"
        assert front.read(0, 512) == bytes(512)
        assert vhost.stats().broken == 0


@pytest.mark.parametrize("size", [0, 1, 15])
def test_short_header_is_an_error(vhost: Server, size: int) -> None:
    with frontend(vhost.path) as front:
        q = front.queues[0]
        status = q.memory.alloc(1, 1)
        assert returned(front, [(header(q), size, 0), (status, 1, WRITE)]) == 1
        assert q.memory.read(status, 1)[0] == IOERR


def test_swapped_header_is_an_error(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        q = front.queues[0]
        at = header(q)
        assert returned(front, [(at, 16, WRITE)]) == 1
        assert q.memory.read(at + 15, 1)[0] == IOERR


def test_longest_chain_works_and_one_more_does_not(vhost: Server) -> None:
    with frontend(vhost.path, num=NUM) as front:
        q = front.queues[0]
        data = os.urandom(512 * (NUM - 2))
        assert front.write(0, data, pieces=NUM - 2) == OK
        assert front.read(0, len(data), pieces=NUM - 2) == data
        assert front.read(0, len(data), pieces=NUM - 2, indirect=True) == data
        q.offer(front.build(T_IN, want=512 * (NUM - 1), pieces=NUM - 1, indirect=True)[0])
        q.kick_now()
        assert q.broken()


def test_storm_of_kicks_is_one_look_at_the_ring(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        q = front.queues[0]
        for _ in range(2000):
            q.kick_now()
        os.eventfd_write(q.kick, (1 << 63) - 1)
        assert front.read(0, 512) == bytes(512)
        assert vhost.stats().submitted == 1


def test_rings_over_data_and_over_each_other_crash_nothing(vhost: Server) -> None:
    with frontend(vhost.path, num=NUM) as front:
        q = front.queues[0]
        # the answer to a read lands on the used ring, the avail ring and the descriptors themselves
        for target in (q.used, q.avail, q.desc):
            status = q.memory.alloc(1, 1)
            q.offer(q.add([(header(q), 16, 0), (target & ~511, 4096, WRITE), (status, 1, WRITE)]))
            q.kick_now()
        wait_until(lambda: vhost.stats().submitted >= 1, "submitted")
        # a second queue whose three parts are the same memory
        mess = Queue(q.memory, NUM)
        mess.avail = mess.used = mess.desc
        front.start(1, mess)
        mess.kick_now()
        fresh = Queue(q.memory, NUM)
        front.start(2, fresh)
        assert front.read(4096, 512, queue=2) == bytes(512)


@pytest.mark.parametrize("vhost", [("async",)], indirect=True)
def test_memory_that_changes_under_us_crashes_nothing(vhost: Server) -> None:
    """Descriptors and headers are rewritten as fast as Python can while requests run; AddressSanitizer watches."""
    with frontend(vhost.path, queues=2, num=16) as front:
        q = front.queues[0]
        memory = q.memory
        stop = threading.Event()
        head_at = header(q)
        status = memory.alloc(1, 1)
        data = memory.alloc(4096, 4096)
        good = [(head_at, 16, NEXT, 1), (data, 4096, NEXT | WRITE, 2), (status, 1, WRITE, 0)]
        evil = [(head_at, 16, NEXT, 1), (data, 0xFFFFFFFF, NEXT, 2), (1 << 50, 1 << 20, WRITE, 0)]
        good_bytes = b"".join(struct.pack("<QIHH", *d) for d in good)
        evil_bytes = b"".join(struct.pack("<QIHH", *d) for d in evil)

        def flip() -> None:
            while not stop.is_set():
                memory.write(q.desc, good_bytes)
                memory.write(head_at, struct.pack("<IIQ", T_OUT, 0, 1 << 60))
                memory.write(q.desc, evil_bytes)
                memory.write(head_at, struct.pack("<IIQ", T_IN, 0, 0))

        thread = threading.Thread(target=flip)
        thread.start()
        try:
            for _ in range(2000):
                q.offer(0)
                q.kick_now()
                if q.broken(0):
                    break
                q.wait()
        finally:
            stop.set()
            thread.join()
        assert front.write(0, b"q" * 512, queue=1) == OK

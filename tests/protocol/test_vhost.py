"""vhost-user-blk: what a front end that behaves well gets."""

from __future__ import annotations

import contextlib
import os
import select
import struct

import pytest
from vhost_frontend import (
    ADD_MEM_REG,
    ALL_PROTOCOL,
    F_CONFIG_WCE,
    F_EVENT_IDX,
    F_FLUSH,
    F_INDIRECT,
    F_PROTOCOL,
    F_RO,
    GET_MAX_MEM_SLOTS,
    GET_QUEUE_NUM,
    IOERR,
    OK,
    P_INFLIGHT,
    P_MEM_SLOTS,
    P_REPLY_ACK,
    PAGE,
    REM_MEM_REG,
    RESET_DEVICE,
    SET_CONFIG,
    SET_VRING_CALL,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_ZEROES,
    UNSUPP,
    WRITE,
    Frontend,
    Memory,
    Queue,
    frontend,
)
from vhost_server import CONNECTED, DISCONNECTED, RINGS, Server, wait_until

SIZE = 64 << 20


def test_offers_what_qemu_needs_to_migrate_and_to_reconnect(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        assert front.protocol == ALL_PROTOCOL
        assert front.ask_u64(1) == 0x174007E46  # and bit 26, VHOST_F_LOG_ALL, among them
        assert front.ask_u64(GET_QUEUE_NUM) == 4
        assert front.ask_u64(GET_MAX_MEM_SLOTS) == 509


def test_configuration_space(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        (
            capacity,
            size_max,
            seg_max,
            _,
            blk_size,
            _,
            _,
            _,
            opt,
            wce,
            _,
            queues,
            discard,
            discard_seg,
            align,
            zeroes,
            zeroes_seg,
            unmap,
        ) = struct.unpack("<QIIIIBBHIBBHIIIIIB", front.config(size=57))
        assert (capacity, seg_max, blk_size, wce, queues, unmap) == (SIZE // 512, 254, 512, 1, 4, 1)
        assert (opt, align) == ((4 << 20) // 512, 128)
        assert min(size_max, discard, discard_seg, zeroes, zeroes_seg) > 0
        assert front.config(32, 1) == b"\x01"
        assert front.config(200, 56) == bytes(56)


@pytest.mark.parametrize("vhost", [(), ("async",)], indirect=True, ids=["inline", "other threads"])
@pytest.mark.parametrize("drop", [0, 1 << F_EVENT_IDX, 1 << F_INDIRECT, 1 << F_PROTOCOL])
def test_reads_what_was_written(vhost: Server, drop: int) -> None:
    with frontend(vhost.path, drop=drop) as front:
        indirect = not drop >> F_INDIRECT & 1
        for n in range(40):
            data = os.urandom(512 * (1 + n))
            assert front.write(n * 100, data, pieces=1 + n % 7, indirect=indirect and n % 2 == 0) == OK
            assert front.read(n * 100, len(data), pieces=1 + n % 5, indirect=indirect and n % 3 == 0) == data


@pytest.mark.parametrize("vhost", [("async",)], indirect=True)
def test_hundreds_of_requests_in_flight_complete_each_once(vhost: Server) -> None:
    with frontend(vhost.path, queues=4, memory=Memory(16 << 20)) as front:
        for rounds in range(3):
            waiting = {}
            for number, queue in enumerate(front.queues):
                for n in range(40):
                    sector = (number * 40 + n) * 8
                    head, _, status = front.build(T_OUT, sector, struct.pack("<II", sector, rounds) * 512, queue=number)
                    queue.offer(head)
                    waiting[number, head] = status
                queue.kick_now()
            for number, queue in enumerate(front.queues):
                for head, length in queue.wait(40):
                    assert length == 1
                    assert queue.memory.read(waiting.pop((number, head)), 1) == b"\0"
            assert not waiting
            front.queues[0].memory.next = front.queues[3].used + PAGE
        for sector in range(0, 160 * 8, 8):
            assert front.read(sector, 4096) == struct.pack("<II", sector, 2) * 512


def test_header_and_status_may_be_cut_anyhow(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        queue = front.queues[0]
        memory = queue.memory
        front.write(9, b"x" * 512)
        header, data, status = memory.alloc(64), memory.alloc(512, 512), memory.alloc(1, 1)
        memory.write(header, struct.pack("<IIQ", T_IN, 0, 9))
        cuts = [
            (header, 1, 0),
            (header + 1, 14, 0),
            (header + 15, 1, 0),
            (data, 511, WRITE),
            (data + 511, 1, WRITE),
            (status, 1, WRITE),
        ]
        queue.offer(queue.add(cuts))
        queue.kick_now()
        assert queue.wait()[0][1] == 513
        assert memory.read(data, 512) == b"x" * 512
        # header and data in one readable buffer, data and status in one writable
        both = memory.alloc(16 + 512)
        memory.write(both, struct.pack("<IIQ", T_OUT, 0, 9) + b"y" * 512)
        queue.offer(queue.add([(both, 528, 0), (status, 1, WRITE)]))
        reply = memory.alloc(513)
        memory.write(header, struct.pack("<IIQ", T_IN, 0, 9))
        queue.offer(queue.add([(header, 16, 0), (reply, 513, WRITE)]))
        queue.kick_now()
        queue.wait(2)
        assert memory.read(reply, 513) == b"y" * 512 + b"\0"


def test_identity_flush_discard_and_write_zeroes(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        assert front.request(T_GET_ID, want=20) == (OK, b"fake".ljust(20, b"\0"))
        assert front.request(T_GET_ID, want=3) == (OK, b"fak")
        assert front.request(T_FLUSH)[0] == OK
        front.write(0, b"1" * (64 << 10))
        ranges = [struct.pack("<QII", 0, 8, 1), struct.pack("<QII", 32, 0, 0), struct.pack("<QII", 64, 8, 0)]
        assert front.request(T_ZEROES, data=b"".join(ranges))[0] == OK
        assert front.read(0, 64 << 10) == (bytes(4096) + b"1" * (56 * 512) + bytes(4096)).ljust(64 << 10, b"1")
        assert front.request(T_DISCARD, data=struct.pack("<QII", 0, 128, 0))[0] == OK
        assert front.read(0, 64 << 10) == bytes(64 << 10)


def test_refuses_what_does_not_fit_the_disk(vhost: Server) -> None:
    end = SIZE // 512
    with frontend(vhost.path) as front:
        assert front.read(end - 1, 512) == bytes(512)
        for sector in (end, end - 1, 1 << 54, (1 << 55) - 1, 1 << 55, (1 << 64) - 2, (1 << 64) - 1):
            assert front.request(T_IN, sector, want=1024)[0] == IOERR
            assert front.write(sector, bytes(1024)) == IOERR
        assert front.request(T_IN, 0, want=513)[0] == IOERR
        assert front.request(T_OUT, 0, data=b"1")[0] == IOERR
        bad = [(end, 1, 0), (end - 1, 2, 0), ((1 << 64) - 1, 2, 0), (0, (1 << 32) - 1, 0), (1 << 55, 1, 0)]
        for kind in (T_DISCARD, T_ZEROES):
            for sector, count, flags in bad:
                assert front.request(kind, data=struct.pack("<QII", sector, count, flags))[0] == IOERR
            assert front.request(kind, data=struct.pack("<QII", 0, 1, 2))[0] == UNSUPP
            assert front.request(kind, data=bytes(15))[0] == IOERR
            assert front.request(kind, data=bytes(16 * 9))[0] == IOERR
        assert front.request(T_DISCARD, data=struct.pack("<QII", 0, 1, 1))[0] == UNSUPP
        for kind in (2, 3, 5, 10, 14, 1 << 31, (1 << 32) - 1):
            assert front.request(kind, want=512)[0] == UNSUPP
        assert vhost.stats().broken == 0


@pytest.mark.parametrize("vhost", [("ro",)], indirect=True)
def test_read_only_export(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        assert front.features >> F_RO & 1
        for kind, data in ((T_OUT, bytes(512)), (T_DISCARD, bytes(16)), (T_ZEROES, bytes(16))):
            assert front.request(kind, data=data)[0] == IOERR
        assert front.read(0, 512) == bytes(512)
        assert vhost.stats().submitted == 1


def test_write_cache_off_makes_every_write_durable(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        front.write(0, bytes(512))
        assert vhost.stats().fua == 0
        assert front.tell(SET_CONFIG, struct.pack("<III", 32, 1, 0) + b"\0") == 0
        assert front.config(32, 1) == b"\0"
        front.write(0, bytes(512))
        assert vhost.stats().fua == 1
        assert front.tell(SET_CONFIG, struct.pack("<III", 32, 1, 0) + b"\1") == 0
        front.write(0, bytes(512))
        assert vhost.stats().fua == 1
        for offset, data in ((0, b"\1"), (32, b"\2"), (31, b"\1\1")):
            assert front.tell(SET_CONFIG, struct.pack("<III", offset, len(data), 0) + data) != 0
        assert front.config(32, 1) == b"\1"


def test_driver_that_cannot_flush_gets_durable_writes(vhost: Server) -> None:
    with frontend(vhost.path, drop=1 << F_FLUSH | 1 << F_CONFIG_WCE) as front:
        front.write(0, bytes(512))
        assert vhost.stats().fua == 1


def test_resize_is_announced_and_read_back(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        channel = front.open_backend()
        vhost.ok(f"resize {SIZE + (32 << 20)}")
        assert channel.recv(64) == struct.pack("<III", 2, 1, 0)
        assert struct.unpack("<Q", front.config(0, 8))[0] == (SIZE + (32 << 20)) // 512
        assert front.read(SIZE // 512, 512) == bytes(512)


def test_memory_of_several_regions_and_buffers_across_them(vhost: Server) -> None:
    low, high = Memory(1 << 20), Memory(1 << 20, guest=1 << 20, user=0x7E0000000000, offset=8192)
    far = Memory(64 << 10, guest=1 << 32, user=0x100000)
    front = Frontend(vhost.path)
    with contextlib.closing(front):
        front.negotiate()
        front.set_features()
        front.set_memory(low, high, far)
        queue = Queue(low)
        front.start(0, queue)
        data = os.urandom(8192)
        low.write((1 << 20) - 4096, data[:4096])
        high.write(1 << 20, data[4096:])
        header, status = low.alloc(16), low.alloc(1, 1)
        low.write(header, struct.pack("<IIQ", T_OUT, 0, 5))
        queue.offer(queue.add([(header, 16, 0), ((1 << 20) - 4096, 8192, 0), (status, 1, WRITE)]))
        queue.kick_now()
        queue.wait()
        assert front.read(5, 8192) == data
        low.write(header, struct.pack("<IIQ", T_IN, 0, 5))
        queue.offer(queue.add([(header, 16, 0), (1 << 32, 8192, WRITE), (status, 1, WRITE)]))
        queue.kick_now()
        queue.wait()
        assert far.read(1 << 32, 8192) == data
        # take the far region away: its addresses are then an error of the request, nothing more
        assert front.tell(REM_MEM_REG, bytes(8) + far.describe()) == 0
        queue.offer(queue.add([(header, 16, 0), (1 << 32, 8192, WRITE), (status, 1, WRITE)]))
        queue.kick_now()
        queue.wait()
        assert low.read(status, 1)[0] == IOERR
        assert front.read(5, 512) == data[:512]
    high.close()
    far.close()


def test_memory_table_changes_under_running_rings_and_requests(vhost: Server) -> None:
    with frontend(vhost.path, protocol=ALL_PROTOCOL & ~(1 << P_MEM_SLOTS)) as front:
        queue = front.queues[0]
        vhost.ok("block")
        head, at, status = front.build(T_IN, 0, want=4096)
        queue.memory.write(at, b"?" * 4096)
        queue.offer(head)
        queue.kick_now()
        wait_until(lambda: vhost.stats().submitted == 1, "submitted")
        for _ in range(3):
            front.set_memory(queue.memory)
        vhost.ok("unblock")
        queue.wait()
        assert (queue.memory.read(status, 1), queue.memory.read(at, 4096)) == (b"\0", bytes(4096))
        assert vhost.maps() == 2  # the region once, the in-flight table


def test_ring_stops_with_all_requests_done(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        queue = front.queues[0]
        vhost.ok("block")
        for n in range(10):
            queue.offer(front.build(T_OUT, n, bytes(512))[0])
        queue.kick_now()
        wait_until(lambda: vhost.stats().submitted == 10, "submitted")
        front.send(11, struct.pack("<II", 0, 0))
        assert not select.select([front.sock], [], [], 0.05)[0]
        vhost.ok("unblock")
        assert struct.unpack("<II", front.receive().payload) == (0, 10)
        assert len(queue.take()) == 10
        # it starts again where it stopped
        assert front.stop(0) == 10
        front.start(0, queue, base=10)
        assert front.write(0, bytes(512)) == OK


def test_requests_that_wait_too_long_fail_when_the_ring_must_stop(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        queue = front.queues[0]
        vhost.ok("deadline 30 10000")
        vhost.ok("block")
        head, _, status = front.build(T_OUT, 0, bytes(512))
        queue.offer(head)
        queue.kick_now()
        wait_until(lambda: vhost.stats().submitted == 1, "submitted")
        assert front.stop(0) == 1
        assert queue.take() == [(head, 1)]
        assert queue.memory.read(status, 1)[0] == IOERR


def test_stuck_storage_ends_the_connection_and_holds_back_the_next_ones_rings(vhost: Server) -> None:
    vhost.ok("deadline 20 20")
    memory = Memory()
    with frontend(vhost.path, memory=memory) as front:
        queue = front.queues[0]
        assert front.write(8, b"w" * 512) == OK
        vhost.ok("hold 0 512")
        head, at, _ = front.build(T_IN, 0, want=512)
        memory.write(at, b"?" * 512)
        queue.offer(head)
        queue.kick_now()
        wait_until(lambda: vhost.stats().submitted == 2, "submitted")
        front.send(11, struct.pack("<II", 0, 0))
        assert front.gone()
        with frontend(vhost.path) as second:
            late, _, _ = second.build(T_FLUSH)
            second.queues[0].offer(late)
            second.queues[0].kick_now()
            with pytest.raises(TimeoutError):
                second.queues[0].wait(timeout=0.05)
            vhost.ok("hold 0 0")
            assert second.queues[0].wait()[0][0] == late
        # the read that came too late left the first guest's memory and ring alone
        assert memory.read(at, 512) == b"?" * 512
        assert queue.take() == []


def test_device_reset_stops_every_ring(vhost: Server) -> None:
    with frontend(vhost.path, queues=4) as front:
        front.write(0, b"r" * 512, queue=2)
        assert front.tell(RESET_DEVICE) == 0
        for n in range(4):
            assert front.stop(n) == (1 if n == 2 else 0)
        fresh = Queue(front.queues[0].memory)
        front.queues.append(fresh)
        front.start(0, fresh)
        assert front.read(0, 512) == b"r" * 512


def test_disabled_ring_waits(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        front.enable(0, 0)
        head = front.build(T_FLUSH)[0]
        front.queues[0].offer(head)
        front.queues[0].kick_now()
        with pytest.raises(TimeoutError):
            front.queues[0].wait(timeout=0.05)
        front.enable(0)
        assert front.queues[0].wait() == [(head, 1)]


def test_call_descriptor_may_change_under_a_running_ring(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        queue = front.queues[0]
        before = vhost.fds().count("anon_inode:[eventfd]")
        for _ in range(3):
            front.tell(SET_VRING_CALL, struct.pack("<Q", 0x100))  # none
            assert vhost.fds().count("anon_inode:[eventfd]") == before - 1
            queue.signalled()
            head = front.build(T_FLUSH)[0]
            queue.offer(head)
            queue.kick_now()
            wait_until(lambda: queue.used_idx() != queue.seen, "used without a signal")
            assert not queue.signalled()
            front.tell(SET_VRING_CALL, struct.pack("<Q", 0), [queue.call])
            assert queue.signalled()  # for what nobody could be told before
            assert queue.take() == [(head, 1)]
            assert front.request(T_FLUSH)[0] == OK
            front.tell(SET_VRING_CALL, struct.pack("<Q", 0), [queue.call])
            assert front.request(T_FLUSH)[0] == OK
            assert vhost.fds().count("anon_inode:[eventfd]") == before
        # a descriptor that takes the number of one let go is not closed in its stead
        more = Memory(guest=1 << 40, user=1 << 40)
        assert front.tell(ADD_MEM_REG, bytes(8) + more.describe(), [more.fd]) == 0
        front.enable(0)
        assert vhost.fds().count("/memfd:guest (deleted)") == 2
        more.close()


def test_one_front_end_after_the_other(vhost: Server) -> None:
    before = vhost.fds()
    for n in range(3):
        with frontend(vhost.path, queues=1 + n) as front:
            assert front.write(n, bytes([n]) * 512) == OK
        vhost.quiet(before)
        assert vhost.events() == [(CONNECTED, 1), (RINGS, 0), (DISCONNECTED, 0)]
    assert vhost.stats().accepted == 3


def test_second_front_end_waits_for_the_first_to_leave(vhost: Server) -> None:
    with frontend(vhost.path):
        second = Frontend(vhost.path)
        second.send(1)
        assert not select.select([second.sock], [], [], 0.05)[0]
    assert second.receive().request == 1
    second.close()


@pytest.mark.parametrize("hard", [True, False])
def test_stop(vhost: Server, hard: bool) -> None:
    with frontend(vhost.path) as front:
        front.write(0, bytes(512))
        if hard:
            vhost.ok("stop hard")
            assert front.gone()
    if not hard:
        vhost.ok("stop soft")
    with pytest.raises(ConnectionRefusedError):
        Frontend(vhost.path)


def test_front_end_without_any_protocol_feature(vhost: Server) -> None:
    with frontend(vhost.path, protocol=0) as front:
        front.enable(0)
        assert front.write(0, b"n" * 512) == OK
        assert front.read(0, 512) == b"n" * 512
    with frontend(vhost.path, protocol=1 << P_REPLY_ACK | 1 << P_INFLIGHT) as front:
        assert front.read(0, 512) == b"n" * 512


def test_front_end_that_goes_on_where_it_was_with_the_back_end_before(vhost: Server) -> None:
    """QEMU 7.2, when its back end is restarted while a migration comes in: it starts its rings and negotiates
    nothing."""
    with frontend(vhost.path) as first:
        features, protocol = first.features, first.protocol
    front = Frontend(vhost.path)
    front.features, front.protocol = features, protocol
    try:
        front.set_features()
        front.get_inflight(1, 128)
        front.set_inflight()
        memory = Memory()
        front.set_memory(memory)
        front.start(0, Queue(memory))
        assert front.write(8, b"again" + bytes(507)) == OK
        assert front.read(8, 512)[:5] == b"again"
    finally:
        front.close()

"""NBD connections that end badly, servers that stop, clients that are slow or greedy."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import time
from collections.abc import Callable

import pytest
from nbd_client import (
    BLOCK_STATUS,
    DISC,
    ESHUTDOWN,
    FLUSH,
    OPT_GO,
    READ,
    WRITE,
    Client,
    Closed,
    name_option,
    option,
    request,
)
from nbd_fake import EVENT_EXPORT_BROKEN, EVENT_EXPORT_DISCONNECTED, EVENT_EXPORT_STOPPED, MEMORY_FACTOR, FakeServer

MIB = 1 << 20


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def arrived(sock: socket.socket) -> int:
    """Bytes that may be read."""
    count = bytearray(4)
    fcntl.ioctl(sock, termios.FIONREAD, count)
    return struct.unpack("i", count)[0]


def test_disconnect_request_ends_after_the_replies(nbd: FakeServer) -> None:
    nbd.do("hold 1")
    with Client(nbd.socket).negotiate() as c:
        cookies = [c.start(READ, n * 512, 512) for n in range(10)]
        c.send(request(DISC))
        until(lambda: nbd.do("waiting") == 10, "all reads reach the engine")
        nbd.do("hold 0")
        assert [c.reply().cookie for _ in range(10)] == cookies
        assert c.closed()
    assert nbd.broken() == 0


def test_half_closed_client_still_gets_its_replies(nbd: FakeServer) -> None:
    nbd.do("hold 1")
    with Client(nbd.socket).negotiate() as c:
        c.start(WRITE, 0, 512, data=b"h" * 512)
        c.sock.shutdown(socket.SHUT_WR)
        until(lambda: nbd.do("waiting") == 1, "the write reaches the engine")
        nbd.do("hold 0")
        assert not c.reply().error
        assert c.closed()


@pytest.mark.parametrize("pooled", [0, 1])
def test_disconnect_with_requests_in_flight_leaks_nothing(nbd: FakeServer, pooled: int) -> None:
    nbd.do(f"pooled {pooled}")
    nbd.do("hold 1")
    with Client(nbd.socket).negotiate() as c:
        for n in range(40):
            c.start(READ, n * 4096, 4096)
            c.start(WRITE, n * 4096, 4096, data=bytes(4096))
            c.start(BLOCK_STATUS, 0, MIB)
        c.start(WRITE, 0, 4 * MIB, data=b"only a part")
        until(lambda: nbd.do("waiting") == 80, "they reach the engine")
    assert nbd.clients() == 1, "an export keeps a client whose requests are in flight"
    nbd.do("hold 0")
    until(lambda: nbd.clients() == 0, "the client is forgotten")


def test_wrong_request_magic_ends_the_connection_and_is_reported(nbd: FakeServer) -> None:
    with Client(nbd.socket).negotiate() as c:
        c.send(request(READ, 0, 512, magic=0x25609514))
        assert c.closed()
    assert nbd.do(f"event {EVENT_EXPORT_BROKEN} 1") == 0
    assert nbd.broken() == 1
    with Client(nbd.socket).negotiate() as c:
        assert c.read(0, 1) == b"\0"


def test_replies_before_a_violation_are_sent(nbd: FakeServer) -> None:
    with Client(nbd.socket).negotiate() as c:
        cookie = c.start(READ, 0, 512)
        c.send(b"garbage" * 10)
        assert c.reply().cookie == cookie
        assert c.closed()


def test_connections_that_come_and_go_leave_no_descriptor(nbd: FakeServer) -> None:
    with Client(nbd.socket).negotiate(), Client(nbd.socket).negotiate():  # each reactor keeps one timer from then on
        until(lambda: nbd.clients() == 2, "both reactors have met a client")
    until(lambda: nbd.clients() == 0, "gone")
    before = nbd.fds()
    for n in range(100):
        c = Client(nbd.socket, flags=[None, 3, 99][n % 3])
        if n % 3 == 1 and n % 2:
            c.negotiate()
            c.start(READ, 0, 1 * MIB)
        elif n % 3 == 1:
            c.send(option(OPT_GO, name_option(b""))[: n % 20])
        c.close()
    until(lambda: nbd.fds() == before and nbd.clients() == 0, "every socket and timer is closed")


def test_silent_client_is_dropped_at_the_handshake_deadline(nbd: FakeServer) -> None:
    begin = time.monotonic()
    drips = [Client(nbd.socket, flags=flags) for flags in (None, 3, 3)]
    alive = Client(nbd.socket).negotiate()
    drips[2].send(option(OPT_GO, name_option(b""))[:20])
    for c in drips:
        assert c.closed()
        c.close()
    assert 9 < time.monotonic() - begin < 13
    assert alive.read(0, 4) == bytes(4), "the deadline ends with the handshake"
    alive.close()


def test_connections_beyond_the_limit_are_closed(nbd: FakeServer) -> None:
    clients = [Client(nbd.socket) for _ in range(64)]
    with pytest.raises(Closed):
        Client(nbd.socket)
    clients.pop().close()

    def accepted() -> bool:
        try:
            clients.append(Client(nbd.socket))
        except Closed:
            return False
        return True

    until(accepted, "a place became free")
    for c in clients:
        c.close()


def test_client_that_does_not_read_replies_is_held_back(nbd: FakeServer) -> None:
    before = nbd.rss()
    with Client(nbd.socket).negotiate() as c, Client(nbd.socket).negotiate() as other:
        reads = c.start_reads([(0, MIB)] * 500)
        until(lambda: nbd.ask("counts")[1] >= 50, "the server reads ahead")
        assert other.read(0, MIB) == bytes(MIB)
        assert nbd.ask("counts")[1] < 100
        assert nbd.rss() - before < 80 * MIB * MEMORY_FACTOR
        for cookie in reads:
            assert c.reply().cookie == cookie


def test_clients_that_do_not_read_share_one_limit(nbd: FakeServer) -> None:
    nbd.do(f"memory {40 * MIB}")
    before = nbd.rss()
    slow = [Client(nbd.socket).negotiate() for _ in range(6)]
    try:
        reads = [c.start_reads([(0, MIB)] * 100) for c in slow]
        with Client(nbd.socket).negotiate() as other:
            # each of them has one request at least, and another client lives beside them
            until(lambda: nbd.ask("counts")[1] >= 40, "the server reads ahead")
            assert other.read(0, 16 * MIB) == bytes(16 * MIB)
            for _ in range(4):
                cookies = other.start_reads([(0, 65536)] * 16)
                assert sorted(other.reply().cookie for _ in cookies) == sorted(cookies)
        # 40 MiB, what was under way when they were reached, and what the sockets took; the other one's are 65
        assert nbd.ask("counts")[1] < 65 + 120
        assert nbd.rss() - before < 90 * MIB * MEMORY_FACTOR
        for c, cookies in zip(slow, reads, strict=True):
            for cookie in cookies:
                assert c.reply().cookie == cookie
    finally:
        for c in slow:
            c.close()


def test_engine_that_does_not_answer_bounds_what_is_read(nbd: FakeServer) -> None:
    nbd.do("hold 1")
    before = nbd.rss()
    with Client(nbd.socket).negotiate() as c:
        c.sock.settimeout(0.3)
        sent = 0
        try:
            while sent < 2000:
                c.start(WRITE, 0, 300000, data=bytes(300000))
                sent += 1
        except TimeoutError:
            pass
        assert 50 < sent < 400
        assert nbd.rss() - before < 80 * MIB * MEMORY_FACTOR
        waiting = nbd.do("waiting")
        assert 50 < waiting < 250
    nbd.do("hold 0")


def test_no_reply_waits_for_a_client_that_reads_nothing(nbd: FakeServer) -> None:
    """Replies that the server holds back because the client has plenty to read are sent when nothing else happens."""
    with Client(nbd.socket).negotiate() as c:
        for n in range(100):
            c.start(READ, n * 512, 512)
            if n % 7 == 0:
                c.start(FLUSH, 0, 0)
        until(lambda: arrived(c.sock) == 100 * (20 + 8 + 512) + 15 * 16, "all replies are there to be read")
        for _ in range(115):
            assert not c.reply().error


def test_slots_bound_small_requests(nbd: FakeServer) -> None:
    nbd.do("hold 1")
    with Client(nbd.socket).negotiate() as c:
        cookies = c.start_reads((n, 1) for n in range(2000))
        until(lambda: nbd.do("waiting") == 512, "as many as there are slots")
        nbd.do("hold 0")
        assert sorted(c.reply().cookie for _ in cookies) == cookies


def test_idle_connections_hold_little_memory(nbd: FakeServer) -> None:
    clients = [Client(nbd.socket).negotiate() for _ in range(8)]
    until(lambda: nbd.clients() == 8, "connected")
    base = nbd.rss()
    more = [Client(nbd.socket).negotiate() for _ in range(40)]
    for c in clients + more:
        for n in range(32):
            c.start(READ, n * 4096, 65536)
        for _ in range(32):
            c.reply()
        c.write(0, bytes(2 * MIB))
    until(lambda: nbd.rss() - base < 40 * 64 * 1024 * MEMORY_FACTOR, "buffers go back to the system")
    for c in clients + more:
        assert c.read(0, 4096) == bytes(4096)
        c.close()


# stopping


def test_soft_stop_lets_present_clients_finish(nbd: FakeServer) -> None:
    with Client(nbd.socket).negotiate() as c:
        assert nbd.do("stop 1 0") == 0
        assert nbd.do("free 1") == -16
        with Client(nbd.socket) as other:
            assert other.info().error
        c.write(0, b"still here")
        c.send(request(DISC))
        assert c.closed()
    assert nbd.do(f"event {EVENT_EXPORT_STOPPED} 1") == 0
    assert nbd.do("free 1") == 0


def test_stop_without_clients_is_at_once(nbd: FakeServer) -> None:
    assert nbd.do("stop 1 0") == 0
    assert nbd.do(f"event {EVENT_EXPORT_STOPPED} 1") == 0
    assert nbd.do("free 1") == 0
    assert nbd.export(1, "again") == 0


@pytest.mark.parametrize("first_soft", [True, False])
def test_hard_stop_drops_clients_in_any_state(nbd: FakeServer, first_soft: bool) -> None:
    assert nbd.export(2, "other") == 0
    nbd.do("hold 1")
    idle, busy, partial = (Client(nbd.socket).negotiate() for _ in range(3))
    elsewhere, talking = Client(nbd.socket).negotiate(b"other"), Client(nbd.socket)
    for n in range(20):
        busy.start(WRITE, n * 4096, 4096, data=bytes(4096))
        busy.start(READ, n * 4096, 4096)
    partial.start(WRITE, 0, MIB, data=b"part")
    until(lambda: nbd.do("waiting") == 40, "in flight")
    if first_soft:
        assert nbd.do("stop 1 0") == 0
    assert nbd.do("stop 1 1") == 0
    for c in (idle, busy, partial):
        assert c.closed()
        c.close()
    assert nbd.do("free 1") == -16, "requests are still in flight"
    nbd.do("hold 0")
    assert nbd.do(f"event {EVENT_EXPORT_STOPPED} 1") == 0
    assert nbd.do("free 1") == 0
    assert elsewhere.read(0, 8) == bytes(8)
    assert talking.info(b"other", go=True).size == nbd.size
    elsewhere.close()
    talking.close()


def test_export_of_the_same_name_later_is_another_one(nbd: FakeServer) -> None:
    with Client(nbd.socket) as c:
        c.structured_replies()
        c.select()
        assert nbd.do("stop 1 1") == 0 and nbd.do(f"event {EVENT_EXPORT_STOPPED} 1") == 0 and nbd.do("free 1") == 0
        assert c.info().error
        assert nbd.export(1) == 0
        assert not c.info(go=True).error
        assert c.call(BLOCK_STATUS, 0, 512).error, "the context was selected for the export that is gone"


def test_server_stop_needs_stopped_exports_and_closes_every_client(nbd: FakeServer) -> None:
    nbd.do("hold 1")
    clients = [
        Client(nbd.socket, flags=None),
        Client(nbd.socket),
        Client(nbd.socket).negotiate(),
        Client(nbd.socket).negotiate(),
    ]
    clients[3].start(FLUSH)
    until(lambda: nbd.do("waiting") == 1, "in flight")
    assert nbd.do("end") == -16
    assert nbd.do("stop 1 0") == 0
    nbd.do("hold 0")
    assert not clients[3].reply().error
    nbd.end()
    for c in clients:
        assert c.closed()
        c.close()
    with pytest.raises(ConnectionRefusedError):
        Client(nbd.socket)


def test_fenced_image_answers_eshutdown(nbd: FakeServer) -> None:
    nbd.do("fail 108 108")
    with Client(nbd.socket).negotiate() as c:
        reply = c.call(WRITE, 0, 1, data=b"x")
        assert reply.error == ESHUTDOWN and "own" in reply.message
        assert c.call(READ, 0, 1).error == ESHUTDOWN


def test_disconnected_event_tells_of_each_client(nbd: FakeServer) -> None:
    with Client(nbd.socket).negotiate():
        assert nbd.clients() == 1
    assert nbd.do(f"event {EVENT_EXPORT_DISCONNECTED} 1") == 0


def test_payload_in_small_pieces(nbd: FakeServer) -> None:
    data = bytes(n * 7 % 251 for n in range(9000))
    with Client(nbd.socket).negotiate() as c:
        c.cookie = 5
        c.lengths[5] = (WRITE, 11, 9000)
        message = request(WRITE, 11, 9000, cookie=5) + data + struct.pack(">I", 0x25609513)
        for at in range(0, len(message), 97):
            c.send(message[at : at + 97])
        assert not c.reply().error
        c.lengths[6] = (READ, 11, 9000)
        c.send(request(READ, 11, 9000, cookie=6)[4:])
        assert c.reply().data == data

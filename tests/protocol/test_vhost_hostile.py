"""vhost-user-blk against a hostile front end (a compromised QEMU): each violation ends its connection, leaks no
descriptor and no mapping, and the next front end is served.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import tempfile
import threading
from collections.abc import Callable

import pytest
from vhost_frontend import (
    ADD_MEM_REG,
    ALL_PROTOCOL,
    F_EVENT_IDX,
    GET_CONFIG,
    GET_FEATURES,
    GET_INFLIGHT_FD,
    GET_QUEUE_NUM,
    GET_VRING_BASE,
    OK,
    P_CONFIG,
    P_MQ,
    REM_MEM_REG,
    SET_BACKEND_REQ_FD,
    SET_CONFIG,
    SET_FEATURES,
    SET_INFLIGHT_FD,
    SET_LOG_BASE,
    SET_LOG_FD,
    SET_MEM_TABLE,
    SET_OWNER,
    SET_PROTOCOL_FEATURES,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    SET_VRING_CALL,
    SET_VRING_ENABLE,
    SET_VRING_ERR,
    SET_VRING_KICK,
    SET_VRING_NUM,
    T_OUT,
    Frontend,
    Gone,
    Memory,
    Queue,
    frontend,
)
from vhost_server import BROKEN, Server, wait_until

Attack = Callable[[Frontend], None]
ATTACKS: list[tuple[str, Attack]] = []


def attack(name: str) -> Callable[[Attack], Attack]:
    def add(f: Attack) -> Attack:
        ATTACKS.append((name, f))
        return f

    return add


def message(
    name: str, request: int, payload: bytes = b"", fds: int = 0, flags: int = 1, size: int | None = None
) -> None:
    """A message that must not be accepted, with that many eventfds attached."""

    def send(front: Frontend) -> None:
        with contextlib.ExitStack() as stack:
            attached = [os.eventfd(0) for _ in range(fds)]
            for fd in attached:
                stack.callback(os.close, fd)
            front.send(request, payload, attached, flags, size)

    ATTACKS.append((name, send))


u64 = struct.Struct("<Q").pack
state = struct.Struct("<II").pack

message("request 0", 0)
message("unknown request", 99)
message("request beyond all tables", 0xFFFFFFFF)
message("negotiable request that is not offered", 28, u64(0))
message("version 0", GET_FEATURES, flags=0)
message("version 2", GET_FEATURES, flags=2)
message("a reply", GET_FEATURES, flags=5)
message("payload where there is none", GET_FEATURES, u64(0))
message("payload too short", SET_FEATURES, bytes(4))
message("payload too long", SET_FEATURES, bytes(9))
message("payload of 4 GiB", SET_FEATURES, u64(0), size=0xFFFFFFFF)
message("no payload", SET_VRING_NUM)
message("unknown features", SET_FEATURES, u64(1 << 63))
message("features not offered", SET_FEATURES, u64(1 << 24))
message("unknown protocol features", SET_PROTOCOL_FEATURES, u64(1 << 40))
message("descriptor with a message that has none", GET_FEATURES, fds=1)
message("descriptors with a message that has none", SET_OWNER, fds=8)
message("more descriptors than any message may have", SET_OWNER, fds=30)
message("two kicks", SET_VRING_KICK, u64(0), fds=2)
message("kick announced, not attached", SET_VRING_KICK, u64(0))
message("kick attached, said to be none", SET_VRING_KICK, u64(0x100), fds=1)
message("a ring to poll for ever", SET_VRING_KICK, u64(0x100))
message("kick with unknown bits", SET_VRING_KICK, u64(1 << 32), fds=1)
message("kick of a queue too many", SET_VRING_KICK, u64(4), fds=1)
message("kick of queue 255", SET_VRING_KICK, u64(255), fds=1)
message("call of a queue too many", SET_VRING_CALL, u64(4), fds=1)
message("err of a queue too many", SET_VRING_ERR, u64(200), fds=1)
message("size of a queue too many", SET_VRING_NUM, state(4, 128))
message("size of queue -1", SET_VRING_NUM, state(0xFFFFFFFF, 128))
message("size 0", SET_VRING_NUM, state(1, 0))
message("size no power of two", SET_VRING_NUM, state(1, 100))
message("size 2048", SET_VRING_NUM, state(1, 2048))
message("size 65536 + 128", SET_VRING_NUM, state(1, 65536 + 128))
message("size of a running ring", SET_VRING_NUM, state(0, 128))
message("base of a queue too many", SET_VRING_BASE, state(4, 0))
message("base 65536", SET_VRING_BASE, state(1, 65536))
message("base of a running ring", SET_VRING_BASE, state(0, 0))
message("stop of a queue too many", GET_VRING_BASE, state(4, 0))
message("stop of queue -1", GET_VRING_BASE, state(0xFFFFFFFF, 0))
message("enable of a queue too many", SET_VRING_ENABLE, state(4, 1))
message("enable 2", SET_VRING_ENABLE, state(0, 2))
message("address of a queue too many", SET_VRING_ADDR, struct.pack("<IIQQQQ", 4, 0, 0, 0, 0, 0))
message("address with unknown flags", SET_VRING_ADDR, struct.pack("<IIQQQQ", 1, 2, 0, 0, 0, 0))
message("descriptors at an odd address", SET_VRING_ADDR, struct.pack("<IIQQQQ", 1, 0, 8, 0, 0, 0))
message("used ring at an odd address", SET_VRING_ADDR, struct.pack("<IIQQQQ", 1, 0, 0, 2, 0, 0))
message("avail ring at an odd address", SET_VRING_ADDR, struct.pack("<IIQQQQ", 1, 0, 0, 0, 1, 0))
message("other addresses of a running ring", SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, 0, 0, 0, 0))
message("table of no memory under a running ring", SET_MEM_TABLE, state(0, 0))
message("table with fewer descriptors than regions", SET_MEM_TABLE, state(2, 0) + bytes(64), fds=1)
message("table with more descriptors than regions", SET_MEM_TABLE, state(1, 0) + bytes(32), fds=2)
message("table shorter than it says", SET_MEM_TABLE, state(2, 0) + bytes(32), fds=2)
message("table longer than it says", SET_MEM_TABLE, state(1, 0) + bytes(64), fds=1)
message("table of 9", SET_MEM_TABLE, state(9, 0) + bytes(32 * 9), fds=8)
message("table of 4 billion", SET_MEM_TABLE, state(0xFFFFFFFF, 0) + bytes(32), fds=1)
message("region without descriptor", ADD_MEM_REG, bytes(40))
message("region in an eventfd", ADD_MEM_REG, bytes(8) + struct.pack("<QQQQ", 1 << 40, 4096, 1 << 40, 0), fds=1)
message("removal of an unknown region", REM_MEM_REG, bytes(8) + struct.pack("<QQQQ", 1 << 40, 4096, 1 << 40, 0))
message("log in an eventfd", SET_LOG_BASE, struct.pack("<QQ", 4096, 0), fds=1)
message("log without descriptor", SET_LOG_BASE, struct.pack("<QQ", 4096, 0))
message("log descriptor missing", SET_LOG_FD)
message("our channel missing", SET_BACKEND_REQ_FD)
message("our channel in an eventfd", SET_BACKEND_REQ_FD, fds=1)
message("in-flight table of no queue", GET_INFLIGHT_FD, struct.pack("<QQHHI", 0, 0, 0, 128, 0))
message("in-flight table of 5 queues", GET_INFLIGHT_FD, struct.pack("<QQHHI", 0, 0, 5, 128, 0))
message("in-flight table of 65535 queues", GET_INFLIGHT_FD, struct.pack("<QQHHI", 0, 0, 65535, 128, 0))
message("in-flight table of queues of none", GET_INFLIGHT_FD, struct.pack("<QQHHI", 0, 0, 1, 0, 0))
message("in-flight table of queues of 65535", GET_INFLIGHT_FD, struct.pack("<QQHHI", 0, 0, 1, 65535, 0))
message("in-flight table of a running ring", SET_INFLIGHT_FD, struct.pack("<QQHHI", 4096, 0, 1, 128, 0), fds=1)
message("configuration beyond its end", GET_CONFIG, struct.pack("<III", 250, 8, 0) + bytes(8))
message("configuration at -1", GET_CONFIG, struct.pack("<III", 0xFFFFFFFF, 1, 0) + bytes(1))
message("configuration of another size than the message", GET_CONFIG, struct.pack("<III", 0, 255, 0) + bytes(8))
message("configuration of 4 GiB", GET_CONFIG, struct.pack("<III", 8, 0xFFFFFFFF, 0) + bytes(8))
message("configuration set with a wrong size", SET_CONFIG, struct.pack("<III", 32, 200, 0) + b"\0")


@attack("event index switched off under a running ring")
def _(front: Frontend) -> None:
    front.send(SET_FEATURES, u64(front.features & ~(1 << F_EVENT_IDX)))


@attack("protocol features changed under a running ring")
def _(front: Frontend) -> None:
    front.send(SET_PROTOCOL_FEATURES, u64(front.protocol & ~(1 << P_MQ)))


@attack("running ring's memory removed")
def _(front: Frontend) -> None:
    assert front.memory
    front.send(REM_MEM_REG, bytes(8) + front.memory.describe())


@attack("ring started outside the memory")
def _(front: Frontend) -> None:
    assert front.memory
    far = Queue(front.memory)
    far.desc = 1 << 44
    with contextlib.suppress(Gone):
        front.start(1, far)


@attack("ring started across the end of the memory")
def _(front: Frontend) -> None:
    assert front.memory
    far = Queue(front.memory)
    far.used = front.memory.size - 100
    with contextlib.suppress(Gone):
        front.start(1, far)


@attack("ring larger than its in-flight table")
def _(front: Frontend) -> None:
    assert front.memory and front.inflight
    big = Queue(front.memory, 256)
    front.stop(0)
    with contextlib.suppress(Gone):
        front.start(0, big)


def region(name: str, size: int, *spec: int) -> None:
    """A region (guest, size, user, offset) in a memfd of `size` bytes, which must be refused."""

    @attack(name)
    def _(front: Frontend) -> None:
        fd = os.memfd_create("small")
        os.ftruncate(fd, size)
        front.send(ADD_MEM_REG, bytes(8) + struct.pack("<QQQQ", *spec), [fd])
        os.close(fd)


FREE = 1 << 40  # neither guest nor user address of anything
region("region of no size", 4096, FREE, 0, FREE, 0)
region("region larger than its file", 4096, FREE, 8192, FREE, 0)
region("region beyond its file", 4096, FREE, 4096, FREE, 4096)
region("region in an empty file", 0, FREE, 4096, FREE, 0)
region("region whose offset wraps", 4096, FREE, 4096, FREE, (1 << 64) - 4096)
region("region whose guest addresses wrap", 8192, (1 << 64) - 4096, 8192, FREE, 0)
region("region whose user addresses wrap", 8192, FREE, 8192, (1 << 64) - 4096, 0)
region("region of 2^63", 4096, FREE, 1 << 63, FREE, 0)
region("region of nearly 2^64", 4096, 0, (1 << 64) - 1, FREE, 0)
region("region over another's guest addresses", 8192, (4 << 20) - 4096, 8192, FREE, 0)
region("region over another's user addresses", 8192, FREE, 8192, 0x7F0000000000 - 4096, 0)


def with_fd(name: str, make: Callable[[], int], request: int, payload: bytes) -> None:
    @attack(name)
    def _(front: Frontend) -> None:
        fd = make()
        front.send(request, payload, [fd])
        os.close(fd)


def pipe_end() -> int:
    r, w = os.pipe()
    os.close(w)
    return r


def plain_file() -> int:
    fd, path = tempfile.mkstemp()
    os.unlink(path)
    return fd


def folder() -> int:
    return os.open("/", os.O_RDONLY)


def zero_device() -> int:
    return os.open("/dev/zero", os.O_RDWR)


def read_only_file() -> int:
    fd = os.memfd_create("readonly")
    os.ftruncate(fd, 8192)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    return again


def socket_end() -> int:
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


def epoll() -> int:
    with select.epoll() as made:
        return os.dup(made.fileno())


for kind, make in (
    ("pipe", pipe_end),
    ("file", plain_file),
    ("folder", folder),
    ("socket", socket_end),
    ("device", zero_device),
    ("epoll", epoll),
):
    for what, request in (("kick", SET_VRING_KICK), ("call", SET_VRING_CALL), ("err", SET_VRING_ERR)):
        with_fd(f"{what} is a {kind}", make, request, u64(0))
for kind, make in (("pipe", pipe_end), ("folder", folder), ("device", zero_device), ("read-only file", read_only_file)):
    with_fd(f"memory is a {kind}", make, ADD_MEM_REG, bytes(8) + struct.pack("<QQQQ", FREE, 4096, FREE, 0))
    with_fd(f"log is a {kind}", make, SET_LOG_BASE, struct.pack("<QQ", 8192, 0))


def memfd(size: int) -> Callable[[], int]:
    def make() -> int:
        fd = os.memfd_create("sized")
        os.ftruncate(fd, size)
        return fd

    return make


with_fd("log shorter than the memory needs", memfd(4096), SET_LOG_BASE, struct.pack("<QQ", 127, 0))
with_fd("log larger than its file", memfd(4096), SET_LOG_BASE, struct.pack("<QQ", 8192, 0))
with_fd("log beyond its file", memfd(4096), SET_LOG_BASE, struct.pack("<QQ", 4096, 1 << 62))
with_fd("log of 2^64", memfd(4096), SET_LOG_BASE, struct.pack("<QQ", (1 << 64) - 1, 1))


@attack("510 regions")
def _(front: Frontend) -> None:
    fd = os.memfd_create("many")
    os.ftruncate(fd, 4096)
    with contextlib.suppress(Gone):
        for n in range(510):
            front.tell(ADD_MEM_REG, bytes(8) + struct.pack("<QQQQ", FREE + n * 8192, 4096, FREE + n * 8192, 0), [fd])
    os.close(fd)


@attack("replies never read")
def _(front: Frontend) -> None:
    front.sock.settimeout(5)
    with contextlib.suppress(Gone, TimeoutError):
        for _ in range(100000):
            front.send(GET_FEATURES)


@attack("descriptor in the middle of a message")
def _(front: Frontend) -> None:
    fd = os.eventfd(0)
    front.sock.sendall(struct.pack("<III", SET_FEATURES, 1, 8) + bytes(4))
    front.sock.sendmsg([bytes(4)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))])
    os.close(fd)


@pytest.mark.parametrize(("name", "act"), ATTACKS, ids=[name for name, _ in ATTACKS])
def test_violation_ends_the_connection_and_nothing_else(vhost: Server, name: str, act: Attack) -> None:
    before = vhost.fds()
    with frontend(vhost.path) as front:
        assert front.write(0, b"h" * 512) == OK
        act(front)
        assert front.gone(), name
    vhost.quiet(before)
    assert (BROKEN, -1) in vhost.events()
    with frontend(vhost.path) as front:
        assert front.read(0, 512) == b"h" * 512
    vhost.quiet(before)


INFLIGHT = [
    ("no queue", (4096, 0, 0, 128)),
    ("5 queues", (65536, 0, 5, 128)),
    ("65535 queues", (1 << 30, 0, 65535, 1024)),
    ("queues of none", (4096, 0, 1, 0)),
    ("queues of 65535", (1 << 30, 0, 1, 65535)),
    ("too short", (2000, 0, 1, 128)),
    ("larger than its file", (65536, 0, 4, 1024)),
    ("beyond its file", (4096, 1 << 40, 1, 128)),
    ("offset wraps", (4096, (1 << 64) - 64, 1, 128)),
    ("crooked offset", (4096, 8, 1, 128)),
]


@pytest.mark.parametrize(("name", "geometry"), INFLIGHT, ids=[name for name, _ in INFLIGHT])
def test_in_flight_table_with_wrong_geometry(vhost: Server, name: str, geometry: tuple[int, int, int, int]) -> None:
    before = vhost.fds()
    front = Frontend(vhost.path)
    with contextlib.closing(front):
        front.negotiate()
        fd = memfd(8192)()
        front.send(SET_INFLIGHT_FD, struct.pack("<QQHHI", *geometry, 0), [fd])
        os.close(fd)
        assert front.gone(), name
    vhost.quiet(before)


@pytest.mark.parametrize("where", ["version", "entries", "batch", "links"])
def test_in_flight_table_of_nonsense_breaks_the_queue(vhost: Server, where: str) -> None:
    front = Frontend(vhost.path)
    with contextlib.closing(front):
        front.negotiate()
        fd = front.get_inflight(1, 128)
        nonsense = {
            "version": (8, b"\x07\x00"),
            "entries": (8, b"\x01\x00\x10\x00"),
            "batch": (8, struct.pack("<HHHH", 1, 128, 0, 60000)),
            "links": (8, struct.pack("<HHHH", 1, 128, 0xFFFF, 0xFFFF)),
        }[where]
        os.pwrite(fd, nonsense[1], nonsense[0])
        os.pwrite(fd, b"\x01", 16)  # head 0 is in flight
        front.set_inflight()
        front.set_features()
        memory = Memory()
        front.set_memory(memory)
        queue = Queue(memory)
        front.start(0, queue)
        assert queue.broken()
        assert front.config()


def test_message_of_a_feature_not_negotiated(vhost: Server) -> None:
    before = vhost.fds()
    for request, payload in ((GET_CONFIG, bytes(20)), (GET_QUEUE_NUM, b"")):
        front = Frontend(vhost.path)
        front.negotiate(protocol=ALL_PROTOCOL & ~(1 << P_CONFIG | 1 << P_MQ))
        front.send(request, payload)
        assert front.gone()
        front.close()
    vhost.quiet(before)


def test_connections_that_end_in_the_middle_of_a_message(vhost: Server) -> None:
    before = vhost.fds()
    with memory_descriptor() as fd:
        for cut in (0, 1, 11, 12, 13, 51):
            front = Frontend(vhost.path)
            whole = struct.pack("<III", ADD_MEM_REG, 1, 40) + bytes(40)
            front.negotiate()
            if cut:
                front.sock.sendmsg([whole[:cut]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))])
            front.close()
    vhost.quiet(before)
    assert vhost.stats().broken == 0


@contextlib.contextmanager
def memory_descriptor():  # type: ignore[no-untyped-def]
    fd = memfd(4096)()
    try:
        yield fd
    finally:
        os.close(fd)


def test_memory_truncated_under_a_running_ring_breaks_the_queue(vhost: Server) -> None:
    before = vhost.fds()
    with frontend(vhost.path) as front:
        queue = front.queues[0]
        assert front.write(0, b"t" * 512) == OK
        assert front.memory
        os.ftruncate(front.memory.fd, 0)
        queue.kick_now()
        assert queue.broken()
        assert front.gone()
    vhost.quiet(before)
    with frontend(vhost.path) as front:
        assert front.read(0, 512) == b"t" * 512


def test_in_flight_table_and_log_truncated_while_in_use(vhost: Server) -> None:
    before = vhost.fds()
    front = Frontend(vhost.path)
    with contextlib.closing(front):
        front.negotiate()
        size = 4096
        table, log = memfd(size)(), memfd(size)()
        front.inflight = (table, struct.pack("<QQHHI", size, 0, 1, 128, 0))
        front.set_inflight()
        front.set_features()
        memory = Memory()
        front.set_memory(memory)
        front.ask(SET_LOG_BASE, struct.pack("<QQ", size, 0), [log])
        front.set_features(1 << 26)
        front.start(0, Queue(memory))
        assert front.write(0, b"t" * 512) == OK
        os.ftruncate(table, 0)
        os.ftruncate(log, 0)
        os.close(log)
        assert front.read(0, 512) == b"t" * 512  # harmless to the guest; the tables' owner has harmed himself
        assert front.gone()
    vhost.quiet(before)


def test_memory_that_can_be_sealed_cannot_be_truncated(vhost: Server) -> None:
    memory = Memory()
    os.close(memory.fd)
    memory.map.close()
    memory.fd = os.memfd_create("sealable", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory.fd, memory.size)
    import mmap

    memory.map = mmap.mmap(memory.fd, memory.size)
    with frontend(vhost.path, memory=memory) as front:
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, 0)
        assert front.read(0, 512) == bytes(512)


def make_blocking(fd: int) -> None:
    """Of the open file, which the back end shares."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)


def clog(fd: int) -> None:
    """Another write to that eventfd blocks for ever."""
    make_blocking(fd)
    with contextlib.suppress(BlockingIOError):
        os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT)
    os.eventfd_write(fd, 0xFFFFFFFFFFFFFFFE)


def test_a_signal_to_a_clogged_eventfd_blocks_nobody(vhost: Server) -> None:
    before = vhost.fds()
    with frontend(vhost.path, queues=4) as front:
        for queue in front.queues:
            clog(queue.call)
        for n in range(40):
            number = n % 4
            queue = front.queues[number]
            head, _, status = front.build(T_OUT, n, data=bytes([n]) * 512, queue=number)
            queue.offer(head)
            queue.take()  # asks for a signal
            queue.kick_now()
            wait_until(lambda queue=queue: queue.used_idx() != queue.seen, f"request {n}")  # type: ignore[misc]
            assert queue.take() == [(head, 1)]
            assert queue.memory.read(status, 1)[0] == OK
        assert vhost.stats().clients == 1
        assert all(front.stop(n) == 10 for n in range(4))
    vhost.quiet(before)


def test_the_signal_of_a_broken_queue_blocks_nobody(vhost: Server) -> None:
    before = vhost.fds()
    with frontend(vhost.path) as front:
        queue = front.queues[0]
        clog(queue.err)
        queue.memory.write(queue.avail + 2, struct.pack("<H", 60000))  # more than the ring has
        queue.kick_now()
        wait_until(lambda: vhost.stats().broken == 1, "broken")
        assert front.config()
    vhost.quiet(before)


def test_a_kick_that_blocks_readers_blocks_nobody(vhost: Server) -> None:
    with frontend(vhost.path) as front:
        queue = front.queues[0]
        make_blocking(queue.kick)
        stop = threading.Event()

        def steal() -> None:  # what the back end's epoll has seen is gone before it reads
            while not stop.is_set():
                os.eventfd_write(queue.kick, 1)
                with contextlib.suppress(BlockingIOError):
                    os.preadv(queue.kick, [bytearray(8)], -1, os.RWF_NOWAIT)

        thief = threading.Thread(target=steal)
        thief.start()
        try:
            for n in range(300):
                assert front.write(n, bytes([n % 256]) * 512) == OK
        finally:
            stop.set()
            thief.join()
        assert front.config()


def test_hundreds_of_connections_leave_nothing(vhost: Server) -> None:
    before = vhost.fds()
    for n in range(200):
        front = Frontend(vhost.path)
        if n % 3 == 1:
            front.send(n)
        elif n % 3 == 2:
            front.negotiate()
            front.set_features()
        front.close()
    vhost.quiet(before)
    wait_until(lambda: vhost.stats().accepted == 200, "accepted")

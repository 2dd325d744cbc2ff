"""A vhost-user front end for tests: `mmap` and `struct`, nothing of ours. It plays QEMU and the guest's driver, and can
misbehave: every message and every byte of guest memory is open to the test.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE, SET_LOG_BASE, SET_LOG_FD = range(1, 8)
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = range(8, 12)
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = range(12, 15)
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = range(15, 19)
SET_BACKEND_REQ_FD = 21
GET_CONFIG, SET_CONFIG = 24, 25
GET_INFLIGHT_FD, SET_INFLIGHT_FD = 31, 32
RESET_DEVICE = 34
GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG = 36, 37, 38

P_MQ, P_LOG_SHMFD, P_REPLY_ACK, P_BACKEND_REQ, P_CONFIG = 0, 1, 3, 5, 9
P_INFLIGHT, P_RESET_DEVICE, P_MEM_SLOTS = 12, 13, 15
ALL_PROTOCOL = sum(
    1 << bit
    for bit in (P_MQ, P_LOG_SHMFD, P_REPLY_ACK, P_BACKEND_REQ, P_CONFIG, P_INFLIGHT, P_RESET_DEVICE, P_MEM_SLOTS)
)

F_RO, F_FLUSH, F_CONFIG_WCE, F_MQ, F_DISCARD, F_ZEROES = 5, 9, 11, 12, 13, 14
F_LOG_ALL, F_INDIRECT, F_EVENT_IDX, F_PROTOCOL, F_VERSION_1 = 26, 28, 29, 30, 32

T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2

NEXT, WRITE, INDIRECT = 1, 2, 4
PAGE = 4096
TIMEOUT = 10.0  # seconds; far beyond what anything here takes


class Gone(ConnectionError):
    """The back end closed the connection."""


@dataclass
class Reply:
    request: int
    flags: int
    payload: bytes
    fds: list[int]


class Memory:
    """One region of guest memory in a memfd of its own."""

    def __init__(self, size: int = 4 << 20, guest: int = 0, user: int = 0x7F0000000000, offset: int = 0) -> None:
        self.size, self.guest, self.user, self.offset = size, guest, user, offset
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size + offset)
        self.map = mmap.mmap(self.fd, size + offset)
        self.next = 0

    def alloc(self, size: int, align: int = 16) -> int:
        """A free guest address; aligned."""
        at = -(-self.next // align) * align
        assert at + size <= self.size, "the test's guest has too little memory"
        self.next = at + size
        return self.guest + at

    def read(self, guest: int, size: int) -> bytes:
        at = guest - self.guest + self.offset
        return self.map[at : at + size]

    def write(self, guest: int, data: bytes) -> None:
        at = guest - self.guest + self.offset
        self.map[at : at + len(data)] = data

    def describe(self) -> bytes:
        return struct.pack("<QQQQ", self.guest, self.size, self.user, self.offset)

    def to_user(self, guest: int) -> int:
        return guest - self.guest + self.user

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


class Queue:
    """A split ring and the driver that fills it."""

    def __init__(self, memory: Memory, num: int = 128) -> None:
        self.memory, self.num = memory, num
        self.desc = memory.alloc(16 * num)
        self.avail = memory.alloc(6 + 2 * num, 2)
        self.used = memory.alloc(6 + 8 * num, 4)
        self.kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.err = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.free = list(range(num))
        self.chains: dict[int, list[int]] = {}  # head -> its descriptors
        self.avail_idx = 0
        self.seen = 0  # used entries taken
        self.event_idx = True

    def set_desc(self, index: int, addr: int, length: int, flags: int = 0, following: int = 0) -> None:
        self.memory.write(self.desc + 16 * index, struct.pack("<QIHH", addr, length, flags, following))

    def add(self, buffers: Sequence[tuple[int, int, int]], indirect: bool = False) -> int:
        """Writes a chain of (address, length, flags); returns its head. Not offered yet."""
        if indirect:
            table = self.memory.alloc(16 * len(buffers))
            for n, (addr, length, flags) in enumerate(buffers):
                more = n + 1 < len(buffers)
                entry = struct.pack("<QIHH", addr, length, flags | (NEXT if more else 0), n + 1 if more else 0)
                self.memory.write(table + 16 * n, entry)
            head = self.free.pop(0)
            self.set_desc(head, table, 16 * len(buffers), INDIRECT)
            self.chains[head] = [head]
            return head
        used = [self.free.pop(0) for _ in buffers]
        for n, (addr, length, flags) in enumerate(buffers):
            more = n + 1 < len(buffers)
            self.set_desc(used[n], addr, length, flags | (NEXT if more else 0), used[n + 1] if more else 0)
        self.chains[used[0]] = used
        return used[0]

    def offer(self, *heads: int) -> None:
        """Puts heads into the avail ring and moves its index."""
        for head in heads:
            self.memory.write(self.avail + 4 + 2 * (self.avail_idx % self.num), struct.pack("<H", head))
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.memory.write(self.avail + 2, struct.pack("<H", self.avail_idx))

    def kick_now(self) -> None:
        os.eventfd_write(self.kick, 1)

    def used_idx(self) -> int:
        return int(struct.unpack("<H", self.memory.read(self.used + 2, 2))[0])

    def take(self) -> list[tuple[int, int]]:
        """(head, length) of what was used since the last time; frees the descriptors."""
        out = []
        while self.seen != self.used_idx():
            head, length = struct.unpack("<II", self.memory.read(self.used + 4 + 8 * (self.seen % self.num), 8))
            self.seen = (self.seen + 1) & 0xFFFF
            self.free += self.chains.pop(head, [])
            out.append((head, length))
        # used_event: signal the very next one
        self.memory.write(self.avail + 4 + 2 * self.num, struct.pack("<H", self.seen))
        return out

    def wait(self, count: int = 1, timeout: float = TIMEOUT) -> list[tuple[int, int]]:
        """Waits by the call eventfd until `count` entries were used."""
        out = self.take()
        deadline = time.monotonic() + timeout
        while len(out) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{len(out)} of {count} used")
            if select.select([self.call], [], [], left)[0]:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self.call)
            out += self.take()
        return out

    def signalled(self) -> bool:
        """Was there a signal since the last one was taken? Takes it."""
        with contextlib.suppress(BlockingIOError):
            return os.eventfd_read(self.call) > 0
        return False

    def broken(self, timeout: float = TIMEOUT) -> bool:
        """Waits for the error eventfd."""
        return bool(select.select([self.err], [], [], timeout)[0])

    def close(self) -> None:
        for fd in (self.kick, self.call, self.err):
            os.close(fd)


class Frontend:
    """One connection, one or more regions, queues."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT)
        try:
            self.sock.connect(os.fspath(path))
        except OSError:
            self.sock.close()
            raise
        self.memory: Memory | None = None
        self.queues: list[Queue] = []
        self.features = 0
        self.protocol = 0
        self.backend: socket.socket | None = None
        self.inflight: tuple[int, bytes] | None = None  # descriptor, payload of SET_INFLIGHT_FD

    # ---- messages ----

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 1, size: int | None = None
    ) -> None:
        header = struct.pack("<III", request, flags, len(payload) if size is None else size)
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        try:
            self.sock.sendmsg([header + payload], control)
        except (BrokenPipeError, ConnectionResetError) as e:
            raise Gone from e

    def _recv(self, size: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part, control, _, _ = self.sock.recvmsg(size - len(data), socket.CMSG_SPACE(64))
            except ConnectionResetError as e:
                raise Gone from e
            for _, _, raw in control:
                fds += array.array("i", raw).tolist()
            if not part:
                raise Gone
            data += part
        return data

    def receive(self) -> Reply:
        fds: list[int] = []
        request, flags, size = struct.unpack("<III", self._recv(12, fds))
        return Reply(request, flags, self._recv(size, fds), fds)

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Reply:
        """A message that has a reply of its own."""
        self.send(request, payload, fds)
        reply = self.receive()
        assert (reply.request, reply.flags) == (request, 5), reply
        return reply

    def ask_u64(self, request: int, payload: bytes = b"") -> int:
        return int(struct.unpack("<Q", self.ask(request, payload).payload)[0])

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """A message without reply; waits for its acknowledgement (0 = done) where that is negotiated."""
        if not self.protocol >> P_REPLY_ACK & 1:
            self.send(request, payload, fds)
            return 0
        self.send(request, payload, fds, flags=9)
        reply = self.receive()
        assert (reply.request, reply.flags) == (request, 5), reply
        return int(struct.unpack("<Q", reply.payload)[0])

    def gone(self, timeout: float = TIMEOUT) -> bool:
        """Waits for the back end to close the connection."""
        self.sock.settimeout(timeout)
        try:
            while self.sock.recv(4096):
                pass
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False
        return True

    # ---- set-up ----

    def negotiate(self, drop: int = 0, protocol: int = ALL_PROTOCOL) -> None:
        """Takes all features but those in `drop` (a mask), and the protocol features given."""
        offered = self.ask_u64(GET_FEATURES)
        if offered >> F_PROTOCOL & 1 and not drop >> F_PROTOCOL & 1:
            self.protocol = self.ask_u64(GET_PROTOCOL_FEATURES) & protocol
            self.send(SET_PROTOCOL_FEATURES, struct.pack("<Q", self.protocol))
        self.tell(SET_OWNER)
        self.features = offered & ~drop & ~(1 << F_LOG_ALL)

    def set_features(self, extra: int = 0) -> None:
        self.tell(SET_FEATURES, struct.pack("<Q", self.features | extra))

    def set_memory(self, *regions: Memory) -> None:
        self.memory = regions[0]
        if self.protocol >> P_MEM_SLOTS & 1:
            for region in regions:
                self.tell(ADD_MEM_REG, bytes(8) + region.describe(), [region.fd])
        else:
            payload = struct.pack("<II", len(regions), 0) + b"".join(region.describe() for region in regions)
            self.tell(SET_MEM_TABLE, payload, [region.fd for region in regions])

    def get_inflight(self, queues: int, num: int) -> int:
        """Asks for a table and keeps it; returns its descriptor."""
        reply = self.ask(GET_INFLIGHT_FD, struct.pack("<QQHHI", 0, 0, queues, num, 0))
        assert len(reply.fds) == 1
        self.inflight = (reply.fds[0], reply.payload)
        return reply.fds[0]

    def set_inflight(self) -> None:
        assert self.inflight
        self.tell(SET_INFLIGHT_FD, self.inflight[1], [self.inflight[0]])

    def set_addr(self, index: int, queue: Queue, flags: int = 0, log: int = 0) -> None:
        to = queue.memory.to_user
        payload = struct.pack("<IIQQQQ", index, flags, to(queue.desc), to(queue.used), to(queue.avail), log)
        self.tell(SET_VRING_ADDR, payload)

    def start(self, index: int, queue: Queue, base: int = 0, enable: bool = True) -> None:
        queue.event_idx = bool(self.features >> F_EVENT_IDX & 1)
        while len(self.queues) <= index:
            self.queues.append(queue)
        self.queues[index] = queue
        self.tell(SET_VRING_NUM, struct.pack("<II", index, queue.num))
        self.tell(SET_VRING_BASE, struct.pack("<II", index, base))
        self.set_addr(index, queue)
        self.tell(SET_VRING_ERR, struct.pack("<Q", index), [queue.err])
        self.tell(SET_VRING_CALL, struct.pack("<Q", index), [queue.call])
        self.tell(SET_VRING_KICK, struct.pack("<Q", index), [queue.kick])
        if enable and self.protocol:
            self.enable(index)

    def enable(self, index: int, on: int = 1) -> None:
        self.tell(SET_VRING_ENABLE, struct.pack("<II", index, on))

    def stop(self, index: int) -> int:
        """GET_VRING_BASE."""
        reply = self.ask(GET_VRING_BASE, struct.pack("<II", index, 0))
        got, base = struct.unpack("<II", reply.payload)
        assert got == index
        return int(base)

    def config(self, offset: int = 0, size: int = 60) -> bytes:
        reply = self.ask(GET_CONFIG, struct.pack("<III", offset, size, 0) + bytes(size))
        assert reply.payload[:12] == struct.pack("<III", offset, size, 0)
        return reply.payload[12:]

    def open_backend(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.settimeout(TIMEOUT)
        with theirs:
            self.tell(SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        self.backend = ours
        return ours

    # ---- the guest's driver ----

    def build(
        self,
        kind: int,
        sector: int = 0,
        data: bytes = b"",
        want: int = 0,
        queue: int = 0,
        indirect: bool = False,
        pieces: int = 1,
    ) -> tuple[int, int, int]:
        """A request in memory: (head, address of the data, address of the status). Readable data, or `want` bytes."""
        q = self.queues[queue]
        m = q.memory
        header = m.alloc(16)
        m.write(header, struct.pack("<IIQ", kind, 0, sector))
        status = m.alloc(1, 1)
        m.write(status, b"\xff")
        size = len(data) or want
        at = m.alloc(size, 512) if size else 0
        if data:
            m.write(at, data)
        flag = 0 if data else WRITE
        step = max(size // pieces, 1)
        parts = [(at + n, min(step, size - n), flag) for n in range(0, size, step)]
        return q.add([(header, 16, 0), *parts, (status, 1, WRITE)], indirect), at, status

    def request(
        self,
        kind: int,
        sector: int = 0,
        data: bytes = b"",
        want: int = 0,
        queue: int = 0,
        indirect: bool = False,
        pieces: int = 1,
    ) -> tuple[int, bytes]:
        """Runs one request to its end: (status, data read). The memory it takes is given back."""
        q = self.queues[queue]
        mark = q.memory.next
        head, at, status = self.build(kind, sector, data, want, queue, indirect, pieces)
        q.offer(head)
        q.kick_now()
        used = q.wait()
        assert [h for h, _ in used] == [head], used
        q.memory.next = mark
        return q.memory.read(status, 1)[0], q.memory.read(at, want) if want else b""

    def write(self, sector: int, data: bytes, **how: object) -> int:
        return self.request(T_OUT, sector, data=data, **how)[0]  # type: ignore[arg-type]

    def read(self, sector: int, size: int, **how: object) -> bytes:
        status, data = self.request(T_IN, sector, want=size, **how)  # type: ignore[arg-type]
        assert status == OK, status
        return data

    def close(self) -> None:
        self.sock.close()
        for queue in set(self.queues):
            queue.close()
        if self.backend:
            self.backend.close()
        if self.inflight:
            os.close(self.inflight[0])
        if self.memory:
            self.memory.close()


@contextlib.contextmanager
def frontend(
    path: str | os.PathLike[str],
    queues: int = 1,
    num: int = 128,
    drop: int = 0,
    protocol: int = ALL_PROTOCOL,
    inflight: bool = True,
    memory: Memory | None = None,
) -> Iterator[Frontend]:
    """A front end with running queues, as QEMU sets them up."""
    front = Frontend(path)
    try:
        front.negotiate(drop, protocol)
        memory = memory or Memory()
        front.memory = memory
        if inflight and front.protocol >> P_INFLIGHT & 1:
            front.get_inflight(queues, num)
            front.set_inflight()
        front.set_features()
        front.set_memory(memory)
        for n in range(queues):
            front.start(n, Queue(memory, num))
        yield front
    finally:
        front.close()

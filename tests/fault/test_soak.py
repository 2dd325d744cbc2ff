"""Eight exports of one daemon under mixed load, each verified against a model, beside clients that never read their
replies. A few seconds in the suite, minutes with `make soak`."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_client import FLUSH, READ, TRIM, WRITE, WRITE_ZEROES, Client, request
from stack import Stack, check_store, create
from vhost_frontend import OK, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_ZEROES, Frontend, frontend

MIB = 1 << 20
SECONDS = 240.0 if os.environ.get("RBDPY_SOAK") else 5.0
EXPORTS = 8
SIZE = 32 * MIB
BLOCK = 4096
LONGEST = 64  # blocks of a request
SLOW = 4  # clients that do not read
HELD = 64 * MIB  # what the server may keep for one of them
SLACK = 96 * MIB  # of the daemon for everything else
PATIENCE = 20.0  # seconds that no request may take, however busy the machine


class Guest(ABC):
    """Somebody who uses one export."""

    @abstractmethod
    def read(self, offset: int, size: int) -> bytes: ...

    @abstractmethod
    def write(self, offset: int, data: bytes) -> None: ...

    @abstractmethod
    def zero(self, offset: int, size: int) -> None: ...

    @abstractmethod
    def discard(self, offset: int, size: int) -> None: ...

    @abstractmethod
    def flush(self) -> None: ...


class NBDGuest(Guest):
    def __init__(self, client: Client) -> None:
        self.client = client

    def read(self, offset: int, size: int) -> bytes:
        return self.client.read(offset, size)

    def write(self, offset: int, data: bytes) -> None:
        assert self.client.call(WRITE, offset, len(data), data=data).error == 0

    def zero(self, offset: int, size: int) -> None:
        assert self.client.call(WRITE_ZEROES, offset, size).error == 0

    def discard(self, offset: int, size: int) -> None:
        assert self.client.call(TRIM, offset, size).error == 0

    def flush(self) -> None:
        assert self.client.call(FLUSH).error == 0


class VhostGuest(Guest):
    def __init__(self, front: Frontend) -> None:
        self.front = front

    def read(self, offset: int, size: int) -> bytes:
        status, data = self.front.request(T_IN, offset // 512, want=size)
        assert status == OK
        return data

    def write(self, offset: int, data: bytes) -> None:
        assert self.front.request(T_OUT, offset // 512, data=data)[0] == OK

    def _range(self, kind: int, offset: int, size: int) -> None:
        assert self.front.request(kind, 0, data=struct.pack("<QII", offset // 512, size // 512, 0))[0] == OK

    def zero(self, offset: int, size: int) -> None:
        self._range(T_ZEROES, offset, size)

    def discard(self, offset: int, size: int) -> None:
        self._range(T_DISCARD, offset, size)

    def flush(self) -> None:
        assert self.front.request(T_FLUSH)[0] == OK


class Load:
    """Random requests, and what every block must hold: the number of the write, 0 for zeroes, None after a discard."""

    def __init__(self, seed: int, guest: Guest) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.guest = guest
        self.blocks: list[int | None] = [0] * (SIZE // BLOCK)
        self.operations = 0
        self.slowest = 0.0  # seconds

    def content(self, block: int, number: int) -> bytes:
        return struct.pack("<QQQQ", self.seed, block, number, number) * (BLOCK // 32) if number else bytes(BLOCK)

    def check(self, first: int, data: bytes) -> None:
        for at in range(len(data) // BLOCK):
            expected = self.blocks[first + at]
            if expected is not None:
                found = data[at * BLOCK : (at + 1) * BLOCK]
                assert found == self.content(first + at, expected), (self.seed, first + at, expected)

    def step(self) -> None:
        count = self.rng.randrange(1, LONGEST)
        first = self.rng.randrange(SIZE // BLOCK - count)
        offset, size = first * BLOCK, count * BLOCK
        kind = self.rng.choices(("read", "write", "zero", "discard", "flush"), (40, 45, 5, 5, 5))[0]
        self.operations += 1
        begun = time.monotonic()
        if kind == "read":
            self.check(first, self.guest.read(offset, size))
        elif kind == "write":
            number = self.operations
            self.guest.write(offset, b"".join(self.content(block, number) for block in range(first, first + count)))
            self.blocks[first : first + count] = [number] * count
        elif kind == "zero":
            self.guest.zero(offset, size)
            self.blocks[first : first + count] = [0] * count
        elif kind == "discard":
            self.guest.discard(offset, size)
            self.blocks[first : first + count] = [None] * count
        else:
            self.guest.flush()
        self.slowest = max(self.slowest, time.monotonic() - begun)

    def verify(self) -> None:
        for first in range(0, SIZE // BLOCK, 64):
            self.check(first, self.guest.read(first * BLOCK, 64 * BLOCK))


class Slow:
    """A client that asks and asks and reads nothing."""

    def __init__(self, client: Client) -> None:
        self.client = client
        client.sock.setblocking(False)
        self.sent = 0
        self.rest = b""

    def push(self) -> None:
        """As much as the server takes; bounded, so that a server that takes all is found out and not for ever."""
        with contextlib.suppress(BlockingIOError):
            while self.sent < 4000:
                self.rest = self.rest or request(READ, 0, MIB, cookie=self.sent)
                self.rest = self.rest[self.client.sock.send(self.rest) :]
                self.sent += not self.rest


def resident(pid: int) -> int:
    """Bytes that are the process' own: mapped image files are the page cache's."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Stack]:
    names = [f"disk{number}" for number in range(EXPORTS)]
    for name in names:
        create(tmp_path / "store", name, SIZE)
    with contextlib.closing(Stack(tmp_path, tmp_path / "store")) as s:
        s.start()
        s.serve(*names)
        for name in names[EXPORTS // 2 :]:
            more = {"addr": {"type": "unix", "path": str(tmp_path / name)}, "writable": True}
            s.qmp("block-export-add", type="vhost-user-blk", id=f"{name}-v", node_name=name, **more)
        yield s
        assert s.stop() == 0, s.daemon.log.read_text()
    assert check_store(tmp_path / "store") == "no findings\n"


def test_mixed_load_beside_clients_that_never_read(daemon: Stack) -> None:
    with contextlib.ExitStack() as stack:
        guests: list[Guest] = [NBDGuest(daemon.client(f"disk{n}", PATIENCE)) for n in range(EXPORTS // 2)]
        for number in range(EXPORTS // 2, EXPORTS):
            guests.append(VhostGuest(stack.enter_context(frontend(daemon.folder / f"disk{number}"))))
        loads = [Load(number + 1, guest) for number, guest in enumerate(guests)]
        before = resident(daemon.daemon.pid)
        slow = [Slow(daemon.client(f"disk{n}")) for n in range(SLOW)]
        end = time.monotonic() + SECONDS
        failures: list[BaseException] = []

        def work(load: Load) -> None:
            try:
                while time.monotonic() < end and not failures:
                    load.step()
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=work, args=(load,)) for load in loads]
        for thread in threads:
            thread.start()
        largest = 0
        while any(thread.is_alive() for thread in threads):
            for client in slow:
                client.push()
            largest = max(largest, resident(daemon.daemon.pid))
            threads[0].join(0.05)
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        assert largest - before < SLOW * HELD + SLACK, f"{(largest - before) >> 20} MiB more"
        assert all(0 < client.sent < 4000 for client in slow), [client.sent for client in slow]
        assert all(load.operations > SECONDS for load in loads), [load.operations for load in loads]
        assert max(load.slowest for load in loads) < PATIENCE
        for client in slow:
            client.client.close()
        for load in loads:
            load.guest.flush()
            load.verify()
        deadline = time.monotonic() + 20
        while resident(daemon.daemon.pid) - before > SLACK:  # what slow clients held comes back
            assert time.monotonic() < deadline, resident(daemon.daemon.pid) - before
            time.sleep(0.05)

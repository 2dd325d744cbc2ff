"""vhost-user-blk: a copy of a guest's memory, made from the dirty log alone while 128 requests are in flight at any
time, is the guest's memory in the end. What the device writes and does not log would be stale on the next host."""

from __future__ import annotations

import random
import struct

import pytest
from test_vhost_migration import Log, begin
from vhost_frontend import F_EVENT_IDX, F_INDIRECT, INDIRECT, OK, PAGE, T_IN, T_OUT, WRITE, Frontend, Memory, frontend
from vhost_server import Server

DEPTH = 128
BLOCKS = 256  # of 4 KiB on the disk, each with a content of its own
REQUESTS = 6000


def content(block: int, turn: int = 0) -> bytes:
    return struct.pack("<QQ", block, turn) * (PAGE // 16)


class Slot:
    """One request's memory: what the driver writes in two pages, what the device writes in others: data, not aligned to
    pages, and the status."""

    def __init__(self, memory: Memory, shift: int) -> None:
        self.driver = memory.alloc(PAGE, PAGE)
        self.out = memory.alloc(PAGE, PAGE)
        self.data = memory.alloc(2 * PAGE, PAGE) + shift
        self.status = memory.alloc(PAGE, PAGE) + 7

    def written(self) -> list[tuple[int, int]]:
        """What the device may write to: (address, bytes)."""
        return [(self.data, PAGE), (self.status, 1)]


class Driver:
    """Keeps 128 requests in flight, each one indirect descriptor."""

    def __init__(self, front: Frontend, seed: int) -> None:
        self.queue = front.queues[0]
        self.memory = self.queue.memory
        self.random = random.Random(seed)
        self.slots = [Slot(self.memory, self.random.choice([0, 512, 2048, 3584])) for _ in range(DEPTH)]
        self.reads = 0

    def offer(self, head: int) -> None:
        slot, memory, block = self.slots[head], self.memory, self.random.randrange(BLOCKS)
        read = self.random.random() < 0.8
        self.reads += read
        if not read:
            block = BLOCKS + head  # nobody else's
            memory.write(slot.out, content(block))
        memory.write(slot.driver, struct.pack("<IIQ", T_IN if read else T_OUT, 0, block * PAGE // 512))
        data = (slot.data, PAGE, WRITE) if read else (slot.out, PAGE, 0)
        parts = [(slot.driver, 16, 0), data, (slot.status, 1, WRITE)]
        for n, (address, length, flags) in enumerate(parts):
            last = n == len(parts) - 1
            entry = struct.pack("<QIHH", address, length, flags | (not last), 0 if last else n + 1)
            memory.write(slot.driver + 64 + 16 * n, entry)
        self.queue.set_desc(head, slot.driver + 64, 16 * len(parts), INDIRECT)
        self.queue.offer(head)

    def step(self) -> list[int]:
        """Waits for some; their heads."""
        return [head for head, _ in self.queue.wait()]


@pytest.mark.parametrize("vhost", [(), ("async",)], indirect=True, ids=["inline", "other threads"])
@pytest.mark.parametrize("drop", [0, 1 << F_EVENT_IDX], ids=["event index", "flags"])
def test_a_copy_made_from_the_log_is_the_memory(vhost: Server, drop: int) -> None:
    vhost.ok("offer 1")  # nobody answers the switch-over here
    logs = [Log(), Log()]
    with frontend(vhost.path, drop=drop, memory=Memory(4 << 20)) as front:
        assert front.features >> F_INDIRECT & 1
        for block in range(BLOCKS):
            assert front.write(block * PAGE // 512, content(block)) == OK
        driver = Driver(front, 1)
        memory, queue = driver.memory, driver.queue
        for head in range(DEPTH):
            driver.offer(head)
        queue.kick_now()
        begin(front, logs[0])
        copy = bytearray(memory.map)  # the first pass, under way
        done = looks = pages = 0
        while done < REQUESTS:
            heads = driver.step()
            done += len(heads)
            for head in heads:
                assert memory.read(driver.slots[head].status, 1) == b"\0"
                driver.offer(head)
            queue.kick_now()
            if looks * 97 <= done < REQUESTS - 200:
                looks += 1
                logs[looks % 2].give(front)  # answered when nobody writes to the other one any more
                pages += transfer(memory, copy, logs[(looks + 1) % 2])
        front.stop(0)
        before = bytes(copy)
        pages += transfer(memory, copy, logs[looks % 2])
        stale = 0
        areas = [area for slot in driver.slots for area in slot.written()]
        areas.append((queue.used, 6 + 8 * queue.num))
        for address, size in areas:
            assert copy[address : address + size] == memory.read(address, size), hex(address)
            stale += before[address : address + size] != memory.read(address, size)
        assert stale, "the last look at the log brought nothing: this test would not see a page that is missing"
        assert driver.reads > REQUESTS // 2
        assert pages > looks
    for log in logs:
        log.close()


def transfer(memory: Memory, copy: bytearray, log: Log) -> int:
    """What QEMU does with a log that nobody writes to: pages copied."""
    pages = log.pages()
    for page in pages:
        at = page * PAGE - memory.guest
        if 0 <= at < memory.size:
            copy[at : at + PAGE] = memory.map[at : at + PAGE]
    return len(pages)

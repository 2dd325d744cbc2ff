"""rbdpyd killed under NBD load, again and again: what was flushed is there, every sector is one that was written."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

from nbd_client import FLUSH, WRITE, Client, Closed
from stack import Stack, check_store, create, pool, stack

from librbd_py import rbd

SECTOR = 4096
SECTORS = 512  # in use, spread over the image
STEP = 40 << 10  # bytes from one to the next
KILLS = 10
DEPTH = 16


def stamp(sector: int, number: int) -> bytes:
    return struct.pack("<QQ", sector, number) * (SECTOR // 16)


class Writer:
    """Up to DEPTH writes and a flush now and then in flight. `flushed`: what every sector holds at least."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.number = 0
        self.flushed = dict.fromkeys(range(SECTORS), 0)
        self.written = dict(self.flushed)  # the last one sent

    def run(self, s: Stack, client: Client, replies: int) -> None:
        """Kills the daemon after that many replies, with requests in flight."""
        waiting: dict[int, tuple[int, int] | dict[int, int]] = {}
        acknowledged = dict(self.flushed)
        try:
            while True:
                while len(waiting) < DEPTH:
                    if self.rng.random() < 0.05:
                        waiting[client.start(FLUSH)] = dict(acknowledged)
                        continue
                    busy = {entry[0] for entry in waiting.values() if isinstance(entry, tuple)}
                    sector = self.rng.choice([n for n in range(SECTORS) if n not in busy])
                    self.number += 1
                    self.written[sector] = self.number
                    data = stamp(sector, self.number)
                    waiting[client.start(WRITE, sector * STEP, SECTOR, data=data)] = (sector, self.number)
                if replies == 0:
                    s.kill()
                reply = client.reply()
                replies -= 1
                assert not reply.error, reply
                entry = waiting.pop(reply.cookie)
                if isinstance(entry, tuple):
                    acknowledged[entry[0]] = entry[1]
                else:
                    self.flushed = {n: max(entry[n], self.flushed[n]) for n in entry}
        except (Closed, ConnectionError):
            assert replies <= 0, "the daemon closed the connection by itself"

    def verify(self, client: Client) -> None:
        """What is found becomes what must be there: it was read."""
        for sector in range(SECTORS):
            data = client.read(sector * STEP, SECTOR)
            found, number = struct.unpack_from("<QQ", data)
            assert data == (stamp(sector, number) if number else bytes(SECTOR)), f"sector {sector} is torn"
            assert found == (sector if number else 0)
            low, high = self.flushed[sector], self.written[sector]
            assert low <= number <= high, f"sector {sector}: {number} found, {low} flushed, {high} written"
            self.flushed[sector] = self.written[sector] = number


def test_a_daemon_killed_under_load(tmp_path: Path) -> None:
    rng = random.Random(3)
    store = tmp_path / "store"
    create(store, "disk", SECTORS * STEP + SECTOR, order=20)
    writer = Writer(rng)
    with stack(tmp_path, store) as s:
        s.serve("disk")
        for kill in range(KILLS):
            with s.client("disk") as client:
                writer.run(s, client, rng.randrange(1, 1500))
            if kill == KILLS // 2:
                assert check_store(store)
                with pool(store) as ioctx, rbd.Image(ioctx, "disk") as image:
                    image.create_snap("middle")
            s.start()
            started = time.monotonic()
            with s.client("disk") as client:
                writer.verify(client)
                client.write(SECTORS * STEP, b"x" * SECTOR)  # needs the lock of the dead
            assert time.monotonic() - started < 10, "the dead owner's lock was waited for"
        assert s.stop() == 0
    assert sum(n > 0 for n in writer.flushed.values()) > SECTORS // 2
    assert check_store(store) == "no findings\n"

"""FLUSH over NBD and the exclusive lock. QEMU sends it at moments that have nothing to do with whom the lock belongs
to: the source of a migration two times after the destination runs. Only what was written here may need the lock."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nbd_client import FLUSH, Client
from test_handoff import World

from qemu_glue.client import Daemon

PATIENCE = 20.0  # seconds
AT_ONCE = 5.0  # seconds; asking a living owner for the lock, and writing, takes a tenth


class Side:
    """A daemon that serves the image over NBD, and its client."""

    def __init__(self, folder: Path, url: str) -> None:
        folder.mkdir(exist_ok=True)
        self.daemon = Daemon(folder, url)
        self.path = str(folder / "nbd.sock")
        self.client: Client

    async def serve(self) -> None:
        await self.daemon.execute("blockdev-add", {"driver": "rbd", "node-name": "d0", "pool": "rbd", "image": "disk"})
        await self.daemon.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": self.path}}})
        await self.daemon.execute(
            "block-export-add", {"type": "nbd", "id": "n", "node-name": "d0", "writable": True, "name": ""}
        )

        def connect() -> Client:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(PATIENCE)
            sock.connect(self.path)
            return Client(sock).negotiate()

        self.client = await asyncio.to_thread(connect)

    async def write(self, at: int, text: bytes) -> None:
        await asyncio.to_thread(self.client.write, at, text.ljust(512))

    async def read(self, at: int) -> bytes:
        return (await asyncio.to_thread(self.client.read, at, 512)).rstrip()

    async def flush(self) -> None:
        reply = await asyncio.wait_for(asyncio.to_thread(self.client.call, FLUSH), PATIENCE)
        assert not reply.error, reply


@asynccontextmanager
async def two(world: World, folder: Path) -> AsyncIterator[tuple[Side, Side]]:
    sides = Side(folder / "na", world.url), Side(folder / "nb", world.url)
    try:
        for side in sides:
            await side.daemon.start()
            await side.serve()
        yield sides
    finally:
        for side in sides:
            if hasattr(side, "client"):
                side.client.close()
            await side.daemon.stop()
        world.guest.close()
        if world._store is not None:
            world._store.close()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_flush_of_who_wrote_nothing_leaves_the_lock_where_it_is(world: World, tmp_path: Path) -> None:
    async def work() -> None:
        async with two(world, tmp_path) as (a, b):
            await b.flush()
            assert world.owner() is None, "nobody wrote"
            await a.write(0, b"a")
            owner = world.owner()
            assert owner is not None
            await b.flush()
            assert await b.read(0) == b"a"
            await b.flush()
            assert world.owner() == owner

    asyncio.run(work())


def test_a_flush_after_the_lock_has_moved_is_answered_and_does_not_fetch_it_back(world: World, tmp_path: Path) -> None:
    """What was written here was flushed when the lock was given up."""

    async def work() -> None:
        async with two(world, tmp_path) as (a, b):
            await a.write(0, b"a")
            await b.write(512, b"b")
            owner = world.owner()
            for _ in range(3):
                await a.flush()
            assert world.owner() == owner
            assert (await a.read(0), await a.read(512)) == (b"a", b"b")
            # and what is written there afterwards is a write like any other
            await a.write(0, b"c")
            await a.flush()
            assert world.owner() not in (owner, None)
            assert await b.read(0) == b"c"

    asyncio.run(work())


def test_a_flush_is_answered_while_the_owner_stands_still(world: World, tmp_path: Path) -> None:
    """So that nothing of it can have gone to the owner."""

    async def work() -> None:
        async with two(world, tmp_path) as (a, b):
            await a.write(0, b"a")
            process = a.daemon._process
            assert process is not None
            process.send_signal(signal.SIGSTOP)
            try:
                await asyncio.wait_for(b.flush(), AT_ONCE)
            finally:
                process.send_signal(signal.SIGCONT)
            await a.write(0, b"still mine")

    asyncio.run(work())

"""The lock follows a VM between two daemons: front ends migrate as QEMU does, on one store.

The guest's memory is one memfd that both front ends use, as after a migration.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError
from test_vhost_migration import Log, begin
from test_vhost_switchover import restart
from vhost_frontend import OK, T_OUT, Frontend, Memory, Queue

from librbd_py import rados, rbd
from librbd_py.image.handle import ImageHandle
from librbd_py.image.locks import lockers
from librbd_py.store import connect
from librbd_py.store.api import Store
from qemu_glue.client import Daemon

MIB = 1 << 20
EVENT = 10.0  # seconds
KEY = "uuid:6f1a7a34-59c3-4e4b-8f0e-0d4a3e0b9a11"


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


class Host:
    """A daemon that serves the image on vhost-user."""

    def __init__(self, folder: Path, url: str) -> None:
        folder.mkdir()
        self.daemon = Daemon(folder, url)
        self.path = folder / "vu.sock"

    async def serve(self, **more: Any) -> None:
        await self.daemon.execute("blockdev-add", {"driver": "rbd", "node-name": "d0", "pool": "rbd", "image": "disk"})
        await self.export(**more)

    async def export(self, **more: Any) -> None:
        address = {"type": "unix", "path": str(self.path)}
        export = {"type": "vhost-user-blk", "id": "v", "node-name": "d0", "writable": True, "addr": address}
        await self.daemon.execute("block-export-add", {**export, "num-queues": 2, "vm": KEY, **more})

    async def event(self, name: str) -> dict[str, Any]:
        return await self.daemon.event(f"RBD_HANDOFF_{name}", EVENT)


class Guest:
    """A VM with one disk of two queues; it runs where its front end is."""

    def __init__(self) -> None:
        self.memory = Memory(16 << 20)
        self.front: Frontend | None = None
        self.bases = [0, 0]
        self.queues: list[Queue] = []
        self.log = Log()

    def connect(self, host: Host) -> Frontend:
        """What QEMU does at its start: nothing but negotiation."""
        front = Frontend(host.path)
        front.negotiate()
        front.config()
        return front

    def start(self, front: Frontend) -> None:
        """The VM runs there: a new in-flight table, the memory, the rings from where they were."""
        front.get_inflight(2, 128)
        front.set_inflight()
        front.set_features()
        front.set_memory(self.memory)
        if not self.queues:
            self.queues = [Queue(self.memory), Queue(self.memory)]
        for n, queue in enumerate(self.queues):
            front.start(n, queue, base=self.bases[n])
        self.front = front

    async def stop(self) -> None:
        """The switch-over. Returns when the VM may run elsewhere."""
        assert self.front
        begin(self.front, self.log)
        for n in range(2):
            self.front.enable(n, 0)
            self.bases[n] = await asyncio.to_thread(self.front.stop, n)

    def leave(self, front: Frontend) -> None:
        front.sock.close()
        if front.inflight:
            os.close(front.inflight[0])

    async def write(self, sector: int, data: bytes, queue: int = 0) -> None:
        assert self.front
        assert await asyncio.to_thread(self.front.write, sector, data, queue=queue) == OK

    async def read(self, sector: int, queue: int = 0) -> bytes:
        assert self.front
        return await asyncio.to_thread(self.front.read, sector, 512, queue=queue)

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
        self.memory.close()
        self.log.close()


class World:
    def __init__(self, folder: Path) -> None:
        self.url = f"embedded:{folder / 'store'}"
        with rados.Rados(conf={"rbdpy_store": self.url}) as cluster, cluster.open_ioctx("rbd") as ioctx:
            rbd.RBD().create(ioctx, "disk", 16 * MIB)
        self.hosts = [Host(folder / name, self.url) for name in ("a", "b")]
        self.guest = Guest()
        self._store: Store | None = None

    def owner(self) -> str | None:
        """Address of who owns the lock."""
        if self._store is None:
            self._store = connect(self.url)
        with ImageHandle.open(self._store.open("rbd"), "disk", read_only=True) as handle:
            rows = lockers(handle).lockers
            return rows[0][2] if rows else None

    @asynccontextmanager
    async def stranger(self) -> AsyncIterator[ImageHandle]:
        """The image, opened by another client."""
        store = await asyncio.to_thread(connect, self.url)
        try:
            image = await asyncio.to_thread(ImageHandle.open, store.open("rbd"), "disk")
            try:
                yield image
            finally:
                await asyncio.to_thread(image.close)
        finally:
            await asyncio.to_thread(store.close)

    @asynccontextmanager
    async def run(self) -> AsyncIterator[tuple[Host, Host, Guest]]:
        a, b = self.hosts
        try:
            async with a.daemon, b.daemon:
                yield a, b, self.guest
        finally:
            self.guest.close()
            if self._store is not None:
                self._store.close()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_lock_goes_there_and_back_with_the_vm(world: World) -> None:
    async def work() -> None:
        async with world.run() as (a, b, guest):
            await a.serve()
            await b.serve()
            guest.start(guest.connect(a))
            await guest.write(0, b"0" * 512)
            owner = world.owner()
            owners = {owner}
            here, there = a, b
            for turn in range(1, 5):
                target = guest.connect(there)
                source = guest.front
                await guest.write(8 * turn, bytes([turn]) * 512, queue=turn % 2)
                await guest.stop()
                offered = await here.event("OFFERED")
                assert offered["key"] == KEY and offered["id"] == "v" and offered["seconds"] < 2
                guest.start(target)
                assert await guest.read(8 * turn) == bytes([turn]) * 512
                if turn == 1:  # later, who offered before may have it back
                    taken = await there.event("TAKEN")
                    assert taken["seconds"] < 2
                assert source
                guest.leave(source)
                before, owner = owner, world.owner()
                assert owner != before
                owners.add(owner)
                await guest.write(8 * turn + 1, bytes([turn]) * 512)
                here, there = there, here
            assert len(owners) == 2 and None not in owners
            assert guest.front
            guest.leave(guest.front)

    run(work())


def test_failed_migration_takes_the_lock_back(world: World) -> None:
    async def work() -> None:
        async with world.run() as (a, b, guest):
            await a.serve()
            await b.serve()
            guest.start(guest.connect(a))
            await guest.write(0, b"a" * 512)
            mine = world.owner()
            for turn in range(3):
                target = guest.connect(b)
                await guest.stop()
                await a.event("OFFERED")
                guest.leave(target)  # the destination's QEMU dies
                front = guest.front
                assert front
                front.set_features()
                for n in range(2):
                    restart(front, n, guest.bases[n])
                await guest.write(turn, b"b" * 512)
                await a.event("BACK")
                assert world.owner() == mine
            # the next migration works
            source, target = guest.front, guest.connect(b)
            await guest.stop()
            guest.start(target)
            assert await guest.read(2) == b"b" * 512
            assert world.owner() != mine
            assert source
            guest.leave(source)
            guest.leave(target)

    run(work())


def test_stranger_in_between_makes_the_destination_refuse(world: World) -> None:
    """The source dies after the offer, a stranger breaks its lock and goes: the VM's memory is older than the disk."""

    async def work() -> None:
        async with world.run() as (a, b, guest):
            await a.serve()
            guest.start(guest.connect(a))
            await guest.write(0, b"a" * 512)
            await b.serve(incoming=True)
            target, source = guest.connect(b), guest.front
            await guest.stop()
            await a.event("OFFERED")
            a.daemon.kill()
            await a.daemon.disconnect()
            async with world.stranger() as stranger:
                await asyncio.to_thread(stranger.acquire_lock)
                await asyncio.to_thread(stranger.data.write, 0, b"s" * 512)
            guest.start(target)
            refused = await b.event("REFUSED")
            assert refused["final"] and "somebody else" in refused["reason"]
            head, _, status = target.build(T_OUT, 0, data=b"z" * 512)
            guest.queues[0].offer(head)
            guest.queues[0].kick_now()
            await asyncio.sleep(0.1)
            assert guest.queues[0].used_idx() == guest.bases[0] and guest.memory.read(status, 1) == b"\xff"
            guest.leave(target)
            assert source
            guest.leave(source)
            # what it had asked for is never done
            await b.daemon.execute("block-export-del", {"id": "v", "mode": "hard"})
            await b.daemon.execute("blockdev-del", {"node-name": "d0"})
            async with world.stranger() as stranger:
                assert bytes(stranger.data.read(0, 512)) == b"s" * 512

    run(work())


def test_vm_that_was_paused_before_it_moved(world: World) -> None:
    """Its rings stop unlogged, nothing is offered, and its program has ended long before it runs again."""

    async def work() -> None:
        async with world.run() as (a, b, guest):
            await a.serve()
            guest.start(guest.connect(a))
            await guest.write(0, b"p" * 512)
            await b.serve(incoming=True)
            target, source = guest.connect(b), guest.front
            assert source
            for n in range(2):
                guest.bases[n] = await asyncio.to_thread(source.stop, n)
            guest.leave(source)
            await a.daemon.execute("block-export-del", {"id": "v", "mode": "hard"})
            await a.daemon.execute("blockdev-del", {"node-name": "d0"})
            guest.start(target)
            assert await guest.read(0) == b"p" * 512
            await b.event("TAKEN")
            await guest.write(1, b"q" * 512)
            guest.leave(target)

    run(work())


def test_slow_store_costs_the_guest_nothing_but_time(world: World) -> None:
    """The lock is another client's, who holds on to it: nothing to offer, and the answer comes all the same."""

    async def work() -> None:
        async with world.run() as (a, _, guest):
            await a.serve()
            guest.start(guest.connect(a))
            async with world.stranger() as stranger:
                await asyncio.to_thread(stranger.lock_by_hand)
                begun = time.monotonic()
                await guest.stop()
                assert time.monotonic() - begun < 6
            assert guest.front
            guest.leave(guest.front)

    run(work())


def test_vm_that_starts_here_while_another_has_the_lock_gets_it_at_its_first_write(world: World) -> None:
    async def work() -> None:
        async with world.run() as (a, b, guest):
            await a.serve()
            await b.serve()
            guest.start(guest.connect(a))
            await guest.write(0, b"a" * 512)
            mine = world.owner()
            other = Guest()
            other.start(other.connect(b))
            assert await other.read(0) == b"a" * 512
            assert world.owner() == mine, "reading takes no lock"
            await other.write(0, b"b" * 512)
            assert world.owner() not in (mine, None)
            assert await guest.read(0) == b"b" * 512
            for one in (guest, other):
                assert one.front
                one.leave(one.front)
            other.close()

    run(work())


def test_names_of_vms_are_checked(world: World) -> None:
    async def work() -> None:
        async with world.run() as (a, _, _):
            for name in ("", "a b", "ü", "x" * 257):
                with pytest.raises(ExecuteError, match="vm"):
                    await (a.serve if name == "" else a.export)(vm=name)

    run(work())

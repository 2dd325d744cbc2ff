"""A machine under load moves to another QEMU on another daemon; what fails on the way leaves it on exactly one side."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qemu_glue.client import Daemon
from qemu_glue.guest import Disk, Guest
from qemu_glue.qmp import Disconnected, Machine, MachineError, MigrationFailed
from tests.vm.machines import FailingConnection, export, says
from tests.vm.rig import MIB, Rig

pytestmark = pytest.mark.vm
DEADLINE = 90.0


class Side:
    """A daemon in a folder of its own, that serves rbd/disk."""

    def __init__(self, rig: Rig, name: str) -> None:
        self.rig = Rig(rig.folder / name, rig.url, rig.kernel, rig.initrd, rig.accel)
        self.rig.folder.mkdir()
        self.daemon = Daemon(self.rig.folder, rig.url)
        self.disk = Disk("raw", "")

    async def start(self, kind: str) -> None:
        await self.daemon.start()
        spec = await export(self.daemon, self.rig, "disk", kind)
        self.disk = Disk(kind, spec.path, spec.export, reconnect=30 if kind == "nbd" else 1)

    def guest(self, *extra: str, seconds: int = 20) -> Guest:
        append = f"rbdpy.mode=load rbdpy.threads=4 rbdpy.seconds={seconds} rbdpy.blocks=2048"
        return self.rig.guest(self.disk, append, qmp=self.rig.folder / "qmp.sock", extra=extra, memory_mib=160)

    async def connect(self) -> Machine:
        connection = await FailingConnection.open_new(self.rig.folder / "qmp.sock", lambda: True, 20)
        connection.arm(-1)
        return Machine(connection)

    @asynccontextmanager
    async def incoming(self) -> AsyncIterator[tuple[Machine, Guest]]:
        with self.guest("-incoming", "defer") as guest:
            machine = await self.connect()
            try:
                yield machine, guest
            finally:
                await machine.close()


@asynccontextmanager
async def two_sides(rig: Rig, kind: str) -> AsyncIterator[tuple[Side, Side]]:
    rig.create("disk", 64 * MIB)
    sides = Side(rig, "a"), Side(rig, "b")
    try:
        for side in sides:
            await side.start(kind)
        yield sides
    finally:
        for side in sides:
            await side.daemon.stop()


async def finished(guest: Guest) -> None:
    """The load of a guest ended, and every block was what it had to be."""
    assert await asyncio.to_thread(guest.wait_for, None, DEADLINE), guest.console[-2000:]
    found = re.search(r"STAMP-LOAD ops=(\d+) errors=(\d+)", guest.console)
    assert found, guest.console[-2000:]
    assert int(found[2]) == 0, guest.console[-2000:]
    assert "GUEST-CHECK ok" in guest.console
    assert "I/O error" not in guest.console


@pytest.mark.parametrize("kind", ["vhost-user", "nbd"])
def test_a_machine_under_load_moves(rig: Rig, kind: str) -> None:
    async def run() -> None:
        async with two_sides(rig, kind) as (a, b):
            with a.guest(seconds=6) as source_guest:
                await says(source_guest, "STAMP-TICK")
                async with await a.connect() as source, b.incoming() as (destination, guest):
                    seen: list[tuple[int, int]] = []
                    moved = await source.migrate(
                        destination, f"unix:{rig.folder}/m", progress=lambda *now: seen.append(now), bandwidth=1 << 30
                    )
                    assert moved.transferred > 0
                    assert moved.downtime < 10
                    assert (await source.status(), await destination.status()) == ("postmigrate", "running")
                    await source.quit()
                    await finished(guest)

    asyncio.run(run())


def test_whatever_fails_leaves_the_machine_on_one_side(rig: Rig) -> None:
    async def run() -> None:
        async with two_sides(rig, "vhost-user") as (a, b):
            with a.guest(seconds=150) as source_guest:
                await says(source_guest, "STAMP-TICK")
                async with await a.connect() as source:
                    phases = 0
                    for side, late in (("source", False), ("destination", False), ("destination", True)):
                        at = 0
                        while await failed(rig, source, b, side, at, late):
                            assert await source.status() == "running"
                            phases, at = phases + 1, at + 1
                        assert await source.status() == "running"
                    assert phases >= 8
                    # the destination dies at the moment of the switch-over, and a moment later
                    async with b.incoming() as (destination, guest):

                        async def dies() -> None:
                            guest.close()

                        with pytest.raises(MigrationFailed) as dead:
                            await source.migrate(destination, f"unix:{rig.folder}/m", at_switchover=dies)
                        assert dead.value.side == "source"
                    assert await source.status() == "running"
                    await cancelled(rig, source, b)
                    await says(source_guest, "STAMP-TICK", len(source_guest.console))
                    async with b.incoming() as (destination, guest):
                        await source.migrate(destination, f"unix:{rig.folder}/m", bandwidth=1 << 30)
                        assert await destination.status() == "running"
                        await says(guest, "STAMP-TICK")

    asyncio.run(run())


async def failed(rig: Rig, source: Machine, b: Side, which: str, at: int, late: bool) -> bool:
    """Migrates with a fault at command `at` of one monitor. False: there was no such command before the machine went
    over, and the migration was stopped by hand there."""

    class Enough(Exception):
        pass

    async def enough() -> None:
        raise Enough

    async with b.incoming() as (destination, _):
        connection: Any = (source if which == "source" else destination).qmp
        connection.arm(at, late)
        with pytest.raises((MachineError, Enough)) as error:
            await source.migrate(destination, f"unix:{rig.folder}/m", at_switchover=enough, bandwidth=1 << 30)
        hit = connection.count > at and "fault" in str(error.value)
        connection.arm(-1)
        if isinstance(error.value, MigrationFailed):
            assert error.value.side == "source", error.value
        with contextlib.suppress(Disconnected):  # its QEMU ends by itself when the source breaks off
            assert await destination.status() in ("inmigrate", "paused")
    return hit


async def cancelled(rig: Rig, source: Machine, b: Side) -> None:
    async with b.incoming() as (destination, _):
        there = asyncio.Event()

        async def wait() -> None:
            there.set()
            await asyncio.sleep(60)

        task = asyncio.create_task(source.migrate(destination, f"unix:{rig.folder}/m", at_switchover=wait))
        await asyncio.wait_for(there.wait(), DEADLINE)
        assert await source.status() in ("finish-migrate", "paused")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await source.status() == "running"


def test_a_destination_that_refuses_to_run_and_one_that_is_lost(rig: Rig, tmp_path: Path) -> None:
    async def run() -> None:
        async with two_sides(rig, "vhost-user") as (a, b):
            with a.guest(seconds=150) as source_guest:
                await says(source_guest, "STAMP-TICK")
                async with await a.connect() as source:
                    for proof in (False, True):
                        async with b.incoming() as (destination, guest):
                            connection: Any = destination.qmp
                            original = connection.execute

                            async def no_cont(
                                command: str, *rest: Any, guest: Any = guest, original: Any = original, **more: Any
                            ) -> Any:
                                if command == "cont":
                                    guest.close()
                                return await original(command, *rest, **more)

                            async def dead(guest: Any = guest) -> None:
                                guest.close()

                            connection.execute = no_cont
                            with pytest.raises(MigrationFailed) as lost:
                                await source.migrate(
                                    destination,
                                    f"unix:{rig.folder}/m",
                                    bandwidth=1 << 30,
                                    destination_dead=dead if proof else None,
                                )
                            assert lost.value.side == ("source" if proof else "neither")
                            assert bool(lost.value.left) is not proof
                        assert await source.status() == ("running" if proof else "postmigrate")
                        await source.resume()
                    await says(source_guest, "STAMP-TICK", len(source_guest.console))

    asyncio.run(run())

"""A host service is killed (SIGKILL) around the switch-over of a live migration, on either side, and started again.

What QEMU 7.2 cannot survive is in ARCHITECTURE.md ("A service that is killed during a migration"); here is what it can.
Long runs, because on a busy machine the windows that it cannot survive are hit now and then.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from qemu_glue.client import Daemon
from qemu_glue.guest import Disk, Guest
from qemu_glue.qmp.connection import Connection
from tests.vm.machines import says
from tests.vm.rig import MIB, Rig

pytestmark = [pytest.mark.vm, pytest.mark.soak]
UUID = str(uuid4())  # services look for it among all processes of the machine
DISK = {"target": "vda", "pool": "rbd", "image": "disk", "transport": "vhost-user"}
DEADLINE = 60.0
SECONDS = 9  # of load in the guest
RECONNECTED = 1.4  # seconds after which QEMU, which tries once a second, has its back end again


class Side:
    """A host service in folders of its own, and what QEMU runs on it."""

    def __init__(self, rig: Rig, name: str, run: str) -> None:
        self.rig = Rig(rig.folder / name, rig.url, rig.kernel, rig.initrd, rig.accel)
        self.rig.folder.mkdir()
        self.daemon = Daemon(self.rig.folder, rig.url, ("--host", "--run", run, "--user", "root"))
        self.path = ""

    async def start(self, incoming: bool) -> None:
        await self.daemon.start()
        vm = {"uuid": UUID, "name": "v0", "incoming": incoming, "disks": [DISK]}
        self.path = (await self.daemon.execute("rbd-vm-prepare", vm))["sockets"]["vda"]

    def guest(self, *extra: str) -> Guest:
        append = f"rbdpy.mode=load rbdpy.threads=8 rbdpy.seconds={SECONDS} rbdpy.blocks=2048"
        more = ["-uuid", UUID, "-name", "guest=v0", *extra]
        return self.rig.guest(
            Disk("vhost-user", self.path), append, qmp=self.rig.folder / "qmp.sock", extra=more, memory_mib=160
        )

    async def monitor(self) -> Connection:
        return await Connection.open_new(self.rig.folder / "qmp.sock", lambda: True, 20)

    async def killed(self) -> None:
        self.daemon.kill()
        await self.daemon.disconnect()
        await self.daemon.start()


@pytest.fixture
def runs() -> Iterator[tuple[str, str]]:
    """Folders whose names leave room for a socket's."""
    with tempfile.TemporaryDirectory(prefix="ra") as a, tempfile.TemporaryDirectory(prefix="rb") as b:
        yield a, b


class Migration:
    """From a to b, slow until `hurry`, and standing at the switch-over until `go_on`."""

    def __init__(self, source: Connection, destination: Connection, path: Path) -> None:
        self.source, self.destination, self.uri = source, destination, f"unix:{path}"

    async def begin(self) -> None:
        both: list[tuple[Connection, str]] = [
            (self.destination, "late-block-activate"),
            (self.source, "pause-before-switchover"),
        ]
        for qmp, name in both:
            wanted = [{"capability": c, "state": True} for c in ("events", name)]
            await qmp.execute("migrate-set-capabilities", {"capabilities": wanted})
        await self.destination.execute("migrate-incoming", {"uri": self.uri})
        await self.source.execute("migrate-set-parameters", {"max-bandwidth": 2 * MIB})
        await self.source.execute("migrate", {"uri": self.uri})
        end = asyncio.get_running_loop().time() + DEADLINE
        while not (await self.source.execute("query-migrate")).get("ram", {}).get("dirty-sync-count"):
            assert asyncio.get_running_loop().time() < end  # until QEMU logs what the disk writes
            await asyncio.sleep(0.01)

    async def status(self, wanted: str) -> None:
        end = asyncio.get_running_loop().time() + DEADLINE
        while (status := (await self.source.execute("query-migrate"))["status"]) != wanted:
            assert status not in ("failed", "cancelled"), status
            assert asyncio.get_running_loop().time() < end, status
            await asyncio.sleep(0.01)

    async def switchover(self) -> None:
        await self.source.execute("migrate-set-parameters", {"max-bandwidth": 8 << 30})
        await self.status("pre-switchover")
        await self.source.execute("migrate-continue", {"state": "pre-switchover"})

    async def arrived(self) -> None:
        await self.status("completed")
        end = asyncio.get_running_loop().time() + DEADLINE
        while (await self.destination.execute("query-status"))["status"] != "running":
            assert asyncio.get_running_loop().time() < end
            await asyncio.sleep(0.01)


@asynccontextmanager
async def moving(rig: Rig, runs: tuple[str, str]) -> AsyncIterator[tuple[Side, Side, Migration, Guest]]:
    rig.create("disk", 64 * MIB)
    a, b = Side(rig, "a", runs[0]), Side(rig, "b", runs[1])
    try:
        await a.start(False)
        await b.start(True)
        with a.guest() as old:
            await says(old, "STAMP-TICK")
            with b.guest("-incoming", "defer") as new:
                source, destination = await a.monitor(), await b.monitor()
                migration = Migration(source, destination, rig.folder / "m")
                await migration.begin()
                try:
                    yield a, b, migration, new
                finally:
                    await source.close()
                    await destination.close()
    finally:
        for side in (a, b):
            await side.daemon.stop()


async def verified(guest: Guest) -> None:
    """The load ended, and every block was what it had to be."""
    assert await asyncio.to_thread(guest.wait_for, None, DEADLINE), guest.console[-2000:]
    found = re.search(r"STAMP-LOAD ops=(\d+) errors=(\d+)", guest.console)
    assert found, guest.console[-2000:]
    assert int(found[2]) == 0, guest.console[-2000:]
    assert "GUEST-CHECK ok" in guest.console
    assert "I/O error" not in guest.console


def run(work: Any) -> None:
    asyncio.run(asyncio.wait_for(work, 3 * DEADLINE))


@pytest.mark.parametrize("side", [0, 1], ids=["source", "destination"])
def test_it_is_back_before_the_switch_over(rig: Rig, runs: tuple[str, str], side: int) -> None:
    """On the source QEMU throws the dirty log away, and all memory is sent again."""

    async def work() -> None:
        async with moving(rig, runs) as (a, b, migration, guest):
            await (a, b)[side].killed()
            await asyncio.sleep(RECONNECTED)
            await migration.switchover()
            await migration.arrived()
            await verified(guest)

    run(work())


def test_the_source_moves_without_its_service(rig: Rig, runs: tuple[str, str]) -> None:
    """Its requests in flight are done on the destination: a driver that gets one twice, or never, stands still. The
    service was alive when QEMU began to log; from then on requests are used in order.
    (What the guest had read since QEMU last looked at the dirty log may be lost; nobody can help that.)"""

    async def work() -> None:
        async with moving(rig, runs) as (a, _, migration, guest):
            a.daemon.kill()
            await a.daemon.disconnect()
            await migration.switchover()
            await migration.arrived()
            at = len(guest.console)
            await says(guest, "STAMP-TICK", at)
            await a.daemon.start()  # and what was in flight stays undone there
            await asyncio.sleep(RECONNECTED)
            assert "is not a head" not in guest.console
            await says(guest, "STAMP-TICK", len(guest.console))

    run(work())


def test_the_destination_is_killed_when_the_guest_runs(rig: Rig, runs: tuple[str, str]) -> None:
    async def work() -> None:
        async with moving(rig, runs) as (_, b, migration, guest):
            await migration.switchover()
            await migration.arrived()
            await b.killed()
            await verified(guest)

    run(work())

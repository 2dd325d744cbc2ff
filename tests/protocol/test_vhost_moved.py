"""A service that comes back for a VM that moved away while it was dead: QEMU 7.2 starts the rings of the stopped
machine, and what was in flight there must never reach the disk, which the VM uses elsewhere by now."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from vhost_frontend import OK, T_OUT, Frontend, Memory, Queue

from librbd_py import rados, rbd
from qemu_glue.client import Daemon

UUID = str(uuid4())  # services look for it among all processes of the machine
DISK = {"target": "vda", "transport": "vhost-user", "pool": "rbd", "image": "disk"}
NEWS = 20.0  # seconds for an event


class Host:
    """A service in a folder of its own."""

    def __init__(self, folder: Path, url: str, run: str) -> None:
        folder.mkdir()
        self.daemon = Daemon(folder, url, ("--host", "--run", run, "--user", "root"))

    async def start(self) -> str:
        """The socket of the VM's disk."""
        await self.daemon.start()
        answer = await self.daemon.execute("rbd-vm-prepare", {"uuid": UUID, "name": "v", "disks": [DISK]})
        return str(answer["sockets"]["vda"])

    async def restart(self) -> None:
        self.daemon.kill()
        await self.daemon.disconnect()
        await self.daemon.start()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    url = f"embedded:{tmp_path / 'store'}"
    with rados.Rados(conf={"rbdpy_store": url}) as cluster, cluster.open_ioctx("rbd") as ioctx:
        rbd.RBD().create(ioctx, "disk", 4 << 20)
    with tempfile.TemporaryDirectory(prefix="ra") as a, tempfile.TemporaryDirectory(prefix="rb") as b:
        yield Host(tmp_path / "a", url, a), Host(tmp_path / "b", url, b)


class Guest:
    """A VM's memory, its one ring, and the table that its QEMU keeps while a service is dead."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.queue = Queue(self.memory)

    def runs(self, path: str, table: tuple[int, bytes] | None = None) -> Frontend:
        """On a host; with the table it had there before, or a new one."""
        front = Frontend(path)
        front.negotiate()
        front.inflight = table
        if table is None:
            front.get_inflight(1, self.queue.num)
        front.set_inflight()
        front.set_features()
        front.set_memory(self.memory)
        front.start(0, self.queue, base=self.queue.used_idx())
        return front

    def close(self) -> None:
        self.queue.close()
        self.memory.close()


@pytest.mark.parametrize("moved", [True, False], ids=["it moved", "it did not"])
def test_what_was_in_flight_where_the_vm_was(hosts: tuple[Host, Host], moved: bool) -> None:
    async def work() -> None:
        a, b = hosts
        here, there = Guest(), Guest()
        fronts: list[Frontend] = []
        try:
            path, other = await a.start(), await b.start()
            old = await asyncio.to_thread(here.runs, path)
            fronts.append(old)
            assert await asyncio.to_thread(old.write, 0, b"first".ljust(512)) == OK
            a.daemon.kill()
            await a.daemon.disconnect()
            head, _, status = old.build(T_OUT, 0, b"in flight".ljust(512))  # asked for while the service is dead
            here.queue.offer(head)
            if moved:
                new = await asyncio.to_thread(there.runs, other)
                fronts.append(new)
                assert await asyncio.to_thread(new.write, 0, b"after".ljust(512)) == OK
            await a.daemon.start()
            fronts.append(await asyncio.to_thread(here.runs, path, old.inflight))
            if moved:
                event = await a.daemon.event("RBD_HANDOFF_REFUSED", NEWS)
                assert event["final"]
                assert "the VM runs on" in event["reason"]
                assert here.memory.read(status, 1) == b"\xff"
                assert await asyncio.to_thread(new.read, 0, 512) == b"after".ljust(512)
                fronts[-1].sock.close()
                assert await asyncio.to_thread(new.write, 1, bytes(512)) == OK
                assert await asyncio.to_thread(new.read, 0, 512) == b"after".ljust(512)
            else:
                assert [used for used, _ in await asyncio.to_thread(here.queue.wait)] == [head]
                assert here.memory.read(status, 1) == b"\0"
        finally:
            for front in fronts:
                front.sock.close()
            for table in {front.inflight[0] for front in fronts if front.inflight}:
                os.close(table)
            here.close()
            there.close()
            for host in hosts:
                await host.daemon.stop()

    asyncio.run(work())

"""The host service under guests: sockets for a VM, an image opened for each QEMU, killed and stopped services."""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from qemu.qmp import ExecuteError

from librbd_py import rbd
from librbd_py.store.rados import make_url
from qemu_glue.client import Daemon
from qemu_glue.guest import Disk, Guest
from tests.vm.rig import MIB, Rig

DEADLINE = 150.0
GONE_SECONDS = 1.0  # from the death of a QEMU to the end of its watch and lock
UUID = str(uuid4())  # services look for it among all processes of the machine
SOAK = os.environ.get("RBDPY_SOAK") == "1"


@pytest.fixture
def run() -> Iterator[str]:
    """A folder whose name leaves room for a socket's."""
    with tempfile.TemporaryDirectory(prefix="rh") as folder:
        yield folder


def host(rig: Rig, run: str) -> Daemon:
    return Daemon(rig.folder, rig.url, ("--host", "--run", run, "--user", "root"))


def vm(*disks: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"uuid": UUID, "name": "v0", "disks": list(disks), **more}


def disk(transport: str = "vhost-user", **more: Any) -> dict[str, Any]:
    return {"target": "vda", "pool": "rbd", "image": "disk", "transport": transport, **more}


def guest(rig: Rig, transport: str, path: str, append: str) -> Guest:
    reconnect = 1 if transport == "vhost-user" else 30
    extra = ["-uuid", UUID, "-name", "guest=v0,debug-threads=on"]
    return rig.guest(Disk(transport, path, export="vda", reconnect=reconnect), append, extra=extra)


async def shows(guest: Guest, text: str | None, after: int = 0) -> None:
    assert await asyncio.to_thread(guest.wait_for, text, DEADLINE, None, after), guest.console[-3000:]


async def served(daemon: Daemon) -> list[dict[str, Any]]:
    """The VM's disks that a QEMU has open."""
    vms = await daemon.execute("rbd-vm-query")
    return [d for its in vms for d in its["disks"] if d["state"] != "waiting"]


async def until_served(daemon: Daemon, count: int, seconds: float) -> float:
    """Seconds until so many are."""
    start = time.monotonic()
    while len(await served(daemon)) != count:
        assert time.monotonic() - start < seconds, await served(daemon)
        await asyncio.sleep(0.01)
    return time.monotonic() - start


def load(console: str) -> tuple[int, int]:
    """Requests that ended, and the longest of them in seconds. No errors, and what was read is what was written."""
    found = re.search(r"STAMP-LOAD ops=(\d+) errors=(\d+) longest_ms=(\d+)", console)
    assert found, console[-3000:]
    assert int(found[2]) == 0, console[-3000:]
    assert "GUEST-CHECK ok" in console, console[-3000:]
    assert "I/O error" not in console
    return int(found[1]), int(found[3]) / 1e3


@pytest.mark.vm
@pytest.mark.parametrize("transport", ["vhost-user", "nbd"])
def test_a_killed_service_comes_back_to_its_guests(rig: Rig, run: str, transport: str) -> None:
    asyncio.run(killed_service(rig, run, transport, (20 if SOAK else 3) if transport == "vhost-user" else 1))


@pytest.mark.vm
def test_a_killed_service_comes_back_on_ceph(rig: Rig, run: str, ceph_conf: str, ceph_pool: str) -> None:
    """Its own former lock is broken at once: real librbd would wait for the watch to expire."""
    rig.url = make_url(ceph_conf)
    asyncio.run(killed_service(rig, run, "vhost-user", 20 if SOAK else 2, ceph_pool))


async def killed_service(rig: Rig, run: str, transport: str, kills: int, pool: str = "rbd") -> None:
    rig.create("disk", 64 * MIB, pool)
    daemon = host(rig, run)
    await daemon.start()
    try:
        answer = await daemon.execute("rbd-vm-prepare", vm(disk(transport, pool=pool)))
        append = f"rbdpy.mode=load rbdpy.threads=8 rbdpy.seconds={8 + 3 * kills} rbdpy.blocks=4096"
        with guest(rig, transport, answer["sockets"]["vda"], append) as g:
            for _ in range(kills):
                await shows(g, "STAMP-TICK", len(g.console))
                daemon.kill()
                await daemon.disconnect()
                await daemon.start()
            await shows(g, None)
            operations, longest = load(g.console)
        assert operations > 100
        assert longest < 10.0  # the outage, QEMU's second until it tries again, the starts on a busy machine
        await until_served(daemon, 0, GONE_SECONDS)
        await daemon.execute("rbd-vm-release", {"uuid": UUID})
        assert await daemon.execute("rbd-vm-query") == []
    finally:
        await daemon.stop()


@pytest.mark.vm
def test_a_killed_qemu_leaves_no_watch_and_no_lock(rig: Rig, run: str) -> None:
    async def work() -> None:
        rig.create("disk", 64 * MIB)
        async with host(rig, run) as daemon:
            answer = await daemon.execute("rbd-vm-prepare", vm(disk()))
            append = "rbdpy.mode=load rbdpy.threads=8 rbdpy.seconds=60 rbdpy.blocks=4096"
            with guest(rig, "vhost-user", answer["sockets"]["vda"], append) as g:
                await shows(g, "STAMP-TICK")
                (its,) = await served(daemon)
                assert its["lock-owner"]
                assert its["pid"] == g.pid
                await daemon.execute("rbd-vm-release", {"uuid": UUID})
                assert await served(daemon), "a release must not cut the disk of a QEMU that lives"
                os.kill(g.pid, 9)
                await until_served(daemon, 0, GONE_SECONDS)
            with rig.cluster() as cluster, cluster.open_ioctx("rbd") as ioctx:
                with rbd.Image(ioctx, "disk") as image:
                    assert not image.list_lockers()

    asyncio.run(work())


@pytest.mark.vm
def test_what_cannot_be_opened_is_refused_at_prepare(rig: Rig, run: str) -> None:
    async def work() -> None:
        rig.create("disk", 16 * MIB)
        async with host(rig, run) as daemon:
            with pytest.raises(ExecuteError, match="disk vda: image rbd/none: "):
                await daemon.execute("rbd-vm-prepare", vm(disk(image="none")))
            with pytest.raises(ExecuteError, match="named twice"):
                await daemon.execute("rbd-vm-prepare", vm(disk(), disk()))
            with pytest.raises(ExecuteError, match="uuid"):
                await daemon.execute("rbd-vm-prepare", {**vm(disk()), "uuid": "../../etc"})
            with pytest.raises(ExecuteError, match="target"):
                await daemon.execute("rbd-vm-prepare", vm(disk(target="../x")))
            assert await daemon.execute("rbd-vm-query") == []
            assert not Path(run, UUID).exists()
            await daemon.execute("rbd-vm-release", {"uuid": UUID})

    asyncio.run(work())

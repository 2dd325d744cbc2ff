"""Snapshots of all disks of a running guest: what they show is of one moment, and the guest is let go whatever
happens."""

from __future__ import annotations

import asyncio
import errno
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from librbd_py import rbd
from qemu_glue.guest import Guest
from qemu_glue.qmp import GroupRef, ImageRef, Machine, MachineError, Quiesce
from qemu_glue.qmp.agent import Agent
from qemu_glue.qmp.snapshot import snapshot
from tests.vm.machines import FailingConnection, says
from tests.vm.rig import MIB, Rig, serve
from vm_images.initramfs import agent_initramfs

pytestmark = pytest.mark.vm
FILE_SYSTEM = 16 * MIB


@asynccontextmanager
async def twins(rig: Rig) -> AsyncIterator[tuple[Machine, Guest, list[ImageRef]]]:
    """A guest with two file systems that it writes in step, and an agent."""
    rig.initrd = agent_initramfs(rig.kernel)
    for name in ("a", "b"):
        rig.create(name, 2 * FILE_SYSTEM)
    async with rig.daemon() as daemon:
        disks = [await serve(daemon, name, "vhost-user", rig.socket(f"{name}.sock")) for name in ("a", "b")]
        qmp, agent = rig.folder / "qmp.sock", rig.folder / "agent.sock"
        append = f"rbdpy.mode=twins rbdpy.start={FILE_SYSTEM}"
        with Guest(
            disks, rig.accel, qmp=qmp, agent=agent, kernel=rig.kernel.vmlinuz, initrd=rig.initrd, append=append
        ) as guest:
            await says(guest, "GUEST-AGENT ready")
            await says(guest, "GUEST-TWINS 100")
            connection = await FailingConnection.open(qmp)
            connection.arm(-1)
            async with Machine(connection, str(agent)) as running:
                yield running, guest, [ImageRef(name, store=rig.url) for name in ("a", "b")]


def snapshots(rig: Rig, image: str) -> list[str]:
    with rig.cluster() as cluster, cluster.open_ioctx("rbd") as ioctx, rbd.Image(ioctx, image, read_only=True) as one:
        return [snap["name"] for snap in one.list_snaps()]


def number(rig: Rig, image: str, snap: str, clean: bool) -> int:
    """What the file `n` says in the snapshot's file system, which must be `clean`: nothing to replay or repair."""
    raw = rig.folder / f"{image}-{snap}.raw"
    with rig.cluster() as cluster, cluster.open_ioctx("rbd") as ioctx:
        with rbd.Image(ioctx, image, snapshot=snap, read_only=True) as one:
            raw.write_bytes(one.read(0, FILE_SYSTEM))
    if clean:
        done = subprocess.run(["/sbin/e2fsck", "-fn", raw], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout
    shown = subprocess.run(["/sbin/debugfs", "-R", "cat /n", raw], capture_output=True, text=True, timeout=60)
    return int(shown.stdout)


async def goes_on(guest: Guest) -> None:
    await says(guest, "GUEST-TWINS", len(guest.console))


def test_a_frozen_guests_disks_show_one_moment(rig: Rig) -> None:
    async def run() -> None:
        async with twins(rig) as (running, guest, images):
            for name in ("one", "two"):
                taken = await running.snapshot(name, images)
                assert taken.frozen == 2
                await goes_on(guest)
                shown = [await asyncio.to_thread(number, rig, image, name, True) for image in ("a", "b")]
                assert 0 <= shown[0] - shown[1] <= 1
            with rig.cluster() as cluster, cluster.open_ioctx("rbd") as ioctx:
                rbd.RBD().group_create(ioctx, "vm")
                with rbd.Group(ioctx, "vm") as group:
                    for image in ("a", "b"):
                        group.add_image(ioctx, image)
            taken = await running.snapshot("three", [GroupRef("vm", store=rig.url)])
            assert (taken.frozen, taken.images) == (2, ("group rbd/vm",))
            with rig.cluster() as cluster, cluster.open_ioctx("rbd") as ioctx, rbd.Group(ioctx, "vm") as group:
                assert [snap["name"] for snap in group.list_snaps()] == ["three"]
            await goes_on(guest)
            stopped = await running.snapshot("stopped", images, Quiesce.STOP)
            assert stopped.frozen == 0
            assert stopped.still < 5
            assert await running.status() == "running"
            await goes_on(guest)
            with pytest.raises(MachineError) as twice:
                await running.snapshot("two", images)
            assert twice.value.errno == errno.EEXIST

    asyncio.run(run())


def test_a_snapshot_that_fails_half_way_leaves_none_and_a_guest_that_runs(rig: Rig) -> None:
    async def run() -> None:
        async with twins(rig) as (running, guest, images):
            assert running.agent
            with rig.cluster() as cluster, cluster.open_ioctx("rbd") as ioctx, rbd.Image(ioctx, "b") as image:
                image.create_snap("first")
                image.set_snap_limit(1)
            with pytest.raises(MachineError) as refused:
                await running.snapshot("half", images)
            assert refused.value.errno == errno.EDQUOT
            assert not refused.value.left
            await goes_on(guest)
            assert (snapshots(rig, "a"), snapshots(rig, "b")) == ([], ["first"])
            with pytest.raises(MachineError) as late:
                await running.snapshot("late", images[:1], limit=0.0001)
            assert late.value.errno == errno.ETIMEDOUT
            await goes_on(guest)
            assert snapshots(rig, "a") == []
            task = asyncio.create_task(running.snapshot("cancelled", images[:1]))
            agent_seen = asyncio.get_running_loop().time() + 5
            while not task.done() and asyncio.get_running_loop().time() < agent_seen:
                await asyncio.sleep(0.02)
                task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await goes_on(guest)
            assert snapshots(rig, "a") == []
            agent = await Agent.open(running.agent)
            assert not await agent.frozen(5.0)
            await agent.close()
            connection = running.qmp
            assert isinstance(connection, FailingConnection)
            for at in range(3):  # query-status, stop, cont
                connection.arm(at, late=at == 1)
                with pytest.raises(MachineError):
                    await running.snapshot(f"stop{at}", images[:1], Quiesce.STOP)
                    raise MachineError(errno.EIO, "cont is tried again")
                connection.arm(-1)
                assert await running.status() == "running"
            assert snapshots(rig, "a") == ["stop2"]

    asyncio.run(run())


def test_without_an_agent_the_choice_is_the_callers(tmp_path: Path) -> None:
    async def run() -> None:
        silent = await asyncio.start_unix_server(nothing, tmp_path / "agent")
        hostile = await asyncio.start_unix_server(nonsense, tmp_path / "hostile")
        try:
            for path, code in (("agent", errno.ENOTCONN), ("hostile", errno.EPROTO), ("none", errno.ENOENT)):
                with pytest.raises(MachineError) as error:
                    await Agent.open(str(tmp_path / path), 0.5)
                assert error.value.errno == code
        finally:
            silent.close()
            hostile.close()
        with pytest.raises(MachineError) as no_port:
            await snapshot(None, "s", [ImageRef("x", store=f"embedded:{tmp_path / 'none'}")], Quiesce.AGENT, None, 0)
        assert no_port.value.errno == errno.EINVAL

    async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(100):
            pass
        writer.close()

    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'\xff{"return": 1}\n\xff' + b"[" * 5000 + b"\n")
        await nothing(reader, writer)

    asyncio.run(run())

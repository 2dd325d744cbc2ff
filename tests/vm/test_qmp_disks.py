"""Disks come to a running guest, grow under it and go; and what fails half way leaves nothing behind."""

from __future__ import annotations

import asyncio
import errno

import pytest

from qemu_glue.guest import Disk
from qemu_glue.qmp import DiskSpec, Machine, MachineError, disks
from tests.vm.machines import FailingConnection, export, machine, says
from tests.vm.rig import MIB, Rig, serve

pytestmark = pytest.mark.vm


def sectors(size: int) -> int:
    return size * MIB // 512


async def inventory(running: Machine) -> tuple[list[str], list[str], list[str]]:
    chardevs = [row["label"] for row in await running.execute("query-chardev")]
    return sorted(await disks.devices(running.qmp)), sorted(chardevs), sorted(await disks.nodes(running.qmp))


def test_disks_are_attached_resized_and_detached_under_a_running_guest(rig: Rig) -> None:
    async def run() -> None:
        for name in ("root", "vu", "nb"):
            rig.create(name, 64 * MIB)
        async with rig.daemon() as daemon:
            root = await serve(daemon, "root", "vhost-user", rig.socket("root.sock"))
            async with machine(rig, root, "disks", ports=2) as (running, guest):
                before = await inventory(running)
                assert await running.disks() == ["d0"]
                vu, nb = await export(daemon, rig, "vu", "vhost-user"), await export(daemon, rig, "nb", "nbd")
                at = await says(guest, "GUEST-DISKS")
                await running.attach(vu)
                at = await says(guest, f"vdb={sectors(64)}", at)
                await running.attach(nb)
                at = await says(guest, f"vdc={sectors(64)}", at)
                assert sorted(await running.disks()) == ["d0", "nb", "vu"]
                with pytest.raises(MachineError) as full:
                    await running.attach(DiskSpec("more", "vhost-user", vu.path))
                assert full.value.errno == errno.ENOSPC
                with pytest.raises(MachineError) as twice:
                    await running.attach(vu)
                assert twice.value.errno == errno.EEXIST
                for size in (96, 128):  # twice: the NBD connection below the node is replaced each time
                    for name, node in (("vu", "vdb"), ("nb", "vdc")):

                        async def change(size: int, name: str = name) -> None:
                            await daemon.execute("block_resize", {"node-name": name, "size": size})

                        await running.resize(name, size * MIB, change)
                        at = await says(guest, f"{node}={sectors(size)}", at)
                await running.detach("vu")
                await running.detach("nb")
                at = await says(guest, f"GUEST-DISKS vda={sectors(64)} \n", at)
                assert await inventory(running) == before
                with pytest.raises(MachineError) as gone:
                    await running.detach("vu")
                assert gone.value.errno == errno.ENODEV

    asyncio.run(run())


def test_every_command_of_an_attach_may_fail_and_nothing_is_left(rig: Rig) -> None:
    async def run() -> None:
        for name in ("root", "vu", "nb"):
            rig.create(name, 16 * MIB)
        async with rig.daemon() as daemon:
            root = await serve(daemon, "root", "vhost-user", rig.socket("root.sock"))
            async with machine(rig, root, "disks", ports=2) as (running, guest):
                connection = running.qmp
                assert isinstance(connection, FailingConnection)
                await says(guest, "GUEST-DISKS")
                before = await inventory(running)
                for spec in (await export(daemon, rig, "vu", "vhost-user"), await export(daemon, rig, "nb", "nbd")):
                    faults = 0
                    for late in (False, True):
                        at = 0
                        while True:
                            connection.arm(at, late)
                            try:
                                await running.attach(spec)
                            except MachineError as error:
                                assert "fault" in str(error)
                                assert not error.left
                                connection.arm(-1)
                                assert await inventory(running) == before
                                faults, at = faults + 1, at + 1
                            else:
                                break
                        connection.arm(-1)
                        await running.detach(spec.name)
                    assert faults >= 10
                with pytest.raises(MachineError) as nobody:
                    await running.attach(DiskSpec("none", "vhost-user", rig.socket("nobody.sock")))
                assert nobody.value.errno == errno.ECONNREFUSED
                assert await inventory(running) == before

    asyncio.run(run())


def test_a_guest_that_does_not_give_a_disk_back_keeps_it(rig: Rig) -> None:
    async def run() -> None:
        rig.create("root", 16 * MIB)
        rig.create("vu", 16 * MIB)
        async with rig.daemon() as daemon:
            root = await serve(daemon, "root", "vhost-user", rig.socket("root.sock"))
            async with machine(rig, root, "disks", ports=1) as (running, guest):
                await says(guest, "GUEST-DISKS")
                await running.attach(await export(daemon, rig, "vu", "vhost-user"))
                await says(guest, "vdb=")
                await running.pause()  # a guest that stands still does not answer
                with pytest.raises(MachineError) as busy:
                    await running.detach("vu", deadline=0.5)
                assert busy.value.errno == errno.EBUSY
                assert busy.value.left
                assert "vu" in await running.disks()
                await running.resume()
                await running.detach("vu")
                assert await running.disks() == ["d0"]

    asyncio.run(run())


def test_an_nbd_disk_of_another_layout_is_not_resized(rig: Rig) -> None:
    async def run() -> None:
        rig.create("root", 16 * MIB)
        async with rig.daemon() as daemon:
            root = await serve(daemon, "root", "nbd", rig.socket("nbd.sock"))
            node = f"driver=nbd,node-name=plain,server.type=unix,server.path={root.path},export=root"
            more = ["-blockdev", node, "-device", "virtio-blk-pci,id=plain,drive=plain"]
            async with machine(rig, Disk("nbd", root.path, export="root"), "disks", extra=more) as (running, _):
                changed: list[int] = []

                async def change(size: int) -> None:
                    changed.append(size)

                with pytest.raises(MachineError) as refused:
                    await running.resize("plain", 32 * MIB, change)
                assert refused.value.errno == errno.ENOTSUP
                assert not changed

    asyncio.run(run())

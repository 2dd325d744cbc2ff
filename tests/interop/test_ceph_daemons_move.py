"""A machine moves between daemons that serve exports by hand, without the host service, on a cluster: `qemu_glue.qmp`
migrates it under load, there and back, and the lock goes with it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from librbd_py import rbd
from librbd_py.devcluster import DevCluster
from librbd_py.image import ownership
from librbd_py.image.handle import ImageHandle
from librbd_py.store import connect
from qemu_glue.accel import accelerator
from tests.vm.machines import says
from tests.vm.rig import Rig
from tests.vm.test_qmp_migration import finished, two_sides
from vm_images.cache import cache_dir
from vm_images.initramfs import initramfs
from vm_images.kernel import kernel

pytestmark = pytest.mark.vm
DEADLINE = 60.0


@pytest.fixture
def rig(tmp_path: Path, ceph_cluster: DevCluster) -> Iterator[Rig]:
    """Its image is rbd/disk, which no other test of the cluster has while this one runs."""
    chosen = kernel()
    ramdisk = initramfs(chosen)
    accel, _ = accelerator(chosen.vmlinuz, ramdisk, cache_dir())
    made = Rig(tmp_path, ceph_cluster.url, chosen, ramdisk, accel)
    yield made
    with made.cluster() as cluster, cluster.open_ioctx("rbd") as ioctx:
        rbd.RBD().remove(ioctx, "disk")


def owner(rig: Rig) -> int:
    """Pid of the daemon that owns the lock of rbd/disk."""
    store = connect(rig.url)
    try:
        with ImageHandle.open(store.open("rbd"), "disk", read_only=True) as handle:
            found = ownership.look(handle).owner
            assert found is not None and found.answer is not None
            return found.answer.pid
    finally:
        store.close()


@pytest.mark.parametrize("kind", ["vhost-user", "nbd"])
def test_a_machine_under_load_moves_there_and_back(rig: Rig, kind: str) -> None:
    async def run() -> None:
        async with two_sides(rig, kind) as (a, b):
            with a.guest(seconds=20) as first:
                await says(first, "STAMP-TICK")
                assert await asyncio.to_thread(owner, rig) == a.daemon.pid
                async with await a.connect() as source, b.incoming() as (there, second):
                    await source.migrate(there, f"unix:{rig.folder}/m", bandwidth=1 << 30)
                    await source.quit()
                    await asyncio.to_thread(first.wait_for, None, DEADLINE)
                    await says(second, "STAMP-TICK")
                    assert await asyncio.to_thread(owner, rig) == b.daemon.pid
                    (a.rig.folder / "qmp.sock").unlink(missing_ok=True)
                    async with a.incoming() as (back, third):
                        await there.migrate(back, f"unix:{rig.folder}/m2", bandwidth=1 << 30)
                        await there.quit()
                        await says(third, "STAMP-TICK")
                        assert await asyncio.to_thread(owner, rig) == a.daemon.pid
                        await finished(third)

    asyncio.run(run())

"""A guest boots from a clone through each export and what it writes is in the image, not in the parent."""

from __future__ import annotations

import asyncio

import pytest

from qemu_glue import boot as demonstration
from tests.vm.rig import Rig
from vm_images.disk import boot_disk


@pytest.mark.vm
def test_guest_boots_from_clones_over_vhost_user_and_nbd(rig: Rig) -> None:
    with rig.cluster() as cluster:
        demonstration.prepare(cluster, boot_disk())

        async def both() -> None:
            async with rig.daemon() as daemon:
                for kind in ("vhost-user", "nbd"):
                    await demonstration.boot(kind, daemon, rig.folder, rig.accel, lambda text: None)
                    assert "512 blocks" in await asyncio.to_thread(demonstration.verify, cluster, f"vm-{kind}")

        asyncio.run(both())

"""block_resize of the daemon reaches a vhost-user guest by itself, with no command to QEMU."""

from __future__ import annotations

import asyncio

import pytest

from tests.vm.rig import MIB, Rig, serve

DEADLINE = 60.0


@pytest.mark.vm
def test_resize_is_seen_by_the_running_guest(rig: Rig) -> None:
    asyncio.run(resized(rig))


async def resized(rig: Rig) -> None:
    rig.create("disk", 64 * MIB)
    async with rig.daemon() as daemon:
        disk = await serve(daemon, "disk", "vhost-user", rig.socket("disk.sock"))
        with rig.guest(disk, "rbdpy.mode=size") as guest:
            assert await asyncio.to_thread(guest.wait_for, f"GUEST-SIZE {64 * MIB // 512}", DEADLINE), guest.console
            await daemon.execute("block_resize", {"node-name": "disk", "size": 96 * MIB})
            assert await asyncio.to_thread(guest.wait_for, f"GUEST-SIZE {96 * MIB // 512}", DEADLINE), guest.console
        nodes = await daemon.execute("query-named-block-nodes")
        assert nodes[0]["image"]["virtual-size"] == 96 * MIB

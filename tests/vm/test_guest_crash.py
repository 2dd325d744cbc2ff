"""kill -9 of the daemon under a guest's I/O: the guest sees a pause and no error, and no version of a block is lost."""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.vm.rig import MIB, Rig, serve

DEADLINE = 150.0


@pytest.mark.vm
@pytest.mark.parametrize("kind", ["vhost-user", "nbd"])
def test_killed_daemon_comes_back_and_the_guest_sees_no_error(rig: Rig, kind: str) -> None:
    asyncio.run(killed_daemon(rig, kind, kills=13 if kind == "vhost-user" else 1))


async def killed_daemon(rig: Rig, kind: str, kills: int) -> None:
    rig.create("disk", 64 * MIB)
    daemon = rig.daemon()
    await daemon.start()
    try:
        disk = await serve(daemon, "disk", kind, rig.socket("disk.sock"), queues=1)
        append = f"rbdpy.mode=load rbdpy.threads=8 rbdpy.seconds={12 + kills} rbdpy.blocks=4096"
        with rig.guest(disk, append) as guest:
            for _ in range(kills):
                seen = len(guest.console)
                assert await asyncio.to_thread(guest.wait_for, "STAMP-TICK", DEADLINE, None, seen), guest.console
                daemon.kill()
                await daemon.disconnect()
                await daemon.start()
            assert await asyncio.to_thread(guest.wait_for, None, DEADLINE), guest.console[-2000:]
            console = guest.console
    finally:
        await daemon.stop()
    found = re.search(r"STAMP-LOAD ops=(\d+) errors=(\d+) longest_ms=(\d+)", console)
    assert found, console[-3000:]
    assert int(found[2]) == 0, console[-3000:]
    assert int(found[1]) > 100
    assert "GUEST-CHECK ok" in console
    assert "I/O error" not in console

"""Snapshots of both disks of a guest while its agent keeps the file systems frozen: `python -m
qemu_glue.examples.consistent_snapshot`."""

from __future__ import annotations

import asyncio

from qemu_glue.examples.scene import MIB, says, scene
from qemu_glue.qmp import Quiesce


async def main() -> None:
    async with scene() as here:
        images = [here.create(name, 32 * MIB) for name in ("data", "log")]
        disks = [await here.export(image) for image in images]
        append = f"rbdpy.mode=twins rbdpy.start={16 * MIB}"
        async with here.guest(disks, append, agent=True) as (machine, guest):
            await says(guest, "GUEST-AGENT ready")
            await says(guest, "GUEST-TWINS 100")
            taken = await machine.snapshot("monday", images, Quiesce.AGENT, limit=10)
            print(f"{taken.name}: {taken.frozen} file systems of {taken.images} frozen for {taken.still * 1000:.0f} ms")
            taken = await machine.snapshot("tuesday", images, Quiesce.STOP)  # for a guest without an agent
            print(f"{taken.name}: the guest stood still for {taken.still * 1000:.0f} ms")


if __name__ == "__main__":
    asyncio.run(main())

"""Gives a running guest a second disk and takes it away again: `python -m qemu_glue.examples.hotplug`."""

from __future__ import annotations

import asyncio

from qemu_glue.examples.scene import says, scene


async def main() -> None:
    async with scene() as here:
        root = await here.export(here.create("root"))
        more = await here.export(here.create("more"))
        async with here.guest([root], "rbdpy.mode=disks rbdpy.start=0") as (machine, guest):
            await machine.attach(more)
            await says(guest, "vdb=")
            print("the guest sees the disk:", await machine.disks())
            await machine.detach("more")
            print("the guest gave it back:", await machine.disks())


if __name__ == "__main__":
    asyncio.run(main())

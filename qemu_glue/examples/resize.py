"""Grows the disk of a running guest, which sees it at once: `python -m qemu_glue.examples.resize`."""

from __future__ import annotations

import asyncio

from qemu_glue.examples.scene import MIB, says, scene


async def main() -> None:
    async with scene() as here:
        image = here.create("root", 64 * MIB)
        async with here.guest([await here.export(image)], "rbdpy.mode=disks rbdpy.start=0") as (machine, guest):
            await says(guest, f"vda={64 * MIB // 512}")
            await machine.resize("d0", 96 * MIB, image)
            await says(guest, f"vda={96 * MIB // 512}")
            print("the guest's disk has grown from 64 to 96 MiB")


if __name__ == "__main__":
    asyncio.run(main())

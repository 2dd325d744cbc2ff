"""Moves a running guest to another QEMU on this host: `python -m qemu_glue.examples.migrate`."""

from __future__ import annotations

import asyncio

from qemu_glue.examples.scene import says, scene


async def main() -> None:
    async with scene() as here:
        image = here.create("root")
        old, new = await here.export(image, 1), await here.export(image, 2)
        append = "rbdpy.mode=idle rbdpy.start=0"
        async with (
            here.guest([old], append, "old") as (source, before),
            here.guest([new], append, "new", incoming=True) as (destination, after),
        ):
            await says(before, "GUEST-TICK")
            moved = await source.migrate(destination, f"unix:{here.folder}/migrate.sock")
            print(f"moved in {moved.seconds:.2f} s, the guest stood still for {moved.downtime * 1000:.0f} ms")
            await source.quit()
            await says(after, "GUEST-TICK")
            print("the guest goes on:", await destination.status())


if __name__ == "__main__":
    asyncio.run(main())

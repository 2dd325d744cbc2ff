"""Follows the events of a guest, without asyncio: `python -m qemu_glue.examples.watch_events [MONITOR]`.

Without MONITOR (a QMP socket, of `rbdpy vm ls --format json` for one) it starts a guest and pauses and resumes it.
"""

from __future__ import annotations

import asyncio
import sys

from qemu_glue.examples.scene import scene
from qemu_glue.qmp import blocking


def watch(path: str) -> None:
    with blocking.Machine.connect(path) as machine:
        for event in machine.events():
            print(f"{event.seconds:.3f} {event.name} {event.data}", flush=True)


async def demonstrate() -> None:
    async with scene() as here:
        async with here.guest([await here.export(here.create("root"))], "rbdpy.mode=idle rbdpy.start=0") as (
            machine,
            _,
        ):
            with machine.qmp.listen() as events:
                await machine.pause()
                await machine.resume()
                for _ in range(2):
                    event = await events.next(10)
                    print(f"{event.seconds:.3f} {event.name} {event.data}")


if __name__ == "__main__":
    if sys.argv[1:]:
        watch(sys.argv[1])
    else:
        asyncio.run(demonstrate())

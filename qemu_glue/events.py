"""Events of exports, brought from the data plane's event thread to the daemon's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from librbd_py.image import events

NAMES = {
    events.EXPORT_CONNECTED: "connected",
    events.EXPORT_DISCONNECTED: "disconnected",
    events.EXPORT_BROKEN: "broken",
    events.EXPORT_STOPPED: "stopped",
    events.EXPORT_SWITCHOVER: "switchover",
    events.EXPORT_RINGS: "rings",
    events.EXPORT_STALE: "stale",
    events.LOST: "lost",
}


STALE = "the guest came without what the disk wrote to its memory last (its service was killed as it moved): queue %d"


def follow(export_id: int, loop: asyncio.AbstractEventLoop, handler: Callable[[str, int], None]) -> None:
    """`handler(name, value)` runs on the loop's thread for every event of that export, until forget()."""

    def arrived(kind: int, value: int) -> None:
        loop.call_soon_threadsafe(handler, NAMES[kind], value)

    events.EVENTS.on_export(export_id, arrived)


def forget(export_id: int) -> None:
    events.EVENTS.forget_export(export_id)

"""An export as the daemon keeps it: the native export, the node it serves, and the wait for its end."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from qemu_glue import events
from qemu_glue.exports import Export
from qemu_glue.handoff import HandOff
from qemu_glue.nodes import Node

log = logging.getLogger(__name__)

DROP_DEADLINE = 30.0  # seconds a dropped client's requests in flight may take


class ServedExport:
    """`hand_off`: of the first writable vhost-user export of a node."""

    def __init__(
        self, export_id: str, kind: str, node: Node, number: int, native: Export, hand_off: HandOff | None = None
    ) -> None:
        self.id = export_id
        self.type = kind
        self.node = node
        self.number = number  # the native id, never used twice in a daemon's life
        self.native = native
        self.hand_off = hand_off
        self._stopped = asyncio.Event()
        self._ending = False

    def follow(self, loop: asyncio.AbstractEventLoop) -> None:
        """Takes the native export's events from now on; must come before its first stop()."""
        events.follow(self.number, loop, self._happened)
        if self.hand_off is not None:
            self.hand_off.start()
            self.hand_off.happened("lost", 0)  # whoever was quicker

    def _happened(self, what: str, value: int) -> None:
        if what == "stopped":
            self._stopped.set()
        elif what == "broken":
            log.warning("export %s: a client broke the protocol (queue %d)", self.id, value)
        elif what == "stale":
            log.warning(f"export %s: {events.STALE}", self.id, value)
        elif self.hand_off is not None:
            self.hand_off.happened(what, value)

    async def end(self, hard: bool) -> None:
        """Stops and frees the export. ETIMEDOUT (builtin TimeoutError) when requests in flight do not end."""
        self._ending = True
        self.native.stop(hard)
        await asyncio.wait_for(self._stopped.wait(), DROP_DEADLINE)
        events.forget(self.number)
        if self.hand_off is not None:
            await self.hand_off.end(stays=True)
        self.native.free()

    def describe(self) -> dict[str, Any]:
        """BlockExportInfo of QMP."""
        return {
            "id": self.id,
            "type": self.type,
            "node-name": self.node.name,
            "shutting-down": self._ending,
        }

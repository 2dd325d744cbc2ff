"""The event BLOCK_IO_ERROR: a guest got an error because its store failed. Source: QEMU's qapi/block-core.json.

As QEMU limits its events: the first goes out at once; what follows within a second waits for the end of it, and only
the last of those is sent. A store that fails every request would otherwise drown the monitors.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import Any

INTERVAL = 1.0  # seconds between events of one node and direction

Key = tuple[str, str]  # node name, operation


class ErrorEvents:
    """`emit` runs on the loop's thread."""

    def __init__(self, emit: Callable[[str, dict[str, Any]], None], loop: asyncio.AbstractEventLoop) -> None:
        self._emit = emit
        self._loop = loop
        self._held: dict[Key, dict[str, Any] | None] = {}  # in the second after an event: the last that came since

    def report(self, node: str, read: bool, code: int) -> None:
        """Any thread. `code`: errno."""
        operation = "read" if read else "write"
        data = {
            "qom-path": "",
            "device": "",
            "node-name": node,
            "operation": operation,
            "action": "report",
            "nospace": code == errno.ENOSPC,
            "reason": os.strerror(code),
        }
        self._loop.call_soon_threadsafe(self._arrived, (node, operation), data)

    def forget(self, node: str) -> None:
        """The node is gone: nothing more is said of it."""
        for key in [key for key in self._held if key[0] == node]:
            del self._held[key]

    def _arrived(self, key: Key, data: dict[str, Any]) -> None:
        if key in self._held:
            self._held[key] = data
        else:
            self._send(key, data)

    def _send(self, key: Key, data: dict[str, Any]) -> None:
        self._emit("BLOCK_IO_ERROR", data)
        self._held[key] = None
        self._loop.call_later(INTERVAL, self._interval_over, key)

    def _interval_over(self, key: Key) -> None:
        data = self._held.pop(key, None)
        if data is not None:
            self._send(key, data)

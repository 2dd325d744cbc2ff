"""Is this client shut out? Asked of the monitors while requests wait and none ends.

An OSD refuses a blocklisted client, which is how one learns of it; an OSD that hangs refuses nobody. Requests that wait
for it would wait on after another client has taken the image, and the guest with them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from librbd_py.format.logs import logger
from librbd_py.native import ffi, lib

if TYPE_CHECKING:
    from .connection import Connection

log = logger(__name__)

TICK = 1.0  # seconds between two looks


class StallWatch:
    """Of one connection. `tick()` comes from one thread every TICK seconds; a thread of its own exists only while
    nothing moves, because a monitor may be as deaf as the OSD."""

    def __init__(self, connection: Connection, shut_out: Callable[[], None]) -> None:
        self._connection = connection
        self._shut_out = shut_out
        self._running, self._ended = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        self._before = (0, 0)  # operations running, C's and Python's, and ended ever, at the last look
        self._stalled = threading.Event()
        self._asking: threading.Thread | None = None

    def tick(self) -> None:
        now = self._connection.calls()
        handle = self._connection.handle or ffi.NULL  # it may be shut down just now
        if lib.rbdn_rados_progress(handle, self._running, self._ended) == 0:
            now = (now[0] + self._running[0], now[1] + self._ended[0])
        if now[0] and self._before[0] and now[1] == self._before[1]:
            self._stalled.set()
            if self._asking is None or not self._asking.is_alive():
                self._asking = threading.Thread(target=self._ask, name="rbdpy-ceph-stall", daemon=True)
                self._asking.start()
        else:
            self._stalled.clear()
        self._before = now

    def _ask(self) -> None:
        from .store import RadosStore

        pause = threading.Event()
        while self._stalled.is_set():
            try:
                self._connection.acquire()
            except OSError:
                return  # it is being closed
            store = RadosStore(self._connection)
            try:
                address = self._connection.client.address
                host = address.rpartition(":")[0]
                if not {address, f"{host}:0/0"}.isdisjoint(store.blocklist()):
                    self._connection.fenced = True
                    self._shut_out()
                    return
            except OSError as failure:
                log.debug("whether this client is blocklisted is not known: %s", failure)
            finally:
                store.close()
            pause.wait(TICK)

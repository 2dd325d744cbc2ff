"""Brings together what an export sees of a live migration and what the image does with its exclusive lock.

The data plane tells when a front end stops its rings for good while it logs writes (`switchover`: its VM leaves), and
when rings start (`rings`: its VM runs here). The first offers the lock before QEMU gets its answer; the second takes
what was offered, or takes it back. Requests wait at the image's gate meanwhile; see librbd_py/control/handoff.py.

    SERVING --switchover--> OFFERING --> OFFERED --rings--> TAKING_BACK --> SERVING
    STANDING_BY --rings--> TAKING_OVER --> SERVING
    TAKING_BACK, TAKING_OVER --a stranger owned the lock--> REFUSED --rings, force()--> as before
    any --end()--> ENDED
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from librbd_py.image.handle import ImageHandle
from qemu_glue.exports import Export

AGAIN_SECONDS = 1.0  # between attempts to get the lock while the store, or its owner, does not let us

log = logging.getLogger(__name__)


class State(Enum):
    SERVING = auto()
    OFFERING = auto()
    OFFERED = auto()
    TAKING_BACK = auto()
    STANDING_BY = auto()
    TAKING_OVER = auto()
    REFUSED = auto()
    ENDED = auto()


class HandOff:
    """Of one vhost-user export. `key`: how a hand-off names the VM. `emit(event, data)` sends a QMP event; `name`: the
    export in it. All methods on the event loop; events are dealt with one after the other, in order."""

    def __init__(
        self, handle: ImageHandle, export: Export, key: str, emit: Callable[[str, dict[str, Any]], None], name: str
    ) -> None:
        self.state = State.SERVING
        self._handle = handle
        self._export = export
        self._key = key
        self._emit = emit
        self._name = name
        self._events: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._switchover = 0  # the last one dealt with

    async def stand_by(self) -> None:
        """The VM is expected from another host: before its front end is served. OSError."""
        if self._handle.uses_lock:
            await asyncio.to_thread(self._handle.stand_by, self._key, park=True)
            self.state = State.STANDING_BY

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def happened(self, what: str, value: int) -> None:
        """An event of the export."""
        if what in ("switchover", "rings", "lost"):
            self._events.put_nowait((what, value))

    def force(self) -> None:
        """An operator's word: takes the lock after it was refused, whoever owned it."""
        self._events.put_nowait(("force", 0))

    async def end(self) -> None:
        """No front end is connected any more. What is under way is given up: the image is closed next."""
        self.state = State.ENDED
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            what, value = await self._events.get()
            if what == "lost":
                stats = self._export.stats()
                if stats.switchover:
                    await self._leaves(stats.switchover)
                elif stats.rings:
                    await self._comes(force=False)
            elif what == "switchover":
                await self._leaves(value)
            else:
                await self._comes(force=what == "force")

    async def _leaves(self, number: int) -> None:
        if number == self._switchover:
            return
        self._switchover = number
        begin = time.monotonic()
        try:
            if self.state is State.SERVING and self._handle.uses_lock and not self._handle.read_only:
                self.state = State.OFFERING
                offered = await asyncio.to_thread(self._handle.offer, self._key)
                self.state = State.OFFERED if offered else State.SERVING
        except OSError as error:
            # The lock stays here: the next host asks for it, as any client would.
            self.state = State.SERVING
            log.warning("%s: the lock is not offered: %s", self._name, error)
        waited = self._export.go_on(number)
        if self.state is State.OFFERED:
            self._say("RBD_HANDOFF_OFFERED", begin)
            if not waited:
                log.info("%s: the guest's host did not wait for the offer", self._name)

    async def _comes(self, force: bool) -> None:
        begin = time.monotonic()
        if self.state in (State.OFFERED, State.TAKING_BACK):
            await self._get(State.TAKING_BACK, self._handle.take_back, "RBD_HANDOFF_BACK", begin, force)
        elif self.state in (State.STANDING_BY, State.TAKING_OVER, State.REFUSED):
            await self._get(State.TAKING_OVER, self._handle.take_over, "RBD_HANDOFF_TAKEN", begin, force)

    async def _get(self, state: State, take: Callable[[], None], event: str, begin: float, force: bool) -> None:
        """Until the lock is ours, or a stranger's."""
        while True:
            self.state = state
            try:
                if force:
                    await asyncio.to_thread(self._handle.take_over, True)
                else:
                    await asyncio.to_thread(take)
            except OSError as error:
                if error.errno == errno.ESTALE:
                    self.state = State.REFUSED
                    self._say("RBD_HANDOFF_REFUSED", begin, reason=error.strerror or str(error))
                    log.error("%s: %s: the guest's requests wait", self._name, error.strerror)
                    return
                if error.errno == errno.ESHUTDOWN:
                    return  # fenced or closing: its requests have failed
                log.warning("%s: the lock cannot be had: %s; trying again", self._name, error)
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            self.state = State.SERVING
            self._say(event, begin)
            return

    def _say(self, event: str, begin: float, **more: str) -> None:
        data = {"id": self._name, "key": self._key, "seconds": round(time.monotonic() - begin, 6), **more}
        self._emit(event, data)

"""The lock follows the VM: what an image's exports see of a live migration becomes what its handle does about it.

A `HandOff` belongs to an export and its open image and is told the export's events. They are carried out in their
order, one at a time, by calls that block, in threads. States, and the ways between them, are the table `NEXT`:

* source: SERVING, the front end stops its last ring (switchover) and waits -> OFFERING -> OFFERED, and the front end
  gets its answer. Its rings start again: the migration failed -> TAKING_BACK -> SERVING. It leaves and the offer was
  taken: SERVING again, as an image that runs nothing.
* destination: STANDING_BY; the rings start, or (NBD) the first write waits -> TAKING_OVER -> SERVING.
* REFUSED: somebody who is not of this VM has owned the lock meanwhile, so its memory and the disk no longer belong
  together. Requests wait until an operator decides (`force`), the front end leaves, or its rings start once more. Also
  for a VM that moved away while its service was dead (qemu_glue/elsewhere.py): then rings are no reason to try again.

Requests are held by the image's gate throughout, so nothing here is a race with the guest. The front end waits for so
long only (`VHOST_OFFER_MS`); then nothing was offered in time, and the next host asks for the lock as anybody.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any, TypeVar

from librbd_py.image.handle import ImageHandle
from qemu_glue.elsewhere import runs_elsewhere
from qemu_glue.exports import Export

TAKEN_LOOK = (0.01, 1.0)  # seconds between looks whether an offer was taken: the first, the longest
RETRY = (0.1, 5.0)  # seconds until the next attempt, when the store or the lock's owner failed: the first, the longest
THREADS = 32  # hand-offs at once in a process; the rest wait

Emit = Callable[[str, dict[str, Any]], None]
R = TypeVar("R")

log = logging.getLogger(__name__)


class State(Enum):
    SERVING = "serving"
    OFFERING = "offering"
    OFFERED = "offered"
    TAKING_BACK = "taking-back"
    STANDING_BY = "standing-by"
    TAKING_OVER = "taking-over"
    REFUSED = "refused"
    ENDED = "ended"


S = State

NEXT: dict[State, frozenset[State]] = {
    S.SERVING: frozenset({S.OFFERING, S.STANDING_BY, S.ENDED}),
    S.OFFERING: frozenset({S.OFFERED, S.SERVING, S.ENDED}),
    S.OFFERED: frozenset({S.TAKING_BACK, S.SERVING, S.ENDED}),
    S.TAKING_BACK: frozenset({S.SERVING, S.OFFERED, S.REFUSED, S.ENDED}),
    S.STANDING_BY: frozenset({S.TAKING_OVER, S.SERVING, S.ENDED}),
    S.TAKING_OVER: frozenset({S.SERVING, S.STANDING_BY, S.REFUSED, S.ENDED}),
    S.REFUSED: frozenset({S.TAKING_OVER, S.TAKING_BACK, S.SERVING, S.ENDED}),
    S.ENDED: frozenset(),
}

_threads = ThreadPoolExecutor(THREADS, thread_name_prefix="rbd-handoff")


class HandOff:
    """`key` names the VM, the same on both hosts. `incoming`: True, the VM comes here by migration, so a stranger who
    had the lock since `stand_by` makes it REFUSED; False, it starts here; None, nobody knows: what is offered is taken,
    and otherwise the lock is had as ever. `name`: the export in events and in the log. An image has one HandOff.

    All methods are for the event loop's thread. `emit` sends RBD_HANDOFF_OFFERED, _TAKEN, _BACK and _REFUSED.
    """

    def __init__(
        self,
        handle: ImageHandle,
        export: Export,
        key: str,
        emit: Emit,
        name: str,
        *,
        incoming: bool | None = False,
    ) -> None:
        self.key = key
        self.incoming = incoming
        self.state = S.SERVING
        self.reason = ""  # why it was refused, or is tried again
        self._handle = handle
        self._export = export
        self._emit = emit
        self._name = name
        self._alone = False  # the last client has left
        self._pending: dict[str, tuple[int, float]] = {}  # event -> value, time; in order, equal ones are merged
        self._news = asyncio.Event()
        self._from_back = False  # REFUSED when taking back, not when taking over
        self._moved = False  # REFUSED because the VM runs elsewhere
        self._delay = RETRY[0]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Carries out what happens from now on, and what happened before."""
        self._loop = asyncio.get_running_loop()
        self._tasks.append(self._loop.create_task(self._work()))
        self._handle.on_wanted = self._wanted
        self._handle.serves_vms = True

    # --- what happens

    def happened(self, what: str, value: int) -> None:
        """An event of the export (qemu_glue.events). Who leaves out "connected" and "disconnected" closes the image
        when its client has left."""
        if what in ("connected", "disconnected"):
            came, self._alone = self._alone or what == "connected", value == 0
            if value == 0:
                self._post("left")
            elif came:
                self._post("came")
        elif what in ("switchover", "rings"):
            self._post(what, value)
        elif what == "lost":
            stats = self._export.stats()
            if stats.clients:
                self.happened("connected", stats.clients)
            if stats.switchover:
                self._post("switchover", stats.switchover)
            elif stats.rings:
                self._post("rings")

    def _wanted(self) -> None:
        """The data path's event thread: a write waits."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._post, "wanted")

    def _post(self, what: str, value: int = 0) -> None:
        if self.state is not S.ENDED:
            self._pending.pop(what, None)
            self._pending[what] = (value, time.monotonic())
            self._news.set()

    # --- what others ask for

    async def stand_by(self, *, sure: bool = True) -> None:
        """The VM will come here (not `sure`: or it came long ago, and its service was started anew); before start() and
        before its client is served. OSError: the lock is in use here (EBUSY), or the store failed. An image without
        exclusive lock has nothing to move."""
        if self._handle.uses_lock:
            self.incoming = True if sure else None
            await self._call(self._handle.stand_by, self.key, park=True)
            self._go(S.STANDING_BY)

    async def look_around(self) -> None:
        """The service was started anew and the VM's QEMU is older: stands by when the VM runs elsewhere. Before start()
        and before its client is served. OSError: the store failed."""
        if self._handle.uses_lock and await self._call(runs_elsewhere, self._handle, self.key) is not None:
            await self.stand_by(sure=False)

    def force(self) -> bool:
        """An operator's word that a VM whose lock was refused may have it all the same. False: it was not refused."""
        if self.state is S.REFUSED:
            self._post("force")
        return self.state is S.REFUSED

    @property
    def lingers(self) -> bool:
        """The lock is offered and, as far as is known, not taken: closing the image would take the offer away."""
        return self.state is S.OFFERING or (self.state is S.OFFERED and self._handle.handing_over)

    async def wait_taken(self, seconds: float | None = None) -> bool:
        """Until closing the image takes nothing away from the next host. False: not within `seconds`."""
        end = None if seconds is None else time.monotonic() + seconds
        pause = TAKEN_LOOK[0]
        while self.lingers:
            if end is not None and time.monotonic() >= end:
                return False
            await asyncio.sleep(pause)
            pause = min(2 * pause, TAKEN_LOOK[1])
        return True

    async def end(self, stays: bool = False) -> None:
        """Nothing more is begun, and what is under way ends when the caller closes the image. `stays`: the image stays
        open and is no VM's any more. Idempotent."""
        idle = self.state in (S.STANDING_BY, S.REFUSED) or (self.state is S.OFFERED and not self.lingers)
        if self.state is not S.ENDED:
            self._go(S.ENDED)
            self._handle.on_wanted = None
            self._handle.serves_vms = False
            if self._timer is not None:
                self._timer.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if idle and stays:
            await self._call(self._handle.stand_down)

    # --- the worker

    async def _work(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._pending:
                what, (value, since) = next(iter(self._pending.items()))
                del self._pending[what]
                try:
                    await self._event(what, value, since)
                except OSError as failure:  # of a call that has no other way to tell
                    log.warning("%s: hand-off, %s: %s", self._name, what, failure)
                except Exception:  # a defect of ours must not stop the VM's next hand-off
                    log.exception("%s: hand-off, %s", self._name, what)

    async def _event(self, what: str, value: int, since: float) -> None:
        match what:
            case "switchover":
                await self._switchover(value, since)
            case "rings" | "wanted" | "force":
                await self._runs_here(what, since)
            case "again" if not self._alone:
                await self._runs_here(what, since)
            case "came":
                await self._came()
            case "left" if self._alone:
                await self._left()
            case "taken":
                await (self._forget_taken() if self._alone else self._came())

    # --- source

    async def _switchover(self, number: int, since: float) -> None:
        waits = self._export.stats().switchover == number
        offering = waits and self.state is S.SERVING and self._handle.uses_lock
        if offering:
            self._go(S.OFFERING)
            try:
                offered = await self._call(self._handle.offer, self.key)
            except OSError as failure:
                offered = False
                log.warning("%s: the lock was not offered: %s", self._name, failure)
            self._go(S.OFFERED if offered or self._handle.handing_over else S.SERVING)
        in_time = self._export.go_on(number)
        if offering and self.state is S.OFFERED:
            self._tell("OFFERED", since)
            if not in_time:
                log.warning("%s: the lock was offered %.1f s late", self._name, time.monotonic() - since)

    # --- destination, or source again

    async def _runs_here(self, what: str, since: float) -> None:
        if self.state is S.OFFERED and what != "wanted":
            await self._take_back(since)
        elif self.state is S.STANDING_BY:
            if self.incoming or what == "force" or await self._call(self._handle.lock_offered_to, self.key):
                await self._take_over(since, what == "force")
            elif where := await self._elsewhere():
                self._go(S.TAKING_OVER)
                self._moved = True
                self._failed(OSError(errno.ESTALE, f"the VM runs on {where}"), S.STANDING_BY, since)
            else:
                await self._call(self._handle.stand_down)
                self._go(S.SERVING)
        elif self.state is S.REFUSED and what != "wanted":
            if self._moved and what != "force":
                return
            if self._from_back and what != "force":
                await self._take_back(since)
            else:
                await self._take_over(since, what == "force")

    async def _elsewhere(self) -> str | None:
        """Where the VM runs, when these rings are what it left behind: a VM that comes has a new in-flight table."""
        if not self._export.stats().resumed:
            return None
        return await self._call(runs_elsewhere, self._handle, self.key)

    async def _take_back(self, since: float) -> None:
        self._go(S.TAKING_BACK)
        try:
            await self._call(self._handle.take_back)
        except OSError as failure:
            self._failed(failure, S.OFFERED, since)
        else:
            self._here("BACK", since)

    async def _take_over(self, since: float, force: bool) -> None:
        self._go(S.TAKING_OVER)
        try:
            await self._call(self._handle.take_over, force)
        except OSError as failure:
            self._failed(failure, S.REFUSED if force else S.STANDING_BY, since)
        else:
            self._here("TAKEN", since)

    def _here(self, event: str, since: float) -> None:
        self._go(S.SERVING)
        self.reason = ""
        self._moved = False
        self._delay = RETRY[0]
        self.incoming = None if self.incoming else self.incoming  # it has come. Leaves and comes again: who knows
        self._tell(event, since)

    def _failed(self, failure: OSError, state: State, since: float) -> None:
        """ESTALE and ESHUTDOWN are final. Anything else may pass, and the VM waits: again, later and later."""
        final = failure.errno in (errno.ESTALE, errno.ESHUTDOWN)
        self._from_back = self.state is S.TAKING_BACK
        self._go(S.REFUSED if final else state)
        reason = failure.strerror or str(failure)
        if reason != self.reason:
            self.reason = reason
            log.error("%s: the lock of a VM that runs here cannot be had: %s", self._name, reason)
            self._tell("REFUSED", since, reason=reason, final=final)
        if not final:
            self._timer = asyncio.get_running_loop().call_later(self._delay, self._post, "again")
            self._delay = min(2 * self._delay, RETRY[1])

    # --- clients

    async def _came(self) -> None:
        """Whether a VM will come here nobody said, so whatever connects may be one: its requests wait for the rings."""
        await self._forget_taken()
        if self.state is not S.SERVING or self.incoming is not None:
            return
        if await self._call(self._owned_elsewhere):
            try:
                await self._call(self._handle.stand_by, self.key, park=True)
            except OSError as failure:
                if failure.errno not in (errno.EBUSY, errno.EINVAL):
                    raise
            else:
                self._go(S.STANDING_BY)

    def _owned_elsewhere(self) -> bool:
        control = self._handle.control
        return control is not None and self._handle.uses_lock and not control.is_owner and control.owner() is not None

    async def _left(self) -> None:
        """No client is left, so nothing is parked."""
        if self._timer is not None:
            self._timer.cancel()
        if self.state is S.OFFERED:
            self._tasks = [task for task in self._tasks if not task.done()]
            self._tasks.append(asyncio.create_task(self._watch_offer()))
        elif self.state is S.REFUSED or (self.state is S.STANDING_BY and not self.incoming):
            await self._call(self._handle.stand_down)
            self._go(S.SERVING)
            self.reason = ""
            self._moved = False

    async def _watch_offer(self) -> None:
        await self.wait_taken()
        self._post("taken")

    async def _forget_taken(self) -> None:
        """The VM is gone and its next host has the lock: the image is one of many again that nobody uses."""
        if self.state is S.OFFERED and not self._handle.handing_over:
            await self._call(self._handle.stand_down)
            self._go(S.SERVING)

    # --- helpers

    async def _call(self, function: Callable[..., R], *arguments: Any, **options: Any) -> R:
        return await asyncio.get_running_loop().run_in_executor(_threads, lambda: function(*arguments, **options))

    def _go(self, state: State) -> None:
        if self.state is not S.ENDED:
            assert state in NEXT[self.state], (self.state, state)
            log.info("%s: hand-off: %s", self._name, state.value)
            self.state = state

    def _tell(self, what: str, since: float, **more: Any) -> None:
        seconds = time.monotonic() - since
        log.info("%s: lock %s after %.1f ms", self._name, what.lower(), 1e3 * seconds)
        self._emit(f"RBD_HANDOFF_{what}", {"id": self._name, "key": self.key, "seconds": seconds, **more})

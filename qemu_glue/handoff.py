<<<<<<< HEAD
"""Brings together what an export sees of a live migration and what the image does with its exclusive lock.

The data plane tells when a front end stops its rings for good while it logs writes (`switchover`: its VM leaves), and
when rings start (`rings`: its VM runs here). The first offers the lock before QEMU gets its answer; the second takes
what was offered, or takes it back. Requests wait at the image's gate meanwhile; see librbd_py/control/handoff.py.

    SERVING --switchover--> OFFERING --> OFFERED --rings--> TAKING_BACK --> SERVING
    STANDING_BY --rings--> TAKING_OVER --> SERVING
    TAKING_BACK, TAKING_OVER --a stranger owned the lock--> REFUSED --rings, force()--> as before
    any --end()--> ENDED
=======
"""The lock follows the VM: what an image's exports see of a live migration becomes what its handle does about it.

One `HandOff` belongs to one open image and is told the events of its exports. They are carried out in their order,
one at a time, by calls that block, in threads. States, and the ways between them, are the table `NEXT`:

* source: SERVING, the front end stops its last ring (switchover) and waits -> OFFERING -> OFFERED, and the front end
  gets its answer. Its rings start again: the migration failed -> TAKING_BACK -> SERVING. It leaves and the offer was
  taken: SERVING again, as an image that runs nothing.
* destination: STANDING_BY; the rings start, or (NBD) the first write waits -> TAKING_OVER -> SERVING.
* REFUSED: somebody who is not of this VM has owned the lock meanwhile, so its memory and the disk no longer belong
  together. Requests wait until an operator decides (`force`), the front end leaves, or its rings start once more.

Requests are held by the image's gate throughout, so nothing here is a race with the guest. The front end waits for so
long only (`VHOST_OFFER_MS`); then nothing was offered in time, and the next host asks for the lock as anybody.
>>>>>>> 93d6ad5 (handoff: what exports see of a live migration moves the exclusive lock)
"""

from __future__ import annotations

import asyncio
<<<<<<< HEAD
import contextlib
import errno
import logging
import time
from collections.abc import Callable
from enum import Enum, auto
from typing import Any
=======
import errno
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any, TypeVar
>>>>>>> 93d6ad5 (handoff: what exports see of a live migration moves the exclusive lock)

from librbd_py.image.handle import ImageHandle
from qemu_glue.exports import Export

<<<<<<< HEAD
AGAIN_SECONDS = 1.0  # between attempts to get the lock while the store, or its owner, does not let us
=======
ANY_VM = "*"  # the key of a VM nobody has named
TAKEN_LOOK = (0.01, 1.0)  # seconds between looks whether an offer was taken: the first, the longest
RETRY = (0.1, 5.0)  # seconds until the next attempt, when the store or the lock's owner failed: the first, the longest
THREADS = 32  # hand-offs at once in a process; the rest wait

Emit = Callable[[str, dict[str, Any]], None]
R = TypeVar("R")
>>>>>>> 93d6ad5 (handoff: what exports see of a live migration moves the exclusive lock)

log = logging.getLogger(__name__)


class State(Enum):
<<<<<<< HEAD
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
=======
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
    had the lock since now makes it REFUSED; False, it starts here; None, nobody knows: what is offered is taken, and
    otherwise the lock is had as ever. `park`: requests wait until the lock is here (vhost-user: there are none before
    the rings start); without it reads are answered at once (NBD: QEMU reads before its VM has come). `names`: what its
    events say.

    All methods are for the loop's thread. `emit` sends RBD_HANDOFF_OFFERED, _TAKEN, _BACK and _REFUSED.
    """

    def __init__(
        self,
        handle: ImageHandle,
        *,
        key: str = ANY_VM,
        incoming: bool | None = None,
        park: bool = True,
        emit: Emit,
        names: Mapping[str, str],
    ) -> None:
        self.key = key
        self.incoming = incoming
        self.park = park
        self.state = S.SERVING
        self.reason = ""  # why it was refused, or is tried again
        self._handle = handle
        self._emit = emit
        self._names = dict(names)
        self._loop = asyncio.get_running_loop()
        self._clients: dict[Export, int] = {}
        self._pending: dict[tuple[str, Export | None], tuple[int, float]] = {}  # in order; equal ones are merged
        self._news = asyncio.Event()
        self._from_back = False  # REFUSED when taking back, not when taking over
        self._delay = RETRY[0]
        self._worker = self._loop.create_task(self._work())
        self._timer: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None
        handle.on_wanted = self._wanted

    # --- what happens

    def happened(self, export: Export, what: str, value: int) -> None:
        """An event of one of the image's exports (qemu_glue.events)."""
        if what in ("connected", "disconnected"):
            before, self._clients[export] = self._clients.get(export, 0), value
            if value == 0:
                self._post("left", export)
            elif before == 0:
                self._post("came", export)
        elif what in ("switchover", "rings"):
            self._post(what, export, value)
        elif what == "lost":
            self._look_again(export)

    def stopped(self, export: Export) -> None:
        """The export is about to be freed."""
        self._clients.pop(export, None)
        for entry in [entry for entry in self._pending if entry[1] is export]:
            del self._pending[entry]

    def _look_again(self, export: Export) -> None:
        stats = export.stats()
        self._clients[export] = stats.clients
        self._post("came" if stats.clients else "left", export)
        if stats.switchover:
            self._post("switchover", export, stats.switchover)
        elif stats.rings:
            self._post("rings", export)

    def _wanted(self) -> None:
        """The data path's event thread: a write waits."""
        self._loop.call_soon_threadsafe(self._post, "wanted", None)

    def _post(self, what: str, export: Export | None = None, value: int = 0) -> None:
        if self.state is not S.ENDED:
            self._pending.pop((what, export), None)
            self._pending[what, export] = (value, time.monotonic())
            self._news.set()

    # --- what others ask for

    async def stand_by(self) -> None:
        """The VM will come here; before the first client is served. OSError EINVAL: the image has no exclusive lock, so
        nothing moves. EBUSY: it is in use here."""
        await self._call(self._handle.stand_by, self.key, park=self.park)
        self._go(S.STANDING_BY)

    def force(self) -> None:
        """An operator's word that a VM whose lock was refused may have it all the same."""
        self._post("force")

    @property
    def lingers(self) -> bool:
        """The lock is offered and, as far as is known, not taken: closing the image would take the offer away."""
        return self.state is S.OFFERING or (self.state is S.OFFERED and self._handle.handing_over)

    async def wait_taken(self, seconds: float | None = None) -> bool:
        """Until closing the image takes nothing away from the next host. False: not within `seconds`."""
        end = None if seconds is None else self._loop.time() + seconds
        pause = TAKEN_LOOK[0]
        while self.lingers:
            if end is not None and self._loop.time() >= end:
                return False
            await asyncio.sleep(pause)
            pause = min(2 * pause, TAKEN_LOOK[1])
        return True

    async def leave(self) -> None:
        """Ends, and leaves the handle as one that no VM uses."""
        idle = self.state in (S.STANDING_BY, S.REFUSED) or (self.state is S.OFFERED and not self.lingers)
        self.close()
        if idle:
            await self._call(self._handle.stand_down)

    def close(self) -> None:
        """Nothing more is begun. What is under way ends with the handle, which the caller closes. Idempotent."""
        if self.state is not S.ENDED:
            self._go(S.ENDED)
            self._handle.on_wanted = None
            if self._timer is not None:
                self._timer.cancel()
            if self._watcher is not None:
                self._watcher.cancel()
            self._worker.cancel()

    # --- the worker

    async def _work(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._pending:
                (what, export), (value, since) = next(iter(self._pending.items()))
                del self._pending[what, export]
                try:
                    await self._handle_event(what, export, value, since)
                except OSError as failure:  # of a call that has no other way to tell
                    log.warning("%s: hand-off, %s: %s", self._who, what, failure)
                except Exception:  # a defect of ours must not stop the VM's next hand-off
                    log.exception("%s: hand-off, %s", self._who, what)

    async def _handle_event(self, what: str, export: Export | None, value: int, since: float) -> None:
        match what:
            case "switchover":
                assert export is not None
                await self._switchover(export, value, since)
            case "rings" | "wanted" | "force":
                await self._runs_here(what, since)
            case "again" if any(self._clients.values()):
                await self._runs_here(what, since)
            case "came":
                await self._came()
            case "left" if not any(self._clients.values()):
                await self._left()
            case "taken" if not any(self._clients.values()):
                await self._forget_taken()

    # --- source

    async def _switchover(self, export: Export, number: int, since: float) -> None:
        offering = self.state is S.SERVING and export.stats().switchover == number
        if offering:
            self._go(S.OFFERING)
            try:
                offered = await self._call(self._handle.offer, self.key)
            except OSError as failure:
                offered = False
                if failure.errno != errno.EINVAL:  # no exclusive lock, nothing to offer
                    log.warning("%s: the lock was not offered: %s", self._who, failure)
            self._go(S.OFFERED if offered else S.SERVING)
        in_time = export.go_on(number)
        if offering and self.state is S.OFFERED:
            self._tell("OFFERED", since)
            if not in_time:
                log.warning("%s: the lock was offered %.1f s late", self._who, time.monotonic() - since)

    # --- destination, or source again

    async def _runs_here(self, what: str, since: float) -> None:
        if self.state is S.OFFERED and what != "wanted":
            await self._take_back(since)
        elif self.state is S.STANDING_BY:
            if self.incoming or what == "force" or await self._call(self._handle.lock_offered_to, self.key):
                await self._take_over(since, what == "force")
            else:
                await self._call(self._handle.stand_down)
                self._go(S.SERVING)
        elif self.state is S.REFUSED and what != "wanted":
            if self._from_back and what != "force":
                await self._take_back(since)
            else:
                await self._take_over(since, what == "force")

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
        self._delay = RETRY[0]
        self.incoming = None  # it has come; when it leaves and comes again, that is another migration
        self._tell(event, since)

    def _failed(self, failure: OSError, state: State, since: float) -> None:
        """ESTALE and ESHUTDOWN are final. Anything else may pass, and the VM waits: again, later and later."""
        final = failure.errno in (errno.ESTALE, errno.ESHUTDOWN)
        self._from_back = self.state is S.TAKING_BACK
        self._go(S.REFUSED if final else state)
        reason = failure.strerror or str(failure)
        if reason != self.reason:
            self.reason = reason
            log.error("%s: the lock of a VM that runs here cannot be had: %s", self._who, reason)
            self._tell("REFUSED", since, reason=reason, final=final)
        if not final:
            self._timer = self._loop.call_later(self._delay, self._post, "again")
            self._delay = min(2 * self._delay, RETRY[1])

    # --- clients

    async def _came(self) -> None:
        """Whether a VM will come here nobody said, so whatever connects may be one: its requests wait for the rings."""
        await self._forget_taken()
        if self.state is not S.SERVING or self.incoming is not None or not self.park:
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
            self._watcher = self._loop.create_task(self._watch_offer())
        elif self.state is S.REFUSED or (self.state is S.STANDING_BY and not self.incoming):
            await self._call(self._handle.stand_down)
            self._go(S.SERVING)
            self.reason = ""

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
        return await self._loop.run_in_executor(_threads, lambda: function(*arguments, **options))

    def _go(self, state: State) -> None:
        if self.state is not S.ENDED:
            assert state in NEXT[self.state], (self.state, state)
            log.info("%s: hand-off: %s", self._who, state.value)
            self.state = state

    def _tell(self, what: str, since: float, **more: Any) -> None:
        seconds = time.monotonic() - since
        log.info("%s: lock %s after %.1f ms", self._who, what.lower(), 1e3 * seconds)
        self._emit(f"RBD_HANDOFF_{what}", {**self._names, "key": self.key, "seconds": seconds, **more})

    @property
    def _who(self) -> str:
        return " ".join(f"{name} {text}" for name, text in self._names.items()) or self._handle.id
>>>>>>> 93d6ad5 (handoff: what exports see of a live migration moves the exclusive lock)

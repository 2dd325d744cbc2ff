"""Who holds an image and why, what would become of it if somebody took the lock, and taking it safely.

`look()` reads the lock, the watchers and the blocklist, and asks every watcher who it is (notify.WhoAreYou): clients of
ours say what they are, real librbd and krbd do not. `take()` does what a new owner does, and says each step.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from enum import Enum

from librbd_py.control import wire
from librbd_py.control.lock_events import Locker
from librbd_py.format import features as ft
from librbd_py.format import lock as fl
from librbd_py.format import notify as nf
from librbd_py.format.encoding import DecodeError
from librbd_py.format.values import dataclass
from librbd_py.format.who import Answer
from librbd_py.store.api import ClientProcess, ListWatchers, WatcherInfo

from .handle import ImageHandle

ASK_MS = 2000  # how long a watcher may take to say who it is
TAKE_SECONDS = 60.0  # longer than a watch lives


class Outcome(Enum):
    """What would happen to who wants the lock now."""

    FREE = "free"
    ASKED = "asked"  # a living owner is asked and gives it up
    REFUSED = "refused"  # a living owner says that it will not
    SILENT = "silent"  # a living owner that did not answer just now
    DEAD = "dead"  # fenced and broken
    BY_HAND = "by hand"
    OFFERED = "offered"  # between the two ends of a hand-off
    UNUSED = "unused"  # the image has no exclusive lock


@dataclass(frozen=True)
class Watching:
    """A client that watches the image. `answer`: what it says of itself; None: nothing, see `answered`."""

    gid: int
    handle: int
    address: str
    answer: Answer | None
    answered: bool  # with whatever: its program runs
    process: ClientProcess | None
    self: bool = False  # the client that looks

    @property
    def stand_by(self) -> bool:
        return self.answer is not None and self.answer.stand_by


@dataclass(frozen=True)
class Owner:
    """Who is in the lock. `watching`: its watch, None when there is none that the lock names, or it has ended all the
    same: it is dead."""

    client: str  # client.4123
    cookie: str
    address: str
    tag: str
    exclusive: bool
    watching: Watching | None
    process: ClientProcess | None
    blocklisted: float | None  # until when (time.time())
    offered_to: str | None  # the VM that it offers the lock to

    @property
    def answer(self) -> Answer | None:
        return None if self.watching is None else self.watching.answer


@dataclass(frozen=True)
class Ownership:
    owner: Owner | None
    others: tuple[Watching, ...]  # watchers that are not the owner
    outcome: Outcome

    @property
    def sentence(self) -> str:
        """What would happen on take-over."""
        who = "nobody" if self.owner is None else self.owner.client
        text = {
            Outcome.FREE: "the lock is free: who writes first takes it",
            Outcome.ASKED: f"{who} would be asked for the lock and give it up",
            Outcome.REFUSED: f"{who} keeps the lock exclusively: it would be asked and refuse (EROFS)",
            Outcome.SILENT: f"{who} watches the image but does not answer: it would be asked until its watch ends, then"
            " fenced and its lock broken",
            Outcome.DEAD: f"{who} no longer watches the image: it would be fenced and its lock broken",
            Outcome.BY_HAND: f"{who} locked the image by hand: EBUSY, until that lock is removed (lock rm)",
            Outcome.UNUSED: "the image has no exclusive lock: anybody may write",
        }
        if self.outcome is Outcome.OFFERED:
            assert self.owner is not None
            to = self.owner.offered_to
            return f"{who} offers the lock to {to}: that VM's other end takes it; others are told to try again"
        return text[self.outcome]


def look(handle: ImageHandle, ask_ms: int = ASK_MS) -> Ownership:
    """Everything there is to know, also through a read-only handle. Takes `ask_ms` when a watcher does not answer.
    ENOENT: the image is gone."""
    state = fl.LockState.decode(
        handle.ctx.exec(handle.oid, "lock", "get_info", fl.InfoRequest(fl.RBD_LOCK_NAME).encode())
    )
    rows: list[WatcherInfo] = handle.ctx.read(handle.oid, [ListWatchers()])[0]
    answers = _ask(handle, ask_ms) if rows else {}
    found = {(row.cookie, row.address): _watching(handle, row, answers) for row in rows}
    if not state.lockers:
        used = handle.header.has(ft.EXCLUSIVE_LOCK)
        return Ownership(None, tuple(found.values()), Outcome.FREE if used else Outcome.UNUSED)
    (who, info), *_ = state.lockers.items()
    number = fl.parse_auto_cookie(who.cookie)
    address = info.address.text
    watching = None if number is None else found.pop((number, address), None)
    if handle.store.ended(address):
        watching = None  # it only seems to watch
    offer = fl.Offer.parse(info.description)
    owner = Owner(
        str(who.entity),
        who.cookie,
        address,
        state.tag,
        state.type == fl.LOCK_EXCLUSIVE,
        watching,
        handle.store.process_of(address),
        _blocklisted(handle, address),
        None if offer is None else offer.key,
    )
    ours = owner.exclusive and owner.tag == fl.RBD_LOCK_TAG and len(state.lockers) == 1 and number is not None
    outcome = _outcome(owner) if ours and who.entity.type == fl.ENTITY_CLIENT else Outcome.BY_HAND
    return Ownership(owner, tuple(found.values()), outcome)


def _outcome(owner: Owner) -> Outcome:
    if owner.watching is None:
        return Outcome.DEAD
    if owner.offered_to is not None:
        return Outcome.OFFERED
    if not owner.watching.answered:
        return Outcome.SILENT
    if owner.answer is not None and owner.answer.policy == "exclusive":
        return Outcome.REFUSED
    return Outcome.ASKED


def _ask(handle: ImageHandle, ask_ms: int) -> dict[tuple[int, int], bytes]:
    reply = handle.ctx.notify(handle.oid, nf.encode(nf.WhoAreYou(handle.store.client.gid)), ask_ms)
    return dict(reply.acks)


def _watching(handle: ImageHandle, row: WatcherInfo, answers: dict[tuple[int, int], bytes]) -> Watching:
    said = answers.get((row.gid, row.cookie))
    try:
        answer = Answer.decode(said) if said else None
    except DecodeError:  # a real client, or one that lies
        answer = None
    mine = row.gid == handle.store.client.gid
    process = handle.store.process_of(row.address)
    return Watching(row.gid, row.cookie, row.address, answer, said is not None, process, mine)


def _blocklisted(handle: ImageHandle, address: str) -> float | None:
    """Until when; None also when this client may not know."""
    try:
        found = handle.store.blocklist()
    except PermissionError:
        return None
    return found.get(address) or found.get(re.sub(r"\d+/\d+$", "0/0", address))


# --- taking it


def take(
    handle: ImageHandle, say: Callable[[str], None], *, force: bool = False, timeout: float = TAKE_SECONDS
) -> Owner | None:
    """Takes the exclusive lock from whoever has it and gives it back: nobody owns it then, and whoever did either gave
    it up or can never write again. `say()` is told each step. Returns who had it.

    A living owner is asked, for `timeout` seconds; one whose watch ends meanwhile is fenced and its lock broken. One
    that refuses or does not answer is fenced only with `force`: on the embedded store its whole process is killed.

    EROFS: the owner refuses; ETIMEDOUT: it does not answer in time; EBUSY: locked by hand; EINVAL: the image has no
    exclusive lock; EPERM: it cannot be fenced from here; EAGAIN: somebody else took it meanwhile. The lock is then as
    it was, and the error says who has it.
    """
    control = handle.control
    if control is None or not handle.header.has(ft.EXCLUSIVE_LOCK):
        raise OSError(errno.EINVAL, "the image has no exclusive lock that this handle could take")
    before = look(handle)
    owner = before.owner
    if before.outcome is Outcome.BY_HAND:
        raise OSError(errno.EBUSY, before.sentence)
    say(before.sentence)
    if owner is not None and before.outcome is not Outcome.DEAD:
        say(f"asking {owner.client} at {owner.address}{_named(owner.answer)} for the lock, for {timeout:g} s")
    elif owner is not None:
        say(f"fencing {owner.client} at {owner.address}{_process(owner)} and breaking its lock")
    begun = time.monotonic()
    try:
        control.acquire(timeout)
    except OSError as failure:
        if failure.errno not in (errno.EROFS, errno.ETIMEDOUT, errno.EAGAIN):
            raise
        _force(handle, before, failure, force, say)
        control.acquire(timeout)
    try:
        said = "" if owner is None else f" after {time.monotonic() - begun:.1f} s"
        fenced = owner is not None and _blocklisted(handle, owner.address) is not None
        say(f"the lock is ours{said}" + (f"; {owner.client} is fenced" if owner is not None and fenced else ""))
    finally:
        control.release()
    say("the lock is free")
    return owner


def _force(handle: ImageHandle, before: Ownership, failure: OSError, force: bool, say: Callable[[str], None]) -> None:
    """The owner lives and did not give the lock up."""
    owner = before.owner
    why = "refuses" if failure.errno == errno.EROFS else "did not give it up in time"
    now = wire.get_lock(handle.ctx, handle.oid).owner
    if owner is None or now is None or (now.cookie, now.address) != (owner.cookie, owner.address):
        raise OSError(errno.EAGAIN, f"the lock moved meanwhile; it is {'free' if now is None else _locker(now)}")
    if not force:
        raise OSError(failure.errno, f"{owner.client} at {owner.address}{_named(owner.answer)} has the lock and {why}")
    say(f"{owner.client} {why}: fencing it{_process(owner)} and breaking its lock")
    fence(handle, now)


def fence(handle: ImageHandle, owner: Locker) -> None:
    """Fences who is in the lock, alive or not, and breaks the lock. EAGAIN: it is another's by now; EINVAL: it is this
    client's; what `Store.blocklist_add` raises."""
    if owner.gid == handle.store.client.gid:
        raise OSError(errno.EINVAL, "fencing ourselves would end every image of this process")
    if wire.get_lock(handle.ctx, handle.oid).owner != owner:
        raise OSError(errno.EAGAIN, "the lock moved meanwhile")
    handle.store.blocklist_add(owner.address)
    try:
        wire.break_lock(handle.ctx, handle.oid, owner)
    except FileNotFoundError:
        pass  # somebody was faster


def _locker(owner: Locker) -> str:
    return f"client.{owner.gid}'s at {owner.address}"


def _named(answer: Answer | None) -> str:
    """ " (rbdpyd, pid 12 on host a)", or nothing."""
    return "" if answer is None else f" ({named(answer)})"


def named(answer: Answer) -> str:
    return f"{answer.program or 'a program'}, pid {answer.pid} on {answer.host or 'a host without a name'}"


def _process(owner: Owner) -> str:
    """What is about to be killed, where fencing means that."""
    process = owner.process
    if process is None or process.pid == os.getpid():
        return ""
    return f" by killing process {process.pid}"

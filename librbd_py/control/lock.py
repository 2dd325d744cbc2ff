"""The exclusive lock of an image header as a state machine without I/O: events in, actions out.

The convention is librbd's and krbd's managed lock: class lock `rbd_lock` on the header, cookie `auto <watch handle>`,
tag `internal`. Acquiring reads the lock; a free one is taken; a live owner (its watch is there) is asked to release;
a dead one is re-read, fenced by its address and broken. What peers announce is a reason to look, never a proof.

One operation is outstanding at a time. It has a number; an answer with another number is from a state that was left
and is ignored. `Fenced` is accepted in every state and ends every wait.

A lock that cannot be unlocked is left behind: the machine is fenced, the watch ends, and the next owner breaks it.

Requests go on while the cookie is renewed under a new watch, as in librbd. A peer may take us for dead meanwhile, but
it fences our address before it breaks the lock, and a fenced client's write is refused by the store however late it
comes. To hold requests back would protect nothing: those sent before the loss was heard of are under way all the same.

How the lock moves with a VM is in `handoff.py`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from librbd_py.control import handoff
from librbd_py.control.handoff import HANDING
from librbd_py.control.lock_events import (
    Abandon,
    Acquire,
    Acquired,
    Action,
    AnnounceAcquired,
    AnnounceReleased,
    Ask,
    Blocklist,
    Break,
    CheckOwner,
    Done,
    Event,
    Fenced,
    LockState,
    LockView,
    Look,
    Lost,
    Offer,
    PeerAcquired,
    PeerReleased,
    PeerRequested,
    Refused,
    Release,
    Released,
    Reply,
    RunPostAcquire,
    RunPreRelease,
    SetCookie,
    Shutdown,
    Sleep,
    StandBy,
    StandDown,
    Stopped,
    TakeBack,
    TakeOver,
    TryLock,
    Unlock,
    WatchDown,
    WatchUp,
)
from librbd_py.format.lock import auto_cookie, parse_auto_cookie

RESEND_SECONDS = 1.5  # the owner said yes and nothing happened: it drains, or died meanwhile (librbd waits 10 s)
REFUSED_SECONDS = 1.0  # the owner answered with an error that is not final
FAIR_SECONDS = 0.1  # after a release for a peer, before we compete for the lock again
BACKOFF_SECONDS = (0.02, 1.0)  # nobody answered for an owner that is alive: first and longest wait
UNLOCK_ATTEMPTS = 3
NOTHING_DONE = (errno.ENOSPC, errno.EDQUOT)  # answers of a store that certainly changed nothing

S = LockState

# Where each state may lead; anything else is a bug and raises. FENCED can follow every state but STOPPED.
NEXT: dict[LockState, frozenset[LockState]] = {
    S.UNLOCKED: frozenset({S.NO_WATCH, S.LOOKING, S.RETRACT_LOOKING, S.STOPPED}),
    S.NO_WATCH: frozenset({S.LOOKING, S.RETRACT_LOOKING, S.UNLOCKED, S.STOPPED}),
    S.LOOKING: frozenset(
        {S.LOOKING, S.LOCKING, S.TAKING, S.RETRACTING, S.CHECKING, S.RELOOKING, S.WAITING, S.POST_ACQUIRING}
        | {S.UNLOCKING, S.NO_WATCH, S.UNLOCKED, S.STOPPED}
    ),
    S.LOCKING: frozenset({S.POST_ACQUIRING, S.UNLOCKING, S.LOOKING, S.WAITING, S.NO_WATCH, S.UNLOCKED, S.STOPPED}),
    S.CHECKING: frozenset({S.ASKING, S.RELOOKING, S.NO_WATCH, S.UNLOCKED, S.STOPPED}),
    S.RELOOKING: frozenset({S.BLOCKLISTING, S.LOOKING, S.NO_WATCH, S.UNLOCKED, S.STOPPED}),
    S.BLOCKLISTING: frozenset({S.BREAKING, S.TAKING, S.NO_WATCH, S.UNLOCKED, S.STOPPED}),
    S.BREAKING: frozenset({S.LOOKING, S.NO_WATCH, S.UNLOCKED, S.STOPPED}),
    S.ASKING: frozenset({S.WAITING, S.LOOKING, S.NO_WATCH, S.UNLOCKED, S.STOPPED}),
    S.WAITING: frozenset({S.LOOKING, S.NO_WATCH, S.UNLOCKED, S.STOPPED}),
    S.POST_ACQUIRING: frozenset({S.LOCKED, S.UNLOCKING}),
    S.LOCKED: frozenset({S.RELOCK_LOOKING, S.QUIESCING}),
    S.RELOCK_LOOKING: frozenset({S.RELOCKING, S.RELOCK_WAITING, S.LOCKED}),
    S.RELOCKING: frozenset({S.LOCKED, S.RELOCK_WAITING, S.QUIESCING}),
    S.RELOCK_WAITING: frozenset({S.LOCKED}),
    S.QUIESCING: frozenset({S.QUIESCING, S.UNLOCKING, S.LOCKED, S.OFFERING}),
    S.UNLOCKING: frozenset({S.ANNOUNCING, S.UNLOCK_RETRY, S.UNLOCKING, S.LOOKING}),
    S.UNLOCK_RETRY: frozenset({S.UNLOCKING}),
    S.ANNOUNCING: frozenset({S.LOOKING, S.RETRACT_LOOKING, S.WAITING, S.NO_WATCH, S.UNLOCKED, S.STOPPED}),
    S.OFFERING: frozenset({S.OFFERED, S.OFFER_LOOKING}),
    S.OFFER_LOOKING: frozenset(
        {S.OFFERED, S.POST_ACQUIRING, S.RETRACT_LOOKING, S.NO_WATCH, S.UNLOCKING, S.UNLOCKED, S.STOPPED}
    ),
    S.OFFERED: frozenset({S.RETRACTING, S.OFFER_LOOKING, S.UNLOCKING}),
    S.RETRACTING: frozenset({S.POST_ACQUIRING, S.RETRACT_LOOKING}),
    S.RETRACT_LOOKING: frozenset(
        {S.RETRACTING, S.OFFERED, S.POST_ACQUIRING, S.UNLOCKING, S.NO_WATCH, S.LOOKING, S.TAKING, S.UNLOCKED}
        | {S.STOPPED}
    ),
    S.TAKING: frozenset({S.POST_ACQUIRING, S.UNLOCKING, S.LOOKING, S.WAITING, S.NO_WATCH, S.UNLOCKED, S.STOPPED}),
    S.FENCED: frozenset({S.STOPPED}),
    S.STOPPED: frozenset(),
}

# States in which the image may change its header and write data.
OWNING = frozenset({S.LOCKED, S.RELOCK_LOOKING, S.RELOCKING, S.RELOCK_WAITING})
# States in which the class lock is, or may be, ours.
HOLDING = OWNING | HANDING | {S.POST_ACQUIRING, S.QUIESCING, S.UNLOCKING, S.UNLOCK_RETRY}
# States on the way to the lock that leave nothing behind when they are left.
SEEKING = frozenset(
    {S.NO_WATCH, S.LOOKING, S.LOCKING, S.TAKING, S.CHECKING, S.RELOOKING, S.BLOCKLISTING, S.BREAKING, S.ASKING}
    | {S.WAITING}
)
# Of these, the ones with nothing outstanding that changes the store, so they can be left at once.
PARKED = frozenset({S.UNLOCKED, S.NO_WATCH, S.WAITING})


class LockMachine:
    """`gid` and `address` are this client's. `handle()` is called with one event at a time and never blocks. `former`:
    addresses of this host's own clients that are dead for sure: their watches are not waited for."""

    def __init__(
        self, gid: int, address: str, *, exclusive: bool = False, former: frozenset[str] = frozenset()
    ) -> None:
        self.gid = gid
        self.address = address
        self.former = former
        self.heir = False  # serves a VM that may come from elsewhere: takes what is offered to whomever
        self.exclusive = exclusive  # refuse requests of peers (EROFS) instead of giving the lock up
        self.state = S.UNLOCKED
        self.handle_now: int | None = None  # watch handle while the watch is up
        self.cookie: str | None = None  # quoted in the lock while HOLDING
        self.hand = handoff.HandOffData()
        self.wanted = False
        self._ask = False  # some of those who want it want its owner asked
        self.stopping = False
        self.fence_errno = 0
        self._asked = False  # a peer was told 0: release as soon as possible
        self._release = False  # our own user wants it released
        self._for_peer = False  # the release under way was asked for by a peer
        self._news = False  # a peer acquired or released since the last look
        self._final = False  # the pre-release under way is that of an image being closed
        self._quiesced = False  # pre-release ran, so UNLOCKING ends a real ownership
        self._failure = 0  # what draining answered when it failed at the end
        self.kept = 0  # why the lock could not be given to a peer that asked, since the last time it could
        self.owner_says = 0  # why the owner, when asked last, does not give it up just now
        self._pending: str | None = None  # cookie that was sent to replace `cookie`, outcome perhaps unknown
        self._attempts = 0
        self._backoff = BACKOFF_SECONDS[0]
        self._op = 0
        self._verifying = False
        self._seen = LockView()
        self._mine: set[str] = set()  # cookies this machine ever sent
        self._handles: set[int] = set()  # of the watches it ever had
        self._out: list[Action] = []

    @property
    def owning(self) -> bool:
        return self.state in OWNING

    @property
    def offered(self) -> bool:
        """The lock is being offered to the VM's next host, and nobody is known to have taken it."""
        return self.state in HANDING

    @property
    def outstanding(self) -> int:
        """Number of the operation whose answer counts."""
        return self._op

    def handle(self, event: Event) -> list[Action]:
        """Advances by one event and returns what is to be done about it, in order."""
        self._out = []
        if isinstance(event, Done):
            self._done(event)
        else:
            REACTIONS[type(event)](self, event)
        return self._out

    # --- moving ------------------------------------------------------------------------------------------------

    def _go(self, state: LockState) -> None:
        assert state in NEXT[self.state] or (state is S.FENCED and self.state is not S.STOPPED), (self.state, state)
        self.state = state
        self._op += 1
        self._verifying = False

    def _do(self, state: LockState, operation: Callable[[int], Action]) -> None:
        self._go(state)
        self._out.append(operation(self._op))

    def _settle(self) -> None:
        """Nothing is held and nothing outstanding: stop, look again, wait for a watch, or rest."""
        if self.cookie is not None:
            self._start_unlock_unused(self.cookie)  # an attempt may have succeeded without our hearing of it
            return
        if self._release:
            self._release = False
            self._out.append(Released())
        if self.stopping:
            self._go(S.STOPPED)
            self._out.append(Stopped(self._failure))
        elif not self.wanted:
            if self.state is not S.UNLOCKED:
                self._go(S.UNLOCKED)
        elif self.handle_now is None:
            if self.state is not S.NO_WATCH:
                self._go(S.NO_WATCH)
        elif self.hand.offer is not None:
            self._do(S.RETRACT_LOOKING, Look)  # we gave it to an heir: a stranger is not asked
        else:
            self._look()

    def _look(self) -> None:
        self._news = False
        self._do(S.LOOKING, Look)

    def _refuse(self, code: int) -> None:
        self.wanted = False
        self._out.append(Refused(code))
        self._settle()

    def _wait(self, seconds: float) -> None:
        self._do(S.WAITING, lambda op: Sleep(op, seconds))

    def _back_off(self) -> None:
        seconds, self._backoff = self._backoff, min(self._backoff * 2, BACKOFF_SECONDS[1])
        self._wait(seconds)

    def _unlock(self, cookie: str) -> None:
        self._do(S.UNLOCKING, lambda op: Unlock(op, cookie))

    def _quiesce(self, for_peer: bool) -> None:
        self._for_peer = for_peer
        self._final = final = self.stopping
        self._do(S.QUIESCING, lambda op: RunPreRelease(op, final))

    def _fence(self, code: int, cookies: tuple[str, ...] = ()) -> None:
        if self.state in (S.FENCED, S.STOPPED):
            return
        self._go(S.FENCED)
        self.fence_errno = code
        self.cookie = None
        self._out.append(Lost(code, cookies))
        handoff.answer_offer(self, code)
        if self.wanted:
            self._out.append(Refused(code))
        self.wanted = False
        if self._release:
            self._release = False
            self._out.append(Released(0))
        if self.stopping:
            self._go(S.STOPPED)
            self._out.append(Stopped(0))

    # --- what users and the watch say -----------------------------------------------------------------------------

    def _on_acquire(self, event: Event) -> None:
        assert isinstance(event, Acquire)
        if self.state in (S.FENCED, S.STOPPED) or self.stopping:
            self._out.append(Refused(self.fence_errno or errno.ESHUTDOWN))
        elif self.owning and not (self._asked or self._release):
            self._out.append(Acquired())
        else:
            self._ask = event.ask or (self.wanted and self._ask)
            self.wanted = True
            if self.state is S.UNLOCKED:
                self._backoff = BACKOFF_SECONDS[0]
                self._settle()

    def _on_abandon(self, event: Event) -> None:
        self.wanted = False
        if self.state in PARKED:
            self._settle()

    def _on_release(self, event: Event) -> None:
        if self.wanted:
            self.wanted = False
            self._out.append(Refused(errno.ECANCELED))
        if self.state in (S.FENCED, S.STOPPED):
            self._out.append(Released())
            return
        self._release = True
        if self.state in PARKED:
            self._settle()
        elif self.state is S.LOCKED:
            self._quiesce(False)
        elif self.state is S.OFFERED:
            self._withdraw()

    def _on_shutdown(self, event: Event) -> None:
        if self.state is S.STOPPED:
            self._out.append(Stopped())
            return
        self.stopping = True
        if self.wanted:
            self.wanted = False
            self._out.append(Refused(errno.ESHUTDOWN))
        if self.state is S.FENCED:
            self._go(S.STOPPED)
            self._out.append(Stopped())
        elif self.state in PARKED:
            self._settle()
        elif self.state is S.LOCKED:
            self._quiesce(False)
        elif self.state is S.OFFERED:
            self._withdraw()

    def _on_watch_up(self, event: Event) -> None:
        assert isinstance(event, WatchUp)
        self.handle_now = event.handle
        self._handles.add(event.handle)
        if self.state is S.NO_WATCH:
            self._settle()
        elif self.state is S.LOCKED:
            self._renew()

    def _on_watch_down(self, event: Event) -> None:
        self.handle_now = None
        handoff.deaf(self)
        if self.state is S.WAITING:
            self._settle()

    def _on_fenced(self, event: Event) -> None:
        assert isinstance(event, Fenced)
        self._fence(event.errno)

    # --- what peers say ---------------------------------------------------------------------------------------------

    def _on_peer_acquired(self, event: Event) -> None:
        assert isinstance(event, PeerAcquired)
        self._news = True
        handoff.took(self, event.gid, event.handle)
        if event.gid == self.gid and event.handle == self.handle_now:
            self._news = False  # our own announcement
        elif self.state is S.LOCKED and not self._verifying:
            self._op += 1
            self._verifying = True
            self._out.append(Look(self._op))
        elif self.state is S.WAITING:
            self._look()
        elif self.state is S.OFFERED:
            self._do(S.OFFER_LOOKING, Look)  # was it taken?

    def _on_peer_released(self, event: Event) -> None:
        assert isinstance(event, PeerReleased)
        self._news = True
        handoff.let_go(self, event.gid)
        if self.state in (S.WAITING, S.ASKING):  # do not sit out a third watcher that never acks our request
            self._look()

    def _on_peer_requested(self, event: Event) -> None:
        assert isinstance(event, PeerRequested)
        giving_up = self.state in (S.UNLOCKING, S.UNLOCK_RETRY)
        own = event.gid == self.gid and event.handle in self._handles  # a request of ours that came late
        if self.state not in HOLDING or self.cookie is None or own or (giving_up and not self._quiesced):
            self._out.append(Reply(None))
        elif self.state in HANDING or self.hand.key is not None:
            self._out.append(Reply(errno.EAGAIN))
            handoff.doubt(self)
        elif giving_up or self.state is S.QUIESCING:
            self._out.append(Reply(self.kept))
            self._for_peer = True
        elif self.exclusive:
            self._out.append(Reply(errno.EROFS))
        else:
            self._out.append(Reply(self.kept))
            if self.state is S.LOCKED:
                self._quiesce(True)
            else:
                self._asked = True

    def _keep(self, code: int) -> None:
        """The lock did not go. The next peers to ask are told an error, and it is tried all the same: librbd comes
        again after one second then, after a promise only after ten. Of the errors, EROFS would end its wait and
        ETIMEDOUT make it ask without a pause."""
        if self._for_peer:
            self.kept = {errno.EROFS: errno.EIO, errno.ETIMEDOUT: errno.EAGAIN}.get(code, code)

    # --- what operations answer ---------------------------------------------------------------------------------------

    def _done(self, done: Done) -> None:
        if done.op != self._op or self.state not in ANSWERS:
            return
        if done.errno == errno.ESHUTDOWN:
            self._fence(done.errno)
            return
        self._op += 1
        pointless = not self.wanted or self.handle_now is None
        if pointless and self.state in SEEKING and self.state not in (S.LOCKING, S.TAKING):
            self._settle()
        else:
            ANSWERS[self.state](self, done)

    def _looked(self, done: Done) -> None:
        if done.errno:
            self._refuse(done.errno)
            return
        assert self.handle_now is not None
        if self._news and self.hand.standby is not None and self.hand.standby.strange:
            self._look()  # what was read may be older than the stranger we heard of
            return
        self._seen = done.value
        owner = self._seen.owner
        self.cookie = None
        cookie = auto_cookie(self.handle_now)
        mine = owner is not None and owner.gid == self.gid and owner.cookie in self._mine
        verdict = None if mine or self._seen.foreign else handoff.judge(self, owner)
        if self._seen.foreign:
            self._refuse(errno.EBUSY)
        elif verdict == errno.EAGAIN:
            self.hand.attempts += 1
            self._wait(handoff.LEAVE_SECONDS)
        elif isinstance(verdict, int):
            self._refuse(verdict)
        elif verdict is not None and owner is not None:
            handoff.take(self, self._seen, verdict.taken)
        elif owner is None:
            self.hand.mark = ""
            self._mine.add(cookie)
            self.cookie = cookie
            self._do(S.LOCKING, lambda op: TryLock(op, cookie))
        elif mine:
            # An attempt of ours whose answer was lost: keep it, or take back what quotes a watch that is gone.
            self.cookie = owner.cookie
            self.hand.mark = owner.mark
            if handoff.was_offered(self, owner):
                handoff.retract(self)
            elif owner.cookie == cookie:
                self._do(S.POST_ACQUIRING, RunPostAcquire)
            else:
                self._start_unlock_unused(owner.cookie)
        else:
            handoff.asks(self, owner)
            if owner.address in self.former:
                self._do(S.RELOOKING, Look)
            else:
                self._do(S.CHECKING, lambda op: CheckOwner(op, owner))

    def _start_unlock_unused(self, cookie: str) -> None:
        self._quiesced = False
        self._for_peer = False
        self._attempts = 0
        self._unlock(cookie)

    def _withdraw(self) -> None:
        """Unlocks what was offered. ENOENT when it was taken: as good. When the store cannot, we stay its owner."""
        assert self.cookie is not None
        self._quiesced = True
        self._for_peer = False
        self._attempts = 0
        self._unlock(self.cookie)

    def _locked(self, done: Done) -> None:
        assert self.cookie is not None
        if done.errno in (0, errno.EEXIST):
            self.kept = 0
            if self.wanted and self.state is S.LOCKING and handoff.overtaken(self):
                self.wanted = False
                self._out.append(Refused(errno.ESTALE))
            if self.wanted and self.handle_now is not None and auto_cookie(self.handle_now) == self.cookie:
                self._do(S.POST_ACQUIRING, RunPostAcquire)
            else:
                self._start_unlock_unused(self.cookie)
            return
        if done.errno == errno.ETIMEDOUT:  # it may be ours
            if self.wanted and self.handle_now is not None:
                self._look()
            else:
                self._start_unlock_unused(self.cookie)
            return
        self.cookie = None
        if done.errno == errno.EBUSY:
            if self.wanted and self.handle_now is not None:
                self._back_off()  # somebody was faster: its announcement cuts this short
            else:
                self._settle()
        elif self.wanted:
            self._refuse(done.errno)
        else:
            self._settle()

    def _checked(self, done: Done) -> None:
        if done.errno:
            self._refuse(done.errno)
        elif not done.value:
            self._do(S.RELOOKING, Look)
        elif self._ask:
            self._do(S.ASKING, Ask)
        else:
            self._refuse(errno.EAGAIN)

    def _relooked(self, done: Done) -> None:
        if done.errno:
            self._refuse(done.errno)
        elif done.value != self._seen:
            self._look()
        else:
            owner = self._seen.owner
            assert owner is not None
            if owner.address == self.address:
                self._refuse(errno.EINVAL)  # fencing ourselves would end every image of this process
            else:
                self._do(S.BLOCKLISTING, lambda op: Blocklist(op, owner.address))

    def _blocklisted(self, done: Done) -> None:
        if done.errno:
            self._refuse(done.errno)
            return
        owner = self._seen.owner
        assert owner is not None
        if self.hand.standby is not None:
            handoff.take(self, self._seen, "")  # in its place, so that nobody comes in between
        else:
            self._do(S.BREAKING, lambda op: Break(op, owner))

    def _broken(self, done: Done) -> None:
        if done.errno not in (0, errno.ENOENT):
            self._refuse(done.errno)
        else:
            self._look()

    def _asked_owner(self, done: Done) -> None:
        if done.errno not in (0, errno.ETIMEDOUT):
            self._refuse(done.errno)
            return
        result = done.value.result if done.errno == 0 else None
        self.owner_says = result or 0
        if result == errno.EROFS:
            self._refuse(errno.EROFS)
        elif self._news:
            self._look()
        elif result is None:
            self._back_off()
        else:
            self._wait(RESEND_SECONDS if result == 0 else REFUSED_SECONDS)

    def _waited(self, done: Done) -> None:
        self._look()

    def _post_acquired(self, done: Done) -> None:
        assert self.cookie is not None
        if done.errno:
            if self.wanted:
                self.wanted = False
                self._out.append(Refused(done.errno))
            handoff.answer_offer(self, done.errno)
            self._start_unlock_unused(self.cookie)
            return
        self.wanted = False
        self._backoff = BACKOFF_SECONDS[0]
        self.hand.standby = None
        self._go(S.LOCKED)
        handle = parse_auto_cookie(self.cookie)
        assert handle is not None
        self._out += [Acquired(), AnnounceAcquired(handle)]
        self._rest()

    def _rest(self) -> None:
        """In LOCKED: does what came up meanwhile."""
        if self.stopping or self._release or self._asked:
            for_peer, self._asked = self._asked, False
            handoff.answer_offer(self, errno.EAGAIN)
            self._quiesce(for_peer)
        elif self.hand.key is not None:
            self._quiesce(False)
        else:
            self._renew()

    def _renew(self) -> None:
        assert self.cookie is not None
        if self.handle_now is not None and auto_cookie(self.handle_now) != self.cookie:
            self._do(S.RELOCK_LOOKING, Look)

    def _still_ours(self, done: Done) -> bool:
        """False when the lock was read and is another's, or gone with the image. Follows a cookie that did arrive."""
        if done.errno:
            return done.errno != errno.ENOENT
        owner = done.value.owner
        if owner is None or owner.gid != self.gid or owner.cookie not in (self.cookie, self._pending):
            return False
        self.cookie = owner.cookie
        return True

    def _verified(self, done: Done) -> None:
        self._verifying = False
        if not self._still_ours(done):
            self._fence(done.errno or errno.ESHUTDOWN)

    def _relock_looked(self, done: Done) -> None:
        if not self._still_ours(done):
            self._fence(done.errno or errno.ESHUTDOWN)
        elif done.errno:
            self._relock_later()
        elif self.handle_now is None or self.stopping or self._release or self._asked:
            self._go(S.LOCKED)  # without a watch the old cookie stands until there is one
            self._rest()
        else:
            old, new = self.cookie, auto_cookie(self.handle_now)
            assert old is not None
            if old == new:
                self._relock_finished()
                return
            self._mine.add(new)
            self._pending = new
            self._do(S.RELOCKING, lambda op: SetCookie(op, old, new))

    def _relock_later(self) -> None:
        self._do(S.RELOCK_WAITING, lambda op: Sleep(op, REFUSED_SECONDS))

    def _relock_waited(self, done: Done) -> None:
        self._go(S.LOCKED)
        self._rest()

    def _relocked(self, done: Done) -> None:
        if done.errno == 0:
            self.cookie = self._pending
            self._relock_finished()
        elif done.errno in (errno.EBUSY, errno.ENOENT):
            self._fence(errno.ESHUTDOWN)
        elif done.errno == errno.ETIMEDOUT:
            self._relock_later()
        else:
            # Refused for another reason: give it back and take it anew, with requests parked in between.
            self._pending = None
            self._ask = True
            self.wanted = not (self.stopping or self._release)
            handoff.answer_offer(self, errno.EAGAIN)
            self._quiesce(False)

    def _relock_finished(self) -> None:
        assert self.cookie is not None
        self._pending = None
        self._go(S.LOCKED)
        handle = parse_auto_cookie(self.cookie)
        assert handle is not None
        self._out.append(AnnounceAcquired(handle))
        self._rest()

    def _pre_released(self, done: Done) -> None:
        assert self.cookie is not None
        if done.errno and (not self.stopping or done.errno == errno.ETIMEDOUT):
            # Not drained: the lock stays. The image left its gate as it was before.
            self._keep(done.errno)
            self._go(S.LOCKED)
            handoff.answer_offer(self, done.errno)
            if self._release:
                self._release = False
                self._out.append(Released(done.errno))
            if self.stopping:
                self.stopping = False
                self._out.append(Stopped(done.errno))
            if self.wanted:
                self.wanted = False
                self._out.append(Acquired())
            self._renew()
            return
        if done.errno and not self._final:
            self._quiesce(self._for_peer)  # closing came in between: not before the gate is shut for good
            return
        if self.hand.key is not None and not (self.stopping or self._release):
            handoff.make_offer(self)
            return
        handoff.answer_offer(self, errno.EAGAIN)
        self._failure = done.errno
        self._quiesced = True
        self._attempts = 0
        self._unlock(self.cookie)

    def _unlocked(self, done: Done) -> None:
        assert self.cookie is not None
        if done.errno == errno.ENOENT and self._pending not in (None, self.cookie):
            self.cookie, self._pending = self._pending, None
            assert self.cookie is not None
            self._unlock(self.cookie)
        elif done.errno in (0, errno.ENOENT):
            self._pending = None
            if done.errno == 0:
                self.hand.offer = None  # nobody took it, and nobody can now
            handle = parse_auto_cookie(self.cookie)
            assert handle is not None
            self._do(S.ANNOUNCING, lambda op: AnnounceReleased(op, handle))
            self.cookie = None
            self._quiesced = False
            self.kept = 0
            if self._release:
                self._release = False
                self._out.append(Released())
        elif self._attempts + 1 >= UNLOCK_ATTEMPTS and self._may_stay(done.errno):
            # A full store must not cost a guest its disk: read the lock, it should be ours as before.
            self._keep(done.errno)
            self._quiesced = False
            self._for_peer = False
            if self._release:
                self._release = False
                self._out.append(Released(done.errno))
            self.wanted = True
            self._look()
        elif self._attempts + 1 >= UNLOCK_ATTEMPTS:
            # Nobody knows who holds it: the next owner breaks it.
            self._fence(done.errno, tuple(c for c in (self.cookie, self._pending) if c is not None))
        else:
            self._attempts += 1
            self._do(S.UNLOCK_RETRY, lambda op: Sleep(op, REFUSED_SECONDS))

    def _may_stay(self, code: int) -> bool:
        return code in NOTHING_DONE and self._quiesced and not self.stopping and self.handle_now is not None

    def _unlock_again(self, done: Done) -> None:
        assert self.cookie is not None
        self._unlock(self.cookie)

    def _announced(self, done: Done) -> None:
        for_peer, self._for_peer = self._for_peer, False
        self._asked = False
        if for_peer and self.wanted and not self.stopping and self.handle_now is not None and not self._news:
            self._wait(FAIR_SECONDS)
        else:
            self._settle()


Reaction = Callable[[LockMachine, Any], None]

REACTIONS: dict[type[Event], Reaction] = {
    Acquire: LockMachine._on_acquire,
    Abandon: LockMachine._on_abandon,
    Release: LockMachine._on_release,
    Shutdown: LockMachine._on_shutdown,
    WatchUp: LockMachine._on_watch_up,
    WatchDown: LockMachine._on_watch_down,
    Fenced: LockMachine._on_fenced,
    PeerAcquired: LockMachine._on_peer_acquired,
    PeerReleased: LockMachine._on_peer_released,
    PeerRequested: LockMachine._on_peer_requested,
    Offer: handoff.on_offer,
    TakeBack: handoff.on_take_back,
    StandBy: handoff.on_stand_by,
    StandDown: handoff.on_stand_down,
    TakeOver: handoff.on_take_over,
}

# What the answer of the one outstanding operation means, by state.
ANSWERS: dict[LockState, Callable[[LockMachine, Done], None]] = {
    S.LOOKING: LockMachine._looked,
    S.LOCKING: LockMachine._locked,
    S.CHECKING: LockMachine._checked,
    S.RELOOKING: LockMachine._relooked,
    S.BLOCKLISTING: LockMachine._blocklisted,
    S.BREAKING: LockMachine._broken,
    S.ASKING: LockMachine._asked_owner,
    S.WAITING: LockMachine._waited,
    S.POST_ACQUIRING: LockMachine._post_acquired,
    S.LOCKED: LockMachine._verified,
    S.RELOCK_LOOKING: LockMachine._relock_looked,
    S.RELOCKING: LockMachine._relocked,
    S.RELOCK_WAITING: LockMachine._relock_waited,
    S.QUIESCING: LockMachine._pre_released,
    S.UNLOCKING: LockMachine._unlocked,
    S.UNLOCK_RETRY: LockMachine._unlock_again,
    S.ANNOUNCING: LockMachine._announced,
    S.OFFERING: handoff.offering_done,
    S.OFFER_LOOKING: handoff.offer_looked,
    S.RETRACTING: handoff.retract_done,
    S.RETRACT_LOOKING: handoff.retract_looked,
    S.TAKING: handoff.taking_done,
}

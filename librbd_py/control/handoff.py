"""Handing the lock over when a VM moves: the part of the lock machine that both hosts of a live migration go through.

The lock is held all the time. Its owner *offers* it by writing a mark into its own record (the locker's description,
which librbd and krbd leave empty and do not read); the next host *takes* it by putting itself in the place of exactly
that record; the owner *takes it back* by removing the mark from exactly that record. Each is one compare-and-set on the
object, so one of the two wins and nobody can come in between. The record is the generation: a cookie is never used
twice, nor is a nonce. Whoever breaks the lock meanwhile (it is the same lock to them) makes both refuse: ESTALE, and
the VM's requests stay parked.

    source       LOCKED -Offer-> QUIESCING -> OFFERING -> OFFERED -TakeBack-> RETRACTING -> POST_ACQUIRING -> LOCKED
                                                            `-taken-> UNLOCKED (the offer is remembered)
    destination  UNLOCKED -StandBy, TakeOver-> LOOKING -> TAKING -> POST_ACQUIRING -> LOCKED

An answer that got lost is found out by reading the lock. While it is offered the lock is given to nobody else: who asks
is told to ask again.

Who stands by expects the owner that it found, until it has the lock itself: that one offers it, gives it up when it is
asked, says that it leaves, or is dead and fenced; anybody else in between is a stranger. When nobody owned the lock, no
write of the VM was under its protection yet and there is nobody to compare with: a free lock is taken, whoever owns it
is asked (the VM's other host, as a rule, which wrote its first block meanwhile), and expected from then on.

An offer names the VM. Where either end does not know its VM the key is "*" and fits every other: one image is no two
VMs' disk. That goes for who stands by, and for those that serve VMs without having been told that one will come
(`heir`: both daemons may have been started by hand); anybody else, a backup say, has to ask, and is told to come again.

In OFFERED nothing is outstanding and no time runs: its exits are TakeBack, Release, Shutdown, Fenced and the news that
somebody acquired the lock.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from librbd_py.control import lock_events as le
from librbd_py.control.lock_events import Done, Locker, LockState, LockView
from librbd_py.format.lock import Offer, auto_cookie
from librbd_py.format.values import replace

if TYPE_CHECKING:
    from librbd_py.control.lock import LockMachine

S = LockState
LEAVE_ATTEMPTS, LEAVE_SECONDS = 10, 0.2  # looks at a lock that its owner has let go without a word so far
ANYBODY = "*"  # the key of a VM that nobody knows: who comes next may take the offer
RETRACT_ATTEMPTS = 3  # when no answer comes and reading shows that nothing happened

# Between the decision to offer and its end. No acquiring but by TakeBack.
HANDING = frozenset({S.OFFERING, S.OFFER_LOOKING, S.OFFERED, S.RETRACTING, S.RETRACT_LOOKING})


class HandOffData:
    """What the machine remembers of a hand-off."""

    def __init__(self) -> None:
        self.key: str | None = None  # an Offer waits for its answer
        self.offer: Offer | None = None  # made, or tried; until the lock is ours again for good
        self.record: Locker | None = None  # ours in the lock while offered
        self.doubtful = False  # OFFERED, but the store did not say so
        self.mark = ""  # of our locker in the lock while we own it: not empty after taking an offer
        self.standby: le.StandBy | None = None
        self.attempts = 0
        self.count = 0  # offers made by this machine: with its gid and cookie they make a nonce

    @property
    def moving(self) -> bool:
        """Only TakeBack and TakeOver lead to the lock now."""
        return self.offer is not None or self.key is not None or self.standby is not None


# --- source ------------------------------------------------------------------------------------------------------


def on_offer(m: LockMachine, event: le.Event) -> None:
    assert isinstance(event, le.Offer)
    if m.state in (S.FENCED, S.STOPPED) or m.stopping:
        m._out.append(le.Offered(m.fence_errno or errno.ESHUTDOWN))
    elif m.state is S.OFFERED:
        m._out.append(le.Offered())
    elif m.hand.key is not None or m.state in HANDING:
        m._out.append(le.Offered(errno.EBUSY))
    elif m._asked or m._release or not (m.owning or m.state is S.POST_ACQUIRING):
        m._out.append(le.Offered(errno.EAGAIN))
    else:
        m.hand.key = event.key
        if m.state is S.LOCKED:
            m._quiesce(False)


def answer_offer(m: LockMachine, code: int) -> None:
    """To whoever waits for one; in every state that is a way out of offering."""
    if m.hand.key is not None:
        m.hand.key = None
        m._out.append(le.Offered(code))


def make_offer(m: LockMachine) -> None:
    """The image has drained and lets nothing in."""
    assert m.cookie is not None and m.hand.key is not None
    m.hand.count += 1
    m.hand.offer = Offer(m.hand.key, f"{m.gid}.{m.cookie.split()[-1]}.{m.hand.count}")
    m.hand.record = record = Locker(m.gid, m.cookie, m.address, m.hand.mark)
    mark = m.hand.offer.mark
    m._do(S.OFFERING, lambda op: le.Mark(op, record, mark))


def offering_done(m: LockMachine, done: Done) -> None:
    if done.errno:
        m._do(S.OFFER_LOOKING, le.Look)
    else:
        _offered(m)


def _offered(m: LockMachine) -> None:
    assert m.hand.offer is not None and m.cookie is not None
    m.hand.record = Locker(m.gid, m.cookie, m.address, m.hand.offer.mark)
    _rest_offered(m, 0)


def _rest_offered(m: LockMachine, code: int) -> None:
    """In OFFERED, perhaps: does what came up meanwhile."""
    m._go(S.OFFERED)
    m.hand.doubtful = code != 0
    answer_offer(m, code)
    if m.stopping or m._release:
        m._withdraw()
    elif m.wanted:
        retract(m)  # a TakeBack came while the lock was being read


def _ours(m: LockMachine, done: Done) -> bool:
    owner = done.value.owner
    return owner is not None and owner.gid == m.gid and owner.cookie == m.cookie


def offer_looked(m: LockMachine, done: Done) -> None:
    assert m.hand.offer is not None
    if done.errno == errno.ENOENT:
        m._fence(done.errno)
    elif done.errno:
        _rest_offered(m, done.errno)  # taking it back finds out
    elif not _ours(m, done):
        owner = done.value.owner
        if m.hand.key is None or (owner is not None and owner.mark == m.hand.offer.taken):
            answer_offer(m, 0)
            _gone(m)
        else:
            m._fence(errno.ESHUTDOWN)  # broken while we owned it
    elif done.value.owner.mark == m.hand.offer.mark:
        _offered(m)
    else:
        _owner_again(m, done.value.owner.mark, errno.EIO)


def _owner_again(m: LockMachine, mark: str, code: int = 0) -> None:
    """The lock is ours and not offered: make the image ready as after acquiring."""
    answer_offer(m, code)
    m.hand.mark = mark
    m.hand.offer = m.hand.record = None
    m._do(S.POST_ACQUIRING, le.RunPostAcquire)


def _gone(m: LockMachine) -> None:
    """Somebody else has the lock: nothing is ours to unlock. The offer is remembered for a TakeBack."""
    m.cookie = None
    m._settle()


def on_take_back(m: LockMachine, event: le.Event) -> None:
    if m.state in (S.FENCED, S.STOPPED) or m.stopping:
        m._out.append(le.Refused(m.fence_errno or errno.ESHUTDOWN))
    elif m.hand.offer is None:
        m._on_acquire(le.Acquire())
    else:
        m.wanted = m._ask = True
        m.hand.attempts = 0
        if m.state is S.OFFERED:
            retract(m)
        elif m.state is S.UNLOCKED:
            m._do(S.RETRACT_LOOKING, le.Look)


def was_offered(m: LockMachine, owner: Locker) -> bool:
    """Our record, as read, offers the lock: an unlocking of it came to nothing."""
    m.hand.offer = Offer.parse(owner.mark)
    m.hand.record = owner if m.hand.offer is not None else None
    m.hand.attempts = 0
    return m.hand.offer is not None


def retract(m: LockMachine) -> None:
    record = m.hand.record
    assert record is not None
    m.hand.attempts += 1
    m._do(S.RETRACTING, lambda op: le.Mark(op, record, ""))


def retract_done(m: LockMachine, done: Done) -> None:
    if done.errno:
        m._do(S.RETRACT_LOOKING, le.Look)
    else:
        _owner_again(m, "")


def retract_looked(m: LockMachine, done: Done) -> None:
    assert m.hand.offer is not None
    if done.errno == errno.ENOENT:
        m._fence(done.errno)
    elif done.errno:
        _not_back(m, done.errno)
    elif m.cookie is not None and _ours(m, done):
        mark = done.value.owner.mark
        if mark != m.hand.offer.mark:
            _owner_again(m, mark)
        elif m.hand.attempts < RETRACT_ATTEMPTS and not (m.stopping or m._release):
            retract(m)
        else:
            _not_back(m, errno.ETIMEDOUT)
    elif done.value.owner is not None and done.value.owner.mark == m.hand.offer.taken:
        # Our own VM's other host: it lives and gives the lock back, or it is dead and fenced. Nobody else comes first.
        m.cookie = None
        if m.wanted:
            m.hand.standby = le.StandBy(m.hand.offer.key, done.value.owner)
        m.hand.offer = m.hand.record = None
        m._settle()
    else:
        m.cookie = None
        owner = done.value.owner
        offer = Offer.parse(owner.mark) if owner is not None else None
        if offer is not None and offer.meant_for(m.hand.offer.key) and m.handle_now is not None and m.wanted:
            m.hand.offer = m.hand.record = None
            take(m, done.value, offer.taken)  # it was taken, and the VM comes home already
        else:
            _not_back(m, errno.ESTALE)


def _not_back(m: LockMachine, code: int) -> None:
    if m.wanted:
        m.wanted = False
        m._out.append(le.Refused(code))
    if m.cookie is None or m.stopping or m._release:
        m._settle()
    else:
        m._go(S.OFFERED)
        m.hand.doubtful = True


def doubt(m: LockMachine) -> None:
    """A peer asks: perhaps it waits for what is offered to nobody. When nothing is, the lock is ours as before."""
    if m.state is S.OFFERED and m.hand.doubtful:
        m._do(S.OFFER_LOOKING, le.Look)


# --- destination -------------------------------------------------------------------------------------------------


def on_stand_by(m: LockMachine, event: le.Event) -> None:
    assert isinstance(event, le.StandBy)
    m.hand.standby = event
    m.hand.offer = m.hand.record = None  # of its stay before: it was taken, and now the VM comes home


def on_stand_down(m: LockMachine, event: le.Event) -> None:
    m.hand.standby = None
    if m.state is S.UNLOCKED:
        m.hand.offer = m.hand.record = None


def took(m: LockMachine, gid: int, handle: int) -> None:
    """A client announced that it has the lock."""
    standby = m.hand.standby
    ours = gid == m.gid and handle in m._handles  # late: of the VM's stay before
    if standby is not None and standby.owner is not None and not ours:
        m.hand.standby = replace(standby, left=False, strange=standby.strange or gid != standby.owner.gid)


def let_go(m: LockMachine, gid: int) -> None:
    """A client announced that it has let the lock go."""
    standby = m.hand.standby
    if standby is not None and standby.owner is not None:
        if gid == standby.owner.gid:
            m.hand.standby = replace(standby, left=not standby.strange)
        elif gid != m.gid:  # else late: of the VM's stay before
            m.hand.standby = replace(standby, left=False, strange=True)  # so it had the lock


def deaf(m: LockMachine) -> None:
    """The watch is lost: what is said now nobody here hears."""
    if m.hand.standby is not None:
        m.hand.standby = replace(m.hand.standby, left=False)


def on_take_over(m: LockMachine, event: le.Event) -> None:
    assert isinstance(event, le.TakeOver)
    m.hand.attempts = 0
    if event.force:
        m.hand.standby = m.hand.offer = None
    m._on_acquire(le.Acquire())


def judge(m: LockMachine, owner: Locker | None) -> int | Offer | None:
    """What to do about the lock as it is, mostly for a host that stands by: an errno (EAGAIN: look again soon), an
    offer to take, None: as anybody would."""
    standby = m.hand.standby
    offer = Offer.parse(owner.mark) if owner is not None else None
    if standby is None:
        return offer if m.heir and offer is not None and offer.key == ANYBODY else None
    expected = standby.owner
    if owner is None:
        if expected is None or standby.left:
            return None
        return errno.EAGAIN if m.hand.attempts < LEAVE_ATTEMPTS else errno.ESTALE  # its last words may be on the way
    if offer is not None:
        return offer if offer.meant_for(standby.key) else errno.ESTALE
    return None if expected is None or owner.gid == expected.gid else errno.ESTALE


def asks(m: LockMachine, owner: Locker) -> None:
    """The owner that was there all the time is asked, or is dead. Nobody else may come before us; where nobody owned
    the lock so far that goes for the first one we see. What we saw may be older than its word that it has let go, which
    it says once."""
    standby = m.hand.standby
    if standby is not None:
        said = standby.left and standby.owner is not None and standby.owner.gid == owner.gid
        m.hand.standby = le.StandBy(standby.key, owner, left=said)


def overtaken(m: LockMachine) -> bool:
    """The lock was free and is ours now, and a stranger was heard of between the two."""
    standby = m.hand.standby
    return standby is not None and standby.owner is not None and not standby.left


def take(m: LockMachine, view: LockView, mark: str) -> None:
    """Puts us in the place of an owner that offers the lock, or is fenced."""
    owner, record = view.owner, view.record
    assert m.handle_now is not None and owner is not None
    m.cookie = cookie = auto_cookie(m.handle_now)
    m._mine.add(cookie)
    m.hand.mark = mark
    m._do(S.TAKING, lambda op: le.TakeOffer(op, cookie, owner, mark, record))


def taking_done(m: LockMachine, done: Done) -> None:
    if done.errno == errno.ECANCELED:
        m.cookie = None
        if m.wanted and m.handle_now is not None:
            m._look()
        else:
            m._settle()
    else:
        m._locked(done)

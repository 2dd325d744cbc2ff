"""What the lock machine hears and says: states, events, actions. See `lock.py`."""

from __future__ import annotations

import errno
from enum import Enum, auto
from typing import Any

from librbd_py.format.values import dataclass, field


@dataclass(frozen=True)
class Locker:
    """Who holds the lock: the whole identity is compared, never a part of it."""

    gid: int
    cookie: str
    address: str
    mark: str = ""  # the locker's description: empty, or an Offer's mark or taken


@dataclass(frozen=True)
class LockView:
    """The lock as read. `foreign`: shared, or of another tag or cookie form, so never ours to ask or break. `record`:
    the bytes in the store."""

    owner: Locker | None = None
    foreign: bool = False
    record: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Answer:
    """What a RequestLock notify brought: the owner's result (0 or a positive errno), None when no owner spoke."""

    result: int | None


class LockState(Enum):
    UNLOCKED = auto()
    NO_WATCH = auto()  # wanted, but a lock needs a watch first
    LOOKING = auto()  # reading the lock
    LOCKING = auto()
    CHECKING = auto()  # is the owner's watch there?
    RELOOKING = auto()  # it is not: is it still the same owner?
    BLOCKLISTING = auto()
    BREAKING = auto()
    ASKING = auto()
    WAITING = auto()  # for the owner, or for a retry
    POST_ACQUIRING = auto()  # the class lock is ours, the image is not ready yet
    LOCKED = auto()
    RELOCK_LOOKING = auto()  # the watch is new: is the lock still ours?
    RELOCKING = auto()  # putting the new cookie in
    RELOCK_WAITING = auto()  # neither worked: once more in a moment
    QUIESCING = auto()  # the image drains
    UNLOCKING = auto()
    UNLOCK_RETRY = auto()
    ANNOUNCING = auto()  # telling the others that the lock is free
    OFFERING = auto()  # writing into the lock that the VM's next host may take it
    OFFER_LOOKING = auto()  # did it get there; was it taken?
    OFFERED = auto()
    RETRACTING = auto()  # the VM stays here after all
    RETRACT_LOOKING = auto()
    TAKING = auto()  # taking what was offered to us, or what a dead owner left when we came for its VM
    FENCED = auto()
    STOPPED = auto()


# --- events ------------------------------------------------------------------------------------------------------


class Event:
    """Base of everything that can happen to the lock."""


@dataclass(frozen=True)
class Acquire(Event):
    """`ask`: a living owner is asked for the lock; else the wait ends with Refused(EAGAIN) when there is one."""

    ask: bool = True


@dataclass(frozen=True)
class Abandon(Event):
    """Nobody waits for the lock any more."""


@dataclass(frozen=True)
class Release(Event):
    pass


@dataclass(frozen=True)
class Shutdown(Event):
    pass


@dataclass(frozen=True)
class WatchUp(Event):
    handle: int


@dataclass(frozen=True)
class WatchDown(Event):
    pass


@dataclass(frozen=True)
class Fenced(Event):
    """This client may not use the store any more (ESHUTDOWN), or the image is gone (ENOENT)."""

    errno: int = errno.ESHUTDOWN


@dataclass(frozen=True)
class Done(Event):
    """The operation `op` ended. `errno` 0 or positive; `value` is a LockView, a bool or an Answer."""

    op: int
    errno: int = 0
    value: Any = None


@dataclass(frozen=True)
class PeerAcquired(Event):
    gid: int
    handle: int


@dataclass(frozen=True)
class PeerReleased(Event):
    gid: int = 0


@dataclass(frozen=True)
class PeerRequested(Event):
    """Someone wants the lock: the answer is a Reply. Gid and watch handle of who asks."""

    gid: int = 0
    handle: int = 0


@dataclass(frozen=True)
class Offer(Event):
    """Hand the lock over to the VM's next host. Ends with Offered."""

    key: str


@dataclass(frozen=True)
class TakeBack(Event):
    """The VM stays here. Ends with Acquired or Refused (ESTALE: a stranger owned the lock meanwhile)."""


@dataclass(frozen=True)
class StandBy(Event):
    """A VM comes here whose lock `owner` has now (None: nobody). `left`: that owner has said since that it let the lock
    go, and nobody has said that he took it: a VM that was paused before it moved, or its program ended (NBD).
    `strange`: somebody else has said that he took it, so what the owner says may be old until it is seen there."""

    key: str
    owner: Locker | None
    left: bool = False
    strange: bool = False


@dataclass(frozen=True)
class StandDown(Event):
    """The VM does not come. The lock is taken as ever, when a write needs it."""


@dataclass(frozen=True)
class TakeOver(Event):
    """The VM runs here from now on. Ends with Acquired or Refused (ESTALE: a stranger owned the lock meanwhile).
    `force`: whoever owned it."""

    force: bool = False


# --- actions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """-> Done(value=LockView)"""

    op: int


@dataclass(frozen=True)
class TryLock:
    op: int
    cookie: str


@dataclass(frozen=True)
class CheckOwner:
    """-> Done(value=True when a watch with the owner's address and handle is there)"""

    op: int
    owner: Locker


@dataclass(frozen=True)
class Blocklist:
    op: int
    address: str


@dataclass(frozen=True)
class Break:
    op: int
    owner: Locker


@dataclass(frozen=True)
class Ask:
    """-> Done(value=Answer)"""

    op: int


@dataclass(frozen=True)
class Sleep:
    op: int
    seconds: float


@dataclass(frozen=True)
class RunPostAcquire:
    op: int


@dataclass(frozen=True)
class RunPreRelease:
    """`final`: the image is being closed, so its gate stays shut even when draining fails."""

    op: int
    final: bool = False


@dataclass(frozen=True)
class Unlock:
    op: int
    cookie: str


@dataclass(frozen=True)
class SetCookie:
    op: int
    old: str
    new: str


@dataclass(frozen=True)
class Mark:
    """Writes `new` as the description of the locker `owner`, if the lock is exactly theirs: Done(ECANCELED)."""

    op: int
    owner: Locker
    new: str


@dataclass(frozen=True)
class TakeOffer:
    """Puts this client with `cookie` in the place of the locker `owner`, if the lock is exactly theirs, in one step:
    Done(ECANCELED). `record`: the lock's bytes when the owner was read."""

    op: int
    cookie: str
    owner: Locker
    mark: str
    record: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class AnnounceReleased:
    op: int
    handle: int


@dataclass(frozen=True)
class AnnounceAcquired:
    """Nobody waits for it."""

    handle: int


@dataclass(frozen=True)
class Acquired:
    """The waiters own the lock."""


@dataclass(frozen=True)
class Refused:
    errno: int


@dataclass(frozen=True)
class Released:
    errno: int = 0


@dataclass(frozen=True)
class Offered:
    """The answer to Offer. EAGAIN: this client does not own the lock; else the lock stayed as it was."""

    errno: int = 0


@dataclass(frozen=True)
class Lost:
    """This client is fenced (ESHUTDOWN), or the image gone (ENOENT), or the store does not let it unlock; so is the
    lock, if it was ours. `cookies`: under these it may still stand in the lock, with nothing under way any more:
    unlocking is worth one more attempt. Its watch must end in any case: while it lasts the others take it for alive."""

    errno: int
    cookies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """Ack of a request: None is the empty ack of a client that does not own the lock, else 0 or a positive errno."""

    result: int | None


@dataclass(frozen=True)
class Stopped:
    errno: int = 0


Operation = (
    Look | TryLock | CheckOwner | Blocklist | Break | Ask | Sleep | RunPostAcquire | RunPreRelease | Unlock
    | SetCookie | AnnounceReleased | Mark | TakeOffer
)  # fmt: skip
Action = Operation | AnnounceAcquired | Acquired | Refused | Released | Offered | Lost | Reply | Stopped

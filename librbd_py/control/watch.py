"""The watch on an image header as a state machine without I/O: events in, actions out.

A watch that the store lost is registered anew, with a growing wait between attempts, until it works, the client is
fenced (ESHUTDOWN) or the object is gone (ENOENT). A new watch always has a new handle: lock cookies quote it, and a
cookie that came back would let two clients believe the same lock is theirs. Losing a watch is not losing the lock.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from librbd_py.format.values import dataclass

BACKOFF_SECONDS = (0.1, 30.0)  # first and longest wait between attempts to register
FINAL = frozenset({errno.ESHUTDOWN, errno.ENOENT})


class WatchState(Enum):
    UNREGISTERED = auto()
    REGISTERING = auto()
    REGISTERED = auto()
    ERROR = auto()  # lost; the old handle is being given back
    BACKING_OFF = auto()
    REWATCHING = auto()
    UNREGISTERING = auto()
    FAILED = auto()  # fenced, or the object is gone
    CLOSED = auto()


class Event:
    """Base of everything that can happen to the watch."""


@dataclass(frozen=True)
class Open(Event):
    pass


@dataclass(frozen=True)
class Close(Event):
    pass


@dataclass(frozen=True)
class Lost(Event):
    """The store says the watch is gone: ENOTCONN, or ESHUTDOWN when the client is fenced."""

    handle: int
    errno: int


@dataclass(frozen=True)
class Done(Event):
    op: int
    errno: int = 0  # positive
    handle: int = 0  # of a successful Register


@dataclass(frozen=True)
class Register:
    op: int


@dataclass(frozen=True)
class Unregister:
    op: int
    handle: int


@dataclass(frozen=True)
class Sleep:
    op: int
    seconds: float


@dataclass(frozen=True)
class Opened:
    """Outcome of Open: 0 or a positive errno."""

    errno: int


@dataclass(frozen=True)
class Up:
    """`again`: after a loss, so what was announced meanwhile was missed."""

    handle: int
    again: bool


@dataclass(frozen=True)
class Down:
    errno: int


@dataclass(frozen=True)
class Failed:
    """For good."""

    errno: int


@dataclass(frozen=True)
class Closed:
    pass


Operation = Register | Unregister | Sleep
Action = Operation | Opened | Up | Down | Failed | Closed

S = WatchState

# Where each state may lead; anything else is a bug and raises.
NEXT: dict[WatchState, frozenset[WatchState]] = {
    S.UNREGISTERED: frozenset({S.REGISTERING, S.CLOSED}),
    S.REGISTERING: frozenset({S.REGISTERED, S.UNREGISTERED, S.UNREGISTERING, S.ERROR, S.CLOSED, S.FAILED}),
    S.REGISTERED: frozenset({S.ERROR, S.UNREGISTERING, S.FAILED}),
    S.ERROR: frozenset({S.REWATCHING, S.CLOSED, S.FAILED}),
    S.BACKING_OFF: frozenset({S.REWATCHING, S.CLOSED, S.FAILED}),
    S.REWATCHING: frozenset({S.REGISTERED, S.BACKING_OFF, S.ERROR, S.UNREGISTERING, S.CLOSED, S.FAILED}),
    S.UNREGISTERING: frozenset({S.CLOSED}),
    S.FAILED: frozenset({S.CLOSED}),
    S.CLOSED: frozenset(),
}


class WatchMachine:
    """`handle()` is called with one event at a time and never blocks. Closing waits for an attempt under way."""

    def __init__(self) -> None:
        self.state = S.UNREGISTERED
        self.watch: int | None = None  # handle while REGISTERED
        self._op = 0
        self._closing = False
        self._backoff = BACKOFF_SECONDS[0]
        self._used: set[int] = set()
        self._lost_early: dict[int, int] = {}  # losses reported before the registration's own answer
        self._out: list[Action] = []

    @property
    def outstanding(self) -> int:
        """Number of the operation whose answer counts."""
        return self._op

    def handle(self, event: Event) -> list[Action]:
        """Advances by one event and returns what is to be done about it, in order."""
        self._out = []
        if isinstance(event, Done):
            if event.op == self._op and self.state in ANSWERS:
                self._op += 1
                ANSWERS[self.state](self, event)
        else:
            REACTIONS[type(event)](self, event)
        return self._out

    def _go(self, state: WatchState) -> None:
        assert state in NEXT[self.state], (self.state, state)
        self.state = state
        self._op += 1

    def _do(self, state: WatchState, operation: Callable[[int], Action]) -> None:
        self._go(state)
        self._out.append(operation(self._op))

    def _close(self) -> None:
        self._go(S.CLOSED)
        self._out.append(Closed())

    def _fail(self, code: int) -> None:
        self._go(S.FAILED)
        self.watch = None
        self._out.append(Failed(code))
        if self._closing:
            self._close()

    def _on_open(self, event: Event) -> None:
        if self.state is S.UNREGISTERED:
            self._do(S.REGISTERING, Register)
        else:
            self._out.append(Opened(errno.EINVAL))

    def _on_close(self, event: Event) -> None:
        if self.state is S.CLOSED:
            self._out.append(Closed())
        elif self.state in (S.REGISTERING, S.REWATCHING, S.UNREGISTERING, S.ERROR):
            self._closing = True
        elif self.state is S.REGISTERED:
            handle = self.watch
            assert handle is not None
            self.watch = None
            self._do(S.UNREGISTERING, lambda op: Unregister(op, handle))
        else:
            self._close()

    def _on_lost(self, event: Event) -> None:
        assert isinstance(event, Lost)
        if self.state is S.REGISTERED and event.handle == self.watch:
            self._lose(event.handle, event.errno)
        elif self.state in (S.REGISTERING, S.REWATCHING) and event.handle not in self._used:
            self._lost_early[event.handle] = event.errno
        elif event.errno == errno.ESHUTDOWN and self.state is S.BACKING_OFF:
            self._fail(event.errno)

    def _lose(self, handle: int, code: int) -> None:
        self.watch = None
        self._out.append(Down(code))
        if code == errno.ESHUTDOWN:
            self._fail(code)
        else:
            self._do(S.ERROR, lambda op: Unregister(op, handle))

    def _registered(self, done: Done) -> None:
        again = self.state is S.REWATCHING
        early, self._lost_early = self._lost_early, {}
        if done.errno == 0 and done.handle in self._used:
            self._do(S.ERROR, lambda op: Unregister(op, done.handle))
        elif done.errno == 0:
            self._used.add(done.handle)
            if self._closing:
                if not again:
                    self._out.append(Opened(errno.ESHUTDOWN))
                self._do(S.UNREGISTERING, lambda op: Unregister(op, done.handle))
                return
            self._go(S.REGISTERED)
            self.watch = done.handle
            self._backoff = BACKOFF_SECONDS[0]
            if not again:
                self._out.append(Opened(0))
            self._out.append(Up(done.handle, again))
            if done.handle in early:
                self._lose(done.handle, early[done.handle])
        elif not again:
            self._out.append(Opened(done.errno))
            if self._closing:
                self._close()
            else:
                self._go(S.UNREGISTERED)
        elif done.errno in FINAL:
            self._fail(done.errno)
        elif self._closing:
            self._close()
        else:
            seconds, self._backoff = self._backoff, min(self._backoff * 2, BACKOFF_SECONDS[1])
            self._do(S.BACKING_OFF, lambda op: Sleep(op, seconds))

    def _given_back(self, done: Done) -> None:
        if self._closing:
            self._close()
        elif done.errno == errno.ESHUTDOWN:
            self._fail(done.errno)
        else:
            self._do(S.REWATCHING, Register)

    def _backed_off(self, done: Done) -> None:
        self._do(S.REWATCHING, Register)

    def _unregistered(self, done: Done) -> None:
        self._close()


REACTIONS: dict[type[Event], Callable[[WatchMachine, Any], None]] = {
    Open: WatchMachine._on_open,
    Close: WatchMachine._on_close,
    Lost: WatchMachine._on_lost,
}

# What the answer of the one outstanding operation means, by state.
ANSWERS: dict[WatchState, Callable[[WatchMachine, Done], None]] = {
    S.REGISTERING: WatchMachine._registered,
    S.REWATCHING: WatchMachine._registered,
    S.ERROR: WatchMachine._given_back,
    S.BACKING_OFF: WatchMachine._backed_off,
    S.UNREGISTERING: WatchMachine._unregistered,
}

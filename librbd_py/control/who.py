"""What a client of an image says when it is asked who it is, and what it remembers for that."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from librbd_py.format import who as fw
from librbd_py.format.notify import ClientId

ASKED_SECONDS = 60.0  # after which who asked for the lock no longer waits: librbd asks again every ten
MOST_ASKING = 256


class Diary:
    """Of one HeaderControl. Thread-safe; nothing here blocks."""

    def __init__(self) -> None:
        self.about: Mapping[str, str] = {}  # what the program wants known of itself or its VM
        self.facts: Callable[[], Mapping[str, Any]] = dict  # fields of the answer that the image knows
        self._lock = threading.Lock()  # guards all below
        self._watching: tuple[int, float] | None = None  # handle, since when (time.monotonic())
        self._owning: float | None = None
        self._asked: dict[ClientId, float] = {}

    def note(self, handle: int | None, owning: bool) -> None:
        """The watch and the lock as they are now. A lock whose cookie is renewed is the same lock."""
        now = time.monotonic()
        with self._lock:
            if handle is None:
                self._watching = None
            elif self._watching is None or self._watching[0] != handle:
                self._watching = (handle, now)
            if owning != (self._owning is not None):
                self._owning = now if owning else None
                if not owning:
                    self._asked.clear()

    def asked(self, client: ClientId) -> None:
        """A peer wants the lock."""
        now = time.monotonic()
        with self._lock:
            self._asked[client] = now
            if len(self._asked) > MOST_ASKING:
                self._asked = {who: when for who, when in self._asked.items() if now - when < ASKED_SECONDS}
                while len(self._asked) > MOST_ASKING:
                    del self._asked[next(iter(self._asked))]

    def answer(self, state: str, policy: str, stand_by: bool = False) -> fw.Answer:
        now = time.monotonic()
        with self._lock:
            watching, owning = self._watching, self._owning
            asked = sorted(self._asked.items(), key=lambda row: row[1])
        waiting = [
            fw.Waiting(who.gid, who.handle, _ms(now - when)) for who, when in asked if now - when < ASKED_SECONDS
        ]
        return fw.Answer(
            host=socket.gethostname(),
            pid=os.getpid(),
            program=os.path.basename(sys.argv[0]) if sys.argv else "",
            about=dict(self.about),
            state=state,
            policy=policy,
            owner=owning is not None,
            stand_by=stand_by,
            watch_age=fw.NEVER if watching is None else _ms(now - watching[1]),
            lock_age=fw.NEVER if owning is None else _ms(now - owning),
            waiting=tuple(waiting[-fw.MAX_WAITING :]),
            **self.facts(),
        )


def _ms(seconds: float) -> int:
    return max(int(seconds * 1000), 0)

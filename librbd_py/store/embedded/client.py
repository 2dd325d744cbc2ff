"""Who is alive: one lock file per client process in run/.

A client holds a write lock on its open file description of run/<gid>.lock for its whole life, so the kernel takes it
away when the process dies, however it dies. Who finds it free knows that the client is dead. A process that stands
still (SIGSTOP) keeps it: such a one is silent (life.py), and who is silent for longer than its watch lasts has lost it.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .folder import Folder, wait_lock
from .life import BEAT, LATE, Identity, Life, heart, identity_of, is_alive, last_beat, lock_byte, now_ms

SURE_SECONDS = 2.0  # how long a silent client is watched before it is believed
_NAMES = re.compile(r"(\d{1,20})\.(lock|sock)")
GUARD = "guard"  # locked by who enters run/
WATCH_FILES = ("watch.db", "watch.db-wal", "watch.db-shm", "watch.db-journal")


def address_of(gid: int) -> str:
    """Unique like the gid (which is never given twice), in the form Ceph prints: ip:port/nonce."""
    return f"127.0.0.1:0/{gid & 0xFFFFFFFF}"


def gid_of(address: str) -> int | None:
    """The inverse for gids below 2^32; None for an address that no client of this store has."""
    match = re.fullmatch(r"127\.0\.0\.1:0/(\d{1,10})", address)
    return int(match[1]) if match else None


class Presence:
    """This client's membership in run/."""

    def __init__(self, run: Folder, gid: int) -> None:
        self.run = run
        self.gid = gid
        self._life: Life | None = None
        self._late: Callable[[], None] | None = None
        self._lock = threading.Lock()  # guards _silent
        self._silent: dict[int, int] = {}  # gid -> the beat after which it was watched and none came

    def enter(self, seconds: float = 30) -> None:
        """Takes the lock. Who finds nobody else alive clears run/ of everything that earlier clients left."""
        guard = self.run.open_file(GUARD, os.O_RDWR | os.O_CREAT)
        try:
            wait_lock(lambda: lock_file(guard), seconds, f"{self.run.path}/{GUARD}")
            self._clear()
            fd = self.run.open_file(f"{self.gid}.lock", os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                self._life = Life(fd)
            except BaseException:
                os.close(fd)
                raise
        finally:
            os.close(guard)

    def _clear(self) -> None:
        alive = False
        names = self.run.names()
        for name in names:
            match = _NAMES.fullmatch(name)
            if match and match[2] == "lock" and int(match[1]) != self.gid:
                if self.alive(int(match[1])):
                    alive = True
                else:
                    self.forget(int(match[1]))
        if not alive:
            # Watches of the dead, a damaged database after a power cut, sockets: nothing of it means anything now.
            for name in names:
                if name in WATCH_FILES or _NAMES.fullmatch(name):
                    self.run.remove(name)

    def others(self) -> list[int]:
        """Live clients but this one."""
        found = (_NAMES.fullmatch(name) for name in self.run.names())
        gids = [int(match[1]) for match in found if match and match[2] == "lock"]
        return [gid for gid in gids if gid != self.gid and self.alive(gid)]

    @contextmanager
    def _file(self, gid: int) -> Iterator[int | None]:
        """Another client's lock file. None: there is none."""
        try:
            fd = self.run.open_file(f"{gid}.lock", os.O_RDWR)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            yield None
            return
        try:
            yield fd
        finally:
            os.close(fd)

    def alive(self, gid: int) -> bool:
        """Whether its process exists: it may still do things, even if it stands still now."""
        if gid == self.gid and self._life is not None:
            return True
        with self._file(gid) as fd:
            return fd is not None and is_alive(fd)

    def identity(self, gid: int) -> Identity | None:
        """Of a client's process, while it lives. None: it does not live, or does not say."""
        with self._file(gid) as fd:
            return None if fd is None else identity_of(fd)

    def silence(self, gid: int) -> float | None:
        """Seconds since another client was seen running. None: it says nothing that could be compared."""
        beat = self._beat_of(gid)
        return None if beat is None else max(now_ms() - beat, 0) / 1000

    def _beat_of(self, gid: int) -> int | None:
        with self._file(gid) as fd:
            return None if fd is None else last_beat(fd)

    def silent(self, gid: int, seconds: float) -> bool:
        """Whether a client has stood still for so long that who only waits `seconds` for it may call it dead. True is
        believed after watching it for a moment: when the whole machine stood still everybody looks dead at first."""
        limit = (seconds + 2 * BEAT) * 1000  # a pause shorter than `seconds` must not count, whenever it begins
        beat = self._beat_of(gid)
        if gid == self.gid or beat is None or now_ms() - beat <= limit:
            return False
        with self._lock:
            if self._silent.get(gid) == beat:
                return True
        for _ in range(20):  # counted, for a clock may jump in just such a moment
            time.sleep(SURE_SECONDS / 20)
            if self._beat_of(gid) != beat:
                return False
        with self._lock:
            if len(self._silent) > 1000:
                self._silent.clear()
            self._silent[gid] = beat
        return True

    def still_silent(self, gid: int) -> bool:
        """Since `silent` said so."""
        with self._lock:
            return self._silent.get(gid, -1) == self._beat_of(gid)

    def forget(self, gid: int) -> None:
        """Files of a client that is dead."""
        self.run.remove(f"{gid}.sock")
        self.run.remove(f"{gid}.lock")

    # --- our own life

    def give_signs(self, late: Callable[[], None]) -> None:
        """From now on once a second. `late()` runs after a pause in which others may have called us dead."""
        self._late = late
        heart.add(self)

    def beat(self) -> None:
        if self._life is not None and self._life.beat() > LATE and self._late is not None:
            self._late()

    def leave(self) -> None:
        if self._life is not None:
            heart.remove(self)
            self.forget(self.gid)
            self._life.drop()
            self._life = None

    def after_fork(self) -> None:
        """In the child, which must not keep its parent alive."""
        if self._life is not None:
            self._life.after_fork()
            self._life = None


def lock_file(fd: int) -> None:
    lock_byte(fd, 0, 0)

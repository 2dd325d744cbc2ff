"""What a client says of itself while it lives: who it is, and when it was last seen running.

All of it is said in kernel locks on its file run/<gid>.lock, each one byte long, whose position is the value. The
kernel takes them away with the process, so nothing of it is ever stale; nothing is written, so it costs no disk and no
full disk is in its way; and one look (F_OFD_GETLK) reads a value.

    0                 the client lives
    2^40 + pid        of its process
    2^48 + ticks      when that process started (/proc/PID/stat)
    2^52 + inode      its PID namespace: in another one the number means another process
    2^53 + inode      its time namespace: in another one the clock is another
    2^56 + ms         CLOCK_MONOTONIC of the last beat; one a second while the client watches anything

A program older than this locks the whole file: it lives, and says nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import time
import weakref
from typing import Protocol

from librbd_py.format.logs import logger
from librbd_py.format.values import dataclass

BEAT = 1.0  # seconds
LATE = 5.0  # seconds without a beat after which a client looks whether it was taken for dead
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, len, pid
_LIFE = (0, 1)
_PID = (1 << 40, 1 << 40)
_START = (1 << 48, 1 << 48)
_PID_NAMESPACE = (1 << 52, 1 << 40)
_TIME_NAMESPACE = (1 << 53, 1 << 40)
_BEAT = (1 << 56, 1 << 55)

log = logger(__name__)


@dataclass(frozen=True)
class Identity:
    """A process. `started`: clock ticks after boot, so that a number that was given again is told apart."""

    pid: int
    started: int
    pid_namespace: int
    time_namespace: int


def this_process() -> Identity:
    return Identity(os.getpid(), start_of("self"), _namespace("pid"), _namespace("time"))


def start_of(pid: int | str) -> int:
    """ESRCH when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(errno.ESRCH, f"there is no process {pid}") from None


def _namespace(kind: str) -> int:
    try:
        return os.stat(f"/proc/self/ns/{kind}").st_ino
    except OSError:  # a kernel without it has one for all
        return 0


def lock_byte(fd: int, start: int, length: int = 1) -> None:
    """EAGAIN or EACCES while another has it."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0))


def _unlock_byte(fd: int, start: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, start, 1, 0))


def _look(fd: int, region: tuple[int, int]) -> int | None:
    """Start of what another holds in there (perhaps before it, for a larger lock); None: nothing."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, *region, 0))
    kind, _, start, _, _ = _FLOCK.unpack(answer)
    return None if kind == fcntl.F_UNLCK else int(start)


def _value(fd: int, region: tuple[int, int]) -> int | None:
    start = _look(fd, region)
    return None if start is None or start < region[0] else start - region[0]


def is_alive(fd: int) -> bool:
    return _look(fd, _LIFE) is not None


def identity_of(fd: int) -> Identity | None:
    """None: it does not say."""
    values = [_value(fd, region) for region in (_PID, _START, _PID_NAMESPACE, _TIME_NAMESPACE)]
    pid, started, pid_namespace, time_namespace = values
    if pid is None or started is None or pid_namespace is None or time_namespace is None:
        return None
    return Identity(pid, started, pid_namespace, time_namespace)


def last_beat(fd: int) -> int | None:
    """Milliseconds of CLOCK_MONOTONIC; None: it never began, or its clock is not ours."""
    beat = _value(fd, _BEAT)
    return beat if beat is not None and _value(fd, _TIME_NAMESPACE) == _namespace("time") else None


def now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class Life:
    """This client's file. `drop()` ends it. Thread-safe."""

    def __init__(self, fd: int) -> None:
        """Takes the locks; the descriptor stays the caller's when that fails."""
        me = this_process()
        lock_byte(fd, _LIFE[0])
        lock_byte(fd, _PID[0] + me.pid)
        lock_byte(fd, _START[0] + me.started)
        lock_byte(fd, _PID_NAMESPACE[0] + me.pid_namespace)
        lock_byte(fd, _TIME_NAMESPACE[0] + me.time_namespace)
        self._lock = threading.Lock()  # guards the next two
        self._fd = fd
        self._beat: int | None = None

    def beat(self) -> float:
        """Says that we are running. Seconds since the last time; 0 for the first."""
        with self._lock:
            if self._fd < 0:
                return 0.0
            before, now = self._beat, now_ms()
            if before == now:
                return 0.0
            lock_byte(self._fd, _BEAT[0] + now)  # first the new one, so that there always is one
            self._beat = now
            if before is None:
                return 0.0
            _unlock_byte(self._fd, _BEAT[0] + before)
            return (now - before) / 1000

    def drop(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def after_fork(self) -> None:
        """In the child, which must not keep its parent alive: some thread of the parent may have held the lock."""
        self._lock = threading.Lock()
        self.drop()


class Beating(Protocol):
    def beat(self) -> None: ...


class _Heart:
    """The thread that beats for every client of this process that watches anything."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the next two
        self._clients: weakref.WeakSet[Beating] = weakref.WeakSet()
        self._runs = False

    def add(self, client: Beating) -> None:
        """Has beaten once on return."""
        client.beat()
        with self._lock:
            self._clients.add(client)
            if self._runs:
                return
            self._runs = True
        threading.Thread(target=self._run, name="rbdpy-heart", daemon=True).start()

    def remove(self, client: Beating) -> None:
        with self._lock:
            self._clients.discard(client)

    def _run(self) -> None:
        while True:
            time.sleep(BEAT)
            with self._lock:
                clients = list(self._clients)
                if not clients:
                    self._runs = False
                    return
            for client in clients:
                try:
                    client.beat()
                except Exception:
                    log.exception("a sign of life could not be given")


heart = _Heart()


def _after_fork() -> None:
    heart.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=_after_fork)

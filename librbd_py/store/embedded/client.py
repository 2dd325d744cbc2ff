"""Who is alive: one lock file per client process in run/.

A client holds a write lock on its open file description of run/<gid>.lock for its whole life, so the kernel takes it
away when the process dies, however it dies. Who finds it free knows that the client is dead.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct

from .folder import Folder, wait_lock

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, len, pid
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
        self._fd = -1

    def enter(self, seconds: float = 30) -> None:
        """Takes the lock. Who finds nobody else alive clears run/ of everything that earlier clients left."""
        guard = self.run.open_file(GUARD, os.O_RDWR | os.O_CREAT)
        try:
            wait_lock(lambda: lock_file(guard), seconds, f"{self.run.path}/{GUARD}")
            self._clear()
            fd = self.run.open_file(f"{self.gid}.lock", os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                lock_file(fd)
            except BaseException:
                os.close(fd)
                raise
            self._fd = fd
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

    def alive(self, gid: int) -> bool:
        if gid == self.gid and self._fd >= 0:
            return True
        try:
            fd = self.run.open_file(f"{gid}.lock", os.O_RDWR)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                return False
            raise
        try:
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        finally:
            os.close(fd)
        kind: int = _FLOCK.unpack(answer)[0]
        return kind != fcntl.F_UNLCK

    def forget(self, gid: int) -> None:
        """Files of a client that is dead."""
        self.run.remove(f"{gid}.sock")
        self.run.remove(f"{gid}.lock")

    def leave(self) -> None:
        if self._fd >= 0:
            self.forget(self.gid)
            self.drop()

    def drop(self) -> None:
        """Lets go of the lock and nothing else (also in the child of a fork, which must not keep its parent alive)."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def lock_file(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))

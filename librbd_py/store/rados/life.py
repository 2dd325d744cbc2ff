"""Proof that a client on this host is dead, for those who would wait for its watch to expire otherwise.

A cluster notices after its watch timeout (30 s by default) that a client is gone; the kernel of the client's host knows
at once. So a client that watches leaves a file with its address as name, under a lock (flock) that ends with the last
process that has it open, however that ends, and not before. Who finds such a file unlocked knows that nobody can send
anything as that client any more; its address is fenced all the same before its lock is broken, for what it sent may be
under way. A file gets its name when it is locked already. No file, or one that cannot be judged, proves nothing.

Whoever can write into the folder can have clients fenced that live, so it must belong to the very user and to nobody
else: $RBDPY_CLIENTS (empty: no files and no proofs), /run/rbdpy/clients of root, $XDG_RUNTIME_DIR/rbdpy/clients.
"""

from __future__ import annotations

import fcntl
import os
import stat
import weakref
from contextlib import suppress
from pathlib import Path

from librbd_py.format.logs import logger

MANY = 512  # files, before those of the longest dead are removed
_NEW = ".new-"

log = logger(__name__)
_alive: weakref.WeakSet[Life] = weakref.WeakSet()


def folder() -> Path | None:
    chosen = os.environ.get("RBDPY_CLIENTS")
    if chosen is not None:
        return Path(chosen) if chosen else None
    if os.geteuid() == 0:
        return Path("/run/rbdpy/clients")
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "rbdpy" / "clients" if base else None


def _trusted(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _name(fsid: str, address: str) -> str:
    return f"{fsid}.{address}".replace("/", "_")


class Life:
    """Of a client of this process. `close` when it has ended in order; the kernel does when it has not."""

    def __init__(self, fsid: str, address: str) -> None:
        """OSError: there is no proof of this one's end then."""
        self._fd = -1
        self._path: Path | None = None
        where = folder()
        if where is None:
            return
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _trusted(where):
            raise PermissionError(f"{where} is not this user's alone")
        _prune(where)
        import tempfile  # here: half the commands watch nothing

        fd, made = tempfile.mkstemp(prefix=_NEW, dir=where)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(made, where / _name(fsid, address))
        except BaseException:
            os.close(fd)
            with suppress(OSError):
                os.unlink(made)
            raise
        self._fd, self._path = fd, where / _name(fsid, address)
        _alive.add(self)

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, -1
        if fd < 0 or self._path is None:
            return
        with suppress(OSError):
            if os.path.samestat(os.fstat(fd), self._path.lstat()):
                self._path.unlink()
        os.close(fd)

    def forget(self) -> None:
        """In a child that was forked: the file is the parent's, and must be unlocked when that one ends."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def ended(fsid: str, address: str) -> bool:
    """Whether the process of that client ran on this host, as this user, and has certainly ended."""
    where = folder()
    return where is not None and _trusted(where) and _unlocked(where / _name(fsid, address))


def _unlocked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return False
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return os.path.samestat(found, path.lstat())  # else another client has this address by now
    except OSError:
        return False
    finally:
        os.close(fd)


def _prune(where: Path) -> None:
    """Nobody wants the locks of clients that died long ago: theirs were broken, or their images are not used."""
    rows = list(where.iterdir())
    if len(rows) <= MANY:
        return
    ages: list[tuple[float, Path]] = []
    for path in rows:
        with suppress(OSError):
            ages.append((path.lstat().st_mtime, path))
    for _, path in sorted(ages)[: len(ages) - MANY // 2]:
        if not path.name.startswith(_NEW) and _unlocked(path):
            with suppress(OSError):
                path.unlink()


def _forget() -> None:
    for life in list(_alive):
        life.forget()


os.register_at_fork(after_in_child=_forget)

"""Ending the process that keeps the database's write lock and stands still: until it is gone nobody can change anything
in the store.

Nobody else may give the lock back for it: it may be in the middle of a transaction, and would go on with it. Its end
rolls the transaction back. It is also the end of every image in that process, so this is never done without being asked
for, and only to a process that is seen to keep the lock all the time.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Callable

from .fencing import KILL_SECONDS
from .folder import Folder
from .holders import Holder, holder_of

SURE_SECONDS = 2.0  # how long a process is watched before it is believed to stand still with the lock
LOOK_SECONDS = 0.05  # between two looks at it
DATABASE = "meta.db"


def unblock(store: str, say: Callable[[str], None], *, force: bool = False, dry_run: bool = False) -> bool:
    """Kills the process that keeps the write lock of the embedded store in folder `store`; `say` hears each step. True:
    it is gone. False: there is nobody to kill, or `dry_run`.

    OSError, nothing has happened: EBUSY: it is not stopped, and not `force`; EPERM: it is somebody else's; EDEADLK:
    it is this process; as Folder.open. ETIMEDOUT: it was killed and is still there after KILL_SECONDS.
    """
    folder = Folder.open(store)
    try:
        path = os.path.join(store, DATABASE)
        os.stat(DATABASE, dir_fd=folder.fd, follow_symlinks=False)
        return _unblock(path, say, force, dry_run)
    finally:
        folder.close()


def _unblock(path: str, say: Callable[[str], None], force: bool, dry_run: bool) -> bool:
    first = holder_of(path)
    if first is None:
        say(f"no process that can be seen from here keeps {path}")
        return False
    say(f"{first} keeps {path}" + (" and is stopped" if first.stopped else ""))
    if first.pid == os.getpid():
        raise OSError(errno.EDEADLK, "it is this process itself")
    try:
        pidfd = os.pidfd_open(first.pid)
    except ProcessLookupError:
        say("it is gone")
        return False
    try:
        stopped = _watched(path, first, pidfd)
        if stopped is None:
            say("it gave the lock back while it was watched: the store is not blocked")
            return False
        say(f"it has kept it for {SURE_SECONDS:g} s and was {'stopped' if stopped else 'not stopped'} all the time")
        if not stopped and not force:
            text = f"{first} is not stopped and may be working: --force kills it all the same"
            raise OSError(errno.EBUSY, text)
        if dry_run:
            say("it would be killed, and every image in it closed")
            return False
        _kill(first, pidfd)
        say("it was killed and is gone")
    finally:
        os.close(pidfd)
    after = holder_of(path)
    say(f"{path} is kept by {after} now" if after is not None else f"{path} is free")
    return True


def _watched(path: str, first: Holder, pidfd: int) -> bool | None:
    """Whether it was stopped at every look; None: there was a look at which it did not keep the lock."""
    stopped = True
    deadline = time.monotonic() + SURE_SECONDS
    while True:
        last = time.monotonic() >= deadline
        now = holder_of(path)
        # The descriptor came first: while its process is there, the number that /proc/locks says is its own.
        if now is None or now.pid != first.pid or _gone(pidfd, 0):
            return None
        stopped = stopped and now.stopped
        if last:
            return stopped
        time.sleep(LOOK_SECONDS)


def _kill(holder: Holder, pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return
    except PermissionError:
        raise OSError(errno.EPERM, f"{holder} belongs to somebody else") from None
    if not _gone(pidfd, KILL_SECONDS):
        raise OSError(errno.ETIMEDOUT, f"{holder} was killed {KILL_SECONDS:.0f} s ago and is still there")


def _gone(pidfd: int, seconds: float) -> bool:
    """A process's descriptor is readable when all its threads have ended; its locks went before that."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))

"""Breaking a client of the embedded store: nobody rejects a late write here, so its process is killed.

A process that stands still may be between any check and the write behind it; only its end is sure. Its end is the end
of every client and every image in it: a daemon that serves several VMs is started again by its supervisor, and they
reconnect.
"""

from __future__ import annotations

import errno
import os
import signal
import time

from librbd_py.format.logs import logger

from .client import Presence
from .life import Identity, start_of, this_process

KILL_SECONDS = 60.0  # how long a killed process may take to be gone: it may be waiting for a disk
NAME_SECONDS = 1.0  # how long a client that has just come may take to say who it is

log = logger(__name__)


class Victim:
    """A live client in another process, pinned down: whatever its number means later, this is who is hit."""

    def __init__(self, presence: Presence, gid: int, identity: Identity, pidfd: int) -> None:
        self._presence = presence
        self.gid = gid
        self.identity = identity
        self._pidfd = pidfd

    def kill(self) -> None:
        """Returns when nothing of it is left and its kernel lock is free. EPERM; ETIMEDOUT: it does not end."""
        log.warning("killing process %d, client %d of %s", self.identity.pid, self.gid, self._presence.run.path)
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except PermissionError:
            raise _not_allowed(self.gid, f"process {self.identity.pid} belongs to somebody else") from None
        deadline = time.monotonic() + KILL_SECONDS
        while self._presence.alive(self.gid):
            if time.monotonic() >= deadline:
                text = f"process {self.identity.pid} was killed {KILL_SECONDS:.0f} s ago and is still there"
                raise OSError(errno.ETIMEDOUT, f"client {self.gid} cannot be fenced yet: {text}")
            time.sleep(0.002)

    def close(self) -> None:
        os.close(self._pidfd)


def find(presence: Presence, gid: int) -> Victim | None:
    """None: it is dead, or lives in this process. EPERM: it lives and we cannot kill it. Nothing has happened yet."""
    identity = _identify(presence, gid)
    me = this_process()
    if identity is None or identity == me:
        return None
    if identity.pid_namespace != me.pid_namespace:
        raise _not_allowed(gid, f"it is process {identity.pid} of another PID namespace (a container?)")
    try:
        pidfd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        pidfd = -1
    try:
        # The descriptor came first: while its process is there, the number is its own.
        if pidfd < 0 or start_of(identity.pid) != identity.started:
            raise ProcessLookupError
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        if pidfd >= 0:
            os.close(pidfd)
        if not presence.alive(gid):
            return None
        raise _not_allowed(gid, f"process {identity.pid}, which took its lock, is gone, but not the lock") from None
    except PermissionError:
        os.close(pidfd)
        raise _not_allowed(gid, f"process {identity.pid} belongs to somebody else") from None
    except BaseException:
        os.close(pidfd)
        raise
    return Victim(presence, gid, identity, pidfd)


def _identify(presence: Presence, gid: int) -> Identity | None:
    deadline = time.monotonic() + NAME_SECONDS
    while True:
        identity = presence.identity(gid)
        if identity is not None or not presence.alive(gid):
            return identity
        if time.monotonic() >= deadline:
            raise _not_allowed(gid, "it does not say which process it is (an older version of this program?)")
        time.sleep(0.01)


def _not_allowed(gid: int, why: str) -> OSError:
    return OSError(errno.EPERM, f"client {gid} lives and cannot be killed from here, so it is not fenced: {why}")

"""TCP ports that nobody uses now."""

from __future__ import annotations

import errno
import os
import random
import socket
from pathlib import Path

from .options import MAX_OSDS
from .processes import Daemon

# Below the ports that the kernel gives to connections: a restarted monitor finds its own free.
LOWEST, HIGHEST = 11000, 30000
LISTENING = "0A"  # in /proc/net/tcp
PORTS_OF_AN_OSD = 8  # four messengers, two protocols
_STEP = 8 + PORTS_OF_AN_OSD * (MAX_OSDS + 4)


def _free(address: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def choose(address: str) -> tuple[tuple[int, int], range]:
    """(the monitor's two ports, ports among which OSDs find theirs), on an address of this machine.
    Another process may be faster to take them: whoever cannot bind chooses anew. EADDRINUSE."""
    starts = list(range(LOWEST, HIGHEST - _STEP, _STEP))
    random.SystemRandom().shuffle(starts)
    for start in starts:
        if all(_free(address, port) for port in range(start, start + 16)):
            return (start, start + 1), range(start + 8, start + _STEP)
    raise OSError(errno.EADDRINUSE, f"no free ports between {LOWEST} and {HIGHEST} on {address}")


def listens(daemon: Daemon, port: int) -> bool:
    """Whether that process, and not another, takes connections on the port."""
    record = daemon.record()
    if record is None:
        return False
    process = Path(f"/proc/{record[0]}")
    try:
        rows = [line.split() for line in (process / "net/tcp").read_text().splitlines()[1:]]
        inodes = {row[9] for row in rows if row[3] == LISTENING and int(row[1].split(":")[1], 16) == port}
        sockets = {f"socket:[{inode}]" for inode in inodes}
        return any(os.readlink(entry) in sockets for entry in (process / "fd").iterdir())
    except OSError:
        return False  # it, or one of its files, went away

"""TCP ports of loopback that nobody uses now."""

from __future__ import annotations

import errno
import random
import socket

from .options import ADDRESS, MAX_OSDS

# Below the ports that the kernel gives to connections: a restarted monitor finds its own free.
LOWEST, HIGHEST = 11000, 30000
PORTS_OF_AN_OSD = 8  # four messengers, two protocols
_STEP = 8 + PORTS_OF_AN_OSD * (MAX_OSDS + 4)


def _free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((ADDRESS, port))
        except OSError:
            return False
    return True


def choose() -> tuple[tuple[int, int], range]:
    """(the monitor's two ports, ports among which OSDs find theirs). Another process may be faster to take them:
    whoever cannot bind chooses anew. EADDRINUSE."""
    starts = list(range(LOWEST, HIGHEST - _STEP, _STEP))
    random.SystemRandom().shuffle(starts)
    for start in starts:
        if all(map(_free, range(start, start + 16))):
            return (start, start + 1), range(start + 8, start + _STEP)
    raise OSError(errno.EADDRINUSE, f"no free ports between {LOWEST} and {HIGHEST} on {ADDRESS}")


def listening(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        return probe.connect_ex((ADDRESS, port)) == 0

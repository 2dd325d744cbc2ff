"""`python -m librbd_py.devcluster.guard FOLDER`: removes the scratch cluster in FOLDER when standard input ends.

Its other end is held by the process that needs the cluster, which may end in any way.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from .cluster import DevCluster


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the process that holds the other end
    sys.stdin.buffer.read()
    DevCluster(Path(sys.argv[1])).stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

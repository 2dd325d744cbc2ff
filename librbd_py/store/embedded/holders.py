"""Which process keeps the database's write lock: /proc/locks knows, and an error that names it can be acted on."""

from __future__ import annotations

import os
from dataclasses import dataclass

WRITE_LOCK = 120  # the byte of the -shm file that SQLite locks for a writer in WAL mode (sqlite.org/walformat.html)
SIZE_MAX = 4 << 20  # bytes read of /proc/locks


@dataclass(frozen=True)
class Holder:
    pid: int
    name: str  # empty: it has just ended
    stopped: bool  # by a signal or by a debugger

    def __str__(self) -> str:
        return f"process {self.pid}" + (f" ({self.name})" if self.name else "")


def writer_of(path: str) -> str:
    """ "process 123 (rbdpyd), which is stopped,", for people; empty: nobody, or nobody that this process can see."""
    holder = holder_of(path)
    if holder is None:
        return ""
    return f"{holder}, which is stopped," if holder.stopped else str(holder)


def holder_of(path: str) -> Holder | None:
    """None: nobody, or nobody that this process can see. `path` is that of the database. The file is only looked at:
    closing it would drop this process's own locks of it."""
    try:
        shm = os.stat(path + "-shm", follow_symlinks=False)
        with open("/proc/locks", "rb") as file:
            rows = file.read(SIZE_MAX).decode(errors="replace").splitlines()
    except OSError:
        return None
    place = f"{os.major(shm.st_dev):02x}:{os.minor(shm.st_dev):02x}:{shm.st_ino}"
    for row in rows:
        words = row.split()
        # 1: POSIX ADVISORY WRITE 4711 fe:01:1234 120 120; one that waits has "->" after its number
        if len(words) != 8 or words[3] != "WRITE" or words[5] != place or not words[4].isdigit():
            continue
        first, last = words[6], words[7]
        if int(words[4]) > 0 and int(first) <= WRITE_LOCK and (last == "EOF" or int(last) >= WRITE_LOCK):
            return _looked_at(int(words[4]))
    return None


def _looked_at(pid: int) -> Holder:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read(4096).decode(errors="replace")
    except OSError:
        return Holder(pid, "", False)
    name = stat[stat.find("(") + 1 : stat.rfind(")")]
    return Holder(pid, name, stat[stat.rfind(")") + 2 :][:1] in ("T", "t"))

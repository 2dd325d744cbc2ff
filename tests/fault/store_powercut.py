"""Power cuts under the embedded store's metadata: python -m tests.fault.store_powercut IMAGE MOUNTPOINT CUTS SEED

Runs in a mount namespace of its own. IMAGE holds a file system; a child runs store_program on it, and at a given step
the file system is shut down without flushing its log, which loses everything that was not synced. Then it is mounted
again and must show the state before or after the operation that was under way. First every step is cut, then CUTS
times a random moment while several threads write, where every acknowledged write must be there.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from librbd_py.store.api import OmapGetVals, OmapSet, Read, WriteFull
from librbd_py.store.embedded import EmbeddedStore, check
from tests.fault.store_program import expected, run_until, verify

GOING_DOWN = 0x8004587D  # _IOR('X', 125, __u32): EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN
NO_LOG_FLUSH = 2
THREADS = 3


class Disk:
    def __init__(self, image: str, mount_point: str) -> None:
        self.image = image
        self.path = Path(mount_point)

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.image, self.path], check=True)

    def umount(self) -> None:
        subprocess.run(["umount", self.path], check=True)

    def cut(self) -> None:
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, GOING_DOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def recover(self) -> None:
        self.umount()
        self.mount()


def cut_every_step(disk: Disk) -> int:
    with tempfile.TemporaryDirectory() as folder:
        states = expected(Path(folder) / "model")

    def stop() -> None:
        disk.cut()
        os.kill(os.getpid(), signal.SIGKILL)

    stop_at, ended = 0, False
    while not ended:
        stop_at += 1
        path = disk.path / f"step{stop_at}"
        acknowledged, ended = run_until(path, stop_at, stop)
        disk.recover()
        verify(path, acknowledged, states, power_cut=True)
        subprocess.run(["rm", "-rf", path], check=True)
    return stop_at


def cut_at_random(disk: Disk, rng: random.Random) -> int:
    """-> acknowledged writes that were looked for"""
    path = disk.path / f"random{rng.random()}"
    EmbeddedStore(path, create=True).close()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        store = EmbeddedStore(path)
        io = store.open("rbd")

        def work(thread: int) -> None:
            number = 0
            while True:
                number += 1
                value = b"%d" % number
                try:
                    io.write(f"o{thread}", [WriteFull(value * 500), OmapSet({b"n": value, b"k" + value: value})])
                except OSError:
                    return  # the disk is gone
                os.write(writer, struct.pack("<II", thread, number))

        for thread in range(THREADS):
            threading.Thread(target=work, args=(thread,)).start()
        signal.pause()
    os.close(writer)
    seen = dict.fromkeys(range(THREADS), 0)
    until = time.monotonic() + rng.uniform(0.01, 0.12)
    while time.monotonic() < until:
        thread, number = struct.unpack("<II", os.read(reader, 8))
        seen[thread] = number
    while select.select([reader], [], [], 0)[0]:
        thread, number = struct.unpack("<II", os.read(reader, 8))
        seen[thread] = number
    # A real cut is one moment; this one takes a while, in which ext4 may still answer a sync that comes to nothing. So
    # what is acknowledged from now on may be there or not.
    later = dict(seen)
    disk.cut()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while data := os.read(reader, 8):
        thread, number = struct.unpack("<II", data)
        later[thread] = number
    os.close(reader)
    disk.recover()
    with EmbeddedStore(path) as store:
        io = store.open("rbd")
        for thread, acknowledged in seen.items():
            if acknowledged == 0:
                continue
            data, (keys, _) = io.read(f"o{thread}", [Read(), OmapGetVals()])
            number = int(keys[b"n"])
            assert acknowledged <= number <= later[thread] + 1, f"{acknowledged} acknowledged, {number} found"
            assert data == b"%d" % number * 500, "an operation list was torn"
            assert len(keys) == min(number + 1, 1024)
    assert check.check(path) == []
    subprocess.run(["rm", "-rf", path], check=True)
    return sum(seen.values())


def main() -> None:
    image, mount_point, cuts, seed = sys.argv[1:]
    disk = Disk(image, mount_point)
    disk.mount()
    try:
        every = cut_every_step(disk)
        rng = random.Random(int(seed))
        writes = sum(cut_at_random(disk, rng) for _ in range(int(cuts)))
    finally:
        disk.umount()
    print(f"{every} steps and {cuts} random moments cut, {writes} acknowledged writes found")


if __name__ == "__main__":
    main()

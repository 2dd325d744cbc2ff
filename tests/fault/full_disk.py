"""A full disk under the whole stack: python -m tests.fault.full_disk IMAGE MOUNTPOINT CASE

Runs in a mount namespace of its own. IMAGE holds a small ext4; the store lies on it, the daemon's sockets and state
file lie elsewhere. CASE is the name of one of the functions of CASES.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nbd_client import ENOSPC, FLUSH, WRITE, Client
from stack import Stack, check_store, pool, rbdpy, stack

from librbd_py import rados, rbd

MIB = 1 << 20
CHUNK = 256 << 10
SIZE = 256 * MIB  # of images: several times the disk


def stamp(number: int, generation: int = 0) -> bytes:
    """The content of chunk `number`."""
    return b"%15d %15d " % (number, generation) * (CHUNK // 32)


def write(client: Client, number: int, generation: int = 0) -> int:
    """-> the NBD error"""
    return client.call(WRITE, number * CHUNK, CHUNK, data=stamp(number, generation)).error


def fill(client: Client, generation: int = 0) -> int:
    """Writes chunks until the disk is full -> the number of the one that failed."""
    for number in range(SIZE // CHUNK):
        error = write(client, number, generation)
        if error:
            assert error == ENOSPC, error
            return number
    raise AssertionError("the disk is not full")


def verify(client: Client, count: int, generation: int = 0) -> None:
    for number in range(count):
        assert client.read(number * CHUNK, CHUNK) == stamp(number, generation), number


def squeeze(ballast: Path) -> None:
    """Takes every block that is left."""
    with ballast.open("ab", buffering=0) as file:
        for size in (MIB, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
                    os.fsync(file.fileno())


def refused(store: Path, *command: str) -> None:
    """ENOSPC, said without a traceback."""
    done = rbdpy(store, *command)
    assert done.returncode == errno.ENOSPC, (command, done)
    assert "Traceback" not in done.stderr, done.stderr
    assert os.strerror(errno.ENOSPC) in done.stderr or "disk is full" in done.stderr, done.stderr


def succeeds(store: Path, *command: str) -> str:
    done = rbdpy(store, *command)
    assert done.returncode == 0, (command, done)
    return done.stdout


def guests_writes(s: Stack, store: Path, ballast: Path) -> None:
    """Refused with ENOSPC and nothing else; what was there stays; space that is freed serves again."""
    with pool(store) as ioctx:
        for name in ("disk", "third", "other"):
            rbd.RBD().create(ioctx, name, SIZE)
        with rbd.Image(ioctx, "other") as image:
            image.write(random.Random(1).randbytes(8 * MIB), 0)
    ballast.write_bytes(bytes(4 * MIB))
    s.serve("disk", "third")
    client, third = s.client("disk"), s.client("third")
    third.write(0, stamp(0))
    count = fill(client)
    assert count > 20 * MIB // CHUNK
    squeeze(ballast)
    assert write(client, count + 1) == ENOSPC
    assert client.call(FLUSH).error == 0
    assert write(client, 0, 1) == write(client, 0) == 0, "room that the image has already"
    verify(client, count)
    assert third.read(0, CHUNK) == stamp(0)
    ballast.unlink()
    assert write(client, count) == 0
    assert client.call(FLUSH).error == 0
    fill(third)
    succeeds(store, "rm", "other")
    assert write(client, count + 1) == 0
    verify(client, count + 2)
    s.kill()
    s.start()
    verify(s.client("disk"), count + 2)


def metadata(s: Stack, store: Path, ballast: Path) -> None:
    """Every operation is done or refused with ENOSPC; the image that is served does not mind."""
    with pool(store) as ioctx:
        rbd.RBD().create(ioctx, "disk", SIZE)
        rbd.RBD().create(ioctx, "small", 8 * MIB)
        with rbd.Image(ioctx, "small") as image:
            image.write(stamp(0) * 16, 0)
            image.create_snap("s")
            image.protect_snap("s")
    s.serve("disk")
    client = s.client("disk")
    for number in range(8):
        assert write(client, number) == 0
    squeeze(ballast)
    refused(store, "import", "/bin/bash", "imported")
    refused(store, "cp", "small", "copied")
    with pool(store) as ioctx, rbd.Image(ioctx, "small") as image:
        passed = 0
        try:
            while passed < 300:  # what the database's log has room for
                image.metadata_set(f"key{passed}", "v" * 60_000)
                passed += 1
        except rbd.Error as error:
            assert error.errno == errno.ENOSPC, error
    assert 0 < passed < 300
    refused(store, "image-meta", "set", "small", "key", "v" * 60_000)
    for command in (
        ("snap", "create", "disk@t"),  # asks the daemon, which holds the lock
        ("resize", "disk", "--size", "1G"),
        ("create", "new", "--size", "64M"),
        ("snap", "create", "small@t"),
        ("clone", "small@s", "child"),
        ("resize", "small", "--size", "512M"),
        ("rename", "small", "renamed"),
    ):
        done = rbdpy(store, *command)
        assert done.returncode in (0, errno.ENOSPC), (command, done)
        assert "Traceback" not in done.stderr, done.stderr
    by_the_page(store, ballast)
    verify(client, 8)
    copies = bool(succeeds(store, "snap", "ls", "disk"))  # overwriting under a snapshot needs room
    assert write(client, 0) in ((0, ENOSPC) if copies else (0,))
    ballast.unlink()
    names = set(succeeds(store, "ls").split())
    assert {"disk"} <= names and names & {"small", "renamed"}
    succeeds(store, "create", "afterwards", "--size", "64M")
    succeeds(store, "snap", "create", "disk@afterwards")
    assert write(client, 0, 1) == 0
    verify(client, 1, 1)


def by_the_page(store: Path, ballast: Path) -> None:
    """With room for one page of the database's log at a time: enough to begin something, not to end it.
    Commands on the image that the daemon serves must not wait for what will never be."""
    for size in (10_000, 1000, 10):
        with contextlib.suppress(rbd.Error, rados.Error), pool(store) as ioctx:
            image = next(name for name in ("small", "renamed") if name in rbd.RBD().list(ioctx))
            with rbd.Image(ioctx, image) as opened:
                for number in range(1000):
                    opened.metadata_set(f"key{size}-{number}", "v" * size)
    for number in range(3):
        with ballast.open("r+b") as file:
            file.truncate(ballast.stat().st_size - 4096)
        for command in (("snap", "create", f"disk@page{number}"), ("resize", "disk", "--size", f"{2 + number}G")):
            begun = time.monotonic()
            done = rbdpy(store, *command)
            assert done.returncode in (0, errno.ENOSPC), (command, done)
            assert "Traceback" not in done.stderr, done.stderr
            assert time.monotonic() - begun < 15, command


def removal(s: Stack, store: Path, ballast: Path) -> None:
    """Nothing but the store's own images to make room with."""
    with pool(store) as ioctx:
        for name in ("disk", "other"):
            rbd.RBD().create(ioctx, name, SIZE)
        with rbd.Image(ioctx, "other") as image:
            image.write(random.Random(1).randbytes(8 * MIB), 0)
    s.serve("disk")
    client = s.client("disk")
    count = fill(client)
    squeeze(ballast)
    succeeds(store, "rm", "other")
    assert write(client, count) == 0
    verify(client, count + 1)


def nobody_connected(s: Stack, store: Path, ballast: Path) -> None:
    """Not even the files that SQLite needs to connect can be made; what there is can be removed, and nothing added."""
    with pool(store) as ioctx:
        for name in ("disk", "other", "third"):
            rbd.RBD().create(ioctx, name, SIZE)
        for name in ("other", "third"):
            with rbd.Image(ioctx, name) as image:
                image.write(random.Random(1).randbytes(2 * MIB), 0)
                image.create_snap("s")
    ballast.write_bytes(bytes(36 * MIB))
    s.serve("disk")
    fill(s.client("disk"))
    s.drop_clients()
    assert s.stop() == 0
    squeeze(ballast)
    for size in (60_000, 10):
        with contextlib.suppress(rbd.Error, rados.Error), pool(store) as ioctx, rbd.Image(ioctx, "third") as image:
            for number in range(1000):  # as much as they let us
                image.metadata_set(f"key{size}-{number}", "v" * size)
    refused(store, "create", "new", "--size", "64M")
    refused(store, "snap", "create", "other@t")
    squeeze(ballast)
    succeeds(store, "snap", "purge", "other")
    succeeds(store, "rm", "other")
    succeeds(store, "trash", "mv", "third")
    ballast.unlink()
    succeeds(store, "create", "new", "--size", "64M")
    assert set(succeeds(store, "ls").split()) == {"disk", "new"}
    s.start()


def log_used_up(s: Stack, store: Path, ballast: Path) -> None:
    """Beside a daemon: the room of the log is gone, and one connects and removes all the same."""
    with pool(store) as ioctx:
        for name in ("disk", "small"):
            rbd.RBD().create(ioctx, name, SIZE)
    s.serve("disk")
    client = s.client("disk")
    assert write(client, 0) == 0
    squeeze(ballast)
    for _ in range(3):
        for size in (60_000, 1000, 10):
            with contextlib.suppress(rbd.Error, rados.Error), pool(store) as ioctx, rbd.Image(ioctx, "small") as image:
                for number in range(1000):  # as much as they let us
                    image.metadata_set(f"key{size}-{number}", "v" * size)
        assert "small" in succeeds(store, "ls")
    refused(store, "image-meta", "set", "small", "key", "v" * 60_000)
    succeeds(store, "rm", "small")
    assert write(client, 0, 1) == 0
    verify(client, 1, 1)


def copy_on_write(s: Stack, store: Path, ballast: Path) -> None:
    """Overwriting under a snapshot and writing to a clone need room for copies."""
    with pool(store) as ioctx:
        rbd.RBD().create(ioctx, "disk", 32 * MIB)
        with rbd.Image(ioctx, "disk") as image:
            for number in range(64):
                image.write(stamp(number), number * CHUNK)
            image.create_snap("s")
            image.protect_snap("s")
        rbd.RBD().clone(ioctx, "disk", "s", ioctx, "child")
    s.serve("disk", "child")
    client, child = s.client("disk"), s.client("child")
    squeeze(ballast)
    with ballast.open("r+b") as file:
        file.truncate(ballast.stat().st_size - 10 * MIB)  # two objects and a half
    small = b"x" * 4096
    wanted: dict[int, Client] = {}
    errors = []
    for at in range(0, 12 * MIB, 4 * MIB):
        for target in (client, child):
            errors.append(target.call(WRITE, at, 4096, data=small).error)
            if not errors[-1]:
                wanted[at + (target is child)] = target
    assert set(errors) == {0, ENOSPC}, errors

    def check_content() -> None:
        for at in range(0, 12 * MIB, 4 * MIB):
            for target in (client, child):
                expected = b"".join(map(stamp, range(at // CHUNK, at // CHUNK + 16)))
                if at + (target is child) in wanted:
                    expected = small + expected[4096:]
                assert target.read(at, 4 * MIB) == expected, (at, target is child)
        with pool(store) as ioctx, rbd.Image(ioctx, "disk", "s") as image:
            for number in range(64):
                assert image.read(number * CHUNK, CHUNK) == stamp(number), number

    check_content()
    ballast.unlink()
    for at in range(0, 12 * MIB, 4 * MIB):
        for target in (client, child):
            assert target.call(WRITE, at, 4096, data=small).error == 0
            wanted[at + (target is child)] = target
            assert target.call(FLUSH).error == 0
    check_content()


CASES = {
    case.__name__: case for case in (guests_writes, metadata, removal, nobody_connected, log_used_up, copy_on_write)
}


def main() -> None:
    image, mount_point, case = sys.argv[1:]
    subprocess.run(["mount", "-o", "loop", image, mount_point], check=True)
    store = Path(mount_point) / "store"
    with tempfile.TemporaryDirectory(prefix="rbdpy-full-") as folder, stack(Path(folder), store) as s:
        CASES[case](s, store, Path(mount_point) / "ballast")
        assert s.stop() == 0
    assert check_store(store) == "no findings\n"
    subprocess.run(["umount", mount_point], check=True)
    print(f"{case} passed")


if __name__ == "__main__":
    main()

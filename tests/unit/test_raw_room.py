"""Much data at once on the embedded store: room taken ahead costs nothing that stays, and writes pass the cache."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from librbd_py import rados, rbd
from librbd_py.image import raw
from librbd_py.image.progress import Progress

MIB = 1 << 20
SIZE = 24 * MIB + 8192
BLOCKS = 512  # bytes of a unit of st_blocks


@pytest.fixture
def ioctx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[rados.Ioctx]:
    monkeypatch.setattr(raw, "AT_ONCE", 4 * MIB)
    with (
        rados.Rados(conf={"rbdpy_store": f"embedded:{tmp_path / 'store'}"}) as cluster,
        cluster.open_ioctx("rbd") as ioctx,
    ):
        rbd.RBD().create(ioctx, "image", SIZE, order=20)
        yield ioctx


def content(dense: int) -> bytes:
    """All data up to `dense`, then 64 KiB of each MiB, in a file without holes."""
    dice, made = random.Random(dense), bytearray(SIZE)
    made[:dense] = dice.randbytes(dense)
    for at in range(dense, SIZE, MIB):
        made[at : at + 65536] = dice.randbytes(min(65536, SIZE - at))
    return bytes(made)


def used(path: Path) -> int:
    return path.stat().st_blocks * BLOCKS


def head(folder: Path) -> Path:
    (found,) = (folder / "store" / "data").glob("*/head.0")
    return found


def import_(image: rbd.Image, path: Path, watch: Progress | None = None) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        raw.import_raw(image.handle, fd, SIZE, progress=watch)
    finally:
        os.close(fd)


@pytest.mark.parametrize("dense", [SIZE, 10 * MIB, 9 * MIB + 4096, 0])
def test_room_that_was_not_used_is_given_back(ioctx: rados.Ioctx, tmp_path: Path, dense: int) -> None:
    """The last piece of dense data makes us take room for the next, which is not."""
    data = content(dense)
    (tmp_path / "in").write_bytes(data)
    needed = dense + -(-(SIZE - dense) // MIB) * 65536
    with rbd.Image(ioctx, "image") as image:
        import_(image, tmp_path / "in")
        assert image.read(0, SIZE) == data
        assert used(head(tmp_path)) <= needed + 128 * 1024
        fd = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            raw.export_raw(image.handle, fd)
        finally:
            os.close(fd)
    assert (tmp_path / "out").read_bytes() == data
    assert used(tmp_path / "out") <= needed + 128 * 1024


def test_large_writes_pass_the_page_cache(ioctx: rados.Ioctx, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(content(SIZE))
    with rbd.Image(ioctx, "image") as image:
        path, modes = head(tmp_path), set[int]()

        def look(done: int, total: int) -> int:
            for fd in os.listdir("/proc/self/fd"):
                try:
                    if os.path.samefile(f"/proc/self/fd/{fd}", path):
                        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
                        modes.add(int(lines[1].split()[1], 8) & os.O_DIRECT)
                except FileNotFoundError:
                    continue
            return 0

        import_(image, tmp_path / "in", look)
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_DIRECT))
            can = {0, os.O_DIRECT}
        except OSError:
            can = {0}  # this file system has no such thing, and is written all the same
        assert modes == can
        assert image.read(0, SIZE) == content(SIZE)
        image.write(b"later", 4096)
        assert image.read(4090, 16) == content(SIZE)[4090:4096] + b"later" + content(SIZE)[4101:4106]
    with rbd.Image(ioctx, "image") as image:
        assert image.read(4096, 5) == b"later"


def test_what_others_write_meanwhile_is_not_given_back(ioctx: rados.Ioctx, tmp_path: Path) -> None:
    """Only holes go: bytes in the page cache that no block holds yet are no hole."""
    with rbd.Image(ioctx, "image") as image:
        native = image.handle.objects.native
        assert native is not None and native.reserve is not None
        native.reserve(0, 8)
        image.write(b"x" * 5000, 3 * MIB + 100)
        native.give_back(0, 8)
        assert image.read(3 * MIB, 6000) == bytes(100) + b"x" * 5000 + bytes(900)
        assert used(head(tmp_path)) <= 64 * 1024
        with pytest.raises(OSError) as caught:
            native.reserve(0, 1 << 40)
        assert caught.value.errno == errno.EFBIG


def test_room_that_is_refused_is_not_asked_for_again() -> None:
    asked: list[tuple[int, int]] = []

    def take(offset: int, length: int) -> None:
        asked.append((offset, length))
        raise OSError(errno.ENOSPC, "full")

    def give_back(offset: int, length: int) -> None:
        raise AssertionError("nothing was taken")

    room = raw._Room(take, give_back)
    for at in range(4):
        with room.for_(at, 1) as unused:
            unused.append(at == 2)
    assert asked == [(1, 1)]


def test_a_full_disk_ends_an_import_with_its_name(ioctx: rados.Ioctx, tmp_path: Path) -> None:
    """A limit on file sizes stands for it: neither room nor writes behind it."""
    import resource

    (tmp_path / "in").write_bytes(content(SIZE))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * MIB, before[1]))
    try:
        with rbd.Image(ioctx, "image") as image, pytest.raises(OSError) as caught:
            import_(image, tmp_path / "in")
        assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

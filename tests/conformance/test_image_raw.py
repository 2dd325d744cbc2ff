"""Format 1 in and out of files and pipes: the same bytes, holes kept, on every store."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from image_fixtures import MIB, R, cluster, io

from librbd_py import rbd
from librbd_py.image import raw
from librbd_py.store.api import ObjectContext

__all__ = ["cluster", "io"]

SIZE = 21 * MIB + 4096 + 512
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small objects": {"order": 16},
    "striped": {"order": 20, "stripe_unit": 65536, "stripe_count": 3, "features": 3},
}


def content(seed: int) -> bytes:
    """Data, zeros that are written, and holes, at odd places."""
    dice, made = random.Random(seed), bytearray(SIZE)
    for _ in range(12):
        at, count = dice.randrange(SIZE), dice.choice((1, 512, 5000, 300_000, 2 * MIB))
        made[at : at + count] = dice.randbytes(min(count, SIZE - at))
    made[-1] = 1
    return bytes(made)


def imported(image: rbd.Image, path: Path, sparse: int = 4096) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        raw.import_raw(image.handle, fd, os.fstat(fd).st_size, sparse)
    finally:
        os.close(fd)


def exported(image: rbd.Image, path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        raw.export_raw(image.handle, fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(io: ObjectContext, tmp_path: Path, layout: str) -> None:
    data = content(list(LAYOUTS).index(layout))
    (tmp_path / "in").write_bytes(data)
    R.create(io, "img", SIZE, **LAYOUTS[layout])
    with rbd.Image(io, "img") as image:
        imported(image, tmp_path / "in")
        assert image.read(0, SIZE) == data
        image.create_snap("s")
        image.discard(0, 8 * MIB)
        image.write(b"later", 100)
        now = image.read(0, SIZE)
        exported(image, tmp_path / "out")
        image.set_snap("s")
        exported(image, tmp_path / "before")
    assert (tmp_path / "out").read_bytes() == now
    assert (tmp_path / "before").read_bytes() == data


def test_a_clone_is_exported_with_what_its_parent_shows(io: ObjectContext, tmp_path: Path) -> None:
    data = content(5)
    (tmp_path / "in").write_bytes(data)
    R.create(io, "parent", SIZE)
    with rbd.Image(io, "parent") as image:
        imported(image, tmp_path / "in")
        image.create_snap("s")
        image.protect_snap("s")
    R.clone(io, "parent", "s", io, "child", features=rbd.RBD_FEATURE_LAYERING)
    with rbd.Image(io, "child") as image:
        image.write(b"child" * 1000, 9 * MIB)
        exported(image, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == image.read(0, SIZE)


def test_holes_stay_holes(io: ObjectContext, tmp_path: Path) -> None:
    with (tmp_path / "in").open("wb") as file:
        file.truncate(4 << 30)
        os.pwrite(file.fileno(), b"x", 3 << 30)
        os.pwrite(file.fileno(), bytes(MIB), 5 * MIB)
    R.create(io, "img", 4 << 30)
    with rbd.Image(io, "img") as image:
        imported(image, tmp_path / "in")
        rows: list[tuple[int, int, bool]] = []
        image.diff_iterate(0, 4 << 30, None, lambda *row: rows.append(row))
        assert len(rows) == 1 and rows[0][1] <= 4096
        exported(image, tmp_path / "out")
    found = os.stat(tmp_path / "out")
    assert found.st_size == 4 << 30 and found.st_blocks * 512 <= MIB
    with (tmp_path / "out").open("rb") as file:
        assert os.pread(file.fileno(), 4096, 3 << 30) == b"x" + bytes(4095)


def test_zeros_are_written_when_that_is_wanted(io: ObjectContext, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(5 * MIB))
    R.create(io, "img", 5 * MIB)
    with rbd.Image(io, "img") as image:
        imported(image, tmp_path / "in", sparse=0)
        rows: list[tuple[int, int, bool]] = []
        image.diff_iterate(0, 5 * MIB, None, lambda *row: rows.append(row))
        assert sum(size for _, size, _ in rows) == 5 * MIB


def test_a_file_that_became_shorter_ends_the_import(io: ObjectContext, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x" * 3 * MIB)
    R.create(io, "img", SIZE)
    with rbd.Image(io, "img") as image, (tmp_path / "in").open("rb") as file:
        raw.import_raw(image.handle, file.fileno(), SIZE)
        assert image.read(0, SIZE) == (b"x" * 3 * MIB).ljust(SIZE, b"\0")


def test_from_a_pipe_that_stalls(io: ObjectContext) -> None:
    data = content(11)
    R.create(io, "img", 0)
    out, into = os.pipe()

    def feed() -> None:
        with open(into, "wb", buffering=0) as pipe:
            rest = memoryview(data)[: 3 * MIB + 77]
            while rest:
                rest = rest[pipe.write(rest) :]
            while not stalled.is_set():
                stalled.wait(0.01)
            rest = memoryview(data)[3 * MIB + 77 :]
            while rest:
                rest = rest[pipe.write(rest) :]

    stalled = threading.Event()
    feeder = threading.Thread(target=feed)
    feeder.start()
    with rbd.Image(io, "img") as image, open(out, "rb", buffering=0) as source:
        timer = threading.Timer(0.5, stalled.set)  # longer than a pump waits
        timer.start()
        raw.import_pipe(image.handle, source)
        feeder.join()
        assert image.size() == SIZE and image.read(0, SIZE) == data
        parts: list[bytes] = []
        raw.export_pipe(image.handle, parts.append)
        assert b"".join(parts) == data


def test_a_progress_callback_ends_an_export(io: ObjectContext, tmp_path: Path) -> None:
    R.create(io, "img", 200 * MIB)
    with rbd.Image(io, "img") as image, (tmp_path / "out").open("wb") as file:
        image.write(b"x", 0)
        image.write(b"x", 150 * MIB)
        seen: list[int] = []

        def progress(done: int, total: int) -> int:
            seen.append(done)
            assert total == 200 * MIB
            return -125

        with pytest.raises(OSError) as caught:
            raw.export_raw(image.handle, file.fileno(), progress)
        assert caught.value.errno == 125 and len(seen) == 1


def test_an_error_of_the_file_is_told(io: ObjectContext, tmp_path: Path) -> None:
    R.create(io, "img", MIB)
    with rbd.Image(io, "img") as image:
        image.write(b"x", 0)
        (tmp_path / "out").write_bytes(b"")
        with (tmp_path / "out").open("rb") as file, pytest.raises(OSError) as caught:
            raw.export_raw(image.handle, file.fileno())
        assert caught.value.errno == errno.EBADF

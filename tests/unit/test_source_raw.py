"""Raw sources from files: sizes, snapshots, sparse knowledge, specs that are wrong."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from librbd_py.source import DATA, MAX_READ, ZERO, Extent, Source, load_spec, open_source
from librbd_py.source.raw import RawSource

BLOCK = 64 << 10


def file_spec(path: Path) -> dict[str, Any]:
    return {"type": "raw", "stream": {"type": "file", "file_path": str(path)}}


def sparse_file(path: Path, blocks: str) -> Path:
    """A letter is a block of it, a dot a hole."""
    with open(path, "wb") as file:
        for number, letter in enumerate(blocks):
            if letter != ".":
                file.seek(number * BLOCK)
                file.write(letter.encode() * BLOCK)
        file.truncate(len(blocks) * BLOCK)
    return path


def rows(source: Source, **points: int | None) -> list[tuple[int, int, str]]:
    size = source.size if points.get("snapshot") is None else source.snapshots[points["snapshot"] or 0].size
    found = source.extents(0, size, **points)
    return [(row.offset // BLOCK, row.length // BLOCK, row.kind.value) for row in found]


def test_a_file_is_an_image_and_its_holes_are_known(tmp_path: Path) -> None:
    source = open_source(file_spec(sparse_file(tmp_path / "a", "aa..b.")))
    assert source.size == 6 * BLOCK and list(source.snapshots) == []
    assert rows(source) == [(0, 2, "data"), (4, 1, "data")]
    assert source.read(BLOCK - 1, 2) == b"aa" and source.read(4 * BLOCK - 1, 2) == b"\0b"
    assert list(source.extents(BLOCK // 2, 1)) == [Extent(BLOCK // 2, 1, DATA)]
    assert list(source.extents(2 * BLOCK, BLOCK)) == [] and list(source.extents(6 * BLOCK, 0)) == []
    source.close()
    source.close()
    with pytest.raises(OSError) as caught:
        source.read(0, 1)
    assert caught.value.errno == errno.EBADF


def test_snapshots_are_files_of_their_own(tmp_path: Path) -> None:
    spec = file_spec(sparse_file(tmp_path / "head", ".bc..."))
    spec["snapshots"] = [
        {**file_spec(sparse_file(tmp_path / "one", "aaaa")), "name": "one"},
        {**file_spec(sparse_file(tmp_path / "two", "a....b..c")), "name": "two"},
        file_spec(sparse_file(tmp_path / "three", "")),
    ]
    source = open_source(spec)
    assert [(snap.name, snap.size // BLOCK) for snap in source.snapshots][:2] == [("one", 4), ("two", 9)]
    assert len(source.snapshots[2].name) == 36 and source.snapshots[2].size == 0
    assert source.read(5 * BLOCK, 1, 1) == b"b" and source.read(BLOCK, 1) == b"b"
    assert rows(source, snapshot=1, since=0) == [(0, 1, "data"), (1, 3, "zero"), (5, 1, "data"), (8, 1, "data")]
    assert rows(source, since=1) == [(0, 1, "zero"), (1, 2, "data"), (5, 1, "zero")]
    for bad in ({"snapshot": 3}, {"since": 3}, {"snapshot": 1, "since": 1}, {"since": -1}):
        with pytest.raises(OSError) as caught:
            list(source.extents(0, 0, **bad))
        assert caught.value.errno == errno.EINVAL
    source.close()


@pytest.mark.parametrize("offset, length", [(-1, 1), (0, BLOCK + 1), (BLOCK, 1), (0, -1)])
def test_ranges_outside_are_refused(tmp_path: Path, offset: int, length: int) -> None:
    source = open_source(file_spec(sparse_file(tmp_path / "a", "a")))
    for call in (source.read, source.extents):
        with pytest.raises(OSError) as caught:
            call(offset, length)
        assert caught.value.errno == errno.EINVAL
    source.close()


def test_a_read_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.touch()
    os.truncate(path, 1 << 40)
    source = open_source(file_spec(path))
    assert source.read((1 << 40) - MAX_READ, MAX_READ) == bytes(MAX_READ)
    assert list(source.extents(0, 1 << 40)) == []
    with pytest.raises(OSError) as caught:
        source.read(0, MAX_READ + 1)
    assert caught.value.errno == errno.EINVAL
    source.close()


def test_a_file_that_is_cut_short_is_an_error_not_zeros(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "a", "aaaa")
    source = open_source(file_spec(path))
    os.truncate(path, BLOCK)
    with pytest.raises(OSError) as caught:
        source.read(0, 2 * BLOCK)
    assert caught.value.errno == errno.EIO
    source.close()


STREAM = {"type": "file", "file_path": "/dev/null/no"}


@pytest.mark.parametrize(
    "spec, code",
    [
        ({}, errno.EINVAL),
        ({"type": 1}, errno.EINVAL),
        ({"type": "vmdk", "stream": STREAM}, errno.ENOSYS),
        ({"type": "native", "pool_name": "rbd"}, errno.ENOSYS),
        ({"type": "raw"}, errno.EINVAL),
        ({"type": "raw", "stream": []}, errno.EINVAL),
        ({"type": "raw", "stream": {}}, errno.EINVAL),
        ({"type": "raw", "stream": {"type": "gopher"}}, errno.ENOSYS),
        ({"type": "raw", "stream": {"type": "file"}}, errno.EINVAL),
        ({"type": "raw", "stream": {"type": "file", "file_path": ""}}, errno.EINVAL),
        ({"type": "raw", "stream": {"type": "file", "file_path": "a\0b"}}, errno.EINVAL),
        ({"type": "raw", "stream": STREAM}, errno.ENOTDIR),
        ({"type": "raw", "stream": {"type": "file", "file_path": "/"}}, errno.EISDIR),
        ({"type": "raw", "stream": {"type": "file", "file_path": "/dev/null"}}, errno.EINVAL),
        ({"type": "raw", "stream": STREAM, "snapshots": {}}, errno.EINVAL),
        ({"type": "raw", "stream": STREAM, "snapshots": [1]}, errno.EINVAL),
        ({"type": "raw", "stream": STREAM, "snapshots": [{"stream": STREAM}]}, errno.EINVAL),
        ({"type": "raw", "stream": STREAM, "snapshots": [{"type": "qcow", "stream": STREAM}]}, errno.ENOSYS),
        ({"type": "raw", "stream": STREAM, "snapshots": [{"type": "raw", "name": 3}]}, errno.EINVAL),
        ({"type": "raw", "stream": STREAM, "snapshots": [{"type": "raw", "name": "a@b"}]}, errno.EINVAL),
        ({"type": "raw", "stream": STREAM, "snapshots": [{"type": "raw", "name": "a"}] * 2}, errno.EINVAL),
        ({"type": "raw", "stream": STREAM, "snapshots": [{"type": "raw"}] * 600}, errno.E2BIG),
    ],
)
def test_a_spec_that_is_wrong_says_how(spec: dict[str, Any], code: int) -> None:
    with pytest.raises(OSError) as caught:
        open_source(spec)
    assert caught.value.errno == code and caught.value.strerror


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"a":' * 100_000, " " * (2 << 20)])
def test_a_spec_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(OSError) as caught:
        load_spec(text)
    assert caught.value.errno == errno.EBADMSG


def test_what_was_opened_is_closed_when_a_later_snapshot_fails(tmp_path: Path) -> None:
    spec = file_spec(sparse_file(tmp_path / "a", "a"))
    spec["snapshots"] = [{"type": "raw", "name": "gone", "stream": STREAM}]
    before = os.listdir("/proc/self/fd")
    with pytest.raises(NotADirectoryError):
        open_source(spec)
    assert os.listdir("/proc/self/fd") == before


class Letters:
    """A stream of one byte per block, '.' a hole."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.size = len(text)

    def read(self, offset: int, length: int) -> bytes:
        return self.text[offset : offset + length].replace(".", "\0").encode()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        at = offset
        while at < offset + length:
            if self.text[at] != ".":
                stop = at + 1
                while stop < offset + length and self.text[stop] == self.text[at]:
                    stop += 1
                yield Extent(at, stop - at, DATA)
                at = stop
            else:
                at += 1

    def close(self) -> None:
        pass


@settings(deadline=None)
@given(st.text("ab.", max_size=20), st.text("ab.", max_size=20), st.integers(0, 20), st.integers(0, 20))
def test_copying_what_changed_makes_them_equal(old: str, new: str, offset: int, length: int) -> None:
    source = RawSource(Letters(new), [("s", Letters(old))])
    offset = min(offset, source.size)
    length = min(length, source.size - offset)
    target = bytearray(Letters(old).read(0, len(old)).ljust(len(new), b"\0")[: len(new)])
    end = offset
    for row in source.extents(offset, length, None, 0):
        assert end <= row.offset and row.length > 0 and row.end <= offset + length
        end = row.end
        target[row.offset : end] = bytes(row.length) if row.kind is ZERO else source.read(row.offset, row.length)
    expected = bytearray(Letters(old).read(0, len(old)).ljust(len(new), b"\0")[: len(new)])
    expected[offset : offset + length] = source.read(offset, length)
    assert target == expected

"""Diff streams and exports of format 2: what is written is read again as it was; what is no stream is told so at once,
whatever it claims."""

from __future__ import annotations

import errno
import io
import random
import resource
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from librbd_py import store
from librbd_py.cli.main import main
from librbd_py.format import streams
from librbd_py.format.merge_diff import merge
from librbd_py.format.streams import BadStream, Extent, Named, Protection, Reader, Resized
from librbd_py.image import snapshots
from librbd_py.image import streams as image_streams
from librbd_py.image.directory import create
from librbd_py.image.handle import ImageHandle
from librbd_py.image.io import read, write
from librbd_py.image.resize import resize

MIB = 1 << 20
HUGE = 1 << 62


def quiet(text: str) -> None:
    del text


class Pipe(io.RawIOBase):
    """Gives no more than a few bytes at once, and can be endless."""

    def __init__(self, data: bytes, endless: bytes = b"") -> None:
        self._data, self._endless = io.BytesIO(data), endless

    def read(self, count: int = -1) -> bytes:
        return self._data.read(min(count, 7)) or (self._endless * count)[:count]


def records(data: bytes, version: int = 1) -> list[object]:
    source = Reader(io.BytesIO(data))
    found: list[object] = []
    for record in streams.read_diff(source, version, quiet):
        found.append(record)
        if isinstance(record, Extent) and record.is_data:
            found.append(b"".join(source.pieces(record.length, "data")))
    return found


@pytest.mark.parametrize("version", [1, 2])
def test_a_diff_is_read_as_it_was_written(version: int) -> None:
    data = streams.diff_head(version, "from", "tö", 12 * MIB, protected=True)
    data += streams.extent(0, 5, True, version) + b"hello" + streams.extent(MIB, 2 * MIB, False, version) + streams.END
    protection = [Protection(True)] if version == 2 else []
    expected = [Named("from", True), Named("tö", False), *protection, Resized(12 * MIB)]
    assert records(data, version) == [*expected, Extent(0, 5, True), b"hello", Extent(MIB, 2 * MIB, False)]


def test_the_layout_of_a_diff_is_that_of_ceph() -> None:
    assert streams.diff_head(1, None, "s", 1) == b"rbd diff v1\nt\x01\0\0\0ss\x01\0\0\0\0\0\0\0"
    head = b"rbd diff v2\nt\x05\0\0\0\0\0\0\0\x01\0\0\0sp\x08\0\0\0\0\0\0\0\0s\x08\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0"
    assert streams.diff_head(2, None, "s", 1) == head
    assert streams.extent(1, 2, True, 1) == b"w" + struct.pack("<QQ", 1, 2)
    assert streams.extent(1, 2, True, 2) == b"w" + struct.pack("<QQQ", 18, 1, 2)
    assert streams.extent(1, 2, False, 2) == b"z" + struct.pack("<QQQ", 16, 1, 2)


@contextmanager
def modest() -> Iterator[None]:
    """Less than a second of processor time, and no memory to speak of."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 << 10  # KiB


HEAD = streams.DIFF_V1
HOSTILE: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", errno.EDOM),
    "half a banner": (b"rbd di", errno.EDOM),
    "another banner": (b"rbd diff v9\n" + b"e", errno.EINVAL),
    "no end": (HEAD, errno.EDOM),
    "a name of 4 GiB": (HEAD + b"t\xff\xff\xff\xff", errno.EINVAL),
    "a name cut short": (HEAD + b"f\x10\0\0\0abc", errno.EDOM),
    "a size cut short": (HEAD + b"s\0\0", errno.EDOM),
    "data of 4 EiB": (HEAD + b"s" + struct.pack("<Q", HUGE) + b"w" + struct.pack("<QQ", 0, HUGE) + b"x", errno.EINVAL),
    "an extent past 2^63": (HEAD + b"z" + struct.pack("<QQ", HUGE, HUGE), errno.EINVAL),
    "an extent that wraps": (HEAD + b"w" + struct.pack("<QQ", (1 << 64) - 1, 2), errno.EINVAL),
    "a negative length": (HEAD + b"w" + struct.pack("<QQ", 0, (1 << 64) - 4096), errno.EINVAL),
    "an extent past the image": (HEAD + b"z" + struct.pack("<QQ", 0, 64 * MIB), errno.EINVAL),
    "a size beyond what an image has": (HEAD + b"s" + b"\xff" * 8 + b"e", errno.EINVAL),
    "unknown tags": (HEAD + b"?" * (1 << 20), errno.EDOM),
    "a start it lacks": (HEAD + b"f\x01\0\0\0xe", errno.EINVAL),
}


@pytest.fixture
def image(tmp_path: Path) -> Iterator[ImageHandle]:
    with store.connect(f"embedded:{tmp_path / 'store'}") as connection:
        ctx = connection.open("rbd")
        create(ctx, "image", 16 * MIB)
        with ImageHandle.open(ctx, "image") as handle:
            yield handle


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_diff_is_an_error_at_once(what: str, image: ImageHandle) -> None:
    data, code = HOSTILE[what]
    with modest(), pytest.raises(OSError) as failure:
        image_streams.import_diff(image, Reader(io.BytesIO(data)))
    assert failure.value.errno in (code, errno.EFBIG if "beyond" in what else code), failure.value


def test_an_exabyte_of_zeros_is_written_where_there_is_something(image: ImageHandle) -> None:
    write(image, 5 * MIB, b"data")
    data = HEAD + b"s" + struct.pack("<Q", 1 << 40) + b"z" + struct.pack("<QQ", 0, 1 << 40) + b"e"
    started = time.process_time()
    image_streams.import_diff(image, Reader(io.BytesIO(data)))
    assert time.process_time() - started < 5
    assert (image.header.size, read(image, 5 * MIB, 4)) == (1 << 40, bytes(4))


@pytest.mark.parametrize(
    "data",
    [
        streams.IMAGE_V2 + b"M" + struct.pack("<Q", HUGE) + b"\xff\xff\xff\xff",
        streams.IMAGE_V2 + b"O" + struct.pack("<QQ", 9, 22),
        streams.IMAGE_V2 + b"O" + struct.pack("<QI", 8, 22),
        streams.IMAGE_V2 + b"?" + struct.pack("<Q", HUGE) + b"x" * 1000,
        streams.DIFF_V1,
    ],
)
def test_a_hostile_head_of_an_export_is_an_error_at_once(data: bytes) -> None:
    with modest(), pytest.raises(BadStream):
        streams.read_image_head(Reader(io.BytesIO(data)), quiet)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([1, 2]))
def test_garbage_never_raises_anything_else(data: bytes, version: int) -> None:
    for head in (b"", HEAD if version == 1 else streams.DIFF_V2):
        try:
            records(head + data, version)
        except BadStream:
            pass


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.integers(0, 7), st.randoms(use_true_random=False))
def test_every_cut_and_flip_of_a_good_stream_is_read_or_refused(cut: int, bit: int, rng: random.Random) -> None:
    good = streams.diff_head(1, "a", "b", MIB) + streams.extent(0, 3, True, 1) + b"abc" + streams.END
    broken = bytearray(good[:cut] or good)
    broken[rng.randrange(len(broken))] ^= 1 << bit
    try:
        records(bytes(broken))
    except BadStream:
        pass


def diff(start: str, end: str, size: int, extents: list[tuple[int, bytes | int]]) -> bytes:
    """Of (offset, data) and (offset, how many zeros)."""
    out = streams.diff_head(1, start or None, end or None, size)
    for offset, what in extents:
        data = isinstance(what, bytes)
        out += streams.extent(offset, len(what) if isinstance(what, bytes) else what, data, 1)
        out += what if isinstance(what, bytes) else b""
    return out + streams.END


def applied(base: bytes, data: bytes) -> bytes:
    content = bytearray(base)
    rows = iter(records(data))
    for row in rows:
        if isinstance(row, Resized):
            content = content[: row.size].ljust(row.size, b"\0")
        elif isinstance(row, Extent):
            content[row.offset : row.offset + row.length] = next(rows) if row.is_data else bytes(row.length)  # type: ignore[call-overload]
    return bytes(content)


def merged(first: bytes, second: bytes, wrap: Callable[[bytes], Pipe] = Pipe) -> bytes:
    out: list[bytes] = []
    merge(Reader(wrap(first)), Reader(wrap(second)), out.append, lambda done, total: None)
    return b"".join(out)


@st.composite
def diffs(draw: st.DrawFn, start: str, end: str, size: int) -> bytes:
    at, extents = 0, []
    while at < size:
        at += draw(st.integers(0, 40))
        length = min(draw(st.integers(1, 30)), size - at)
        if length <= 0:
            break
        extents.append((at, draw(st.binary(min_size=length, max_size=length)) if draw(st.booleans()) else length))
        at += length
    return diff(start, end, size, extents)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 200), st.integers(1, 200))
def test_a_merged_diff_does_what_both_do(data: st.DataObject, first_size: int, second_size: int) -> None:
    first = data.draw(diffs("a", "b", first_size))
    second = data.draw(diffs("b", "c", second_size))
    base = bytes(range(1, 151))
    both = merged(first, second)
    assert applied(base, both) == applied(applied(base, first), second)
    assert records(both)[:3] == [Named("a", True), Named("c", False), Resized(second_size)]


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (diff("a", "b", 10, []), diff("x", "c", 10, []), errno.EINVAL),
        (diff("a", "b", 10, [(5, b"x"), (2, b"y")]), diff("b", "c", 10, []), errno.ENOTSUP),
        (diff("a", "b", 10, [(5, 0)]), diff("b", "c", 10, []), errno.ENOTSUP),
        (diff("a", "b", 10, [])[:-1], diff("b", "c", 10, []), errno.EDOM),
        (b"rbd diff v2\n", diff("b", "c", 10, []), errno.EINVAL),
    ],
)
def test_what_cannot_be_merged_is_refused(first: bytes, second: bytes, code: int) -> None:
    with pytest.raises(BadStream) as failure:
        merged(first, second)
    assert failure.value.errno == code


# --- commands


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    return lambda *words: main(["--store", f"embedded:{tmp_path / 'store'}", *words, "--no-progress"])


def _life(run: Callable[..., int], folder: Path) -> None:
    """An image with two snapshots, the second of another size and protected, and files of what it was."""
    rng = random.Random(3)
    for number, size in enumerate((9 * MIB, 5 * MIB, 12 * MIB + 512)):
        content = bytearray(size)
        for _ in range(6):
            at = rng.randrange(size - 70000)
            content[at : at + 70000] = rng.randbytes(70000)
        (folder / f"v{number}").write_bytes(content)
    assert run("import", "v0", "image") == 0
    with _opened(folder, "image") as image:
        for number in (1, 2):
            snapshots.create(image, f"s{number}")
            content = (folder / f"v{number}").read_bytes()
            resize(image, len(content))
            write(image, 0, content)
        snapshots.protect(image, "s2")


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[ImageHandle]:
    with store.connect(f"embedded:{folder / 'store'}") as opened, ImageHandle.open(opened.open("rbd"), name) as image:
        yield image


def _same(run: Callable[..., int], folder: Path, name: str) -> None:
    for number, what in enumerate(("@s1", "@s2", "")):
        (folder / "out").unlink(missing_ok=True)
        assert run("export", name + what, "out") == 0
        assert (folder / "out").read_bytes() == (folder / f"v{number}").read_bytes(), name + what


def test_format_2_carries_the_whole_image(run: Callable[..., int], tmp_path: Path) -> None:
    _life(run, tmp_path)
    assert run("export", "image", "stream", "--export-format", "2") == 0
    assert run("import", "stream", "copy", "--export-format", "2") == 0
    _same(run, tmp_path, "copy")
    with _opened(tmp_path, "copy") as copy:
        assert [(s.name, bool(s.protection)) for s in copy.header.snaps.values()] == [("s1", False), ("s2", True)]
    (tmp_path / "stream").write_bytes((tmp_path / "stream").read_bytes()[:-20])
    assert run("import", "stream", "half", "--export-format", "2") == errno.EDOM
    assert run("rm", "half") == errno.ENOENT  # half an image must not look like a whole one


def test_diffs_lead_from_snapshot_to_snapshot_and_can_be_applied_again(run: Callable[..., int], tmp_path: Path) -> None:
    _life(run, tmp_path)
    assert run("export-diff", "image@s1", "d1") == 0
    assert run("export-diff", "image@s2", "d2", "--from-snap", "s1") == 0
    assert run("export-diff", "image", "d3", "--from-snap", "s2") == 0
    assert run("create", "copy", "--size", "1") == 0
    assert run("import-diff", "d2", "copy") == errno.EINVAL  # it begins at s1
    for name in ("d1", "d2", "d3"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / "cut").write_bytes(whole[: len(whole) * 2 // 3])
        assert run("import-diff", "cut", "copy") == errno.EBADMSG
        assert run("import-diff", name, "copy") == 0
    _same(run, tmp_path, "copy")
    assert run("import-diff", "d1", "copy") == errno.EEXIST
    assert run("merge-diff", "d1", "d2", "m12") == 0
    assert run("merge-diff", "m12", "d3", "m") == 0
    assert run("create", "other", "--size", "20") == 0
    assert run("import-diff", "m", "other") == 0
    (tmp_path / "out").unlink()
    assert run("export", "other", "out") == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "v2").read_bytes()

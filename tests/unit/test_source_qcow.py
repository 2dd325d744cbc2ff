"""QCOW images as sources: what QEMU made is read as QEMU reads it, and no header, table or byte does harm."""

from __future__ import annotations

import errno
import random
import struct
import subprocess
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from librbd_py.source import DATA, ZERO, Extent, Source, open_source
from librbd_py.source.qcow import QcowSource

MIB = 1 << 20


def run(*argv: str | Path) -> None:
    subprocess.run([str(word) for word in argv], check=True, capture_output=True, timeout=60)


def opened(path: Path) -> Source:
    return open_source({"type": "qcow", "stream": {"type": "file", "file_path": str(path)}})


def content(source: Source, snapshot: int | None = None) -> bytes:
    size = source.size if snapshot is None else source.snapshots[snapshot].size
    return b"".join(source.read(at, min(MIB, size - at), snapshot) for at in range(0, size, MIB))


def truth(path: Path, snapshot: str | None = None, kind: str = "qcow2") -> bytes:
    out = path.with_suffix(".raw")
    point = ["-l", f"snapshot.name={snapshot}"] if snapshot else []
    run("qemu-img", "convert", "-f", kind, *point, "-O", "raw", path, out)
    data = out.read_bytes()
    out.unlink()
    return data


def applied(source: Source, before: bytes, snapshot: int | None, since: int | None) -> bytes:
    size = source.size if snapshot is None else source.snapshots[snapshot].size
    target = bytearray(before.ljust(size, b"\0")[:size])
    end = 0
    for row in source.extents(0, size, snapshot, since):
        assert end <= row.offset and row.length > 0 and row.end <= size
        end = row.end
        zero = row.kind is ZERO
        target[row.offset : end] = bytes(row.length) if zero else source.read(row.offset, row.length, snapshot)
    return bytes(target)


OPTIONS = ["compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=2M", "compression_type=zstd,cluster_size=4k"]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", [1, 2])
def test_it_reads_what_qemu_reads(tmp_path: Path, options: str, seed: int) -> None:
    pick = random.Random(f"{options}{seed}")
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-o", options, path, str(pick.choice([3 * MIB, 5 * MIB + 512])))
    cluster = {"cluster_size=512": 512, "cluster_size=2M": 2 * MIB, OPTIONS[-1]: 4096}.get(options, 65536)
    for number in range(4):
        commands = []
        for _ in range(5):
            at, length = pick.randrange(0, 3 * MIB - 70000) & ~511, pick.choice([512, 4096, 65536])
            kinds = [f"write -P {pick.randrange(1, 255)}", "discard"] + ["write -z -u", "write -z"] * (
                "0.10" not in options
            )
            commands += ["-c", f"{pick.choice(kinds)} {at} {length}"]
        whole = pick.randrange(3 * MIB // cluster) * cluster
        commands += ["-c", f"write -c -P {pick.randrange(1, 255)} {whole} {cluster}"]
        # Some of it QEMU refuses (to compress over a cluster of its own): what it reads then is right.
        subprocess.run(["qemu-io", "-f", "qcow2", *commands, str(path)], capture_output=True, timeout=60)
        if number < 3:
            run("qemu-img", "snapshot", "-c", f"s{number}", path)
    source = opened(path)
    assert [snap.name for snap in source.snapshots] == ["s0", "s1", "s2"]
    points: list[int | None] = [0, 1, 2, None]
    before = b""
    for since, point in zip([None, 0, 1, 2], points, strict=True):
        now = content(source, point)
        assert now == truth(path, None if point is None else f"s{point}")
        before = applied(source, before, point, since)
        assert before == now and applied(source, b"", point, None) == now
    source.close()


def test_snapshots_of_other_sizes(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-f", "qcow2", path, str(2 * MIB + 1536))
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 1 0 {2 * MIB + 1536}", path)
    run("qemu-img", "snapshot", "-c", "small", path)
    run("qemu-img", "resize", path, "1G")
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 2 {2 * MIB + 1536} 512", "-c", "write -P 3 700M 64k", path)
    run("qemu-img", "snapshot", "-c", "big", path)
    run("qemu-img", "resize", "--shrink", path, "701M")
    source = opened(path)
    assert [(snap.name, snap.size) for snap in source.snapshots] == [("small", 2 * MIB + 1536), ("big", 1 << 30)]
    assert source.size == 701 * MIB
    start = applied(source, b"", 0, None)
    assert start == b"\1" * (2 * MIB + 1536)
    rows = list(source.extents(0, 1 << 30, 1, 0))
    assert [row.kind for row in rows] == [DATA, DATA] and sum(row.length for row in rows) <= 2 * 65536
    assert source.read(2 * MIB + 1536, 1024, 1) == b"\2" * 512 + bytes(512)
    assert list(source.extents(0, source.size, None, 1)) == []
    source.close()


def test_a_compressed_image(tmp_path: Path) -> None:
    raw = tmp_path / "in.raw"
    pick = random.Random(5)
    raw.write_bytes(b"".join(pick.randbytes(4096) + b"ab" * 30000 + bytes(100_000) for _ in range(20)).ljust(4 * MIB))
    for options in ("compression_type=zlib", "compression_type=zstd", "compat=0.10"):
        path = tmp_path / "c.qcow2"
        run("qemu-img", "convert", "-f", "raw", "-c", "-O", "qcow2", "-o", options, raw, path)
        source = opened(path)
        assert content(source) == raw.read_bytes()
        source.close()


def test_the_first_version(tmp_path: Path) -> None:
    raw = tmp_path / "in.raw"
    raw.write_bytes((bytes(300_000) + b"data" * 50_000 + bytes(2 * MIB) + b"end!").ljust(3 * MIB, b"\0"))
    for how in ([], ["-c"]):
        path = tmp_path / "v1.qcow"
        # With -c this QEMU ends with status 1 and without a word; what it wrote is an image all the same.
        subprocess.run(["qemu-img", "convert", "-f", "raw", *how, "-O", "qcow", raw, path], timeout=60)
        source, expected = opened(path), truth(path, kind="qcow")
        assert len(expected) == 3 * MIB and expected.count(b"data") == 50_000
        assert content(source) == expected and applied(source, b"", None, None) == expected
        assert sum(row.length for row in source.extents(0, 3 * MIB)) < MIB
        source.close()


@pytest.mark.parametrize(
    "how, code, words",
    [
        (["-o", "extended_l2=on"], errno.EOPNOTSUPP, "subclusters"),
        (
            ["-o", "encrypt.format=aes,encrypt.key-secret=s", "--object", "secret,id=s,data=x"],
            errno.EOPNOTSUPP,
            "encrypted",
        ),
        (["-b", "base.raw", "-F", "raw"], errno.EOPNOTSUPP, "backing file"),
        (["-o", "data_file=data.raw"], errno.EOPNOTSUPP, "another file"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, how: list[str], code: int, words: str) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    path = tmp_path / "image.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", *how, str(path), "1M"],
        check=True, capture_output=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    with pytest.raises(OSError) as caught:
        opened(path)
    assert caught.value.errno == code and words in str(caught.value)


class Bytes:
    """A stream in memory."""

    def __init__(self, data: bytes | bytearray, size: int | None = None) -> None:
        self.data = bytes(data)
        self.size = len(data) if size is None else size
        self.closed = False

    def read(self, offset: int, length: int) -> bytes:
        assert min(offset, length) >= 0 and offset + length <= self.size and length <= 32 * MIB
        return self.data[offset : offset + length].ljust(length, b"\0")

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, DATA)

    def close(self) -> None:
        self.closed = True


def image(**change: Any) -> bytearray:
    """Version 3, clusters of 4 KiB, 2 MiB + 512 bytes: L1 at 1, L2 at 2, data at 3; a snapshot table at 4 with its own
    L1 at 5; a compressed cluster at 6."""
    given = {
        "magic": b"QFI\xfb", "version": 3, "backing": 0, "backing_size": 0, "cluster_bits": 12, "size": 2 * MIB + 512,
        "crypt": 0, "l1_size": 2, "l1": 4096, "refcounts": 0, "refcount_clusters": 0, "snapshots": 1, "table": 4 * 4096,
        "incompatible": 0, "compatible": 0, "auto": 0, "order": 4, "length": 112, "compression": 0,
        "l1_entry": 2 * 4096, "l2_entry": 3 * 4096, "snap_l1": 5 * 4096, "snap_l1_size": 1, "snap_size": MIB,
        "id_size": 1, "name_size": 1, "extra": 16,
    } | change  # fmt: skip
    out = bytearray(7 * 4096)
    out[:72] = struct.pack(
        ">4sIQIIQIIQQIIQ",
        *(given[k] for k in ("magic", "version", "backing", "backing_size", "cluster_bits", "size", "crypt")),
        *(given[k] for k in ("l1_size", "l1")),
        *(given[k] for k in ("refcounts", "refcount_clusters", "snapshots", "table")),
    )  # fmt: skip
    out[72:104] = struct.pack(">QQQII", *(given[k] for k in ("incompatible", "compatible", "auto", "order", "length")))
    out[104] = given["compression"]
    out[4096:4104] = struct.pack(">Q", given["l1_entry"])
    packed = zlib.compressobj(9, zlib.DEFLATED, -12)
    data = packed.compress(b"z" * 4096) + packed.flush()
    out[6 * 4096 : 6 * 4096 + len(data)] = data
    compressed = (1 << 62) | 6 * 4096
    out[8192 : 8192 + 32] = struct.pack(">QQQQ", given["l2_entry"], 1, compressed, given["l2_entry"] | 1 << 63)
    out[3 * 4096 : 4 * 4096] = b"d" * 4096
    fields = [given[k] for k in ("snap_l1", "snap_l1_size", "id_size", "name_size")]
    record = struct.pack(">QIHHIIQII", *fields, 0, 0, 0, 0, given["extra"])
    out[4 * 4096 : 4 * 4096 + len(record) + 18] = record + bytes(8) + struct.pack(">Q", given["snap_size"]) + b"1s"
    out[5 * 4096 : 5 * 4096 + 8] = struct.pack(">Q", 2 * 4096)
    return out


def test_the_image_made_here_is_one() -> None:
    source = QcowSource(Bytes(image()))
    assert source.read(0, 16384) == b"d" * 4096 + bytes(4096) + b"z" * 4096 + b"d" * 4096
    assert list(source.extents(0, source.size)) == [Extent(0, 4096, DATA), Extent(8192, 8192, DATA)]
    assert list(source.extents(0, source.size, None, 0)) == []
    assert [(snap.name, snap.size) for snap in source.snapshots] == [("s", MIB)]


FAR = 1 << 40


@pytest.mark.parametrize(
    "change, code",
    [
        ({"magic": b"QFI\0"}, errno.EBADMSG),
        ({"version": 0}, errno.EOPNOTSUPP),
        ({"version": 4}, errno.EOPNOTSUPP),
        ({"cluster_bits": 8}, errno.EBADMSG),
        ({"cluster_bits": 22}, errno.EBADMSG),
        ({"cluster_bits": 0xFFFFFFFF}, errno.EBADMSG),
        ({"size": (1 << 64) - 1}, errno.EFBIG),
        ({"size": 1 << 50}, errno.EFBIG),
        ({"size": 3 * MIB * 4}, errno.EBADMSG),
        ({"l1_size": 1}, errno.EBADMSG),
        ({"l1": 0}, errno.EBADMSG),
        ({"l1": FAR}, errno.EBADMSG),
        ({"l1": 4097}, errno.EBADMSG),
        ({"l1": (1 << 64) - 4096}, errno.EBADMSG),
        ({"backing": 200, "backing_size": 10}, errno.EOPNOTSUPP),
        ({"crypt": 2}, errno.EOPNOTSUPP),
        ({"incompatible": 1 << 5}, errno.EOPNOTSUPP),
        ({"incompatible": 1 << 63}, errno.EOPNOTSUPP),
        ({"incompatible": 8}, errno.EBADMSG),
        ({"compression": 1}, errno.EBADMSG),
        ({"compression": 9, "incompatible": 8}, errno.EOPNOTSUPP),
        ({"length": 0}, errno.EBADMSG),
        ({"length": 0xFFFFFFF8}, errno.EBADMSG),
        ({"order": 7}, errno.EBADMSG),
        ({"snapshots": 0xFFFFFFFF}, errno.E2BIG),
        ({"snapshots": 9999}, errno.EBADMSG),
        ({"table": 0}, errno.EBADMSG),
        ({"table": FAR}, errno.EBADMSG),
        ({"table": 100}, errno.EBADMSG),
        ({"snap_l1": FAR}, errno.EBADMSG),
        ({"snap_l1": 5 * 4096 + 8}, errno.EBADMSG),
        ({"snap_l1_size": 0}, errno.EBADMSG),
        ({"snap_size": 1 << 62}, errno.EFBIG),
        ({"extra": 0xFFFFFFFF}, errno.EBADMSG),
        ({"extra": 1024, "id_size": 0xFFFF, "name_size": 0xFFFF}, errno.EBADMSG),
    ],
)
def test_a_hostile_header_is_refused_at_once(change: dict[str, Any], code: int) -> None:
    stream = Bytes(image(**change))
    begin = time.monotonic()
    with pytest.raises(OSError) as caught:
        QcowSource(stream)
    assert caught.value.errno == code and time.monotonic() - begin < 1
    assert stream.closed


@pytest.mark.parametrize(
    "change",
    [
        {"l1_entry": FAR},
        {"l1_entry": 8192 + 512},
        {"l1_entry": 7 * 4096},
        {"l2_entry": FAR},
        {"l2_entry": 3 * 4096 + 512},
        {"l2_entry": (1 << 62) | FAR},
        {"l2_entry": (1 << 62) | 3 * 4096},
        {"version": 2, "l2_entry": 3 * 4096 | 1},
    ],
)
def test_a_hostile_table_is_an_error_where_it_is_used(change: dict[str, Any]) -> None:
    source = QcowSource(Bytes(image(**change)))
    with pytest.raises(OSError) as caught:
        source.read(0, 1)
    assert caught.value.errno == errno.EBADMSG
    assert source.read(MIB * 2, 512) == bytes(512)


@pytest.mark.parametrize("cut", [0, 3, 4, 7, 8, 71, 72, 103, 104, 200, 4095, 4096])
def test_a_file_that_ends_early(cut: int) -> None:
    with pytest.raises(OSError) as caught:
        QcowSource(Bytes(image()[:cut]))
    assert caught.value.errno == errno.EBADMSG


def test_tables_that_lead_to_each_other() -> None:
    """An L1 entry that names the L1 table, an L2 entry that names the L2 table, all entries the same: bytes are read,
    nothing is followed twice."""
    for change in ({"l1_entry": 4096}, {"l2_entry": 8192}, {"snap_l1": 4096}, {"snap_l1": 4 * 4096}):
        source = QcowSource(Bytes(image(**change)))
        for snapshot in (None, 0):
            try:
                assert all(row.end <= MIB for row in source.extents(0, MIB, snapshot))
                assert len(source.read(0, MIB, snapshot)) == MIB
            except OSError as failure:
                assert failure.errno == errno.EBADMSG


def test_a_bomb_stays_one_cluster() -> None:
    """Compressed data that goes on for 64 MiB gives a cluster, and takes the memory of one."""
    packed = zlib.compressobj(9, zlib.DEFLATED, -12)
    bomb = b"".join(packed.compress(bytes(MIB)) for _ in range(64)) + packed.flush()
    data = image(l2_entry=(1 << 62) | (15 << 58) | 7 * 4096) + bomb
    source = QcowSource(Bytes(data))
    source.read(8192, 4096)
    tracemalloc.start()
    try:
        assert source.read(0, 4096) == bytes(4096)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


def test_an_exbibyte_of_nothing_is_looked_through_quickly() -> None:
    """The largest L1 table that is allowed, empty but for its last entry."""
    used = (32 << 20) // 8
    size = used * (1 << 21) * (1 << 18)
    out = bytearray(image(cluster_bits=21, size=size, l1_size=used, l1=1 << 21, snapshots=0))
    out += bytes((1 << 21) + (32 << 20) + (1 << 21) * 2 - len(out))
    table = (1 << 21) + (32 << 20)
    out[table - 8 : table] = struct.pack(">Q", table)
    out[table + (1 << 21) - 8 : table + (1 << 21)] = struct.pack(">Q", table)
    source = QcowSource(Bytes(out))
    begin = time.monotonic()
    tracemalloc.start()
    try:
        rows = list(source.extents(0, size))
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()
    assert rows == [Extent(size - (1 << 21), 1 << 21, DATA)] and time.monotonic() - begin < 10


def test_names_of_snapshots_are_usable(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-f", "qcow2", path, "1M")
    for name in ("a/b@c", "same", "same"):
        run("qemu-img", "snapshot", "-c", name, path)
    source = opened(path)
    names = [snap.name for snap in source.snapshots]
    assert names[:2] == ["a_b_c", "same"] and names[2].startswith("same-") and len(set(names)) == 3
    source.close()


SMALL = bytes(image())
METADATA = [
    *range(120),
    *range(4096, 4104),
    *range(8192, 8224),
    *range(4 * 4096, 4 * 4096 + 58),
    *range(6 * 4096, 6 * 4096 + 24),
]


@settings(max_examples=400, deadline=10_000)
@given(
    st.lists(st.tuples(st.sampled_from(METADATA), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, len(SMALL)),
)
def test_damage_of_any_kind_is_an_error_or_other_bytes(changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(SMALL)
    for at, value in changes:
        data[at] = value
    if cut % 8 == 7:
        del data[cut:]
    try:
        source = QcowSource(Bytes(data))
        points: list[int | None] = [None, *range(len(source.snapshots))]
        for point in points:
            size = source.size if point is None else source.snapshots[point].size
            for since in (None, *(range(len(source.snapshots)) if point is None else range(point))):
                for number, row in enumerate(source.extents(0, min(size, 64 * MIB), point, since)):
                    assert row.length > 0 and row.end <= size
                    if number > 50:
                        break
            length = min(size, 65536)
            assert len(source.read(0, length, point)) == length
    except OSError as failure:
        assert failure.errno in (errno.EBADMSG, errno.EOPNOTSUPP, errno.EFBIG, errno.E2BIG)


def test_the_header_has_what_the_file_says() -> None:
    header = QcowSource(Bytes(image())).header
    assert header.cluster == 4096 and header.reach == 512 * 4096 and header.head.l1_used == 2

"""Images as sources: every point of their life, in this cluster and in another store."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from image_fixtures import MIB, Cluster, R, cluster, io

from librbd_py import rbd
from librbd_py.cli.main import main
from librbd_py.image.directory import CreateOptions
from librbd_py.image.import_source import import_source
from librbd_py.image.native_source import KEPT_OPEN, NativeSource, open_any
from librbd_py.source import ZERO, Source
from librbd_py.store.api import ObjectContext
from librbd_py.store.embedded import EmbeddedStore

__all__ = ["cluster", "io"]

SPEC: dict[str, Any] = {"type": "native", "pool_name": "rbd", "image_name": "p"}


@pytest.fixture
def image(io: ObjectContext) -> Iterator[rbd.Image]:
    make(io)
    with rbd.Image(io, "p") as image:
        yield image


def make(io: ObjectContext) -> None:
    R.create(io, "p", 9 * MIB, order=20)
    with rbd.Image(io, "p") as image:
        image.write(b"a" * MIB, 0)
        image.write(b"a" * 5000, 4 * MIB)
        image.create_snap("one")
        image.write(b"b" * 70000, 4 * MIB + 2000)
        image.discard(0, MIB)
        image.resize(12 * MIB)
        image.create_snap("two")
        image.resize(6 * MIB)
        image.write(b"c" * 10, 6 * MIB - 10)
        image.create_snap("three")
        image.write(b"d", 3 * MIB)


def content(source: Source, snapshot: int | None) -> bytes:
    size = source.size if snapshot is None else source.snapshots[snapshot].size
    return b"".join(source.read(at, min(MIB, size - at), snapshot) for at in range(0, size, MIB))


def applied(source: Source, before: bytes, snapshot: int | None, since: int | None) -> bytes:
    size = source.size if snapshot is None else source.snapshots[snapshot].size
    target = bytearray(before.ljust(size, b"\0")[:size])
    for row in source.extents(0, size, snapshot, since):
        zero = row.kind is ZERO
        target[row.offset : row.end] = bytes(row.length) if zero else source.read(row.offset, row.length, snapshot)
    return bytes(target)


def test_every_point_reads_as_the_image_does(image: rbd.Image, cluster: Cluster) -> None:
    source = open_any(SPEC, cluster.first, import_only=False)
    assert [(snap.name, snap.size // MIB) for snap in source.snapshots] == [("one", 9), ("two", 12), ("three", 6)]
    assert source.size == 6 * MIB and content(source, None) == image.read(0, 6 * MIB)
    for number, snap in enumerate(source.snapshots):
        image.set_snap(snap.name)
        assert content(source, number) == image.read(0, snap.size)
    source.close()


def test_copying_what_changed_makes_them_equal(image: rbd.Image, cluster: Cluster) -> None:
    source = open_any(SPEC, cluster.first, import_only=False)
    points = [None, 0, 1, 2]
    state = b""
    for since, snapshot in zip([None, 0, 1, 2], [0, 1, 2, None], strict=True):
        state = applied(source, state, snapshot, since)
        assert state == content(source, snapshot)
    for snapshot in points:
        assert applied(source, b"", snapshot, None) == content(source, snapshot)
    assert sum(row.length for row in source.extents(0, 6 * MIB, None, 2)) <= MIB
    source.close()


def test_an_import_ends_at_its_snapshot(image: rbd.Image, cluster: Cluster) -> None:
    with pytest.raises(OSError) as caught:
        open_any(SPEC, cluster.first)
    assert caught.value.errno == errno.EINVAL
    snap_id = image.snap_get_id("two")
    for how in ({"snap_name": "two"}, {"snap_id": snap_id}, {"snap_id": str(snap_id)}):
        source = open_any(SPEC | how, cluster.first)
        assert [snap.name for snap in source.snapshots] == ["one", "two"]
        assert source.size == 12 * MIB and content(source, None) == content(source, 1)
        assert list(source.extents(0, 12 * MIB, None, 1)) == []
        source.close()


def test_an_image_of_another_store(cluster: Cluster, tmp_path: Path) -> None:
    url = f"embedded:{tmp_path}/elsewhere"
    with EmbeddedStore(f"{tmp_path}/elsewhere", create=True) as other:
        other.pool_create("far")
        R.namespace_create(other.open("far"), "n")
        make(other.open("far", "n"))
    spec = {**SPEC, "pool_name": "far", "pool_namespace": "n", "store": url, "snap_name": "one"}
    source = open_any(spec, cluster.first)
    assert content(source, 0)[: MIB + 1] == b"a" * MIB + b"\0"
    source.close()
    for wrong in ({"store": f"{url}-not"}, {"pool_name": "no"}, {"snap_name": "no"}, {"image_name": "no"}):
        with pytest.raises(FileNotFoundError):
            open_any(spec | wrong, cluster.first)
    assert not (tmp_path / "elsewhere-not").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"pool_name": None},
        {"pool_id": 1},
        {"pool_name": None, "pool_id": "x"},
        {"pool_name": None, "pool_id": -1},
        {"pool_name": None, "pool_id": True},
        {"pool_name": 5},
        {"pool_namespace": 5},
        {"image_name": None},
        {"image_id": 5},
        {"snap_id": 4},
        {"snap_name": None, "snap_id": 1 << 64},
        {"store": "memory:a", "cluster_name": "b"},
        {"cluster_name": "../b"},
        {"client_name": "client.admin"},
    ],
)
def test_a_spec_that_is_wrong_is_refused(cluster: Cluster, change: dict[str, Any]) -> None:
    with pytest.raises(OSError) as caught:
        open_any({**SPEC, "snap_name": "one", **change}, cluster.first)
    assert caught.value.errno == errno.EINVAL


def test_many_readers_and_few_handles(image: rbd.Image, cluster: Cluster) -> None:
    source = open_any(SPEC, cluster.first, import_only=False)
    assert isinstance(source, NativeSource)
    expected = {point: content(source, point) for point in (None, 0, 1, 2)}
    wrong: list[Any] = []

    def reader(turn: int) -> None:
        for point in [None, 0, 1, 2][turn:] + [None, 0, 1, 2][:turn]:
            if content(source, point) != expected[point]:
                wrong.append(point)

    threads = [threading.Thread(target=reader, args=(turn % 4,)) for turn in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and sum(map(len, source._idle.values())) <= KEPT_OPEN
    forgotten = source.extents(0, 6 * MIB)
    next(forgotten)
    source.close()
    with pytest.raises(OSError) as caught:
        source.read(0, 1)
    assert caught.value.errno == errno.EBADF
    forgotten.close()  # type: ignore[attr-defined]
    assert not source._idle


def test_config_keys_are_looked_up_at_the_monitors(ceph_conf: str, tmp_path: Path) -> None:
    from librbd_py.image.native_source import _config_key
    from librbd_py.store import connect

    with connect(f"ceph:{ceph_conf}") as ceph, EmbeddedStore(str(tmp_path / "s"), create=True) as embedded:
        ceph.mon_command({"prefix": "config-key set", "key": "rbd/s3/key", "val": "secret"})  # type: ignore[attr-defined]
        assert _config_key(ceph, "rbd/s3/key") == "secret"
        with pytest.raises(FileNotFoundError):
            _config_key(ceph, "rbd/s3/none")
        with pytest.raises(OSError) as caught:
            _config_key(embedded, "rbd/s3/key")
        assert caught.value.errno == errno.EOPNOTSUPP


def test_an_image_is_made_of_a_source(image: rbd.Image, cluster: Cluster) -> None:
    source = open_any(SPEC, cluster.first, import_only=False)
    io = cluster.pool("other")
    import_source(source, io, "q", CreateOptions(order=16))
    with rbd.Image(io, "q") as made:
        assert [snap["name"] for snap in sorted(made.list_snaps(), key=lambda s: int(s["id"]))] == [
            "one",
            "two",
            "three",
        ]
        for point in (None, 0, 1, 2):
            made.set_snap(None if point is None else source.snapshots[point].name)
            assert made.read(0, made.size()) == content(source, point)
    with pytest.raises(FileExistsError):
        import_source(source, io, "q")
    source.close()
    with pytest.raises(OSError) as caught:
        import_source(source, io, "r")
    assert caught.value.errno == errno.EBADF and list(R.list(io)) == ["q"] and list(R.trash_list(io)) == []


def test_raw_snapshots_share_what_did_not_change(io: ObjectContext, cluster: Cluster, tmp_path: Path) -> None:
    """A raw source knows only that everything may have changed."""
    for name, place in (("one", 0), ("two", 3), ("head", 5)):
        data = bytearray(b"base" * (MIB // 2))
        data[place * 65536 : place * 65536 + 10] = b"x" * 10
        (tmp_path / name).write_bytes(data)

    def raw(name: str) -> dict[str, Any]:
        return {"type": "raw", "stream": {"type": "file", "file_path": f"{tmp_path}/{name}"}}

    spec = raw("head") | {"snapshots": [raw(name) | {"name": name} for name in ("one", "two")]}
    source = open_any(spec, cluster.first)
    import_source(source, io, "q")
    with rbd.Image(io, "q") as made:
        for name in ("one", "two"):
            made.set_snap(name)
            assert made.read(0, 2 * MIB) == (tmp_path / name).read_bytes()
        made.set_snap(None)
        rows: list[Any] = []
        made.diff_iterate(0, 2 * MIB, "one", lambda *row: rows.append(row))
        assert made.read(0, 2 * MIB) == (tmp_path / "head").read_bytes()
        assert sum(length for _, length, _ in rows) <= 3 * 16384
    source.close()


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, store = tmp_path / "a.raw", f"{tmp_path}/s"
    path.write_bytes(b"abc" * MIB)
    spec = json.dumps({"type": "raw", "stream": {"type": "file", "file_path": str(path)}})
    (tmp_path / "spec.json").write_text(spec)
    assert main(["--store", store, "source", "info", "--source-spec", spec]) == 0
    assert capsys.readouterr().out == f"size 3 MiB ({3 * MIB} bytes)\n"
    words = ["--store", store, "source", "import", "rbd/q", "--source-spec-path", f"{tmp_path}/spec.json"]
    assert main([*words, "--no-progress", "--object-size", "64K"]) == 0
    with EmbeddedStore(store) as opened, rbd.Image(opened.open("rbd"), "q") as made:
        assert made.read(0, 3 * MIB) == path.read_bytes() and made.stat()["order"] == 16
    capsys.readouterr()
    for more, code, said in (
        (["import", "q"], 22, "--source-spec"),
        (["import", "q", "--source-spec", "{}"], 22, "type"),
        (["import", "q", "--source-spec", "nonsense"], 74, "JSON"),
        (["import", "q", "--source-spec", spec], 17, "exists"),
        (["import", "r", "--source-spec", spec, "--object-size", "5000"], 22, "power of two"),
        (["info", "--source-spec", spec.replace("a.raw", "b.raw")], 2, "b.raw"),
        (["info", "--source-spec-path", "/none"], 2, "none"),
    ):
        assert main(["--store", store, "source", *more]) == code
        assert said in capsys.readouterr().err

"""Images that are used while they are imported from what is no image of their store."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from image_fixtures import MIB, Cluster, R, cluster, heads, io, refused
from test_image_migration import SIZE, content, maps_are_right

from librbd_py import rbd
from librbd_py.store.api import ObjectContext
from librbd_py.store.embedded import EmbeddedStore

__all__ = ["cluster", "io"]


def raw(path: Path, seed: int, size: int) -> dict[str, Any]:
    """A file of data and holes."""
    some = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for at in range(0, size, 3 * MIB):
            file.seek(at)
            file.write(some.randbytes(min(100_000, size - at)))
    return {"type": "raw", "stream": {"type": "file", "file_path": str(path)}}


@pytest.fixture
def spec(tmp_path: Path) -> str:
    """Two snapshots and HEAD, of which each is larger than the one before."""
    first, second, head = (raw(tmp_path / f"raw{n}", n, SIZE - (2 - n) * 3 * MIB) for n in range(3))
    snaps = [{"name": f"s{n}", **each} for n, each in enumerate((first, second))]
    return json.dumps({**head, "snapshots": snaps})


@pytest.fixture
def expected(spec: str, tmp_path: Path) -> dict[str, bytes]:
    return {name: (tmp_path / f"raw{n}").read_bytes() for n, name in enumerate(("s0", "s1", ""))}


def test_an_import_is_used_before_it_is_done(io: ObjectContext, spec: str, expected: dict[str, bytes]) -> None:
    R.migration_prepare_import(spec, io, "a")
    status = R.migration_status(io, "a")
    assert (status["state"], status["source_pool_id"]) == (rbd.RBD_IMAGE_MIGRATION_STATE_PREPARED, -1)
    assert content(io, "a") == expected
    with rbd.Image(io, "a") as image:
        assert json.loads(image.migration_source_spec()) == json.loads(spec)
        head = bytearray(expected[""])
        some = random.Random(9)
        for _ in range(10):
            offset = some.randrange(SIZE - 5000)
            data = some.randbytes(5000)
            image.write(data, offset)
            head[offset : offset + 5000] = data
        image.write_zeroes(3 * MIB, 50_000)
        head[3 * MIB : 3 * MIB + 50_000] = bytes(50_000)
        assert image.read(0, SIZE) == bytes(head)
        image.create_snap("s2")
        image.write(b"after", 8 * MIB)
        wanted = {**expected, "s2": bytes(head)}
        head[8 * MIB : 8 * MIB + 5] = b"after"
        wanted[""] = bytes(head)
        assert content(io, "a") == wanted
        R.migration_execute(io, "a")
        assert image.read(0, SIZE) == bytes(head)
    assert content(io, "a") == wanted
    R.migration_commit(io, "a")
    assert content(io, "a") == wanted
    maps_are_right(io, "a")


def test_an_import_is_aborted(io: ObjectContext, spec: str) -> None:
    R.migration_prepare_import(spec, io, "a")
    with rbd.Image(io, "a") as image:
        image.write(b"x", 5 * MIB)
    R.migration_abort(io, "a")
    assert R.list(io) == []
    assert heads(io) == ["rbd_directory"]


def test_what_cannot_be_imported(io: ObjectContext, spec: str, tmp_path: Path) -> None:
    for wrong in ("", "{", "[]", "{}"):
        refused(rbd.InvalidArgument, 22, R.migration_prepare_import, wrong, io, "a")
    missing = json.dumps({"type": "raw", "stream": {"type": "file", "file_path": str(tmp_path / "nope")}})
    refused(rbd.ImageNotFound, 2, R.migration_prepare_import, missing, io, "a")
    R.create(io, "a", MIB)
    refused(rbd.ImageExists, 17, R.migration_prepare_import, spec, io, "a")
    assert R.list(io) == ["a"]


def test_a_source_that_is_gone_fails_what_needs_it_alone(io: ObjectContext, spec: str, tmp_path: Path) -> None:
    R.migration_prepare_import(spec, io, "a")
    with rbd.Image(io, "a") as image:
        image.write(b"here", 0)
    (tmp_path / "raw2").rename(tmp_path / "away")
    with rbd.Image(io, "a") as image:
        assert image.read(0, 4) == b"here"
        with pytest.raises(rbd.Error):
            image.read(6 * MIB, 4096)
        with pytest.raises(rbd.Error):
            image.write(b"x", 6 * MIB)
    (tmp_path / "away").rename(tmp_path / "raw2")
    R.migration_execute(io, "a")


def test_an_image_of_another_store(cluster: Cluster, io: ObjectContext, tmp_path: Path) -> None:
    folder = str(tmp_path / "other store")
    with EmbeddedStore(folder, create=True) as store:
        store.pool_create("far")
        there = store.open("far")
        R.create(there, "x", SIZE, order=20)
        with rbd.Image(there, "x") as image:
            image.write(b"one" * 50_000, 2 * MIB)
            image.create_snap("s1")
            image.write(b"two" * 50_000, 7 * MIB)
            image.create_snap("s2")
        wanted = content(there, "x")
    rows = {"type": "native", "store": f"embedded:{folder}", "pool_name": "far", "image_name": "x", "snap_name": "s2"}
    R.migration_prepare_import(json.dumps(rows), io, "a")
    with rbd.Image(io, "a") as image:
        image.write(b"own", 4 * MIB)
    head = bytearray(wanted[""])
    head[4 * MIB : 4 * MIB + 3] = b"own"
    assert content(io, "a") == {**wanted, "": bytes(head)}
    R.migration_execute(io, "a")
    R.migration_commit(io, "a")
    assert content(io, "a") == {**wanted, "": bytes(head)}
    maps_are_right(io, "a")


def test_copies_and_differences_of_an_image_that_migrates(
    cluster: Cluster, io: ObjectContext, spec: str, expected: dict[str, bytes]
) -> None:
    """What the object map of the destination does not know is no hole."""
    R.migration_prepare_import(spec, io, "a")
    R.create(io, "b", SIZE)
    with rbd.Image(io, "b") as image:
        image.write(b"b" * 100_000, 5 * MIB)
    R.migration_prepare(io, "b", cluster.pool("other"), "b")
    for ctx, name in ((io, "a"), (cluster.pool("other"), "b")):
        wanted = content(ctx, name)[""]
        with rbd.Image(ctx, name) as image:
            shown = bytearray(SIZE)

            def found(offset: int, length: int, exists: bool) -> None:
                shown[offset : offset + length] = wanted[offset : offset + length] if exists else bytes(length)  # noqa: B023

            image.diff_iterate(0, SIZE, None, found)
            assert bytes(shown) == wanted
            image.copy(io, f"copy of {name}")
            image.deep_copy(io, f"deep copy of {name}")
        assert content(io, f"copy of {name}") == {"": wanted}
        assert content(io, f"deep copy of {name}") == content(ctx, name)

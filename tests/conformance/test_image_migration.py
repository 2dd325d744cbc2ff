"""Live migration of images between pools, namespaces and layouts of one store."""

from __future__ import annotations

import random
from typing import Any

import pytest
from image_fixtures import MIB, Cluster, R, cluster, heads, io, refused

from librbd_py import rbd
from librbd_py.format import features as ft
from librbd_py.format import trash as ftr
from librbd_py.image import cls, map_check
from librbd_py.store.api import ObjectContext

__all__ = ["cluster", "io"]

SIZE = 10 * MIB + 4096
PREPARED, EXECUTING, EXECUTED = (
    rbd.RBD_IMAGE_MIGRATION_STATE_PREPARED,
    rbd.RBD_IMAGE_MIGRATION_STATE_EXECUTING,
    rbd.RBD_IMAGE_MIGRATION_STATE_EXECUTED,
)


def fill(image: rbd.Image, seed: int, writes: int = 12) -> None:
    some = random.Random(seed)
    size = image.size()
    for _ in range(writes):
        offset = some.randrange(size)
        length = min(some.choice((512, 4096, 70_000)), size - offset)
        if some.random() < 0.2:
            image.discard(offset, length)
        else:
            image.write(some.randbytes(length), offset)


def content(io: ObjectContext, name: str) -> dict[str, bytes]:
    """Of HEAD and each snapshot."""
    with rbd.Image(io, name, read_only=True) as image:
        found = {"": image.read(0, image.size())}
        for snap in image.list_snaps():
            image.set_snap(snap["name"])
            found[snap["name"]] = image.read(0, image.size())
        return found


@pytest.fixture
def source(io: ObjectContext) -> ObjectContext:
    """Image `a`: objects 0 and 1 hold data, 2 holds nothing."""
    R.create(io, "a", SIZE)
    with rbd.Image(io, "a") as image:
        fill(image, 1)
        image.metadata_set("mk", "mv")
    return io


def state(io: ObjectContext, name: str) -> int:
    return int(R.migration_status(io, name)["state"])


def maps_are_right(io: ObjectContext, name: str) -> None:
    with rbd.Image(io, name) as image:
        assert map_check.differences(image.handle) == []


def test_a_migration_from_pool_to_pool(cluster: Cluster, source: ObjectContext) -> None:
    other = cluster.pool("other")
    before = content(source, "a")
    R.migration_prepare(source, "a", other, "b")
    assert (R.list(source), R.list(other)) == ([], ["b"])
    assert content(other, "b") == before
    [trashed] = R.trash_list(source)
    assert (trashed["name"], trashed["source"]) == ("a", "MIGRATION")
    status = R.migration_status(other, "b")
    assert status == R.migration_status(source, "a")
    with rbd.Image(other, "b") as image:
        assert image.features() & ft.MIGRATING
        assert list(image.metadata_list()) == [("mk", "mv")]
        assert status == {
            "source_pool_id": source.pool_id,
            "source_pool_namespace": "",
            "source_image_name": "a",
            "source_image_id": trashed["id"],
            "dest_pool_id": other.pool_id,
            "dest_pool_namespace": "",
            "dest_image_name": "b",
            "dest_image_id": image.id(),
            "state": PREPARED,
            "state_description": "",
        }
    refused(rbd.InvalidArgument, 22, R.migration_commit, other, "b")
    steps: list[tuple[int, int]] = []
    R.migration_execute(other, "b", lambda done, total: steps.append((done, total)))
    assert steps and steps[-1][0] == steps[-1][1]
    assert state(other, "b") == EXECUTED
    assert content(other, "b") == before
    refused(rbd.InvalidArgument, 22, R.migration_execute, other, "b")
    R.migration_commit(other, "b")
    assert content(other, "b") == before
    with rbd.Image(other, "b") as image:
        assert not image.features() & ft.MIGRATING
    assert (heads(source), list(R.trash_list(source))) == (["rbd_directory", "rbd_trash"], [])
    refused(rbd.InvalidArgument, 22, R.migration_status, other, "b")
    maps_are_right(other, "b")


def test_an_image_is_used_while_it_migrates(cluster: Cluster, source: ObjectContext) -> None:
    other = cluster.pool("other")
    expected = bytearray(content(source, "a")[""])
    R.migration_prepare(source, "a", other, "a")
    with rbd.Image(other, "a") as image:
        some = random.Random(3)
        for turn in range(30):
            offset = some.randrange(SIZE - 9000)
            if turn % 3:
                data = some.randbytes(some.randrange(1, 9000))
                image.write(data, offset)
                expected[offset : offset + len(data)] = data
            else:
                image.discard(0, 1)  # nothing by itself: smaller than the granularity
                image.write_zeroes(offset, 5000)
                expected[offset : offset + 5000] = bytes(5000)
        assert image.read(0, SIZE) == bytes(expected)
        image.create_snap("new")
        image.write(b"after", 100)
        before, expected[100:105] = bytes(expected), b"after"
        R.migration_execute(other, "a")
        assert image.read(0, SIZE) == bytes(expected)
        image.write(b"later", 9 * MIB)
        expected[9 * MIB : 9 * MIB + 5] = b"later"
    R.migration_commit(other, "a")
    assert content(other, "a") == {"": bytes(expected), "new": before}
    maps_are_right(other, "a")


def test_an_abort_carries_back_what_was_written(cluster: Cluster, source: ObjectContext) -> None:
    other = cluster.pool("other")
    expected = bytearray(content(source, "a")[""])
    with rbd.Image(source, "a") as image:
        identity = image.id()
    R.migration_prepare(source, "a", other, "b", order=21, stripe_unit=65536, stripe_count=3)
    with rbd.Image(other, "b") as image:
        image.write(b"new" * 1000, 5 * MIB - 1000)
        expected[5 * MIB - 1000 : 5 * MIB + 2000] = b"new" * 1000
        image.discard(0, 1 * MIB)
        expected[: 1 * MIB] = bytes(MIB)
        refused(rbd.ImageBusy, 16, R.migration_abort, other, "b")
    R.migration_abort(other, "b")
    assert (R.list(source), R.list(other), list(R.trash_list(source))) == (["a"], [], [])
    with rbd.Image(source, "a") as image:
        assert image.id() == identity and not image.features() & ft.MIGRATING
    assert content(source, "a") == {"": bytes(expected)}
    maps_are_right(source, "a")
    assert heads(other) == ["rbd_directory"]


LAYOUTS: dict[str, dict[str, Any]] = {
    "larger objects": {"order": 23, "stripe_unit": 1 << 23, "stripe_count": 1},
    "smaller objects": {"order": 20, "stripe_unit": 1 << 20, "stripe_count": 1},
    "striped": {"order": 21, "stripe_unit": 65536, "stripe_count": 3},
    "a data pool": {"data_pool": "data"},
    "no lock": {"features": ft.LAYERING},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_migration_to_another_layout(layout: str, cluster: Cluster, source: ObjectContext) -> None:
    """Within the pool and under the same name."""
    before = content(source, "a")
    R.migration_prepare(source, "a", source, "a", **LAYOUTS[layout])
    assert content(source, "a") == before
    with rbd.Image(source, "a") as image:
        image.write(b"x" * 5000, 4 * MIB - 2500)
    changed = bytearray(before[""])
    changed[4 * MIB - 2500 : 4 * MIB + 2500] = b"x" * 5000
    R.migration_execute(source, "a")
    R.migration_commit(source, "a")
    assert content(source, "a") == {"": bytes(changed)}
    with rbd.Image(source, "a") as image:
        wanted = LAYOUTS[layout]
        if "order" in wanted:
            assert (image.stat()["order"], image.stripe_count()) == (wanted["order"], wanted["stripe_count"])
        if "data_pool" in wanted:
            assert image.data_pool_id() == cluster.pool("data").pool_id
        if "features" not in wanted:
            assert map_check.differences(image.handle) == []


def test_a_migration_into_a_namespace(cluster: Cluster, source: ObjectContext) -> None:
    R.namespace_create(source, "ns")
    inside = cluster.pool("rbd", "ns")
    before = content(source, "a")
    R.migration_prepare(source, "a", inside, "a")
    R.migration_execute(source, "a")  # by the source's name, too
    R.migration_commit(inside, "a")
    assert content(inside, "a") == before
    assert R.list(source) == []


def test_what_cannot_migrate(cluster: Cluster, source: ObjectContext) -> None:
    other = cluster.pool("other")
    refused(rbd.ImageNotFound, 2, R.migration_prepare, source, "nope", other, "b")
    refused(rbd.ImageNotFound, 2, R.migration_status, source, "nope")
    refused(rbd.InvalidArgument, 22, R.migration_status, source, "a")
    refused(rbd.InvalidArgument, 22, R.migration_prepare, source, "a", other, "b", order=21)  # the stripe unit: librbd
    R.create(other, "b", MIB)
    refused(rbd.ImageExists, 17, R.migration_prepare, source, "a", other, "b")
    with rbd.Image(cluster.connect().open("rbd"), "a"):
        refused(rbd.ImageBusy, 16, R.migration_prepare, source, "a", other, "c")
    assert (R.list(source), R.list(other)) == (["a"], ["b"])
    R.migration_prepare(source, "a", other, "c")
    [entry] = R.trash_list(source)
    with pytest.raises(rbd.ReadOnlyImage):
        rbd.Image(source, image_id=entry["id"])
    R.trash_purge(source)
    assert cls.trash_get(source, entry["id"]).source == ftr.SOURCE_MIGRATION
    with rbd.Image(other, "c") as image:
        refused(rbd.ImageBusy, 16, image.flatten)
    R.migration_abort(source, "a")
    assert R.list(other) == ["b"]


def test_what_a_shrink_cut_off_does_not_come_back(cluster: Cluster, source: ObjectContext) -> None:
    other = cluster.pool("other")
    before = content(source, "a")[""]
    R.migration_prepare(source, "a", other, "a")
    with rbd.Image(other, "a") as image:
        image.resize(3 * MIB)
        image.resize(SIZE)
        assert image.read(0, SIZE) == before[: 3 * MIB] + bytes(SIZE - 3 * MIB)
    R.migration_execute(other, "a")
    R.migration_commit(other, "a")
    assert content(other, "a")[""] == before[: 3 * MIB] + bytes(SIZE - 3 * MIB)

"""Live migration of images with snapshots, of clones and of their parents, and of members of groups."""

from __future__ import annotations

import random
from typing import Any

import pytest
from image_fixtures import MIB, Cluster, R, cluster, heads, io, refused
from test_image_migration import SIZE, content, fill, maps_are_right

from librbd_py import rbd
from librbd_py.format import features as ft
from librbd_py.format import object_map as fm
from librbd_py.image import cls, object_map
from librbd_py.image.handle import ImageHandle
from librbd_py.image.migration import objects
from librbd_py.store.api import NOSNAP, ObjectContext, OmapSet

__all__ = ["cluster", "io"]


@pytest.fixture
def source(io: ObjectContext) -> ObjectContext:
    """Image `a` that grew, shrank and was changed between three snapshots; object 2 is only in the second."""
    R.create(io, "a", 6 * MIB)
    with rbd.Image(io, "a") as image:
        image.write(b"one" * 30_000, 100)
        image.create_snap("s1")
        image.resize(SIZE + 4 * MIB)
        image.write(b"two" * 30_000, 40_000)
        image.write(b"late" * 1000, 9 * MIB)
        image.write(b"later" * 1000, 13 * MIB)
        image.create_snap("s2")
        image.protect_snap("s2")
        image.resize(SIZE)
        image.discard(8 * MIB, SIZE - 8 * MIB)
        image.create_snap("s3")
        fill(image, 4)
    return io


def rest(cluster: Cluster) -> list[str]:
    return [oid for oid in heads(cluster.pool("rbd")) if oid.startswith(("rbd_data", "rbd_header", "rbd_object_map"))]


LAYOUTS: dict[str, dict[str, Any]] = {
    "as it was": {},
    "larger objects": {"order": 23, "stripe_unit": 1 << 23, "stripe_count": 1},
    "smaller objects": {"order": 20, "stripe_unit": 1 << 20, "stripe_count": 1},
    "striped": {"order": 21, "stripe_unit": 65536, "stripe_count": 3, "data_pool": "data"},
    "no lock": {"features": ft.LAYERING},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_snapshots_come_along(layout: str, cluster: Cluster, source: ObjectContext) -> None:
    other = cluster.pool("other")
    before = content(source, "a")
    R.migration_prepare(source, "a", other, "b", **LAYOUTS[layout])
    assert content(other, "b") == before
    with rbd.Image(other, "b") as image:
        assert [(snap["name"], snap["size"]) for snap in image.list_snaps()] == [
            ("s1", 6 * MIB),
            ("s2", SIZE + 4 * MIB),
            ("s3", SIZE),
        ]
        assert [image.is_protected_snap(name) for name in ("s1", "s2", "s3")] == [False, True, False]
        refused(rbd.ImageBusy, 16, image.rollback_to_snap, "s1")
        head = bytearray(before[""])
        some = random.Random(5)
        for turn in range(12):
            offset = some.randrange(SIZE - 100_000)
            if turn % 3 == 2:
                image.discard(offset, 100_000)
                start, end = -(-offset // 65536) * 65536, (offset + 100_000) // 65536 * 65536
                head[offset : offset + 100_000] = image.read(offset, 100_000)
                assert start >= end or head[start:end] == bytes(end - start)
            else:
                data = some.randbytes(3000)
                image.write(data, offset)
                head[offset : offset + 3000] = data
        image.create_snap("s4")
    changed = {**before, "": bytes(head), "s4": bytes(head)}
    assert content(other, "b") == changed
    R.migration_execute(other, "b")
    assert content(other, "b") == changed
    R.migration_commit(other, "b")
    assert content(other, "b") == changed
    assert rest(cluster) == []
    if LAYOUTS[layout].get("features") != ft.LAYERING:
        maps_are_right(other, "b")


def test_an_image_grows_over_what_only_a_snapshot_holds(cluster: Cluster, source: ObjectContext) -> None:
    other = cluster.pool("other")
    before = content(source, "a")
    R.migration_prepare(source, "a", other, "a")
    with rbd.Image(other, "a") as image:
        image.resize(SIZE + 4 * MIB)
        image.write(b"grown", 13 * MIB)
    head = bytearray(before[""] + bytes(4 * MIB))
    head[13 * MIB : 13 * MIB + 5] = b"grown"
    assert content(other, "a") == {**before, "": bytes(head)}
    R.migration_execute(other, "a")
    R.migration_commit(other, "a")
    assert content(other, "a") == {**before, "": bytes(head)}


def test_an_abort_of_snapshots(cluster: Cluster, source: ObjectContext) -> None:
    other = cluster.pool("other")
    before = content(source, "a")
    R.migration_prepare(source, "a", other, "a")
    with rbd.Image(other, "a") as image:
        image.write(b"changed", 5 * MIB)
    R.migration_abort(other, "a")
    head = bytearray(before[""])
    head[5 * MIB : 5 * MIB + 7] = b"changed"
    assert content(source, "a") == {**before, "": bytes(head)}
    assert (R.list(source), R.list(other)) == (["a"], [])
    maps_are_right(source, "a")


def test_an_object_that_a_crash_left_between_two_versions(cluster: Cluster, source: ObjectContext) -> None:
    """Its oldest version is there, and the note in the header: the next owner brings the others first."""
    other = cluster.pool("other")
    before = content(source, "a")
    R.migration_prepare(source, "a", other, "a")
    with ImageHandle.open(other, "a") as handle:
        history = objects.History(handle, handle.header, 0)
        steps = history.steps
        assert len(steps) > 2
        step, there = steps[0]
        handle.ctx.write(handle.oid, [OmapSet({objects.NOTE + b"%016x" % 0: b""})])
        ops = objects.change(None, history.content(there), 1 << 22)
        handle.data_ctx.write(handle.objects.oid(0), ops, objects.snap_context(step.older))
    with rbd.Image(other, "a") as image:
        image.write(b"x", 4 * MIB - 1)
        head = bytearray(before[""])
        head[4 * MIB - 1 : 4 * MIB] = b"x"
        assert image.read(0, SIZE) == bytes(head)
    assert content(other, "a") == {**before, "": bytes(head)}


def test_a_map_is_changed_while_an_object_is_between_two_versions(cluster: Cluster, source: ObjectContext) -> None:
    """Object 2 has come to what the second snapshot sees, which the third does not; then another one comes."""
    other = cluster.pool("other")
    R.migration_prepare(source, "a", other, "b")
    with ImageHandle.open(other, "b") as handle, handle.exclusive() as header:
        second = sorted(header.snaps)[1]
        history = objects.History(handle, header, 2)
        [(step, there)] = [found for found in history.steps if found[1] == second]
        handle.ctx.write(handle.oid, [OmapSet({objects.NOTE + b"%016x" % 2: b""})])
        ops = objects.change(None, history.content(there), 1 << 22)
        handle.data_ctx.write(handle.objects.oid(2), ops, objects.snap_context(step.older))
        objects.bring(handle, header, 0)
    R.migration_execute(other, "b")
    R.migration_commit(other, "b")
    maps_are_right(other, "b")


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("clone_format", [1, 2])
def test_a_clone_migrates(clone_format: int, flatten: bool, cluster: Cluster, io: ObjectContext) -> None:
    other = cluster.pool("other")
    R.create(io, "p", SIZE)
    with rbd.Image(io, "p") as image:
        fill(image, 1)
        image.create_snap("s")
        image.protect_snap("s")
    from librbd_py.image.clones import clone

    clone(io, "p", "s", io, "c", clone_format=clone_format)
    with rbd.Image(io, "c") as image:
        image.write(bytes(4 * MIB), 0)  # zeros hide the parent
        image.create_snap("t")
        image.resize(9 * MIB)
        image.resize(SIZE)
        image.write(b"own", 5 * MIB)
    before = content(io, "c")
    R.migration_prepare(io, "c", other, "c", flatten=flatten)
    with rbd.Image(other, "c") as image:
        if flatten:
            refused(rbd.ImageNotFound, 2, image.parent_info)
        else:
            assert image.parent_info() == ("rbd", "p", "s")
        image.write(b"during", 6 * MIB)
    head = bytearray(before[""])
    head[6 * MIB : 6 * MIB + 6] = b"during"
    wanted = {**before, "": bytes(head)}
    assert content(other, "c") == wanted
    R.migration_execute(other, "c")
    assert content(other, "c") == wanted
    R.migration_commit(other, "c")
    assert content(other, "c") == wanted
    with rbd.Image(io, "p") as image:
        assert [(row["pool"], row["image"]) for row in image.list_children2()] == ([] if flatten else [("other", "c")])
    maps_are_right(other, "c")


@pytest.mark.parametrize("clone_format", [1, 2])
def test_the_clones_of_an_image_follow_it(clone_format: int, cluster: Cluster, source: ObjectContext) -> None:
    other = cluster.pool("other")
    from librbd_py.image.clones import clone

    clone(source, "a", "s2", cluster.pool("other"), "c", clone_format=clone_format)
    with rbd.Image(other, "c") as image:
        image.create_snap("t")
        image.write(b"own", 0)
    before, parent = content(other, "c"), content(source, "a")
    refused(rbd.InvalidArgument, 22, R.migration_prepare, source, "a", other, "b", features=0)

    def linked_to(ctx: ObjectContext, pool: str, name: str) -> None:
        with rbd.Image(other, "c") as image, rbd.Image(ctx, name) as above:
            assert image.parent_info() == (pool, name, "s2")
            assert [(row["pool"], row["image"]) for row in above.list_children2()] == [("other", "c")]

    R.migration_prepare(source, "a", other, "b")
    linked_to(other, "other", "b")
    assert content(other, "c") == before
    R.migration_abort(other, "b")
    linked_to(source, "rbd", "a")
    assert (content(other, "c"), content(source, "a")) == (before, parent)
    R.migration_prepare(source, "a", other, "b")
    R.migration_execute(other, "b")
    R.migration_commit(other, "b")
    linked_to(other, "other", "b")
    assert (content(other, "c"), content(other, "b")) == (before, parent)
    assert rest(cluster) == []


def test_an_object_that_only_the_map_has_is_brought(cluster: Cluster, source: ObjectContext) -> None:
    """As a crash leaves it between the map, which comes first, and the object."""
    other = cluster.pool("other")
    before = content(source, "a")
    R.migration_prepare(source, "a", other, "a")
    with rbd.Image(other, "a") as image:
        count = image.handle.header.layout.objects(image.size())
        object_map.save(other, image.id(), NOSNAP, bytes([fm.EXISTS]) * count)
    R.migration_execute(other, "a")
    R.migration_commit(other, "a")
    assert content(other, "a") == before


def test_a_member_of_a_group_stays_one(cluster: Cluster, source: ObjectContext) -> None:
    other = cluster.pool("other")
    R.group_create(source, "g")
    group = rbd.Group(source, "g")
    group.add_image(source, "a")
    R.migration_prepare(source, "a", other, "b")
    assert [(row["pool"], row["name"]) for row in group.list_images()] == [(other.pool_id, "b")]
    R.migration_abort(other, "b")
    assert [(row["pool"], row["name"]) for row in group.list_images()] == [(source.pool_id, "a")]
    R.migration_prepare(source, "a", other, "b")
    R.migration_execute(other, "b")
    R.migration_commit(other, "b")
    assert [(row["pool"], row["name"]) for row in group.list_images()] == [(other.pool_id, "b")]
    R.group_remove(source, "g")
    R.create(source, "d", MIB)
    R.group_create(source, "g")
    group = rbd.Group(source, "g")
    group.add_image(source, "d")
    group.create_snap("gs")
    refused(rbd.ImageBusy, 16, R.migration_prepare, source, "d", other, "d")
    R.namespace_create(other, "ns")
    group.remove_snap("gs")
    inside = cluster.pool("other", "ns")
    refused(rbd.InvalidArgument, 22, R.migration_prepare, source, "d", inside, "d")  # a group has one namespace
    assert (R.list(source), R.list(inside)) == (["d"], [])
    assert [row["name"] for row in group.list_images()] == ["d"]
    assert cls.trash_list(source) == {}

"""Consistency groups on every store; values seen with librbd 16.2.15."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from image_fixtures import MIB, Cluster, R, cluster, eventually, io, refused

from librbd_py import rbd
from librbd_py.format import group as fg
from librbd_py.format import header as fh
from librbd_py.image import group as groups
from librbd_py.image import snapshots
from librbd_py.image.handle import ImageHandle
from librbd_py.store.api import ObjectContext

__all__ = ["cluster", "io"]

ATTACHED, COMPLETE = rbd.RBD_GROUP_IMAGE_STATE_ATTACHED, rbd.RBD_GROUP_SNAP_STATE_COMPLETE


@pytest.fixture
def group(io: ObjectContext) -> Iterator[rbd.Group]:
    for name in ("a", "b"):
        R.create(io, name, 8 * MIB)
    R.group_create(io, "g")
    yield rbd.Group(io, "g")


def members(group: rbd.Group) -> list[tuple[str, int]]:
    return sorted((row["name"], row["state"]) for row in group.list_images())


def snaps(group: rbd.Group) -> list[tuple[str, int]]:
    return sorted((row["name"], row["state"]) for row in group.list_snaps())


def test_groups_come_and_go_by_name(io: ObjectContext) -> None:
    assert R.group_list(io) == []
    R.group_create(io, "g")
    refused(rbd.ObjectExists, 17, R.group_create, io, "g")
    refused(rbd.InvalidArgument, 22, R.group_create, io, "")
    R.group_create(io, b"h")
    refused(rbd.ImageExists, 17, R.group_rename, io, "g", "h")
    refused(rbd.ImageExists, 17, R.group_rename, io, "g", "g")
    refused(rbd.ImageNotFound, 2, R.group_rename, io, "no", "x")
    refused(rbd.InvalidArgument, 22, R.group_rename, io, "g", "")
    R.group_rename(io, "g", "f")
    assert R.group_list(io) == ["f", "h"]
    R.group_remove(io, "f")
    R.group_remove(io, "f")
    R.group_remove(io, "h")
    assert R.group_list(io) == []
    assert [oid for oid in io.objects() if oid.startswith(fg.GROUP_HEADER_PREFIX)] == []


def test_a_group_that_is_not_there(io: ObjectContext) -> None:
    R.create(io, "a", MIB)
    none = rbd.Group(io, "no")
    assert list(none.list_images()) == list(none.list_snaps()) == []
    for call in (none.add_image, none.remove_image):
        refused(rbd.ObjectNotFound, 2, call, io, "a")
    for change in (none.create_snap, none.remove_snap, none.rollback_to_snap, none.get_snap_info):
        refused(rbd.ObjectNotFound, 2, change, "s")
    refused(rbd.ObjectNotFound, 2, none.rename_snap, "s", "t")
    refused(rbd.ObjectNotFound, 2, none.id)


def test_members(io: ObjectContext, cluster: Cluster, group: rbd.Group) -> None:
    group.add_image(io, "a")
    group.add_image(io, "a")
    refused(rbd.ObjectNotFound, 2, group.add_image, io, "no")
    refused(rbd.ObjectNotFound, 2, group.remove_image, io, "no")
    group.remove_image(io, "b")
    R.group_create(io, "h")
    other = rbd.Group(io, "h")
    refused(rbd.ObjectExists, 17, other.add_image, io, "a")
    assert members(other) == []
    refused(rbd.OSError, 9, other.remove_image, io, "a")
    elsewhere = cluster.pool("other")
    R.create(elsewhere, "c", MIB)
    group.add_image(elsewhere, "c")
    assert members(group) == [("a", ATTACHED), ("c", ATTACHED)]
    assert {row["pool"] for row in group.list_images()} == {io.pool_id, elsewhere.pool_id}
    with rbd.Image(io, "a") as image:
        assert image.group() == {"pool": io.pool_id, "name": "g"}
        assert image.op_features() == rbd.RBD_OPERATION_FEATURE_GROUP
        group.remove_image(io, "a")
        eventually(lambda: image.op_features() == 0)
        assert image.group() == {"pool": -1, "name": ""}
    R.group_remove(io, "g")
    with rbd.Image(elsewhere, "c") as image:
        assert image.group() == {"pool": -1, "name": ""} and image.op_features() == 0


def test_groups_keep_to_their_namespace(io: ObjectContext, cluster: Cluster, group: rbd.Group) -> None:
    R.namespace_create(io, "space")
    inside = cluster.pool("rbd", "space")
    R.create(inside, "n", MIB)
    refused(rbd.InvalidArgument, 22, group.add_image, inside, "n")
    R.group_create(inside, "g")
    rbd.Group(inside, "g").add_image(inside, "n")
    assert members(rbd.Group(inside, "g")) == [("n", ATTACHED)] and members(group) == []
    refused(rbd.ImageBusy, 16, R.namespace_remove, io, "space")
    rbd.Group(inside, "g").remove_image(inside, "n")
    R.remove(inside, "n")
    R.namespace_remove(io, "space")
    assert R.group_list(inside) == [] and R.group_list(io) == ["g"]


def test_a_member_in_the_trash_stays_one(io: ObjectContext, group: rbd.Group) -> None:
    group.add_image(io, "a")
    refused(rbd.OSError, 31, R.remove, io, "a")
    with rbd.Image(io, "a") as image:
        image_id = image.id()
    R.trash_move(io, "a", 0)
    assert members(group) == []
    refused(rbd.OSError, 31, R.trash_remove, io, image_id)
    R.trash_restore(io, image_id, "a")
    assert members(group) == [("a", ATTACHED)]


def test_snapshots_of_all_members(io: ObjectContext, group: rbd.Group) -> None:
    for name in ("a", "b"):
        group.add_image(io, name)
        with rbd.Image(io, name) as image:
            image.write(name.encode() * 1000, 0)
    group.create_snap("s")
    refused(rbd.ObjectExists, 17, group.create_snap, "s")
    refused(rbd.InvalidArgument, 22, group.create_snap, "")
    refused(rbd.InvalidArgument, 22, group.create_snap, "f", 8)
    assert snaps(group) == [("s", COMPLETE)]
    info = group.get_snap_info("s")
    assert sorted(row["image_name"] for row in info["image_snaps"]) == ["a", "b"]
    for name in ("a", "b"):
        with rbd.Image(io, name) as image:
            (row,) = image.list_snaps()
            assert row["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_GROUP
            assert row["name"] == f".group.{io.pool_id:x}_{group.id()}_{info['id']}" == info["image_snap_name"]
            assert row["group"] == image.snap_get_group_namespace(row["id"])
            assert row["group"] == {"pool": io.pool_id, "name": "g", "snap_name": "s"}
            for call in (image.remove_snap, image.set_snap, image.protect_snap, image.rollback_to_snap):
                refused(rbd.ImageNotFound, 2, call, row["name"])
            image.write(b"x" * 2000, 100)
            image.set_snap_by_id(row["id"])
            assert image.read(0, 1001) == name.encode() * 1000 + b"\0"
    refused(rbd.ObjectExists, 17, group.rename_snap, "s", "s")
    refused(rbd.ObjectNotFound, 2, group.rename_snap, "no", "x")
    group.create_snap("t")
    refused(rbd.ObjectExists, 17, group.rename_snap, "t", "s")
    group.rename_snap("s", "r")
    group.rollback_to_snap("r")
    for name in ("a", "b"):
        with rbd.Image(io, name) as image:
            assert image.read(0, 1001) == name.encode() * 1000 + b"\0"
    refused(rbd.ImageHasSnapshots, 39, R.remove, io, "a")
    group.remove_snap("t")
    refused(rbd.ObjectNotFound, 2, group.remove_snap, "t")
    assert snaps(group) == [("r", COMPLETE)]
    R.group_remove(io, "g")
    for name in ("a", "b"):
        with rbd.Image(io, name) as image:
            assert list(image.list_snaps()) == []
        R.remove(io, name)


def test_a_snapshot_outlives_membership(io: ObjectContext, group: rbd.Group) -> None:
    group.add_image(io, "a")
    group.create_snap("s")
    group.remove_image(io, "a")
    group.add_image(io, "b")
    with rbd.Image(io, "a") as image:
        assert len(list(image.list_snaps())) == 1
        image.write(b"later", 0)
    group.rollback_to_snap("s")
    with rbd.Image(io, "a") as image:
        assert image.read(0, 5) == bytes(5)
    group.remove_snap("s")
    with rbd.Image(io, "a") as image:
        assert list(image.list_snaps()) == []


def test_a_snapshot_that_was_cut_short_can_be_removed(io: ObjectContext, group: rbd.Group) -> None:
    group.add_image(io, "a")
    group.add_image(io, "b")
    group_id = group.id()
    ids = [cls_member.image_id for cls_member in groups.members(io, "g")]
    left = fg.GroupSnapshot("abc", "half", 0, tuple(fg.ImageSnapshotSpec(io.pool_id, image_id, 0) for image_id in ids))
    io.exec(groups.header_name(group_id), "rbd", "group_snap_set", left.encode())
    with ImageHandle.open(io, "a") as handle:
        name = fg.group_snap_name(io.pool_id, group_id, "abc")
        snapshots.create(handle, name, fh.GroupNamespace(io.pool_id, group_id, "abc"))
    assert snaps(group) == [("half", rbd.RBD_GROUP_SNAP_STATE_INCOMPLETE)]
    group.remove_snap("half")
    with rbd.Image(io, "a") as image:
        assert list(image.list_snaps()) == []
    assert snaps(group) == []


def test_a_snapshot_that_fails_leaves_nothing(io: ObjectContext, cluster: Cluster, group: rbd.Group) -> None:
    group.add_image(io, "a")
    group.add_image(io, "b")
    with rbd.Image(cluster.connect().open("rbd"), "b") as image:
        image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
        refused(rbd.ReadOnlyImage, 30, group.create_snap, "s")
        refused(rbd.ObjectNotFound, 2, group.rollback_to_snap, "s")
    assert snaps(group) == []
    for name in ("a", "b"):
        with rbd.Image(io, name) as image:
            assert list(image.list_snaps()) == []


def test_members_are_snapshot_at_one_moment(io: ObjectContext, cluster: Cluster, group: rbd.Group) -> None:
    """A writer that writes to `a` first and to `b` after it: no snapshot has more in b than in a."""
    for name in ("a", "b"):
        group.add_image(io, name)
    stop = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        try:
            elsewhere = cluster.connect().open("rbd")
            with rbd.Image(elsewhere, "a") as first, rbd.Image(elsewhere, "b") as second:
                number = 0
                while not stop.is_set():
                    number += 1
                    first.write(number.to_bytes(8), 0)
                    second.write(number.to_bytes(8), 0)
        except BaseException as failure:
            failures.append(failure)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with rbd.Image(io, "b", read_only=True) as image:
            eventually(lambda: image.read(0, 8) != bytes(8))
        for number in range(3):
            group.create_snap(f"s{number}")
    finally:
        stop.set()
        writer.join(60)
    assert failures == [] and not writer.is_alive()
    for number in range(3):
        held = []
        for name in ("a", "b"):
            with rbd.Image(io, name) as image:
                (row,) = [row for row in image.list_snaps() if row["group"]["snap_name"] == f"s{number}"]
                image.set_snap_by_id(row["id"])
                held.append(int.from_bytes(image.read(0, 8)))
        assert held[0] in (held[1], held[1] + 1)

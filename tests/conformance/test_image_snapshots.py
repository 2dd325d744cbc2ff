"""Snapshots of images; values seen with librbd 16.2.15."""

from __future__ import annotations

import pytest
from image_fixtures import MIB, Cluster, R, cluster, eventually, heads, io, refused

from librbd_py import rbd
from librbd_py.image import map_check, object_map
from librbd_py.store.api import ObjectContext

__all__ = ["cluster", "io"]

ORDERS = [22, 12]


def names(image: rbd.Image) -> list[str]:
    return [row["name"] for row in image.list_snaps()]


def test_create_list_and_look_up(io: ObjectContext) -> None:
    R.create(io, "a", 10 * MIB)
    with rbd.Image(io, "a") as image:
        image.create_snap("s1")
        assert image.is_exclusive_lock_owner()
        refused(rbd.ImageExists, 17, image.create_snap, "s1")
        refused(rbd.InvalidArgument, None, image.create_snap, None)
        image.create_snap("")
        image.create_snap(b"bytes")
        image.create_snap("x@y")
        rows = list(image.list_snaps())
        assert [(row["name"], row["size"], row["namespace"]) for row in rows] == [
            ("s1", 10 * MIB, 0),
            ("", 10 * MIB, 0),
            ("bytes", 10 * MIB, 0),
            ("x@y", 10 * MIB, 0),
        ]
        assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
        number = rows[0]["id"]
        assert image.snap_get_id("s1") == number and image.snap_get_name(number) == "s1"
        assert image.snap_exists("s1") and not image.snap_exists("no")
        assert not image.is_protected_snap("s1")
        assert image.get_snap_timestamp(number).microsecond == 0
        assert image.snap_get_namespace_type(number) == rbd.RBD_SNAP_NAMESPACE_TYPE_USER
        for call, argument in (
            (image.is_protected_snap, "no"),
            (image.snap_get_id, "no"),
            (image.snap_get_name, 999),
            (image.get_snap_timestamp, 999),
            (image.snap_get_namespace_type, 999),
            (image.remove_snap, "no"),
            (image.remove_snap_by_id, 999),
            (image.rollback_to_snap, "no"),
            (image.protect_snap, "no"),
            (image.unprotect_snap, "no"),
            (image.set_snap, "no"),
            (image.set_snap_by_id, 999),
        ):
            refused(rbd.ImageNotFound, 2, call, argument)
        for call in (
            image.snap_get_group_namespace,
            image.snap_get_trash_namespace,
            image.snap_get_mirror_namespace,
        ):
            refused(rbd.InvalidArgument, 22, call, number)


def test_rename_and_remove(io: ObjectContext) -> None:
    R.create(io, "a", MIB)
    with rbd.Image(io, "a") as image:
        for name in ("s1", "s2", "s3"):
            image.create_snap(name)
        image.rename_snap("s1", "t1")
        refused(rbd.ImageNotFound, 2, image.rename_snap, "s1", "x")
        refused(rbd.ImageExists, 17, image.rename_snap, "t1", "t1")
        refused(rbd.ImageExists, 17, image.rename_snap, "t1", "s2")
        image.remove_snap("s2")
        image.remove_snap_by_id(image.snap_get_id("s3"))
        assert names(image) == ["t1"]
        image.create_snap("s2")
        assert names(image) == ["t1", "s2"]


def test_protection(io: ObjectContext) -> None:
    R.create(io, "a", MIB)
    with rbd.Image(io, "a") as image:
        image.create_snap("s")
        image.protect_snap("s")
        assert image.is_protected_snap("s")
        refused(rbd.ImageBusy, 16, image.protect_snap, "s")
        refused(rbd.ImageBusy, 16, image.remove_snap, "s")
        refused(rbd.ImageBusy, 16, image.remove_snap_by_id, image.snap_get_id("s"))
        assert names(image) == ["s"]  # not even half removed
        image.unprotect_snap("s")
        refused(rbd.InvalidArgument, 22, image.unprotect_snap, "s")
        image.protect_snap("s")
        image.remove_snap2("s", rbd.RBD_SNAP_REMOVE_UNPROTECT)
        assert names(image) == []


def test_limit(io: ObjectContext) -> None:
    R.create(io, "a", MIB)
    with rbd.Image(io, "a") as image:
        image.create_snap("s1")
        refused(rbd.OSError, 34, image.set_snap_limit, 0)
        assert image.set_snap_limit(1) == 0
        assert image.get_snap_limit() == 1
        refused(rbd.DiskQuotaExceeded, 122, image.create_snap, "s2")
        assert image.remove_snap_limit() == 0
        assert image.get_snap_limit() == (1 << 64) - 1
        image.create_snap("s2")


def test_the_snapshot_that_is_read_can_be_removed(io: ObjectContext) -> None:
    R.create(io, "a", MIB)
    with rbd.Image(io, "a") as image:
        image.write(b"old", 0)
        image.create_snap("s")
        image.set_snap("s")
        assert not image.is_exclusive_lock_owner()
        image.remove_snap("s")
        refused(rbd.ImageNotFound, 2, image.read, 0, 3)
        image.set_snap(None)
        assert image.read(0, 3) == b"old"


def test_nobody_rolls_back_what_another_owns(cluster: Cluster, io: ObjectContext) -> None:
    R.create(io, "a", MIB)
    with rbd.Image(io, "a") as owner, rbd.Image(cluster.connect().open("rbd"), "a") as other:
        owner.write(b"old", 0)
        owner.create_snap("s")
        owner.write(b"new", 0)
        refused(rbd.ReadOnlyImage, 30, other.rollback_to_snap, "s")
        assert owner.is_exclusive_lock_owner()
        owner.rollback_to_snap("s")
        assert owner.read(0, 3) == b"old"
    with rbd.Image(cluster.connect().open("rbd"), "a") as other:
        other.write(b"new", 0)
        other.rollback_to_snap("s")
        assert other.read(0, 3) == b"old"


def test_a_snapshot_is_read_only(io: ObjectContext) -> None:
    R.create(io, "a", MIB)
    with rbd.Image(io, "a") as image:
        image.write(b"old", 0)
        image.create_snap("s")
        image.write(b"new", 0)
        image.set_snap("s")
        assert image.read(0, 3) == b"old"
        for call, args in (
            (image.write, (b"a", 0)),
            (image.discard, (0, 4096)),
            (image.write_zeroes, (0, 10)),
            (image.resize, (2 * MIB,)),
            (image.update_features, (4, False)),
            (image.metadata_set, ("a", "b")),
            (image.rollback_to_snap, ("s",)),
        ):
            refused(rbd.ReadOnlyImage, 30, call, *args)
        refused(rbd.InvalidArgument, 22, image.flatten)
        refused(rbd.InvalidArgument, 22, image.lock_acquire, 0)
        image.flush()
        image.create_snap("t")  # of HEAD: librbd allows it
        image.rename_snap("t", "u")
        assert image.set_snap_limit(5) == 0
        assert image.read(0, 3) == b"old"
        image.set_snap(None)
        assert image.read(0, 3) == b"new"
        image.set_snap_by_id(image.snap_get_id("u"))
        assert image.read(0, 3) == b"new"
        image.set_snap_by_id(None)
        image.write(b"end", 0)
    with rbd.Image(io, "a", snapshot="s") as image:
        assert image.read(0, 3) == b"old"
        refused(rbd.ReadOnlyImage, 30, image.write, b"a", 0)
        assert not image.is_exclusive_lock_owner()


@pytest.mark.parametrize("order", ORDERS)
def test_rollback_restores_content_and_size(io: ObjectContext, order: int) -> None:
    size = MIB + 777
    R.create(io, "a", size, order=order)
    with rbd.Image(io, "a") as image:
        image.write(b"1" * 70000, 0)
        image.create_snap("one")
        image.write(b"2" * 70000, 35000)
        image.create_snap("two")
        image.resize(50000)
        image.create_snap("three")
        image.resize(2 * MIB)
        image.write(b"4" * 1000, MIB)
        one = (b"1" * 70000).ljust(size, b"\0")
        two = (b"1" * 35000 + b"2" * 70000).ljust(size, b"\0")
        three = two[:50000]
        for name, content in (("two", two), ("three", three), ("one", one), ("two", two)):
            image.rollback_to_snap(name)
            assert image.size() == len(content)
            assert image.read(0, len(content)) == content
            for snap, kept in (("one", one), ("two", two), ("three", three)):
                image.set_snap(snap)
                assert (image.size(), image.read(0, len(kept))) == (len(kept), kept)
                image.set_snap(None)
            assert map_check.differences(image.handle) == []
        steps: list[tuple[int, int]] = []
        image.rollback_to_snap("one", on_progress=lambda *step: steps.append(step))
        assert len(steps) == image.stat()["num_objs"]


def test_a_map_that_is_marked_wrong_goes_nowhere_else(io: ObjectContext) -> None:
    """As librbd leaves those of older snapshots when it makes one: not to be believed, and empty."""
    R.create(io, "a", 8 << 12, order=12)
    with rbd.Image(io, "a") as image:
        image.write(b"1" * 5000, 0)
        image.create_snap("one")
        number = image.snap_get_id("one")
        image.write(b"2" * 5000, 4 << 12)
        object_map.save(io, image.id(), number, bytes(8))
        object_map.invalidate(io, image.handle.oid, [number], map_check.BOTH_INVALID)
        image.handle.refresh()
        image.rollback_to_snap("one")
        assert image.read(0, 5000) == b"1" * 5000 and image.flags() == 0
        assert [row for row in map_check.differences(image.handle) if row.startswith("HEAD")] == []
        image.remove_snap("one")
        assert image.flags() == rbd.RBD_FLAG_FAST_DIFF_INVALID


def test_removed_snapshots_free_their_data(io: ObjectContext) -> None:
    R.create(io, "a", 10 * MIB)
    with rbd.Image(io, "a") as image:
        image.write(b"x" * 1000, 0)
        image.create_snap("s")
        image.discard(0, 4 * MIB)
        image.set_snap("s")
        assert image.read(0, 4) == b"xxxx"
        image.set_snap(None)
        image.remove_snap("s")
        # An OSD trims in the background.
        eventually(lambda: [oid for oid in heads(io) if oid.startswith(f"rbd_data.{image.id()}")] == [])


def test_snapshots_of_another_client_are_seen_at_once(cluster: Cluster, io: ObjectContext) -> None:
    R.create(io, "a", MIB)
    with rbd.Image(io, "a") as mine, rbd.Image(cluster.connect().open("rbd"), "a") as theirs:
        theirs.write(b"before", 0)
        mine.create_snap("s")
        assert names(theirs) == ["s"]
        theirs.write(b"after!", 0)
        assert mine.read(0, 6) == b"after!"
        mine.set_snap("s")
        assert mine.read(0, 6) == b"before"
        theirs.resize(2 * MIB)
        theirs.remove_snap("s")
        mine.set_snap(None)
        assert (names(mine), mine.size()) == ([], 2 * MIB)


def test_a_snapshot_removed_under_a_reader_is_gone(cluster: Cluster, io: ObjectContext) -> None:
    R.create(io, "a", MIB)
    with rbd.Image(io, "a") as mine, rbd.Image(cluster.connect().open("rbd"), "a") as theirs:
        mine.write(b"x", 0)
        mine.create_snap("s")
        theirs.set_snap("s")
        assert theirs.read(0, 1) == b"x"
        mine.remove_snap("s")
        refused(rbd.ImageNotFound, 2, theirs.read, 0, 1)
        theirs.set_snap(None)
        assert theirs.read(0, 1) == b"x"


def test_sparsify_gives_back_zeros(io: ObjectContext) -> None:
    R.create(io, "a", 4 * MIB, order=20)
    with rbd.Image(io, "a") as image:
        image.write(bytes(MIB), 0)
        image.write(b"x" * 4096 + bytes(MIB - 4096), MIB)
        refused(rbd.InvalidArgument, 22, image.sparsify, 100)
        image.sparsify(4096)
        assert len([oid for oid in heads(io) if oid.startswith(f"rbd_data.{image.id()}")]) == 1
        assert image.read(MIB, 8192) == b"x" * 4096 + bytes(4096)
        assert map_check.differences(image.handle) == []

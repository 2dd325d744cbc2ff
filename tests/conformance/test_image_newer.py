"""What newer releases of librbd, or its C interface, offer on top of Ceph 16's Python module."""

from __future__ import annotations

import pytest
from image_fixtures import MIB, Cluster, R, cluster, io, refused

from librbd_py import rbd
from librbd_py.image import map_check, object_map, pool, trash
from librbd_py.store.api import NOSNAP, ObjectContext

__all__ = ["cluster", "io"]


def test_clones_of_a_groups_snapshot(io: ObjectContext) -> None:
    R.create(io, "a", 8 * MIB)
    R.group_create(io, "g")
    group = rbd.Group(io, "g")
    group.add_image(io, "a")
    with rbd.Image(io, "a") as image:
        image.write(b"first", 0)
        group.create_snap("s")
        (row,) = image.list_snaps()
        image.write(b"later", 0)
    R.clone(io, "a", row["id"], io, "kid")
    refused(rbd.ImageNotFound, 2, R.clone, io, "a", row["id"] + 1000, io, "other")
    with rbd.Image(io, "kid") as kid:
        assert kid.read(0, 5) == b"first" and kid.overlap() == 8 * MIB
        assert kid.get_parent_image_spec()["snap_name"] == row["name"]
        kid.write(b"mine", 4 * MIB)
    group.remove_snap("s")
    with rbd.Image(io, "a") as image:
        (left,) = image.list_snaps()
        assert left["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_TRASH
        refused(rbd.InvalidArgument, 22, R.clone, io, "a", left["id"], io, "late")
    with rbd.Image(io, "kid") as kid:
        kid.flatten()
        assert kid.read(0, 5) == b"first" and kid.read(4 * MIB, 4) == b"mine"
    with rbd.Image(io, "a") as image:
        assert list(image.list_snaps()) == []


def test_differences_since_a_snapshot_by_its_id(io: ObjectContext) -> None:
    R.create(io, "a", 8 * MIB)
    R.group_create(io, "g")
    group = rbd.Group(io, "g")
    group.add_image(io, "a")
    with rbd.Image(io, "a") as image:
        image.write(b"x" * 4096, 0)
        group.create_snap("s")
        (row,) = image.list_snaps()
        image.write(b"y" * 4096, 4 * MIB)
        found: list[tuple[int, int, bool]] = []
        image.diff_iterate(0, 8 * MIB, row["id"], lambda *args: found.append(args))
        assert found == [(4 * MIB, 4096, True)]
        refused(rbd.ImageNotFound, 2, image.diff_iterate, 0, 8 * MIB, row["id"] + 1000, print)


def test_vectors(io: ObjectContext) -> None:
    R.create(io, "a", MIB)
    with rbd.Image(io, "a") as image:
        assert image.writev([b"one", bytearray(b"two"), memoryview(b"three")], 10) == 11
        first, second = bytearray(4), bytearray(100)
        assert image.readv([first, second], 10) == 104
        assert bytes(first) == b"onet" and bytes(second).rstrip(b"\0") == b"wothree"
        assert image.readv([first, second], MIB - 6) == 6
        refused(rbd.InvalidArgument, 22, image.readv, [first], MIB)
        assert image.readv([], 0) == image.writev([], 0) == 0


@pytest.mark.parametrize("pattern", [b"ab", b"\0" * 512, b"x" * 4096])
def test_one_pattern_again_and_again(io: ObjectContext, pattern: bytes) -> None:
    R.create(io, "a", 12 * MIB)
    with rbd.Image(io, "a") as image:
        image.write(b"z" * 10 * MIB, 0)
        assert image.writesame(MIB, 9 * MIB, pattern) == 9 * MIB
        assert image.read(MIB, 9 * MIB) == pattern * (9 * MIB // len(pattern))
        assert image.read(MIB - 1, 1) == b"z"
        refused(rbd.InvalidArgument, 22, image.writesame, 0, len(pattern) + 1, pattern)
        refused(rbd.InvalidArgument, 22, image.writesame, 11 * MIB, 2 * MIB, pattern)
        refused(rbd.InvalidArgument, 22, image.writesame, 0, 4, b"")
        assert image.writesame(0, 0, pattern) == 0
    with rbd.Image(io, "a", read_only=True) as image:
        refused(rbd.ReadOnlyImage, 30, image.writesame, 0, len(pattern), pattern)


def test_maps_are_rebuilt_from_an_image_open_at_a_snapshot(io: ObjectContext, cluster: Cluster) -> None:
    R.create(io, "a", 8 * MIB)
    with rbd.Image(io, "a") as image:
        image.write(b"x", 0)
        image.create_snap("s")
        snap_id = image.snap_get_id("s")
        object_map.invalidate(io, image.handle.oid, [snap_id, NOSNAP], map_check.BOTH_INVALID)
    with rbd.Image(io, "a", snapshot="s") as image:
        assert image.flags() == map_check.BOTH_INVALID
        image.rebuild_object_map()
        assert image.flags() == 0 and image.read(0, 2) == b"x\0"
        refused(rbd.ReadOnlyImage, 30, image.write, b"y", 0)
        image.set_snap(None)
        assert image.flags() == map_check.BOTH_INVALID
        image.rebuild_object_map()
        assert image.flags() == 0 and map_check.differences(image.handle) == []
    with rbd.Image(io, "a", snapshot="s", read_only=True) as image:
        refused(rbd.ReadOnlyImage, 30, image.rebuild_object_map)


def test_discards_reach_what_only_the_parent_has(io: ObjectContext) -> None:
    """As in librbd: in whole steps of the discard granularity."""
    R.create(io, "a", 16 * MIB)
    with rbd.Image(io, "a") as image:
        image.write(b"p" * 10 * MIB, 0)
        image.create_snap("s")
    for name, snaps in (("kid", ()), ("old kid", ("mine",))):
        R.clone(io, "a", "s", io, name)
        with rbd.Image(io, name) as kid:
            for snap in snaps:
                kid.create_snap(snap)
            expected = bytearray(b"p" * 10 * MIB + bytes(6 * MIB))
            for at, length, first, last in (
                (65536, 65536, 65536, 131072),
                (4 * MIB + 4096, 8192, 0, 0),
                (4 * MIB + 4096, 131072, 4 * MIB + 65536, 4 * MIB + 131072),
                (6 * MIB, 2 * MIB, 6 * MIB, 8 * MIB),
                (8 * MIB, MIB, 8 * MIB, 9 * MIB),
                (12 * MIB, 65536, 0, 0),
            ):
                kid.discard(at, length)
                expected[first:last] = bytes(last - first)
                assert kid.read(0, 16 * MIB) == expected, (name, at)
            for snap in snaps:
                kid.set_snap(snap)
                assert kid.read(0, 10 * MIB) == b"p" * 10 * MIB
                kid.set_snap(None)
            assert map_check.differences(kid.handle) == []


def test_purging_until_the_pool_is_less_full(io: ObjectContext) -> None:
    """What comes first goes first; a store that does not know its size is never too full."""
    for delay, name in enumerate(("first", "second", "third")):
        R.create(io, name, 8 * MIB)
        with rbd.Image(io, name) as image:
            image.write(b"x" * 4 * MIB, 0)
        R.trash_move(io, name, 1000 * (delay + 1))

    def left() -> list[str]:
        return sorted(row["name"] for row in R.trash_list(io))

    for wrong in (1.5, -2):
        refused(rbd.InvalidArgument, 22, R.trash_purge, io, None, wrong)
    R.trash_purge(io, None, 1)
    assert left() == ["first", "second", "third"]
    used, total = pool.usage(io)
    trash.purge_to_free(io, 5 * MIB)
    assert left() == ["third"]
    R.trash_purge(io, None, 0)
    assert left() == ([] if used else ["third"]) and total >= used


def test_an_image_whose_removal_was_cancelled_counts_as_one(io: ObjectContext) -> None:
    R.create(io, "a", 8 * MIB)
    refused(rbd.OperationCanceled, 125, R.remove, io, "a", lambda done, total: -rbd.ECANCELED)
    found = R.pool_stats_get(io)
    assert (R.list(io), found["image_count"], found["trash_count"]) == (["a"], 1, 0)
    R.remove(io, "a")
    assert R.pool_stats_get(io)["image_count"] == 0

"""Clones, their parents, flatten and copies; values seen with librbd 16.2.15."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from image_fixtures import MIB, Cluster, R, cluster, heads, io, refused

from librbd_py import rbd
from librbd_py.format import features as ft
from librbd_py.format import object_map as fm
from librbd_py.format.object_map import EXISTS, EXISTS_CLEAN, NONEXISTENT, PENDING
from librbd_py.image import clones, map_check, object_map
from librbd_py.image.cls import call, u8, u64
from librbd_py.image.handle import ImageHandle
from librbd_py.image.header import header_oid, map_oid
from librbd_py.store.api import NOSNAP, ObjectContext, Read

__all__ = ["cluster", "io"]

SIZE = 10 * MIB + 5


@pytest.fixture
def parent(io: ObjectContext) -> ObjectContext:
    """Image `p` with some content and snapshot `s1`."""
    R.create(io, "p", SIZE)
    with rbd.Image(io, "p") as image:
        image.write(b"A" * 100, 0)
        image.write(b"B" * 100, 5 * MIB)
        image.metadata_set("mk", "mv")
        image.create_snap("s1")
        image.write(b"C" * 100, 0)
    return io


def steps_to(rows: list[int]) -> Callable[[int, int], None]:
    return lambda offset, total: rows.extend((offset, total))


def children(image: rbd.Image) -> list[str]:
    return sorted(row["image"] for row in image.list_children2())


def test_a_clone_shows_its_parent(parent: ObjectContext) -> None:
    R.clone(parent, "p", "s1", parent, "c")
    with rbd.Image(parent, "p") as image, rbd.Image(parent, "c") as child:
        assert child.parent_info() == ("rbd", "p", "s1")
        assert child.parent_id() == image.id()
        spec = child.get_parent_image_spec()
        assert {key: spec[key] for key in ("pool_name", "pool_namespace", "image_name", "snap_name")} == {
            "pool_name": "rbd",
            "pool_namespace": "",
            "image_name": "p",
            "snap_name": "s1",
        }
        assert (child.overlap(), child.size(), child.features()) == (SIZE, SIZE, 317)
        assert (child.op_features(), image.op_features()) == (2, 1)
        assert child.stat()["order"] == 22
        assert list(child.metadata_list()) == [("mk", "mv")]
        assert child.read(0, 3) == b"AAA"
        child.write(b"x", 1)
        assert child.read(0, 3) == b"AxA"
        assert child.read(5 * MIB, 2) == b"BB"
        for call in (image.parent_info, image.parent_id, image.get_parent_image_spec):
            refused(rbd.ImageNotFound, 2, call)


def test_clone_arguments_are_checked(cluster: Cluster, parent: ObjectContext) -> None:
    other = cluster.pool("other")

    def clone(
        code: int | None, kind: type[BaseException], snap: str | None, name: str, image: str = "p", **more: int
    ) -> None:
        refused(kind, code, R.clone, parent, image, snap, other, name, **more)

    clone(2, rbd.ImageNotFound, "nope", "c")
    clone(2, rbd.ImageNotFound, "s1", "c", "nope")
    clone(None, rbd.InvalidArgument, None, "c")
    clone(38, rbd.FunctionNotSupported, "s1", "c", features=0)
    clone(33, rbd.ArgumentOutOfRange, "s1", "c", order=11)
    clone(22, rbd.InvalidArgument, "s1", "c", order=20)  # the parent's stripe unit does not fit
    R.clone(parent, "p", "s1", other, "c", features=1, order=20, stripe_unit=65536, stripe_count=2)
    clone(17, rbd.ImageExists, "s1", "c")
    refused(rbd.ImageExists, 17, R.clone, parent, "p", "s1", parent, "p")
    assert R.list(other) == ["c"]
    with rbd.Image(other, "c") as child:
        assert (child.features(), child.stripe_unit()) == (ft.LAYERING | ft.STRIPINGV2 | ft.OPERATIONS, 65536)
        assert child.read(5 * MIB - 2, 4) == b"\0\0BB"


def test_children_in_several_pools_and_in_the_trash(cluster: Cluster, parent: ObjectContext) -> None:
    other = cluster.pool("other")
    R.namespace_create(other, "ns")
    inside = cluster.pool("other", "ns")
    R.clone(parent, "p", "s1", parent, "c1")
    R.clone(parent, "p", "s1", other, "c2")
    R.clone(parent, "p", "s1", inside, "c3")
    R.clone(parent, "p", "s1", parent, "c4", data_pool="data")
    R.trash_move(other, "c2")
    with rbd.Image(parent, "p") as image:
        rows = {row["image"]: row for row in image.list_children2()}
        assert {name: (row["pool"], row["pool_namespace"], row["trash"]) for name, row in rows.items()} == {
            "c1": ("rbd", "", False),
            "c2": ("other", "", True),
            "c3": ("other", "ns", False),
            "c4": ("rbd", "", False),
        }
        assert sorted(image.list_children()) == [("other", "c3"), ("rbd", "c1"), ("rbd", "c4")]
        image.set_snap("s1")
        assert children(image) == ["c1", "c2", "c3", "c4"]
        image.set_snap(None)
        image.create_snap("s2")
        image.set_snap("s2")
        assert children(image) == []
        image.set_snap(None)
        with rbd.Image(parent, "c1") as child:
            child.create_snap("deep")
        R.clone(parent, "c1", "deep", parent, "grandchild")
        assert sorted(row["image"] for row in image.list_descendants()) == ["c1", "c2", "c3", "c4", "grandchild"]
        assert children(image) == ["c1", "c2", "c3", "c4"]


def test_a_parent_snapshot_goes_with_its_last_clone(parent: ObjectContext) -> None:
    R.clone(parent, "p", "s1", parent, "c1")
    R.clone(parent, "p", "s1", parent, "c2")
    with rbd.Image(parent, "p") as image:
        image.protect_snap("s1")
        image.unprotect_snap("s1")  # format 2 clones do not need it
        image.remove_snap("s1")
        (row,) = image.list_snaps()
        assert (row["namespace"], row["trash"]) == (2, {"original_name": "s1"})
        assert row["name"] != "s1"
        assert (image.op_features(), children(image)) == (9, ["c1", "c2"])
        assert image.snap_get_trash_namespace(row["id"]) == {"original_name": "s1"}
        assert image.snap_get_namespace_type(row["id"]) == 2
        refused(rbd.ImageBusy, 16, image.remove_snap_by_id, row["id"])
        assert not image.snap_exists("s1")
        image.set_snap_by_id(row["id"])
        assert image.read(0, 3) == b"AAA"
        image.set_snap(None)
        refused(rbd.ImageBusy, 16, R.remove, parent, "p")
    refused(rbd.ImageHasSnapshots, 39, R.remove, parent, "p")
    with rbd.Image(parent, "c1") as child:
        assert child.parent_info() == ("rbd", "p", row["name"])
        child.flatten()
        assert child.read(0, 3) == b"AAA"
    with rbd.Image(parent, "p") as image:
        assert children(image) == ["c2"]
        R.remove(parent, "c2")
        assert (list(image.list_snaps()), image.op_features()) == ([], 0)
    R.remove(parent, "p")
    with rbd.Image(parent, "c1") as child:
        assert child.read(5 * MIB, 3) == b"BBB"


def test_a_parent_in_the_trash_goes_with_its_last_clone(parent: ObjectContext) -> None:
    """Only one that went there for its clones' sake, with the last of all its snapshots; and so does its own parent."""
    R.clone(parent, "p", "s1", parent, "c")
    with rbd.Image(parent, "c") as child:
        child.create_snap("s2")
        child.create_snap("s3")
    R.clone(parent, "c", "s2", parent, "d")
    R.clone(parent, "c", "s3", parent, "e")
    R.clone(parent, "c", "s3", parent, "f")
    for name, snaps in (("p", ["s1"]), ("c", ["s2", "s3"])):
        with rbd.Image(parent, name) as image:
            for snap in snaps:
                image.remove_snap(snap)
        refused(rbd.ImageHasSnapshots, 39, R.remove, parent, name)
    R.config_set(parent, "rbd_move_parent_to_trash_on_remove", "true")
    R.remove(parent, "p")
    R.remove(parent, "c")
    kept = [("c", "USER_PARENT"), ("p", "USER_PARENT")]
    for last in ("d", "e"):
        R.remove(parent, last)
        assert sorted((row["name"], row["source"]) for row in R.trash_list(parent)) == kept
    with rbd.Image(parent, "f") as child:
        assert child.read(5 * MIB, 3) == b"BBB"
        child.flatten()
        assert child.read(5 * MIB, 3) == b"BBB"
    assert list(R.trash_list(parent)) == []


def test_a_parent_that_was_put_into_the_trash_stays_there(parent: ObjectContext) -> None:
    R.clone(parent, "p", "s1", parent, "c")
    with rbd.Image(parent, "p") as image:
        image.remove_snap("s1")
    R.trash_move(parent, "p")
    R.remove(parent, "c")
    assert [row["name"] for row in R.trash_list(parent)] == ["p"]


def test_flatten_with_and_without_deep_flatten(parent: ObjectContext) -> None:
    deep = ft.DEFAULT
    for name, features in (("deep", deep), ("flat", deep & ~ft.DEEP_FLATTEN)):
        R.clone(parent, "p", "s1", parent, name, features=features)
        with rbd.Image(parent, name) as child:
            child.create_snap("cs")
            steps: list[int] = []
            child.flatten(steps_to(steps))
            assert steps == [0, 3, 1, 3, 2, 3]
            refused(rbd.InvalidArgument, 22, child.flatten)
            refused(rbd.ImageNotFound, 2, child.parent_info)
            assert child.overlap() == 0
            child.set_snap("cs")
            assert child.read(0, 3) == b"AAA"
            assert child.overlap() == (0 if name == "deep" else SIZE)
            child.set_snap(None)
            assert child.op_features() == (0 if name == "deep" else 2)
            assert map_check.differences(child.handle) == []
    with rbd.Image(parent, "p") as image:
        assert children(image) == ["flat"]
        with rbd.Image(parent, "flat") as child:
            child.remove_snap("cs")
            assert child.op_features() == 0
        assert children(image) == []


def test_a_format_1_clone_that_goes_to_another_namespace_keeps_its_parent(cluster: Cluster, io: ObjectContext) -> None:
    """Clones of format 1 are looked for in the parent's namespace only: away from it they are of format 2."""
    R.namespace_create(io, "space")
    space = cluster.pool("rbd", "space")
    R.create(io, "p", MIB, order=20)
    with rbd.Image(io, "p") as image:
        image.write(b"A" * 100, 0)
        image.create_snap("s")
        image.protect_snap("s")
        for name in ("moves", "is copied", "stays"):
            clones.clone(io, "p", "s", io, name, clone_format=1)
        R.migration_prepare(io, "moves", space, "moves")
        R.migration_execute(space, "moves")
        R.migration_commit(space, "moves")
        with rbd.Image(io, "is copied") as child:
            child.deep_copy(space, "is copied")
        refused(rbd.ImageBusy, 16, image.unprotect_snap, "s")
        for name in ("is copied", "stays"):
            R.remove(io, name)
        image.unprotect_snap("s")
        image.remove_snap("s")  # to the trash: it has clones
        for name in ("moves", "is copied"):
            with rbd.Image(space, name) as child:
                assert (child.op_features(), child.read(0, 1)) == (rbd.RBD_OPERATION_FEATURE_CLONE_CHILD, b"A")
            assert len(list(image.list_snaps())) == 1
            R.remove(space, name)
        assert list(image.list_snaps()) == []


def test_the_format_1_clones_of_an_image_that_goes_to_another_namespace(cluster: Cluster, io: ObjectContext) -> None:
    R.namespace_create(io, "space")
    space = cluster.pool("rbd", "space")
    R.create(io, "p", MIB, order=20)
    with rbd.Image(io, "p") as image:
        image.write(b"A" * 100, 0)
        image.create_snap("s")
        image.protect_snap("s")
    clones.clone(io, "p", "s", io, "c", clone_format=1)
    R.migration_prepare(io, "p", space, "p")
    R.migration_abort(space, "p")
    with rbd.Image(io, "p") as image:
        assert children(image) == ["c"]
    R.migration_prepare(io, "p", space, "p")
    R.migration_execute(space, "p")
    R.migration_commit(space, "p")
    with rbd.Image(space, "p") as image:
        assert children(image) == ["c"]
        image.unprotect_snap("s")
        image.remove_snap("s")
        with rbd.Image(io, "c") as child:
            assert child.read(0, 1) == b"A"
        R.remove(io, "c")
        assert list(image.list_snaps()) == []


def test_format_1_clones_need_protection(cluster: Cluster, parent: ObjectContext) -> None:
    other = cluster.pool("other")
    with pytest.raises(OSError) as caught:
        clones.clone(parent, "p", "s1", other, "c", clone_format=1)
    assert caught.value.errno == 22
    assert R.list(other) == []
    with rbd.Image(parent, "p") as image:
        image.protect_snap("s1")
        clones.clone(parent, "p", "s1", other, "c", clone_format=1)
        assert image.op_features() == 0
        assert list(image.list_children()) == [("other", "c")]
        refused(rbd.ImageBusy, 16, image.unprotect_snap, "s1")
        assert image.is_protected_snap("s1")
        with rbd.Image(other, "c") as child:
            assert (child.op_features(), child.read(0, 1)) == (0, b"A")
        image.remove_snap2("s1", rbd.RBD_SNAP_REMOVE_FORCE)
        assert list(image.list_snaps()) == []
    with rbd.Image(other, "c") as child:
        assert child.read(0, 1) == b"A" and child.overlap() == 0


def test_shrinking_and_growing_a_clone(parent: ObjectContext) -> None:
    R.clone(parent, "p", "s1", parent, "c")
    with rbd.Image(parent, "c") as child:
        child.create_snap("before")
        child.resize(3 * MIB)
        assert child.overlap() == 3 * MIB
        child.resize(SIZE)
        assert child.overlap() == 3 * MIB
        assert child.read(5 * MIB, 2) == bytes(2)
        child.rollback_to_snap("before")
        assert child.read(5 * MIB, 2) == b"BB"
        child.resize(0)
        assert child.overlap() == 0
        child.flatten()  # it is still tied to its parent by the snapshot
        child.remove_snap("before")
    with rbd.Image(parent, "p") as image:
        assert children(image) == []


def test_discards_hide_the_parent(parent: ObjectContext) -> None:
    R.clone(parent, "p", "s1", parent, "c")
    with rbd.Image(parent, "c") as child:
        child.discard(0, 4 * MIB)
        assert child.read(0, 4) == bytes(4)
        child.write_zeroes(5 * MIB + 10, 10)
        assert child.read(5 * MIB, 30) == b"B" * 10 + bytes(10) + b"B" * 10
        child.create_snap("s")
        child.write(b"new", 0)
        child.set_snap("s")
        assert child.read(0, 4) == bytes(4)
        assert map_check.differences(child.handle) == []


@pytest.mark.parametrize("hide", ["discard", "write_zeroes", "write", "resize"])
def test_snapshots_of_a_clone_survive_hiding_and_flatten(parent: ObjectContext, hide: str) -> None:
    R.clone(parent, "p", "s1", parent, "c")
    with rbd.Image(parent, "c") as child:
        child.create_snap("s")
        if hide == "discard":
            child.discard(0, SIZE)
        elif hide == "write_zeroes":
            child.write_zeroes(0, SIZE)
        elif hide == "write":
            child.write(b"w" * (8 * MIB), 0)
        else:
            child.resize(0)
        child.flatten()
        child.set_snap("s")
        assert child.overlap() == 0
        assert child.read(0, 101) == b"A" * 100 + b"\0"
        assert child.read(5 * MIB, 101) == b"B" * 100 + b"\0"
        child.set_snap(None)
        assert map_check.differences(child.handle) == []


def states(image: rbd.Image) -> list[list[int]]:
    """The object maps of the snapshots, oldest first, and of HEAD."""
    handle = image.handle
    maps = [object_map.load(handle.ctx, handle.id, snap_id) for snap_id in (*handle.header.snaps, NOSNAP)]
    assert map_check.differences(handle) == []
    return [list(found) for found in maps]


def changed(image: rbd.Image, start: str | None, end: str | None) -> list[int]:
    """Objects that a fast diff names."""
    rows: list[int] = []
    if end is not None:
        image.set_snap(end)
    image.diff_iterate(0, image.size(), start, lambda at, size, data: rows.append(at // (4 * MIB)), False, True)
    image.set_snap(None)
    return rows


def test_object_maps_of_snapshots_learn_of_copy_ups(parent: ObjectContext) -> None:
    """States as librbd 16.2.15 writes them: the data came with the oldest snapshot, and has not changed since."""
    R.clone(parent, "p", "s1", parent, "c")
    with rbd.Image(parent, "c") as child:
        for snap in ("a", "b", "c"):
            child.create_snap(snap)
        none = [NONEXISTENT, NONEXISTENT, NONEXISTENT]
        assert states(child) == [none] * 4
        assert changed(child, "a", None) == []
        child.write(b"x", 5 * MIB)
        written = [NONEXISTENT, EXISTS, NONEXISTENT]
        same = [NONEXISTENT, EXISTS_CLEAN, NONEXISTENT]
        assert states(child) == [written, same, same, written]
        assert [changed(child, *points) for points in (("a", "c"), ("c", None), (None, "a"))] == [[], [1], [1]]
        child.create_snap("d")
        child.remove_snap("a")
        assert states(child) == [written, same, written, same]  # what a knew of changes went to b
        child.flatten()
        full, clean = [EXISTS, EXISTS, NONEXISTENT], [EXISTS_CLEAN, EXISTS_CLEAN, NONEXISTENT]
        assert states(child) == [full, clean, [EXISTS_CLEAN, EXISTS, NONEXISTENT], clean]
        assert [changed(child, *points) for points in (("b", "d"), ("d", None), (None, "d"))] == [[1], [], [0, 1]]
        child.rollback_to_snap("b")
        assert states(child)[:3] == [full, clean, [EXISTS_CLEAN, EXISTS, NONEXISTENT]]
        assert changed(child, "d", None) == [0, 1]
        assert child.read(5 * MIB, 2) == b"BB"
        child.remove_snap("b")
        child.remove_snap("c")
        assert states(child)[0] == full


@pytest.mark.parametrize("hide", ["discard", "shrink"])
def test_a_snapshot_keeps_in_its_map_what_a_copy_up_gave_it_before_the_object_went(
    parent: ObjectContext, hide: str
) -> None:
    R.clone(parent, "p", "s1", parent, "c")
    with rbd.Image(parent, "c") as child:
        child.create_snap("a")
        child.write(b"x", 5 * MIB)
        child.create_snap("b")
        if hide == "discard":
            child.discard(4 * MIB, 4 * MIB)
        else:
            child.resize(4 * MIB)
        assert states(child)[:2] == [[NONEXISTENT, EXISTS, NONEXISTENT]] * 2
        assert changed(child, "a", "b") == [1]
        handle = child.handle
        oid = map_oid(handle.id, min(handle.header.snaps))
        for state in (PENDING, NONEXISTENT):  # a change of one entry leaves the others, and the CRCs, as they are seen
            handle.ctx.write(oid, [call("object_map_update", u64(2) + u64(3) + u8(state) + u8(0))])
            assert list(fm.decode(handle.ctx.read(oid, [Read()])[0])) == [NONEXISTENT, EXISTS, state]
        assert handle.ctx.stat(oid).size == fm.encoded_length(3)
        assert states(child)[0] == [NONEXISTENT, EXISTS, NONEXISTENT]


def test_a_chain_of_clones(parent: ObjectContext) -> None:
    name, snap = "p", "s1"
    for level in range(6):
        R.clone(parent, name, snap, parent, f"c{level}")
        name, snap = f"c{level}", "s"
        with rbd.Image(parent, name) as image:
            image.write(bytes([65 + level]) * 10, 6 * MIB + level * 10)
            image.create_snap(snap)
    with rbd.Image(parent, "c5") as last:
        assert last.read(6 * MIB, 60) == b"".join(bytes([65 + level]) * 10 for level in range(6))
        assert last.read(0, 3) == b"AAA"
        last.flatten()
        assert last.read(0, 3) == b"AAA"


def test_a_cycle_of_parents_is_refused(parent: ObjectContext) -> None:
    R.clone(parent, "p", "s1", parent, "c")
    with rbd.Image(parent, "c") as child:
        child.create_snap("s")
        number, child_id = child.snap_get_id("s"), child.id()
    with rbd.Image(parent, "p") as image:
        parent_id = image.id()
    from librbd_py.format.header import ParentImageSpec
    from librbd_py.image import cls

    spec = ParentImageSpec(parent.pool_id, "", child_id, number)
    parent.exec(header_oid(parent_id), "rbd", "parent_attach", cls.encoded(spec) + cls.u64(SIZE))
    with pytest.raises(OSError) as caught:
        ImageHandle.open(parent, "p")
    assert caught.value.errno == 40  # ELOOP


def test_copies(cluster: Cluster, parent: ObjectContext) -> None:
    other = cluster.pool("other")
    R.clone(parent, "p", "s1", parent, "c")
    with rbd.Image(parent, "c") as child:
        child.write(b"own", 9 * MIB)
        child.create_snap("cs")
        child.write(b"mine", 9 * MIB)
        child.copy(other, "flat")
        refused(rbd.ImageExists, 17, child.copy, other, "flat")
        child.deep_copy(other, "deep")
        child.set_snap("cs")
        child.copy(other, "at-snap")
        child.set_snap(None)
    for name, content, snaps in (("flat", b"mine", []), ("at-snap", b"own\0", []), ("deep", b"mine", ["cs"])):
        with rbd.Image(other, name) as copied:
            assert (copied.size(), copied.read(9 * MIB, 4), copied.read(0, 3)) == (SIZE, content, b"AAA")
            assert [row["name"] for row in copied.list_snaps()] == snaps
            parent_kept = 0 if name != "deep" else 256  # clone-child
            assert (copied.features(), list(copied.metadata_list())) == (61 | parent_kept, [("mk", "mv")])
    with rbd.Image(other, "deep") as copied:
        copied.set_snap("cs")
        assert copied.read(9 * MIB, 4) == b"own\0"
    with rbd.Image(parent, "p") as image:
        assert children(image) == ["c", "deep"]


def test_a_deep_copy_of_a_clone_keeps_its_parent(parent: ObjectContext) -> None:
    R.clone(parent, "p", "s1", parent, "c")
    with rbd.Image(parent, "c") as child:
        child.write(b"own", 1)
        child.deep_copy(parent, "d")
    with rbd.Image(parent, "d") as copied:
        assert copied.parent_info() == ("rbd", "p", "s1")
        assert copied.read(0, 5) == b"AownA"
        assert copied.handle.header.overlap_at(NOSNAP) == SIZE


def test_a_removed_clone_leaves_no_trace(parent: ObjectContext) -> None:
    before = sorted(heads(parent))
    R.clone(parent, "p", "s1", parent, "c")
    with rbd.Image(parent, "c") as child:
        child.write(b"x", 0)
    R.remove(parent, "c")
    assert sorted(set(heads(parent)) - {"rbd_trash"}) == before
    with rbd.Image(parent, "p") as image:
        assert (children(image), image.op_features()) == ([], 0)

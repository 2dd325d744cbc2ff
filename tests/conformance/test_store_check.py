"""`rbdpy store check` on a store that has no files of its own to look at: what is wrong is found and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from image_fixtures import MIB, Cluster, R, cluster, io

from librbd_py import rbd
from librbd_py.format import features as ft
from librbd_py.format import names
from librbd_py.image import object_map
from librbd_py.store.api import ObjectContext, ObjectName, OmapRmKeys, OmapSet, Remove, Write
from librbd_py.store.check.pools import check
from librbd_py.store.embedded import EmbeddedStore

__all__ = ["cluster", "io"]

MAPPED = ft.LAYERING | ft.EXCLUSIVE_LOCK | ft.OBJECT_MAP | ft.FAST_DIFF
Damage = Callable[[Cluster, ObjectContext, str], None]


def fill(cluster: Cluster, io: ObjectContext) -> str:
    """One of each, sound. The id of image "a", which has objects that only its snapshot needs, and a clone."""
    R.namespace_create(io, "space")
    R.create(io, "a", MIB, 16, False, MAPPED)
    with rbd.Image(io, "a") as image:
        image.write(b"1" * MIB, 0)
        image.create_snap("s")
        image.write(b"2" * 100, 0)
        image.discard(MIB // 2, MIB // 2)
        number = str(image.id())
    R.clone(io, "a", "s", cluster.pool("rbd", "space"), "kid", MAPPED)
    R.create(io, "far", MIB, 16, False, MAPPED, data_pool="data")
    with rbd.Image(io, "far") as image:
        image.write(b"3" * 100_000, 0)
    R.group_create(io, "g")
    rbd.Group(io, "g").add_image(io, "a")
    rbd.Group(io, "g").create_snap("gs")
    R.create(io, "gone", MIB)
    R.trash_move(io, "gone", 0)
    return number


def no_name(cluster: Cluster, io: ObjectContext, number: str) -> None:
    io.write(names.DIRECTORY, [OmapRmKeys([b"name_a", b"id_" + number.encode()])])


def no_header(cluster: Cluster, io: ObjectContext, number: str) -> None:
    io.write(names.header(number), [Remove()])


def no_map(cluster: Cluster, io: ObjectContext, number: str) -> None:
    io.write(names.object_map(number), [Remove()])


def wrong_map(cluster: Cluster, io: ObjectContext, number: str) -> None:
    object_map.save(io, number, names.NOSNAP, bytes(16))


def lone_map(cluster: Cluster, io: ObjectContext, number: str) -> None:
    object_map.save(io, number, 12345, bytes(16))


def damaged(cluster: Cluster, io: ObjectContext, number: str) -> None:
    io.write(names.header(number), [OmapSet({b"size": b"short"})])


def strange_data(cluster: Cluster, io: ObjectContext, number: str) -> None:
    cluster.pool("data").write("rbd_data.1.abcdef.0000000000000005", [Write(0, b"x")])


def no_group(cluster: Cluster, io: ObjectContext, number: str) -> None:
    io.write("rbd_group_header." + rbd.Group(io, "g").id(), [Remove()])


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no name": (no_name, "has a header and no name"),
    "no header": (no_header, "header of '{id}' is missing"),
    "no map": (no_map, "is missing although the image has the object-map feature"),
    "wrong map": (wrong_map, "says that 8 objects are absent which exist, from 0"),
    "lone map": (lone_map, "is the object map of nothing that exists"),
    "damaged": (damaged, "size is damaged"),
    "strange data": (strange_data, "1 data objects of no image"),
    "no group": (no_group, "its header is missing"),
}


def test_nothing_is_wrong_with_what_is_sound(cluster: Cluster, io: ObjectContext) -> None:
    fill(cluster, io)
    assert check(cluster.first, snapshots=True) == []


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_wrong_is_named(name: str, cluster: Cluster, io: ObjectContext) -> None:
    damage, words = DAMAGES[name]
    number = fill(cluster, io)
    damage(cluster, io, number)
    found = [finding.what for finding in check(cluster.first)]
    assert any(words.format(id=number) in what for what in found), found


def test_data_kept_for_a_snapshot_that_is_no_more_goes_with_a_repair(cluster: Cluster, io: ObjectContext) -> None:
    number = fill(cluster, io)
    with rbd.Image(io, "a") as image:
        snap = image.snap_get_id("s")
        rows = [b"snapshot_%016x" % snap, b"snap_children_%016x" % snap]
    rbd.Group(io, "g").remove_snap("gs")
    R.remove(cluster.pool("rbd", "space"), "kid")
    io.write(names.header(number), [OmapRmKeys(rows)])  # a removal that was cut short before its last step
    io.write(names.object_map(number, snap), [Remove()])
    found = [finding.what for finding in check(cluster.first, snapshots=True)]
    told = not isinstance(cluster.first, EmbeddedStore)  # which shows the versions that the header knows; see its own
    assert found == [f"keeps data for snapshot {snap} of pool {io.pool_id}, which the image does not have"] * told
    assert [finding.repaired for finding in check(cluster.first, repair=True, snapshots=True)] == [True] * told


def test_an_object_that_goes_meanwhile_is_one_that_is_not_there(cluster: Cluster, io: ObjectContext) -> None:
    fill(cluster, io)
    listing = type(io).listing

    def then_gone(self: ObjectContext, **named: bool) -> Iterator[ObjectName]:
        yield from listing(self, **named)
        if self.pool_id == io.pool_id:
            io.write(names.header(next(iter(R.trash_list(io)))["id"]), [Remove()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(io), "listing", then_gone)
        found = [finding.what for finding in check(cluster.first)]
    assert found and set(found) == {"is the object map of nothing that exists"}

"""`rbdpy store check` looks at groups, their snapshots and namespaces from both sides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from librbd_py import rbd
from librbd_py.format import group as fg
from librbd_py.store.api import ObjectContext, OmapGetKeys, OmapRmKeys, OmapSet, Remove
from librbd_py.store.embedded import EmbeddedStore
from librbd_py.store.embedded.check import check

R = rbd.RBD()
MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound store: a group of two in a namespace, with a snapshot, and one who left after it."""
    with EmbeddedStore(tmp_path / "store", create=True) as store:
        R.namespace_create(store.open("rbd"), "space")
        io = store.open("rbd", "space")
        R.group_create(io, "group")
        for name in ("a", "b"):
            R.create(io, name, MIB)
            rbd.Group(io, "group").add_image(io, name)
        rbd.Group(io, "group").create_snap("snap")
        rbd.Group(io, "group").remove_image(io, "b")
    assert check(tmp_path / "store") == []
    return tmp_path / "store"


def header(io: ObjectContext) -> str:
    return fg.GROUP_HEADER_PREFIX + rbd.Group(io, "group").id()


def image(io: ObjectContext, name: str) -> str:
    with rbd.Image(io, name, read_only=True) as opened:
        return "rbd_header." + str(opened.id())


def drop(io: ObjectContext, oid: str, prefix: bytes) -> None:
    keys = [key for key in io.read(oid, [OmapGetKeys()])[0][0] if key.startswith(prefix)]
    assert keys
    io.write(oid, [OmapRmKeys(keys)])


def damage(io: ObjectContext, oid: str, prefix: bytes, value: bytes) -> None:
    key = next(key for key in io.read(oid, [OmapGetKeys()])[0][0] if key.startswith(prefix))
    io.write(oid, [OmapSet({key: value})])


def lose_snapshot(io: ObjectContext) -> None:
    with rbd.Image(io, "a") as opened:
        opened.remove_snap_by_id(next(iter(opened.list_snaps()))["id"])


def half_a_snapshot(io: ObjectContext) -> None:
    record = fg.GroupSnapshot("half", "half")
    io.write(header(io), [OmapSet({record.key: record.encode()})])


DAMAGE: dict[str, Callable[[ObjectContext], object]] = {
    "has id": lambda io: drop(io, fg.GROUP_DIRECTORY, b"id_"),
    "which is another": lambda io: drop(io, fg.GROUP_DIRECTORY, b"name_"),
    "that has no name": lambda io: drop(io, fg.GROUP_DIRECTORY, b""),
    "rbd_group_directory: entry b'name_": lambda io: damage(io, fg.GROUP_DIRECTORY, b"name_", b"\xff" * 9),
    "its header is missing": lambda io: io.write(header(io), [Remove()]),
    "which does not list it": lambda io: drop(io, header(io), b"image_"),
    "is of a group's that does not exist": lambda io: drop(io, header(io), b"snapshot_"),
    "does not know of this group": lambda io: drop(io, image(io, "a"), fg.GROUP_REF_KEY),
    "was cut short": lambda io: damage(io, header(io), b"image_", bytes([fg.LINK_INCOMPLETE])),
    "snapshot 'half' was cut short": half_a_snapshot,
    "has lost that of image": lose_snapshot,
    "b'snapshot_": lambda io: damage(io, header(io), b"snapshot_", b"\xff" * 40),
    "member 'nobody' of pool 1": lambda io: io.write(header(io), [OmapSet({b"image_%016x_nobody" % 1: b"\0"})]),
    "b'image_x": lambda io: io.write(header(io), [OmapSet({b"image_x": b"\0"})]),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_and_named(path: Path, what: str) -> None:
    with EmbeddedStore(path) as store:
        DAMAGE[what](store.open("rbd", "space"))
    found = [str(finding.where) + ": " + finding.what for finding in check(path)]
    assert any(what in line for line in found), found


def test_images_of_a_namespace_that_is_not_listed_are_found(path: Path) -> None:
    with EmbeddedStore(path) as store:
        drop(store.open("rbd"), "rbd_namespace", b"")
    assert ["is no namespace of the pool" in finding.what for finding in check(path)] == [True]

"""Images that Ceph's own librbd (16.2.15) and we make, change and read in turns, and what then lies in the pool."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from ceph_dump import Dump
from ceph_peer import Peer
from ceph_program import Program

from librbd_py import rados, rbd
from librbd_py.devcluster import DevCluster
from librbd_py.image import map_check

# Who runs a stage: by its number.
MAKERS: dict[str, Callable[[int], bool]] = {
    "ours": lambda stage: True,
    "theirs": lambda stage: False,
    "in turns, we first": lambda stage: stage % 2 == 0,
    "in turns, they first": lambda stage: stage % 2 == 1,
}


@dataclass
class Life:
    ours: Program
    theirs: Peer
    facts: dict[str, Any]  # as we see them


class Lives:
    """One pair of pools for each way to make the images."""

    def __init__(self, conf: str) -> None:
        self.conf = conf
        self._made: dict[str, Life] = {}
        self._pools: list[str] = []

    def of(self, maker: str) -> Life:
        if maker not in self._made:
            self._made[maker] = self._live(maker)
        return self._made[maker]

    def _live(self, maker: str) -> Life:
        with rados.Rados(conffile=self.conf) as cluster:
            pools = [f"life {len(self._pools) + at}" for at in range(2)]
            for pool in pools:
                cluster.create_pool(pool)
                self._pools.append(pool)
        ours, theirs = Program((rados, rbd), self.conf, *pools), Peer(self.conf, *pools)
        theirs.call("init")
        for number, stage in enumerate(Program.STAGES):
            if MAKERS[maker](number):
                getattr(ours, stage)()
            else:
                theirs.call(stage)
        return Life(ours, theirs, json.loads(json.dumps(ours.facts())))

    def close(self) -> None:
        for life in self._made.values():
            life.ours.close()
            life.theirs.close()
        with rados.Rados(conffile=self.conf) as cluster:
            for pool in self._pools:
                cluster.delete_pool(pool)


@pytest.fixture(scope="module")
def lives(ceph_cluster: DevCluster) -> Iterator[Lives]:
    made = Lives(ceph_cluster.conf)
    yield made
    made.close()


@pytest.mark.parametrize("maker", MAKERS)
def test_both_see_the_same(lives: Lives, maker: str) -> None:
    life = lives.of(maker)
    theirs = life.theirs.call("facts")
    assert set(theirs) == set(life.facts)
    for name, facts in life.facts.items():
        assert theirs[name] == facts, name


@pytest.mark.parametrize("maker", [maker for maker in MAKERS if maker != "ours"])
def test_it_does_not_matter_who_made_it(lives: Lives, maker: str) -> None:
    """Contents, sizes, snapshots, relations; not the ids."""
    first, second = lives.of("ours"), lives.of(maker)
    for name, facts in first.facts.items():
        if name == "namespaces":
            assert second.facts[name] == facts
            continue
        other = second.facts[name]
        for what in facts.keys() - {"id", "stat", "data pool", "created", "parent"}:
            assert other[what] == facts[what], f"{name}: {what}"
        assert other["stat"][:4] == facts["stat"][:4]
        assert (other["parent"] or [""])[1:] == (facts["parent"] or [""])[1:]


@pytest.mark.parametrize("maker", MAKERS)
def test_object_maps_are_true(lives: Lives, maker: str) -> None:
    """Ours and Ceph's checker on every image; Ceph's on every snapshot too."""
    life = lives.of(maker)
    for name, facts in life.facts.items():
        if name == "namespaces" or not facts["features"] & 8:
            continue
        with life.ours.image(name, read_only=True) as image:
            assert map_check.differences(image.handle) == [], name
        for view in (name, *(f"{name}@{snap}" for snap in facts["snapshots"])):
            checked = subprocess.run(
                ["timeout", "60", "rbd", "-c", lives.conf, "object-map", "check", f"{life.ours.io.name}/{view}"],
                capture_output=True,
                text=True,
            )
            assert checked.returncode == 0 and "invalid" not in checked.stderr, (view, checked.stderr)
        with life.ours.image(name, read_only=True) as image:
            assert image.flags() == 0, name


def _dump(life: Life, *, data: bool) -> dict[str, object]:
    """All objects of the pools that hold data, or all others."""
    io, store = life.ours.io.context, life.ours.cluster.store
    data_pool = store.pool_id(life.ours.data_pool)
    images = {facts["id"]: name for name, facts in life.facts.items() if name != "namespaces"}
    shown = {image_id: f"<{name.replace(' ', '_'):-<{len(image_id) - 1}}" for image_id, name in images.items()}
    dump = Dump(shown, {io.pool_id: 0, data_pool: 1})
    found: dict[str, object] = {}
    for where, part in (("", io), ("space/", store.open(io.pool_id, "space")), ("data/", store.open(data_pool))):
        names = [oid for oid in part.objects() if oid.startswith("rbd_data.") == data]
        found |= {where + what: value for what, value in dump.of(part, names).items()}
    return found


def _children(value: bytes) -> list[bytes]:
    """The items of a set; the dump has changed their lengths, so they are told apart by their heads."""
    found = re.split(rb"(?=\x02\x01.\0\0\0)", value[4:], flags=re.DOTALL)[1:]
    assert len(found) == int.from_bytes(value[:4], "little")
    return sorted(found)


def test_metadata_is_the_same_to_the_byte(lives: Lives) -> None:
    ours, theirs = (_dump(lives.of(maker), data=False) for maker in ("ours", "theirs"))
    assert len(ours) > 150
    assert sorted(ours) == sorted(theirs)
    for what, value in ours.items():
        other = theirs[what]
        assert isinstance(value, bytes) and isinstance(other, bytes)
        if "snap_children" in what:  # a set, in the order of the images' ids
            assert _children(value) == _children(other), what
        elif what == "rbd_object_map.<flat------- data":
            # Librbd calls objects that a flatten copied changed since the snapshot; we call them clean, as they are.
            assert _exist(value) == _exist(other), what
        else:
            assert value == other, what


def _exist(stored: bytes) -> list[bool]:
    """Which objects an object map knows."""
    states = stored[18:-16]
    return [byte >> shift & 3 != 0 for byte in states for shift in (6, 4, 2, 0)]


def test_data_objects_are_the_same(lives: Lives) -> None:
    """But for zeros at the end: a copy-up of ours cuts them off at sectors, librbd's where the parent's object ends."""
    ours, theirs = (_dump(lives.of(maker), data=True) for maker in ("ours", "theirs"))
    assert len(ours) > 30
    assert sorted(ours) == sorted(theirs)
    for what, value in ours.items():
        other = theirs[what]
        assert isinstance(value, bytes) and isinstance(other, bytes)
        assert value.rstrip(b"\0") == other.rstrip(b"\0"), what


def test_an_ioctx_of_cephs_own_module(lives: Lives) -> None:
    """Our `rbd` on Ceph's `rados`, in one process: the same client, and both see the image."""
    life = lives.of("theirs")
    seen = life.theirs.call("use_our_rbd")
    assert seen["ours"] == seen["theirs"]
    assert seen["listed"] == ["inside"]
    with life.ours.image("through theirs", read_only=True) as image:
        assert image.read(0, 5) == b"hello"
        assert [snap["name"] for snap in image.list_snaps()] == ["s"]
        assert image.id().startswith(f"{seen['client']:x}")


def test_an_image_of_format_1_is_refused_and_left_alone(ceph_conf: str, ceph_pool: str) -> None:
    words = ["rbd", "--conf", ceph_conf, "create", f"{ceph_pool}/old", "--size", "8M", "--image-format", "1"]
    environment = {**os.environ, "RBD_FORCE_ALLOW_V1": "1"}
    subprocess.run(words, check=True, timeout=60, env=environment, stderr=subprocess.DEVNULL)
    with rados.Rados(conffile=ceph_conf) as cluster, cluster.open_ioctx(ceph_pool) as ioctx:
        before = sorted(each.key for each in ioctx.list_objects())
        with pytest.raises(rbd.OperationNotSupported, match="format 1"):
            rbd.Image(ioctx, "old")
        for refused in (rbd.RBD().remove, rbd.RBD().trash_move):
            with pytest.raises(rbd.OperationNotSupported):
                refused(ioctx, "old")
        with pytest.raises(rbd.ImageExists):
            rbd.RBD().create(ioctx, "old", 1 << 20)
        rbd.RBD().create(ioctx, "new", 1 << 20)
        with pytest.raises(rbd.ImageExists):
            rbd.RBD().rename(ioctx, "new", "old")
        with pytest.raises(rbd.OperationNotSupported):
            rbd.RBD().rename(ioctx, "old", "other")
        rbd.RBD().remove(ioctx, "new")
        assert set(before) <= {each.key for each in ioctx.list_objects()}

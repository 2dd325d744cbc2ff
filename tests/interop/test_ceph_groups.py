"""Groups beside Ceph's own librbd (16.2.15): what calls give, who reads whose groups, and the bytes of the records."""

from __future__ import annotations

import json
import queue
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ceph_peer import Peer
from groups_program import outcomes

from librbd_py import rados, rbd
from librbd_py.devcluster import DevCluster
from librbd_py.format import group as fg
from librbd_py.format.encoding import Decoder, Encoder
from librbd_py.store.api import ObjectContext, OmapGetVals

MIB = 1 << 20
R = rbd.RBD()


def _pools(cluster: rados.Rados, *names: str) -> None:
    for name in names:
        cluster.create_pool(name)


@pytest.fixture
def cluster(ceph_cluster: DevCluster) -> Iterator[rados.Rados]:
    with rados.Rados(conffile=ceph_cluster.conf) as made:
        before = set(made.list_pools())
        yield made
        for name in set(made.list_pools()) - before:
            made.delete_pool(name)


def test_every_call_ends_as_with_cephs_own(cluster: rados.Rados, ceph_cluster: DevCluster) -> None:
    _pools(cluster, "groups of theirs", "groups of ours")
    program = str(Path(__file__).with_name("groups_program.py"))
    theirs = subprocess.run(
        ["/usr/bin/python3", program, ceph_cluster.conf, "groups of theirs"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    expected: dict[str, Any] = json.loads(theirs.stdout)
    found = json.loads(json.dumps(outcomes((rados, rbd), ceph_cluster.conf, "groups of ours")))
    assert len(expected) > 90
    assert {what: found.get(what) for what in expected} == expected


@pytest.fixture
def peer(cluster: rados.Rados, ceph_cluster: DevCluster) -> Iterator[Peer]:
    _pools(cluster, "groups", "groups data")
    made = Peer(ceph_cluster.conf, "groups", "groups data")
    made.call("init")
    yield made
    made.close()


def _ours(io: rados.Ioctx, name: str) -> None:
    """A group with two images and two snapshots, the second after a change."""
    R.group_create(io, name)
    group = rbd.Group(io, name)
    for image in ("a", "b"):
        R.create(io, f"{name} {image}", 8 * MIB)
        group.add_image(io, f"{name} {image}")
        with rbd.Image(io, f"{name} {image}") as opened:
            opened.write(b"first", 0)
    group.create_snap("one")
    with rbd.Image(io, f"{name} a") as opened:
        opened.write(b"later", 0)
    group.create_snap("zwei")
    group.rename_snap("zwei", "two")


THEIRS = """[
    program.r.group_create(io, NAME),
    [program.r.create(io, NAME + ' ' + image, 8 << 20) for image in 'ab'],
    [rbd.Group(io, NAME).add_image(io, NAME + ' ' + image) for image in 'ab'],
    [open(NAME + ' ' + image).write(b'first', 0) for image in 'ab'],
    rbd.Group(io, NAME).create_snap('one'),
    open(NAME + ' a').write(b'later', 0),
    rbd.Group(io, NAME).create_snap('zwei'),
    rbd.Group(io, NAME).rename_snap('zwei', 'two'),
    [images.pop(name).close() for name in list(images)],
] and None"""


def _rows(io: ObjectContext, oid: str) -> dict[bytes, bytes]:
    rows: dict[bytes, bytes] = io.read(oid, [OmapGetVals()])[0][0]
    return rows


def _encoded_again(key: bytes, value: bytes) -> bytes:
    """What our encoder makes of what our decoder read."""
    if key.startswith(fg.SNAPSHOT_PREFIX):
        record = fg.GroupSnapshot.decode(value)
        assert record.key == key and len(record.snapshots) == 2 and record.state == fg.SNAPSHOT_COMPLETE
        return record.encode()
    assert key.startswith(fg.IMAGE_PREFIX)
    return Encoder().u8(Decoder(value).u8()).done()


def test_records_are_the_same_to_the_byte(cluster: rados.Rados, peer: Peer) -> None:
    with cluster.open_ioctx("groups") as ioctx:
        _ours(ioctx, "ours")
        peer.ask(THEIRS.replace("NAME", "'theirs'"))
        io = ioctx.context
        directory = _rows(io, fg.GROUP_DIRECTORY)
        shapes = []
        for name in ("ours", "theirs"):
            group_id = rbd.Group(ioctx, name).id()
            assert directory[b"name_" + name.encode()] == Encoder().string(group_id).done()
            assert directory[b"id_" + group_id.encode()] == Encoder().string(name).done()
            header = _rows(io, fg.GROUP_HEADER_PREFIX + group_id)
            for key, value in header.items():
                assert _encoded_again(key, value) == value, (name, key)
            shapes.append(sorted(key.partition(b"_")[0] for key in header))
            with rbd.Image(ioctx, f"{name} a") as image:
                held = _rows(io, image.handle.oid)
                assert held[fg.GROUP_REF_KEY] == fg.GroupSpec(io.pool_id, group_id).encode()
                assert held[b"op_features"] == (4).to_bytes(8, "little")
                for snap in image.list_snaps():
                    info = rbd.Group(ioctx, name).get_snap_info(snap["group"]["snap_name"])
                    assert snap["name"] == info["image_snap_name"] == f".group.{io.pool_id:x}_{group_id}_{info['id']}"
        assert shapes[0] == shapes[1] == [b"image", b"image", b"snapshot", b"snapshot"]


def test_it_does_not_matter_who_made_the_group(cluster: rados.Rados, peer: Peer) -> None:
    with cluster.open_ioctx("groups") as ioctx:
        _ours(ioctx, "ours")
        peer.ask(THEIRS.replace("NAME", "'theirs'"))
        assert R.group_list(ioctx) == peer.ask("program.r.group_list(io)") == ["ours", "theirs"]
        for name in ("ours", "theirs"):
            rows = [[row["name"], row["state"]] for row in rbd.Group(ioctx, name).list_images()]
            assert rows == peer.ask(f"[[r['name'], r['state']] for r in rbd.Group(io, {name!r}).list_images()]")
            snaps = sorted([row["name"], row["state"]] for row in rbd.Group(ioctx, name).list_snaps())
            assert snaps == peer.ask(f"sorted([r['name'], r['state']] for r in rbd.Group(io, {name!r}).list_snaps())")
            assert snaps == [["one", 1], ["two", 1]]
        # each rolls back, changes and removes what the other made
        rbd.Group(ioctx, "theirs").rollback_to_snap("one")
        peer.ask("rbd.Group(io, 'ours').rollback_to_snap('one')")
        for name in ("ours a", "theirs a"):
            with rbd.Image(ioctx, name) as image:
                assert image.read(0, 5) == b"first"
        rbd.Group(ioctx, "theirs").remove_snap("one")
        peer.ask("rbd.Group(io, 'ours').remove_snap('one')")
        rbd.Group(ioctx, "theirs").remove_image(ioctx, "theirs b")
        peer.ask("rbd.Group(io, 'ours').remove_image(io, 'ours b')")
        R.group_remove(ioctx, "theirs")
        peer.ask("program.r.group_remove(io, 'ours')")
        for name in ("ours a", "ours b", "theirs a", "theirs b"):
            with rbd.Image(ioctx, name) as image:
                assert list(image.list_snaps()) == [] and image.op_features() == 0
            R.remove(ioctx, name)
        assert R.group_list(ioctx) == []


def test_a_guest_of_ours_stands_still_for_a_snapshot_of_theirs(cluster: rados.Rados, peer: Peer) -> None:
    with cluster.open_ioctx("groups") as ioctx:
        R.create(ioctx, "disk", MIB)
        events: queue.SimpleQueue[str] = queue.SimpleQueue()
        with rbd.Image(ioctx, "disk") as image:
            image.quiesce_watch(lambda: events.put("stop"), lambda: events.put("go"))
            peer.ask("open('disk').create_snap('s')")
            assert [events.get(timeout=30), events.get(timeout=30)] == ["stop", "go"]
            peer.ask("open('disk').create_snap('t', rbd.RBD_SNAP_CREATE_SKIP_QUIESCE)")
            assert events.empty()
            image.quiesce_watch(_refuse, lambda: events.put("never"))
            failed = peer.ask("program.failure(lambda: open('disk').create_snap('u'))")
            assert failed == ["PermissionError", 1]
            assert [row["name"] for row in image.list_snaps()] == ["s", "t"]


def _refuse() -> None:
    raise PermissionError(1, "not now")

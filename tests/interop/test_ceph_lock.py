"""An image open here and in Ceph's own librbd (16.2.15) at once: the lock goes to and fro, and changes are seen."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from ceph_peer import Peer

from librbd_py import rados, rbd

MIB = 1 << 20
R = rbd.RBD()


@pytest.fixture(scope="module")
def both(ceph_conf: str) -> Iterator[tuple[rados.Ioctx, Peer]]:
    pool = f"lock-{os.getpid()}"
    with rados.Rados(conffile=ceph_conf) as cluster:
        cluster.create_pool(pool)
        peer = Peer(ceph_conf, pool, pool)
        peer.call("init")
        with cluster.open_ioctx(pool) as ioctx:
            yield ioctx, peer
        peer.close()
        cluster.delete_pool(pool)


@pytest.fixture
def image(both: tuple[rados.Ioctx, Peer]) -> Iterator[Any]:
    """Open on both sides; nobody owns the lock."""
    io, peer = both
    R.create(io, "a", 16 * MIB)
    with rbd.Image(io, "a") as opened:
        peer.ask("open('a').size()")
        yield opened
        peer.ask("images.pop('a').close()")
    R.remove(io, "a")


def test_the_lock_goes_to_who_writes(both: tuple[rados.Ioctx, Peer], image: Any) -> None:
    peer = both[1]
    for turn in range(3):
        begun = time.monotonic()
        assert peer.ask(f"open('a').write(b'theirs{turn}', {turn * 100})") == 7
        assert peer.ask("open('a').is_exclusive_lock_owner()") and not image.is_exclusive_lock_owner()
        image.write(b"ours%d" % turn, turn * 100 + 50)
        assert image.is_exclusive_lock_owner() and not peer.ask("open('a').is_exclusive_lock_owner()")
        assert time.monotonic() - begun < 10  # asked for and given, not waited for until somebody is fenced
    for turn in range(3):
        assert image.read(turn * 100, 7) == b"theirs%d" % turn
        assert peer.ask(f"open('a').read({turn * 100 + 50}, 5)") == f"ours{turn}"


def test_the_owner_is_seen_from_the_other_side(both: tuple[rados.Ioctx, Peer], image: Any) -> None:
    io, peer = both
    image.write(b"x", 0)
    assert peer.ask("[o['owner'] for o in open('a').lock_get_owners()]") == [io.rados.get_addrs()]
    assert peer.ask("len(list(open('a').watchers_list()))") == 2
    peer.ask("open('a').write(b'x', 0)")
    assert [owner["owner"] for owner in image.lock_get_owners()] == [peer.ask("program.cluster.get_addrs()")]


def test_what_one_changes_the_other_sees(both: tuple[rados.Ioctx, Peer], image: Any) -> None:
    peer = both[1]
    image.write(b"one", 0)
    image.create_snap("ours")
    assert peer.ask("[s['name'] for s in open('a').list_snaps()]") == ["ours"]
    image.write(b"two", 0)
    peer.ask("open('a').create_snap('theirs')")
    assert [snap["name"] for snap in image.list_snaps()] == ["ours", "theirs"]
    image.write(b"tri", 0)  # under the snapshot they made
    for view, content in (("ours", "one"), ("theirs", "two"), (None, "tri")):
        image.set_snap(view)
        assert image.read(0, 3) == content.encode()
        peer.ask(f"open('a').set_snap({view!r})")
        assert peer.ask("open('a').read(0, 3)") == content
    image.resize(24 * MIB)
    assert peer.ask("open('a').size()") == 24 * MIB
    image.write(b"z", 24 * MIB - 1)
    peer.ask(f"open('a').resize({20 * MIB})")
    assert image.size() == 20 * MIB
    image.write(b"end", 20 * MIB - 3)
    assert peer.ask(f"open('a').read({20 * MIB - 3}, 3)") == "end"
    peer.ask("open('a').metadata_set('key', 'value')")
    assert list(image.metadata_list()) == [("key", "value")]
    peer.ask("open('a').update_features(8 | 16, False)")
    assert image.features() & 24 == 0
    image.write(b"without a map", 0)
    image.update_features(8 | 16, True)
    assert peer.ask("open('a').features()") & 24 == 24
    for name in ("ours", "theirs"):
        peer.ask(f"open('a').remove_snap({name!r})")
    assert list(image.list_snaps()) == []
    assert peer.ask("open('a').read(0, 13)") == "without a map"


def test_a_lock_of_a_dead_librbd_is_broken(both: tuple[rados.Ioctx, Peer], ceph_conf: str) -> None:
    """Its watch ends after the cluster's watch timeout; then it is blocklisted and its lock taken."""
    io = both[0]
    R.create(io, "orphan", 4 * MIB)
    dead = Peer(ceph_conf, io.name, io.name)
    dead.ask("open('orphan').write(b'last words', 0)")
    address = dead.ask("program.cluster.get_addrs()")
    dead.kill()
    with rbd.Image(io, "orphan") as image:
        assert image.read(0, 10) == b"last words"
        image.write(b"now ours", 0)
        assert image.is_exclusive_lock_owner()
    assert address in io.rados.store.blocklist()
    R.remove(io, "orphan")

"""Maintenance operations between us and Ceph's own librbd (16.2.15) while the other side owns the lock."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from ceph_peer import Peer

from librbd_py import rados, rbd

MIB = 1 << 20
R = rbd.RBD()


@dataclass
class Both:
    ioctx: rados.Ioctx
    peer: Peer
    conf: str
    pool: str

    def rbd(self, *arguments: str, status: int = 0) -> str:
        """Ceph's own command in the pool."""
        command = ["rbd", "--conf", self.conf, "--pool", self.pool, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, (command, done)
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def both(ceph_conf: str) -> Iterator[Both]:
    pool = f"proxy-{os.getpid()}"
    with rados.Rados(conffile=ceph_conf) as cluster:
        cluster.create_pool(pool)
        peer = Peer(ceph_conf, pool, pool)
        peer.call("init")
        with cluster.open_ioctx(pool) as ioctx:
            yield Both(ioctx, peer, ceph_conf, pool)
        peer.close()
        cluster.delete_pool(pool)


@pytest.fixture
def image(both: Both) -> Iterator[rbd.Image]:
    """Ours, 16 MiB, and we own its lock."""
    R.create(both.ioctx, "a", 16 * MIB)
    with rbd.Image(both.ioctx, "a") as image:
        image.write(b"ours", 0)
        yield image
    clean(both.ioctx)


@pytest.fixture
def theirs(both: Both) -> Iterator[rbd.Image]:
    """Our handle of an image that a process with Ceph's librbd has open and owns the lock of."""
    R.create(both.ioctx, "b", 16 * MIB)
    both.peer.ask("open('b').write(b'theirs', 0)")
    with rbd.Image(both.ioctx, "b") as image:
        yield image
    both.peer.ask("images.pop('b').close()")
    clean(both.ioctx)


def clean(ioctx: rados.Ioctx) -> None:
    for name in R.list(ioctx):
        with rbd.Image(ioctx, name) as image:
            for snap in image.list_snaps():
                if image.is_protected_snap(snap["name"]):
                    image.unprotect_snap(snap["name"])
                image.remove_snap(snap["name"])
        R.remove(ioctx, name)


def snaps(image: rbd.Image) -> list[str]:
    return [snap["name"] for snap in image.list_snaps()]


ASKED_OF_US: dict[str, tuple[tuple[str, ...], Callable[[rbd.Image], bool]]] = {
    "grow": (("resize", "a", "--size", "64M", "--no-progress"), lambda i: i.size() == 64 * MIB),
    "shrink": (("resize", "a", "--size", "4M", "--allow-shrink", "--no-progress"), lambda i: i.size() == 4 * MIB),
    "snap create": (("snap", "create", "a@s"), lambda i: snaps(i) == ["s"]),
    "metadata": (("image-meta", "set", "a", "key", "value"), lambda i: i.metadata_get("key") == "value"),
    "rebuild": (("object-map", "rebuild", "a", "--no-progress"), lambda i: i.flags() == 0),
    "sparsify": (("sparsify", "a", "--no-progress"), lambda i: i.read(0, 4) == b"ours"),
    "feature off": (("feature", "disable", "a", "object-map", "fast-diff"), lambda i: not i.features() & 8),
    "rename": (("rename", "a", "renamed"), lambda i: i.get_name() == "renamed"),
}


@pytest.mark.parametrize("name", ASKED_OF_US)
def test_their_command_asks_us_and_we_keep_the_lock(both: Both, image: rbd.Image, name: str) -> None:
    command, done = ASKED_OF_US[name]
    both.rbd(*command)
    assert done(image)
    assert image.is_exclusive_lock_owner()
    image.write(b"still ours", MIB)


def test_their_commands_on_snapshots_of_ours(both: Both, image: rbd.Image) -> None:
    both.rbd("snap", "create", "a@s")
    assert "(17) File exists" in both.rbd("snap", "create", "a@s", status=errno.EEXIST)
    both.rbd("snap", "protect", "a@s")
    both.rbd("snap", "rm", "a@s", status=errno.EBUSY)
    both.rbd("snap", "unprotect", "a@s")
    both.rbd("snap", "rename", "a@s", "a@t")
    assert snaps(image) == ["t"]
    both.rbd("snap", "rollback", "a@t", "--no-progress", status=errno.EROFS)
    both.rbd("snap", "rm", "a@t")
    assert snaps(image) == [] and image.is_exclusive_lock_owner()
    assert "ENOENT" not in both.rbd("image-meta", "list", "a")


def test_their_flatten_of_a_clone_of_ours_shows_progress(both: Both, image: rbd.Image) -> None:
    image.create_snap("s")
    image.protect_snap("s")
    R.clone(both.ioctx, "a", "s", both.ioctx, "child")
    with rbd.Image(both.ioctx, "child") as child:
        child.write(b"x", 9 * MIB)
        assert "100% complete...done." in both.rbd("flatten", "child")
        with pytest.raises(rbd.ImageNotFound):
            child.parent_info()
        assert child.is_exclusive_lock_owner() and child.read(0, 4) == b"ours"
    both.rbd("object-map", "check", "child", "--no-progress")


def test_an_exclusive_owner_still_does_what_it_is_asked(both: Both, image: rbd.Image) -> None:
    image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
    both.rbd("resize", "a", "--size", "32M", "--no-progress")
    assert image.size() == 32 * MIB and image.is_exclusive_lock_owner()


ASKED_OF_THEM: dict[str, tuple[Callable[[rbd.Image], Any], str]] = {
    "grow": (lambda i: i.resize(64 * MIB), f"open('b').size() == {64 * MIB}"),
    "shrink": (lambda i: i.resize(4 * MIB), f"open('b').size() == {4 * MIB}"),
    "snap create": (lambda i: i.create_snap("s"), "[s['name'] for s in open('b').list_snaps()] == ['s']"),
    "metadata": (lambda i: i.metadata_set("key", "value"), "open('b').metadata_get('key') == 'value'"),
    "rebuild": (lambda i: i.rebuild_object_map(lambda done, total: 0), "open('b').flags() == 0"),
    "sparsify": (lambda i: i.sparsify(4096), "open('b').read(0, 6) == b'theirs'"),
    "feature off": (lambda i: i.update_features(8 | 16, False), "not open('b').features() & 8"),
    "rename": (lambda i: R.rename(i.handle.ctx, "b", "renamed"), "open('b').get_name() == 'renamed'"),
    "protect": (lambda i: (i.create_snap("s"), i.protect_snap("s")), "open('b').is_protected_snap('s')"),
}


@pytest.mark.parametrize("name", ASKED_OF_THEM)
def test_we_ask_their_process_and_it_keeps_the_lock(both: Both, theirs: rbd.Image, name: str) -> None:
    operation, done = ASKED_OF_THEM[name]
    operation(theirs)
    assert both.peer.ask(done)
    assert both.peer.ask("open('b').is_exclusive_lock_owner()") and not theirs.is_exclusive_lock_owner()


def test_what_their_process_refuses(both: Both, theirs: rbd.Image) -> None:
    theirs.create_snap("s")
    with pytest.raises(rbd.ImageExists):
        theirs.create_snap("s")
    with pytest.raises(rbd.ImageNotFound):
        theirs.remove_snap("t")
    with pytest.raises(rbd.InvalidArgument):
        theirs.resize(MIB, False)
    with pytest.raises(rbd.ReadOnlyImage):
        theirs.rollback_to_snap("s")
    theirs.remove_snap("s")
    assert snaps(theirs) == [] and both.peer.ask("open('b').is_exclusive_lock_owner()")


def test_their_process_is_killed_and_we_do_it_ourselves(both: Both, ceph_conf: str) -> None:
    """Its watch stays for up to 30 s: until then nobody may break its lock, afterwards we do."""
    R.create(both.ioctx, "c", 16 * MIB)
    victim = Peer(ceph_conf, both.pool, both.pool)
    victim.ask("open('c').write(b'theirs', 0)")
    victim.kill()
    with rbd.Image(both.ioctx, "c") as image:
        image.resize(32 * MIB)
        assert image.size() == 32 * MIB and image.is_exclusive_lock_owner()
        assert image.read(0, 6) == b"theirs"
    clean(both.ioctx)

"""Images of ours in Linux' own client: a guest with Debian's kernel maps them with krbd."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from krbd_guest import KrbdGuest

from librbd_py import rados, rbd
from librbd_py.image import ownership
from qemu_glue.accel import accelerator
from vm_images.cache import cache_dir
from vm_images.initramfs import initramfs
from vm_images.kernel import kernel

MIB = 1 << 20
DEADLINE = 60.0  # seconds; reached only when one side gets nowhere
R = rbd.RBD()


@dataclass
class World:
    guest: KrbdGuest
    ioctx: rados.Ioctx
    pool: str
    conf: str


@pytest.fixture(scope="module")
def world(ceph_conf: str) -> Iterator[World]:
    pool = f"krbd-{os.getpid()}"
    with rados.Rados(conffile=ceph_conf) as cluster:
        cluster.create_pool(pool)
        found = kernel()
        guest = KrbdGuest(ceph_conf, accelerator(found.vmlinuz, initramfs(found), cache_dir())[0])
        with cluster.open_ioctx(pool) as ioctx:
            yield World(guest, ioctx, pool, ceph_conf)
        guest.close()
        cluster.delete_pool(pool)


def checked(world: World, image: str) -> None:
    """Real librbd agrees with the object map."""
    command = ["rbd", "--conf", world.conf, "object-map", "check", "--no-progress", f"{world.pool}/{image}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "error" not in done.stderr, done


def test_it_maps_an_image_we_made_and_both_see_what_is_written(world: World) -> None:
    R.create(world.ioctx, "made", 16 * MIB)
    with rbd.Image(world.ioctx, "made") as image:
        image.write(b"from the host", 5 * MIB)
    device = world.guest.map(world.pool, "made")
    assert world.guest.ok(f"blockdev --getsize64 {device}") == str(16 * MIB)
    assert world.guest.read(device, 13, 5 * MIB) == "from the host"
    world.guest.write(device, "from the guest", 9 * MIB)
    world.guest.ok(f"blkstamp write {device} {MIB} 64 1 && blkstamp verify {device} {MIB} 64 1")
    world.guest.unmap(device)
    with rbd.Image(world.ioctx, "made") as image:
        assert image.read(9 * MIB, 14) == b"from the guest"
        assert image.read(5 * MIB, 13) == b"from the host"
    checked(world, "made")


def test_the_lock_goes_to_and_fro_and_nothing_is_lost(world: World) -> None:
    R.create(world.ioctx, "shared", 16 * MIB)
    with rbd.Image(world.ioctx, "shared") as image:
        image.write(b"turn 0", 0)
        device = world.guest.map(world.pool, "shared")
        for turn in range(1, 7):
            if turn % 2:
                world.guest.write(device, f"turn {turn}", turn * MIB)
                assert not image.is_exclusive_lock_owner()
            else:
                image.write(f"turn {turn}".encode(), turn * MIB)
                assert image.is_exclusive_lock_owner()
        for turn in range(7):
            assert image.read(turn * MIB, 6) == f"turn {turn}".encode()
            assert world.guest.read(device, 6, turn * MIB) == f"turn {turn}"
        world.guest.unmap(device)
    checked(world, "shared")


def test_it_is_asked_who_it_is_and_does_not_mind(world: World) -> None:
    R.create(world.ioctx, "asked", 16 * MIB)
    device = world.guest.map(world.pool, "asked")
    world.guest.write(device, "its own", 0)
    with rbd.Image(world.ioctx, "asked") as image:
        for turn in range(5):
            found = ownership.look(image.handle)
            assert found.owner is not None and found.owner.watching is not None
            assert found.owner.watching.answered and found.owner.answer is None
            assert found.outcome is ownership.Outcome.ASKED
            world.guest.write(device, f"turn {turn}", MIB)
        steps: list[str] = []
        taken = ownership.take(image.handle, steps.append)
        assert taken is not None and taken.address == found.owner.address
        assert steps[-1] == "the lock is free" and not any("fenced" in step for step in steps)
        world.guest.write(device, "after", 2 * MIB)
        assert image.read(2 * MIB, 5) == b"after" and image.read(MIB, 6) == b"turn 4"
    world.guest.unmap(device)


def test_it_gets_the_lock_after_a_hand_off(world: World) -> None:
    """From the second of two clients of ours, but not while it is offered; and gives it back to either."""
    R.create(world.ioctx, "moved", 16 * MIB)
    fenced = set(world.ioctx.rados.store.blocklist())  # by other tests
    key = "uuid:6f1a7a34-59c3-4e4b-8f0e-0d4a3e0b9a11"
    with (
        rados.Rados(conffile=world.conf) as other,
        other.open_ioctx(world.pool) as io,
        rbd.Image(world.ioctx, "moved") as here,
        rbd.Image(io, "moved") as there,
    ):
        device = world.guest.map(world.pool, "moved")  # which takes the lock
        here.write(b"source", 0)
        there.handle.stand_by(key, park=True)
        assert here.handle.offer(key)
        asking = threading.Thread(target=world.guest.write, args=(device, "guest", MIB))
        asking.start()
        try:
            time.sleep(0.5)  # it asks and is told to come again
            assert asking.is_alive() and here.handle.handing_over
        finally:
            there.handle.take_over()
            asking.join(60)
        assert not asking.is_alive()
        there.write(b"next", 2 * MIB)
        assert there.is_exclusive_lock_owner() and there.read(MIB, 5) == b"guest"
        world.guest.write(device, "again", MIB)
        here.handle.stand_down()
        here.write(b"old", 0)
        assert world.guest.read(device, 4, 2 * MIB) == "next" and world.guest.read(device, 6, 0) == "oldrce"
        world.guest.unmap(device)
        assert set(world.ioctx.rados.store.blocklist()) <= fenced
    checked(world, "moved")


def test_it_writes_while_we_write(world: World) -> None:
    """Both sides at once, the lock moving under them: every write that was acknowledged is there, and both get on."""
    R.create(world.ioctx, "busy", 16 * MIB)
    with rbd.Image(world.ioctx, "busy") as image:
        device = world.guest.map(world.pool, "busy")
        stop, written, failures = threading.Event(), [], []

        def write() -> None:
            try:
                while not stop.is_set():
                    at = len(written) % 512 * 4096
                    image.write(b"%016d" % len(written), 8 * MIB + at)
                    written.append(at)
                    time.sleep(0.02)
            except BaseException as failure:
                failures.append(failure)

        thread = threading.Thread(target=write)
        thread.start()
        try:
            end, count = time.monotonic() + DEADLINE, 0
            while count < 10 or len(written) < 3:  # whose turn is how long is the kernel's to say
                assert not failures and time.monotonic() < end, (count, len(written))
                world.guest.write(device, f"guest {count % 10}", count % 10 * 4096)
                count += 1
        finally:
            stop.set()
            thread.join()
        assert not failures
        for number in range(max(0, len(written) - 512), len(written)):
            assert image.read(8 * MIB + number % 512 * 4096, 16) == b"%016d" % number
        for block in range(10):
            assert image.read(block * 4096, 7) == b"guest %d" % block
        world.guest.unmap(device)
    checked(world, "busy")


def test_a_resize_of_ours_is_seen_at_once(world: World) -> None:
    R.create(world.ioctx, "growing", 8 * MIB)
    device = world.guest.map(world.pool, "growing")
    world.guest.write(device, "before", 0)
    with rbd.Image(world.ioctx, "growing") as image:
        image.resize(24 * MIB)
        size = f"/sys/class/block/{device.removeprefix('/dev/')}/size"
        until = f"[ $(cat {size}) = {24 * MIB // 512} ]"
        world.guest.ok(f"for i in $(seq 50); do {until} && break; sleep 0.1; done; {until}")
        world.guest.write(device, "behind", 20 * MIB)
        assert image.read(20 * MIB, 6) == b"behind"
    world.guest.unmap(device)


def test_who_keeps_the_lock_keeps_it(world: World) -> None:
    """Exclusive on our side: the guest cannot map it for writing. Exclusive on the guest's: our write is refused."""
    R.create(world.ioctx, "kept", 8 * MIB)
    with rbd.Image(world.ioctx, "kept") as image:
        image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
        with pytest.raises(AssertionError, match="Read-only file system"):
            world.guest.map(world.pool, "kept")
        image.write(b"still ours", 4096)
        image.lock_release()
    device = world.guest.map(world.pool, "kept", "exclusive")
    world.guest.write(device, "of a guest", 0)
    with rbd.Image(world.ioctx, "kept") as image:
        with pytest.raises(rbd.ReadOnlyImage):
            image.write(b"refused", 0)
        assert image.read(0, 10) == b"of a guest" and image.read(4096, 10) == b"still ours"
    world.guest.unmap(device)


def test_clones_snapshots_stripes_and_namespaces(world: World) -> None:
    R.create(world.ioctx, "parent", 16 * MIB)
    with rbd.Image(world.ioctx, "parent") as image:
        image.write(b"of the parent", 6 * MIB)
        image.create_snap("s")
        image.protect_snap("s")
        image.write(b"after the snap", 6 * MIB)
    R.clone(world.ioctx, "parent", "s", world.ioctx, "child")
    device = world.guest.map(world.pool, "child")
    assert world.guest.read(device, 13, 6 * MIB) == "of the parent"
    world.guest.write(device, "of the child", 7 * MIB)
    world.guest.unmap(device)
    with rbd.Image(world.ioctx, "child") as image:
        assert image.read(6 * MIB, 13) == b"of the parent" and image.read(7 * MIB, 12) == b"of the child"
    checked(world, "child")
    device = world.guest.map(world.pool, "parent", "ro", "s")
    assert world.guest.read(device, 13, 6 * MIB) == "of the parent"
    world.guest.unmap(device)

    R.create(world.ioctx, "striped", 16 * MIB, stripe_unit=65536, stripe_count=4)
    with rbd.Image(world.ioctx, "striped") as image:
        image.write(bytes(range(256)) * 4096, 3 * MIB)
    device = world.guest.map(world.pool, "striped")
    digest = world.guest.ok(f"dd if={device} bs=65536 skip=48 count=16 2>/dev/null | md5sum")
    world.guest.ok(f"dd if={device} of={device} bs=65536 skip=48 seek=128 count=16 conv=fsync 2>/dev/null")
    world.guest.unmap(device)
    with rbd.Image(world.ioctx, "striped") as image:
        assert image.read(8 * MIB, MIB) == bytes(range(256)) * 4096, digest

    R.namespace_create(world.ioctx, "space")
    with rados.Rados(conffile=world.conf) as cluster, cluster.open_ioctx(world.pool) as inside:
        inside.set_namespace("space")
        R.create(inside, "inner", 8 * MIB)
        device = world.guest.map(world.pool, "inner", "_pool_ns=space")
        world.guest.write(device, "in the space", 4 * MIB)
        world.guest.unmap(device)
        with rbd.Image(inside, "inner") as image:
            assert image.read(4 * MIB, 12) == b"in the space"

"""Images of ours under QEMU's own rbd driver: qemu-img, qemu-io and a guest."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from librbd_py import rados, rbd
from qemu_glue.accel import accelerator
from qemu_glue.guest import Guest
from vm_images.cache import cache_dir
from vm_images.initramfs import initramfs
from vm_images.kernel import kernel

MIB = 1 << 20
R = rbd.RBD()


@dataclass
class World:
    ioctx: rados.Ioctx
    conf: str
    pool: str

    def url(self, image: str) -> str:
        return f"rbd:{self.pool}/{image}:conf={self.conf}"


@pytest.fixture(scope="module")
def world(ceph_conf: str) -> Iterator[World]:
    pool = f"qemu-{os.getpid()}"
    with rados.Rados(conffile=ceph_conf) as cluster:
        cluster.create_pool(pool)
        with cluster.open_ioctx(pool) as ioctx:
            yield World(ioctx, ceph_conf, pool)
        cluster.delete_pool(pool)


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (command, done)
    return done.stdout


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """12 MiB with a hole in the middle."""
    path = tmp_path / "raw"
    data = random.Random(4).randbytes(3 * MIB)
    with path.open("wb") as file:
        file.write(data)
        file.seek(9 * MIB)
        file.write(data)
    return path


def test_qemu_img_reads_what_we_wrote(world: World, raw: Path) -> None:
    R.create(world.ioctx, "ours", 12 * MIB)
    with rbd.Image(world.ioctx, "ours") as image:
        image.write(raw.read_bytes()[: 3 * MIB], 0)
        image.write(raw.read_bytes()[9 * MIB :], 9 * MIB)
    info = json.loads(run("qemu-img", "info", "--output=json", world.url("ours")))
    assert info["virtual-size"] == 12 * MIB
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, world.url("ours"))
    holes = json.loads(run("qemu-img", "map", "--output=json", world.url("ours")))
    assert [(row["start"], row["length"]) for row in holes if not row["data"]] == [(4 * MIB, 4 * MIB)]


def test_we_read_what_qemu_img_wrote(world: World, raw: Path) -> None:
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", raw, _made(world, "theirs"))
    with rbd.Image(world.ioctx, "theirs") as image:
        assert image.read(0, 12 * MIB) == raw.read_bytes()
        present = [0] * 3
        image.diff_iterate(0, 12 * MIB, None, lambda off, length, exists: present.__setitem__(off // (4 * MIB), 1))
        assert present == [1, 0, 1]
    run("qemu-img", "resize", "-f", "raw", world.url("theirs"), "20M")
    with rbd.Image(world.ioctx, "theirs") as image:
        assert image.size() == 20 * MIB


def _made(world: World, name: str) -> str:
    R.create(world.ioctx, name, 12 * MIB)
    return world.url(name)


def test_qemu_io_takes_the_lock_from_us_and_gives_it_back(world: World) -> None:
    R.create(world.ioctx, "shared", 8 * MIB)
    with rbd.Image(world.ioctx, "shared") as image:
        image.write(b"\x11" * 65536, 0)
        commands = ("read -P 0x11 0 64k", "write -P 0x22 64k 64k", "discard 4M 4M", "flush")
        out = run("qemu-io", "-f", "raw", *(f"-c{command}" for command in commands), world.url("shared"))
        assert "Pattern verification failed" not in out, out
        assert image.read(65536, 65536) == b"\x22" * 65536
        assert not image.is_exclusive_lock_owner()
        image.write(b"\x33" * 4096, 128 << 10)
        assert image.is_exclusive_lock_owner()
        assert "failed" not in run("qemu-io", "-r", "-f", "raw", "-cread -P 0x33 128k 4k", world.url("shared"))


def test_a_guest_on_their_driver_and_a_snapshot_of_ours(world: World) -> None:
    """The guest writes, flushes and verifies; meanwhile we snapshot the image, which its QEMU owns."""
    R.create(world.ioctx, "vm", 16 * MIB)
    found = kernel()
    ramdisk = initramfs(found)
    accel, _ = accelerator(found.vmlinuz, ramdisk, cache_dir())
    node = f"driver=rbd,node-name=d,pool={world.pool},image=vm,conf={world.conf}"
    extra = ["-blockdev", node, "-device", "virtio-blk-pci,drive=d"]
    append = "rbdpy.start=0 rbdpy.mode=load rbdpy.seconds=5 rbdpy.blocks=512"
    with Guest([], accel, kernel=found.vmlinuz, initrd=ramdisk, append=append, extra=extra) as guest:
        assert guest.wait_for("GUEST-UP", 90), guest.console
        with rbd.Image(world.ioctx, "vm") as image:
            image.create_snap("running")
            assert not image.is_exclusive_lock_owner()
        assert guest.wait_for("GUEST-CHECK ok", 60), guest.console
        assert guest.wait_for(None, 30), guest.console
    with rbd.Image(world.ioctx, "vm") as image, rbd.Image(world.ioctx, "vm", snapshot="running") as before:
        assert image.read(0, 2) == b"1\n" == before.read(0, 2)
        assert image.read(0, 16 * MIB) != bytes(16 * MIB)
        image.remove_snap("running")

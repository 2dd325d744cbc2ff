"""A guest boots from an image that migrates, and works on it while everything comes over."""

from __future__ import annotations

import asyncio
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from librbd_py import rbd
from librbd_py.store.embedded import EmbeddedStore
from qemu_glue.guest import Disk
from tests.vm.rig import MIB, Rig

DEADLINE = 150.0
SIZE = 64 * MIB
R = rbd.RBD()


def fill(ioctx: Any) -> bytes:
    """Image `source` with a snapshot. Returns what the snapshot holds."""
    some = random.Random(3)
    R.create(ioctx, "source", SIZE, order=21)
    with rbd.Image(ioctx, "source") as image:
        for at in range(0, SIZE, 3 * MIB):
            image.write(some.randbytes(200_000), at)
        image.create_snap("before")
        image.write(some.randbytes(2 * MIB), 17 * MIB)
        image.create_snap("last")
        image.set_snap("before")
        return bytes(image.read(0, SIZE))


@pytest.mark.vm
def test_a_guest_on_an_image_that_goes_to_another_pool_and_layout(rig: Rig) -> None:
    with rig.cluster() as cluster:
        cluster.create_pool("other")
        with cluster.open_ioctx("rbd") as here, cluster.open_ioctx("other") as there:
            before = fill(here)
            R.migration_prepare(here, "source", there, "disk", order=22, stripe_unit=65536, stripe_count=4)
    asyncio.run(guest_works(rig, "other", before))


@pytest.mark.vm
def test_a_guest_on_an_image_that_comes_from_an_embedded_store_to_ceph(
    rig: Rig, ceph_conf: str, ceph_pool: str, tmp_path: Path
) -> None:
    folder = str(tmp_path / "far")
    with EmbeddedStore(folder, create=True) as store:
        before = fill(store.open("rbd"))
    rig = replace(rig, url=f"ceph:{ceph_conf}")
    rows = {"type": "native", "store": f"embedded:{folder}", "pool_name": "rbd", "image_name": "source"}
    with rig.cluster() as cluster, cluster.open_ioctx(ceph_pool) as io:
        R.migration_prepare_import(json.dumps({**rows, "snap_name": "last"}), io, "disk")
    asyncio.run(guest_works(rig, ceph_pool, before))


async def guest_works(rig: Rig, pool: str, before: bytes) -> None:
    async with rig.daemon() as daemon:
        await daemon.execute("blockdev-add", {"driver": "rbd", "node-name": "disk", "pool": pool, "image": "disk"})
        path = rig.socket("disk.sock")
        address = {"type": "unix", "path": path}
        export = {"id": "disk", "node-name": "disk", "writable": True, "type": "vhost-user-blk", "addr": address}
        await daemon.execute("block-export-add", export)
        append = "rbdpy.mode=load rbdpy.threads=4 rbdpy.seconds=12 rbdpy.blocks=2048"
        with rig.guest(Disk("vhost-user", path), append) as guest:
            assert await asyncio.to_thread(guest.wait_for, "STAMP-TICK", DEADLINE), guest.console
            await asyncio.to_thread(executed, rig, pool)
            seen = len(guest.console)
            assert await asyncio.to_thread(guest.wait_for, "STAMP-TICK", DEADLINE, None, seen), guest.console[-2000:]
            await asyncio.to_thread(committed, rig, pool)
            assert await asyncio.to_thread(guest.wait_for, None, DEADLINE), guest.console[-2000:]
            console = guest.console
    found = re.search(r"STAMP-LOAD ops=(\d+) errors=(\d+)", console)
    assert found and int(found[2]) == 0 and int(found[1]) > 50, console[-3000:]
    assert "GUEST-CHECK ok" in console
    assert "I/O error" not in console
    with rig.cluster() as cluster, cluster.open_ioctx(pool) as io, rbd.Image(io, "disk") as image:
        image.set_snap("before")
        assert image.read(0, SIZE) == before


def executed(rig: Rig, pool: str) -> None:
    """By another client than the one that owns the image, which has it done and stays the owner."""
    with rig.cluster() as cluster, cluster.open_ioctx(pool) as io:
        with rbd.Image(io, "disk") as image:
            owners = list(image.lock_get_owners())
        assert len(owners) == 1
        R.migration_execute(io, "disk")
        assert R.migration_status(io, "disk")["state"] == rbd.RBD_IMAGE_MIGRATION_STATE_EXECUTED
        with rbd.Image(io, "disk") as image:
            assert list(image.lock_get_owners()) == owners


def committed(rig: Rig, pool: str) -> None:
    with rig.cluster() as cluster, cluster.open_ioctx(pool) as io:
        R.migration_commit(io, "disk")

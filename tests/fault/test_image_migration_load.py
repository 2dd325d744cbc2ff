"""Threads write to an image at random, and read it back, while all of it comes over, snapshots are made and removed,
and another client reads."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from librbd_py import rbd
from librbd_py.devcluster import DevCluster
from librbd_py.image import map_check
from librbd_py.store import rados
from librbd_py.store.api import Store
from librbd_py.store.embedded import EmbeddedStore
from librbd_py.store.rados import ClusterOptions

MIB = 1 << 20
SIZE = 24 * MIB
THREADS = 4
SHARE = SIZE // THREADS
TURNS = 400 if os.environ.get("RBDPY_SOAK") else 40
R = rbd.RBD()

Connect = Callable[[], Store]


@pytest.fixture(params=["embedded", "ceph"])
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Connect]:
    made: list[Store] = []

    def one() -> Store:
        if request.param == "embedded":
            store: Store = EmbeddedStore(str(tmp_path / "store"), create=True)
        else:
            cluster: DevCluster = request.getfixturevalue("ceph_cluster")
            store = rados.connect(ClusterOptions(cluster.conf), share=False)
        made.append(store)
        return store

    yield one
    for store in made:
        store.close()


@pytest.fixture
def pool(connect: Connect, request: pytest.FixtureRequest) -> Any:
    if "ceph" in request.node.name:
        return connect().open(request.getfixturevalue("ceph_pool"))
    return connect().open("rbd")


def fill(io: Any, seed: int) -> dict[str, bytes]:
    """Image `a` with two snapshots; what they and HEAD hold."""
    some = random.Random(seed)
    R.create(io, "a", SIZE, order=20)
    found = {}
    with rbd.Image(io, "a") as image:
        for name in ("s1", "s2", ""):
            for _ in range(12):
                image.write(some.randbytes(300_000), some.randrange(SIZE - 300_000))
            found[name] = image.read(0, SIZE)
            if name:
                image.create_snap(name)
    return found


class Load:
    """Every thread has its share of the image, which it knows to the byte."""

    def __init__(self, image: rbd.Image, head: bytes) -> None:
        self.image = image
        self.model = bytearray(head)
        self.stop = threading.Event()

    def run(self, number: int) -> int:
        some = random.Random(number)
        base, turns = number * SHARE, 0
        while turns < TURNS or not self.stop.is_set():
            turns += 1
            length = some.choice((512, 4096, 65536, 200_000))
            at = base + some.randrange(SHARE - length)
            match some.randrange(4):
                case 0 | 1:
                    data = some.randbytes(length)
                    self.image.write(data, at)
                    self.model[at : at + length] = data
                case 2:
                    self.image.write_zeroes(at, length)
                    self.model[at : at + length] = bytes(length)
                case _:
                    assert self.image.read(at, length) == self.model[at : at + length], f"{at}~{length}"
        return turns


def under_load(io: Any, other: Any, before: dict[str, bytes]) -> None:
    """`other`: the pool of another client, which reads a snapshot and has everything brought over."""
    with rbd.Image(io, "b") as image, ThreadPoolExecutor(THREADS + 1) as threads:
        load = Load(image, before[""])
        working = [threads.submit(load.run, number) for number in range(THREADS)]
        try:
            with rbd.Image(other, "b", read_only=True, snapshot="s1") as reader:
                for at in range(0, SIZE, 2 * MIB):
                    assert reader.read(at, 2 * MIB) == before["s1"][at : at + 2 * MIB]
            image.create_snap("while")
            executing = threads.submit(R.migration_execute, other, "b")
            image.remove_snap("while")
            executing.result(120)
        finally:
            load.stop.set()
        assert sum(thread.result(120) for thread in working) >= THREADS * TURNS
        assert image.read(0, SIZE) == load.model
        R.migration_commit(other, "b")
        assert image.read(0, SIZE) == load.model
        for name in ("s1", "s2"):
            image.set_snap(name)
            found = image.read(0, SIZE)
            wrong = [at for at in range(0, SIZE, 4096) if found[at : at + 4096] != before[name][at : at + 4096]]
            assert wrong == [], name
        image.set_snap(None)
        image.flush()
    with rbd.Image(io, "b") as image:
        assert image.read(0, SIZE) == load.model
        assert map_check.differences(image.handle) == []


def test_an_image_migrates_under_load(connect: Connect, pool: Any) -> None:
    before = fill(pool, 1)
    R.migration_prepare(pool, "a", pool, "b", order=21, stripe_unit=65536, stripe_count=3)
    under_load(pool, connect().open(pool.pool_id), before)


def test_an_image_is_imported_under_load(connect: Connect, pool: Any, tmp_path: Path) -> None:
    with EmbeddedStore(str(tmp_path / "far"), create=True) as far:
        before = fill(far.open("rbd"), 2)
        with rbd.Image(far.open("rbd"), "a") as image:
            image.create_snap("last")
    rows = {"type": "native", "store": f"embedded:{tmp_path / 'far'}", "pool_name": "rbd", "image_name": "a"}
    R.migration_prepare_import(json.dumps({**rows, "snap_name": "last"}), pool, "b")
    under_load(pool, connect().open(pool.pool_id), before)

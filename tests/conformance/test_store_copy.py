"""Images carried from store to store and back are the same; a copy that is cut short leaves none."""

from __future__ import annotations

import errno
import itertools
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from copy_world import ORDER, described, fill

from librbd_py import rbd
from librbd_py.cli.main import main
from librbd_py.devcluster import DevCluster
from librbd_py.image import clones, cls
from librbd_py.image.handle import ImageHandle
from librbd_py.image.transfer import Transfer
from librbd_py.store import connect
from librbd_py.store.api import Store, Write
from librbd_py.store.memory import MemoryCluster, MemoryContext, MemoryStore

_numbers = itertools.count(1)


class Stores:
    """By kind. On Ceph the pools are removed again."""

    def __init__(self, folder: Path, conf: Callable[[], str]) -> None:
        self._folder = folder
        self._conf = conf
        self._open: list[Store] = []
        number = next(_numbers)
        self.pools = (f"copy-{os.getpid()}-{number}-a", f"copy-{os.getpid()}-{number}-b")

    def url(self, kind: str) -> str:
        return f"ceph:{self._conf()}" if kind == "ceph" else f"{self._folder}/{kind}-{next(_numbers)}"

    def open(self, url: str) -> Store:
        store = MemoryStore(MemoryCluster()) if url == "memory" else connect(url)
        self._open.append(store)
        return store

    def make(self, kind: str) -> tuple[str, Store]:
        """With both pools, which have given snapshot ids before, in different numbers."""
        url = self.url(kind)
        store = self.open(url)
        for name, given in zip(self.pools, (3, 1), strict=True):
            store.pool_create(name)
            for _ in range(given):
                store.open(name).snap_create()
        return url, store

    def close(self) -> None:
        for store in self._open:
            for name in self.pools if type(store).__name__ == "RadosStore" else ():
                try:
                    store.pool_remove(name)
                except FileNotFoundError:
                    pass
            store.close()


@pytest.fixture
def stores(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stores]:
    def conf() -> str:
        found: DevCluster = request.getfixturevalue("ceph_cluster")
        return found.conf

    made = Stores(tmp_path, conf)
    yield made
    made.close()


@pytest.mark.parametrize("through", ["memory", "embedded", "ceph"])
def test_there_and_back_everything_is_the_same(stores: Stores, through: str) -> None:
    source = stores.make("embedded")[1]
    fill(source, *stores.pools)
    before = described(source, stores.pools)
    assert len(before) == 11
    middle = stores.open("memory") if through == "memory" else stores.open(stores.url(through))
    steps: list[tuple[int, int]] = []
    there = Transfer(source, middle, lambda done, total: steps.append((done, total)))
    there.everything()
    assert {row.name for row in there.copied} >= {"plain", "striped", "v1", "v2", "grand", "orphan", "kin", "inside"}
    assert not any(row.new_id for row in there.copied)
    assert steps and all(0 < done <= total for done, total in steps)
    assert described(middle, stores.pools) == before
    assert described(source, stores.pools) == before  # untouched
    back = stores.open(stores.url("embedded"))
    for pool in stores.pools:  # and not what others have on that cluster
        Transfer(middle, back).pool(pool)
    assert described(back, stores.pools) == before
    # What came over is alive.
    for name in ("plain", "v1", "kin"):
        with rbd.Image(back.open(stores.pools[0]), name) as image:
            image.write(b"new", 100)
            image.create_snap("new")
            assert image.read(100, 3) == b"new"


def test_ceph_reads_what_came(stores: Stores, ceph_cluster: DevCluster) -> None:
    """Ceph's own command agrees with our object maps and reads the same bytes at every snapshot."""
    source = stores.make("embedded")[1]
    fill(source, *stores.pools, seed=2)
    there = stores.make("ceph")[1]
    Transfer(source, there).everything()

    def ceph(*words: str) -> bytes:
        command = ["timeout", "60", "rbd", "-c", ceph_cluster.conf, *words]
        return subprocess.run(command, check=True, capture_output=True).stdout

    for pool, name in ((0, "plain"), (0, "striped"), (1, "v2"), (0, "grand")):
        ctx = source.open(stores.pools[pool])
        spec = f"{stores.pools[pool]}/{name}"
        with ImageHandle.open(ctx, name, read_only=True) as handle:
            snaps = [snap.name for snap in handle.header.snaps.values()]
        for at in [None, *snaps]:
            named = spec if at is None else f"{spec}@{at}"
            with rbd.Image(ctx, name, snapshot=at, read_only=True) as image:
                assert ceph("export", "--no-progress", named, "-") == image.read(0, image.size())
            ceph("object-map", "check", "--no-progress", named)
            with ImageHandle.open(there.open(stores.pools[pool]), name, read_only=True) as handle:
                assert handle.header.flags == 0
    assert ceph("children", f"{stores.pools[0]}/plain@s2").decode().split() == [
        f"{stores.pools[0]}/v1",
        f"{stores.pools[1]}/v2",
    ]


def test_images_made_by_ceph_come_over(stores: Stores, ceph_cluster: DevCluster) -> None:
    """Striped data in another pool, a snapshot in the trash that a clone needs, an image without any maps."""
    stores.make("ceph")
    pool, data = stores.pools

    def ceph(*words: str) -> bytes:
        command = ["timeout", "60", "rbd", "-c", ceph_cluster.conf, *words]
        return subprocess.run(command, check=True, capture_output=True).stdout

    def bench(image: str, size: str, total: str) -> None:
        random_ = ("--io-type", "write", "--io-pattern", "rand", "--io-size", size, "--io-total", total)
        ceph("bench", *random_, f"{pool}/{image}")

    layout = ("--object-size", "64K", "--stripe-unit", "16K", "--stripe-count", "4", "--data-pool", data)
    ceph("create", f"{pool}/r", "--size", "2M", *layout)
    for snap in "abc":
        bench("r", "4K", "128K")
        ceph("snap", "create", "--no-progress", f"{pool}/r@{snap}")
    ceph("snap", "rm", "--no-progress", f"{pool}/r@a")
    ceph("resize", "--no-progress", "--allow-shrink", "--size", "1M", f"{pool}/r")
    ceph("clone", "--rbd-default-clone-format", "2", f"{pool}/r@b", f"{pool}/k")
    bench("k", "4K", "64K")
    ceph("snap", "create", "--no-progress", f"{pool}/k@q")
    ceph("snap", "rm", "--no-progress", f"{pool}/r@b")
    ceph("create", f"{pool}/shared", "--size", "1M", "--image-shared")
    bench("shared", "4K", "64K")
    ceph("snap", "create", "--no-progress", f"{pool}/shared@z")
    there = stores.open(f"ceph:{ceph_cluster.conf}")
    here = stores.open(stores.url("embedded"))
    transfer = Transfer(there, here)
    transfer.pool(pool)
    assert sorted(row.name for row in transfer.copied) == ["k", "r", "shared"]
    assert described(here, (pool,)) == described(there, (pool,))
    for name, snap in (("r", None), ("r", "c"), ("k", None), ("k", "q"), ("shared", None), ("shared", "z")):
        with rbd.Image(here.open(pool), name, snapshot=snap, read_only=True) as image:
            spec = f"{pool}/{name}@{snap}" if snap else f"{pool}/{name}"
            assert ceph("export", "--no-progress", spec, "-") == image.read(0, image.size())


def test_one_image_brings_its_parents_and_no_others(stores: Stores) -> None:
    source, dest = stores.make("embedded")[1], stores.open("memory")
    fill(source, *stores.pools)
    Transfer(source, dest).image(source.open(stores.pools[0]), "grand")
    assert [key.split("/")[-1] for key in described(dest, stores.pools)] == ["grand", "plain", "v2"]
    with ImageHandle.open(dest.open(stores.pools[0]), "plain", read_only=True) as handle:
        assert [snap.children for snap in handle.header.snaps.values()] == [0, 1, 0, 0]
    Transfer(source, dest).image(source.open(stores.pools[0]), "v1")  # its parent is there by now
    with rbd.Image(dest.open(stores.pools[0]), "plain", read_only=True) as image:
        image.set_snap("s2")
        assert sorted(name for _, name in image.list_children()) == ["v1", "v2"]


# --- a copy that is cut short


class Cut(Exception):
    """The process ends here."""


class Counter:
    """Lets so many changes of a store through; then none, for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Store, allowed: int) -> None:
        self.left = allowed
        self.dead = False

        def wrap(name: str) -> None:
            real = getattr(MemoryContext, name)

            def changed(context: MemoryContext, *args: Any, **named: Any) -> Any:
                if context.store is store:
                    if self.left == 0 or self.dead:
                        self.dead = True
                        raise Cut
                    self.left -= 1
                return real(context, *args, **named)

            monkeypatch.setattr(MemoryContext, name, changed)

        for name in ("write", "snap_create", "snap_remove"):
            wrap(name)


def small(store: Store, pools: tuple[str, str]) -> None:
    ctx = store.open(pools[0])
    rbd.RBD().create(ctx, "base", 3 << ORDER, order=ORDER)
    with rbd.Image(ctx, "base") as image:
        image.write(b"one" * 30000, 0)
        image.create_snap("s")
        image.write(b"two", 70000)
    clones.clone(ctx, "base", "s", store.open(pools[1]), "child")
    with rbd.Image(store.open(pools[1]), "child") as image:
        image.write(b"mine", 5)
        image.create_snap("t")


def objects(store: Store, pools: tuple[str, ...]) -> list[str]:
    """Their names, without the ids of snapshots, which each store gives itself."""
    maps = re.compile(r"(rbd_object_map\.\w+\.)\w+")
    return sorted(maps.sub(r"\1", oid) for name in pools for oid in store.open(name).objects())


def test_a_copy_cut_anywhere_is_no_image_and_is_done_again(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stores.make("embedded")[1]
    small(source, stores.pools)
    before = described(source, stores.pools)
    whole = stores.open("memory")
    Transfer(source, whole).everything()
    wanted = objects(whole, stores.pools)
    for allowed in itertools.count():
        cluster = MemoryCluster()
        dying = cluster.connect()
        for name in stores.pools:
            dying.pool_create(name)
        with monkeypatch.context() as patch:
            cut = Counter(patch, dying, allowed)
            try:
                Transfer(source, dying).everything()
            except Cut:
                pass
        dying.close()  # its watches are gone with it
        with cluster.connect() as store:
            for name in stores.pools:
                for image, image_id in cls.list_images(store.open(name)).items():
                    key = f"{name}//{image}"
                    with rbd.Image(store.open(name), image, read_only=True) as opened:  # whole, or it has no name
                        data = opened.read(0, opened.size())
                    assert data == before[key]["content"][-1] and image_id == before[key]["id"]
            Transfer(source, store).everything()
            assert described(store, stores.pools) == before, allowed
            assert objects(store, stores.pools) == wanted, allowed
        if not cut.dead:
            break
    assert allowed > 20


def test_a_cancelled_copy_takes_away_what_it_made(stores: Stores) -> None:
    source, dest = stores.make("embedded")[1], stores.open("memory")
    small(source, stores.pools)
    for stop in (1, 2, 4):
        with pytest.raises(OSError) as caught:
            Transfer(source, dest, lambda done, total, stop=stop: -errno.ECANCELED if done >= stop else 0).image(
                source.open(stores.pools[0]), "base"
            )
        assert caught.value.errno == errno.ECANCELED
        assert objects(dest, stores.pools[:1]) == ["rbd_info", "rbd_trash"]
    Transfer(source, dest).image(source.open(stores.pools[0]), "base")


def test_a_copy_that_differs_gets_no_name(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dest = stores.make("embedded")[1], stores.open("memory")
    small(source, stores.pools)
    real = MemoryContext.write

    def flip(context: MemoryContext, oid: str, ops: Any, *args: Any) -> Any:
        wrong = [Write(op.offset, b"\xff" + op.data[1:]) if isinstance(op, Write) else op for op in ops]
        return real(context, oid, wrong, *args)

    monkeypatch.setattr(MemoryContext, "write", flip)
    with pytest.raises(OSError, match="other content") as caught:
        Transfer(source, dest).image(source.open(stores.pools[0]), "base")
    assert caught.value.errno == errno.EIO
    assert cls.list_images(dest.open(stores.pools[0])) == {}


def test_a_copy_that_could_not_be_named_is_completed(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dest = stores.make("embedded")[1], stores.open("memory")
    small(source, stores.pools)
    real = MemoryContext.write

    def full(context: MemoryContext, oid: str, ops: Any, *args: Any) -> Any:
        if context.store is dest and oid == "rbd_directory":
            raise OSError(errno.ENOSPC, "full")
        return real(context, oid, ops, *args)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryContext, "write", full)
        with pytest.raises(OSError) as caught:
            Transfer(source, dest).image(source.open(stores.pools[0]), "base")
        assert caught.value.errno == errno.ENOSPC
    again = Transfer(source, dest)
    again.image(source.open(stores.pools[0]), "base")
    assert again.copied == []  # nothing was left but to name it
    with rbd.Image(dest.open(stores.pools[0]), "base") as image:
        assert image.read(70000, 3) == b"two" and [snap["name"] for snap in image.list_snaps()] == ["s"]
    assert cls.trash_list(dest.open(stores.pools[0])) == {}


# --- refused


def test_what_is_refused(stores: Stores, capsys: pytest.CaptureFixture[str]) -> None:
    url, source = stores.make("embedded")
    other, dest = stores.make("embedded")
    small(source, stores.pools)
    base = f"{stores.pools[0]}/base"
    with rbd.Image(source.open(stores.pools[0]), "base"):
        assert main(["store", "copy", url, other, base, "--no-progress"]) == errno.EBUSY
    assert "open elsewhere" in capsys.readouterr().err
    assert main(["store", "copy", url, other, base, "--no-progress"]) == 0
    assert capsys.readouterr().out == f"{base}: copied and compared\n"
    assert main(["store", "copy", url, other, base, "--no-progress"]) == errno.EEXIST
    assert main(["store", "copy", url, other, f"{stores.pools[0]}/none"]) == errno.ENOENT
    assert main(["store", "copy", url, other, f"{base}@s"]) == errno.EINVAL
    assert main(["store", "copy", url]) == errno.EINVAL
    assert main(["store", "copy", url, other, stores.pools[0]]) == 0  # all there
    assert capsys.readouterr().out.endswith("nothing to copy\n")
    with rbd.Image(dest.open(stores.pools[0]), "base") as image:
        image.remove_snap("s")
    assert main(["store", "copy", url, other, f"{stores.pools[1]}/child"]) == errno.ESTALE
    assert "without the snapshot s that child needs" in capsys.readouterr().err


def test_an_id_that_is_taken_is_replaced(stores: Stores) -> None:
    source, dest = stores.make("embedded")[1], stores.open("memory")
    small(source, stores.pools)
    Transfer(source, dest).everything()
    rbd.RBD().rename(dest.open(stores.pools[0]), "base", "moved")
    again = Transfer(source, dest)
    again.image(source.open(stores.pools[0]), "base")
    assert [(row.name, row.new_id) for row in again.copied] == [("base", True)]
    with rbd.Image(dest.open(stores.pools[0]), "base", read_only=True) as image:
        assert image.read(0, 3) == b"one"

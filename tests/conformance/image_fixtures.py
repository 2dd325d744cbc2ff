"""Image tests run on every store: what they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from librbd_py import rbd
from librbd_py.format import names
from librbd_py.store import rados
from librbd_py.store.api import AssertExists, ObjectContext, OmapClear, Remove, Store
from librbd_py.store.embedded import EmbeddedStore
from librbd_py.store.memory import MemoryCluster
from librbd_py.store.rados import ClusterOptions

MIB = 1 << 20
POOLS = ("rbd", "other", "data")
R = rbd.RBD()
_namespaces = {""}  # that tests have used


class Cluster:
    """One cluster with empty pools `rbd`, `other` and `data`; `connect` makes further clients."""

    def __init__(self, connect: Callable[[], Store]) -> None:
        self._connect = connect
        self._stores: list[Store] = []
        self.first = self.connect()
        have = [row.name for row in self.first.pools()]
        for pool in POOLS:
            if pool not in have:
                self.first.pool_create(pool)

    def connect(self) -> Store:
        store = self._connect()
        self._stores.append(store)
        return store

    def pool(self, name: str, namespace: str = "") -> ObjectContext:
        _namespaces.add(namespace)
        return self.first.open(name, namespace)

    def empty(self) -> None:
        """For tests that share a cluster: making pools anew takes Ceph longer."""
        for pool in POOLS:
            for io in [self.first.open(pool, space) for space in _namespaces]:
                for oid in list(io.objects()):
                    with suppress(FileNotFoundError):  # snapshots still need it
                        # To validate the pool again takes a snapshot of it, which takes Ceph longest.
                        io.write(oid, [OmapClear() if oid == names.INFO else Remove()])

    def close(self) -> None:
        for store in self._stores:
            store.close()


@pytest.fixture(params=["memory", "embedded", "ceph"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    connect: Callable[[], Store]
    if request.param == "memory":
        connect = MemoryCluster().connect
    elif request.param == "ceph":
        options = ClusterOptions(
            request.getfixturevalue("ceph_cluster").conf, options=(("rbd_default_clone_format", "2"),)
        )

        def connect() -> Store:
            return rados.connect(options, share=False)

    else:
        folder = str(tmp_path / "store")

        def connect() -> Store:
            return EmbeddedStore(folder, create=True)

    made = Cluster(connect)
    if request.param == "ceph":
        made.empty()
    yield made
    if request.param == "ceph":
        made.empty()  # others use the pool, too
    made.close()


@pytest.fixture
def io(cluster: Cluster) -> ObjectContext:
    return cluster.pool("rbd")


def heads(io: ObjectContext) -> list[str]:
    """Objects that exist, without those that only snapshots need (of earlier tests too, on a Ceph cluster), and without
    what a pool on Ceph keeps of its validation."""

    def exists(oid: str) -> bool:
        try:
            io.read(oid, [AssertExists()])
        except FileNotFoundError:
            return False
        return True

    return [oid for oid in io.objects() if oid != names.INFO and exists(oid)]


def refused(kind: type[BaseException], code: int | None, call: Callable[..., Any], *args: Any, **named: Any) -> None:
    """The call raises exactly this class, with this errno."""
    with pytest.raises(kind) as caught:
        call(*args, **named)
    assert type(caught.value) is kind
    if code is not None:
        assert getattr(caught.value, "errno", None) == code


def eventually(holds: Callable[[], bool], seconds: float = 30) -> None:
    """Waits for what a cluster does in the background."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.02)

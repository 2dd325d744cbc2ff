"""The conformance suite runs over every store. A store joins by adding a factory to `FACTORIES`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from librbd_py.store.api import ObjectContext, Store
from librbd_py.store.embedded import EmbeddedStore
from librbd_py.store.memory import MemoryCluster, MemoryStore
from librbd_py.store.rados import ClusterOptions, connect

_numbers = itertools.count(1)


class StoreCluster:
    """Several clients of one cluster. Everything opened here is closed at the end of the test."""

    def __init__(self, kind: str, connect: Callable[[], Store]) -> None:
        self.kind = kind
        self._connect = connect
        self._open: list[Store] = []
        self._pools: list[str] = []
        self.default = self.client()

    def client(self) -> Store:
        store = self._connect()
        self._open.append(store)
        return store

    def pool(self) -> str:
        """A new, empty pool."""
        name = f"pool-{os.getpid()}-{next(_numbers)}"
        self.default.pool_create(name)
        self._pools.append(name)
        return name

    def context(self, namespace: str = "") -> ObjectContext:
        return self.default.open(self.pool(), namespace)

    def close(self) -> None:
        if self.kind == "ceph":
            for name in self._pools:
                self.default.pool_remove(name)
        for store in self._open:
            store.close()


def _memory(request: pytest.FixtureRequest, folder: Path) -> Callable[[], Store]:
    cluster = MemoryCluster()
    return lambda: MemoryStore(cluster)


def _embedded(request: pytest.FixtureRequest, folder: Path) -> Callable[[], Store]:
    return lambda: EmbeddedStore(str(folder / "store"), create=True)


def _ceph(request: pytest.FixtureRequest, folder: Path) -> Callable[[], Store]:
    conf = request.getfixturevalue("ceph_cluster").conf
    return lambda: connect(ClusterOptions(conf), share=False)


FACTORIES: dict[str, Callable[[pytest.FixtureRequest, Path], Callable[[], Store]]] = {
    "memory": _memory,
    "embedded": _embedded,
    "ceph": _ceph,
}


@pytest.fixture(params=sorted(FACTORIES))
def store_cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreCluster]:
    made = StoreCluster(request.param, FACTORIES[request.param](request, tmp_path))
    yield made
    made.close()


@pytest.fixture
def io(store_cluster: StoreCluster) -> ObjectContext:
    """An empty pool, seen by the first client."""
    return store_cluster.context()

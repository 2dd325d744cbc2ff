"""Image tests run on every store: what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from librbd_py import rbd
from librbd_py.store.api import ObjectContext, Store
from librbd_py.store.embedded import EmbeddedStore
from librbd_py.store.memory import MemoryCluster

MIB = 1 << 20
R = rbd.RBD()


class Cluster:
    """One cluster with pools `rbd`, `other` and `data`; `connect` makes further clients."""

    def __init__(self, connect: Callable[[], Store]) -> None:
        self._connect = connect
        self._stores: list[Store] = []
        self.first = self.connect()
        for pool in ("rbd", "other", "data"):
            if pool not in [row.name for row in self.first.pools()]:
                self.first.pool_create(pool)

    def connect(self) -> Store:
        store = self._connect()
        self._stores.append(store)
        return store

    def pool(self, name: str, namespace: str = "") -> ObjectContext:
        return self.first.open(name, namespace)

    def close(self) -> None:
        for store in self._stores:
            store.close()


@pytest.fixture(params=["memory", "embedded"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    connect: Callable[[], Store]
    if request.param == "memory":
        connect = MemoryCluster().connect
    else:
        folder = str(tmp_path / "store")

        def connect() -> Store:
            return EmbeddedStore(folder, create=True)

    made = Cluster(connect)
    yield made
    made.close()


@pytest.fixture
def io(cluster: Cluster) -> ObjectContext:
    return cluster.pool("rbd")


def refused(kind: type[BaseException], code: int | None, call: Callable[..., Any], *args: Any, **named: Any) -> None:
    """The call raises exactly this class, with this errno."""
    with pytest.raises(kind) as caught:
        call(*args, **named)
    assert type(caught.value) is kind
    if code is not None:
        assert getattr(caught.value, "errno", None) == code

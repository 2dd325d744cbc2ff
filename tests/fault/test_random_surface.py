"""Random programs over images, snapshots, clones, trash, groups and namespaces, by two clients, against a model.

RBDPY_SEED repeats a run; what failed is shrunk first.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from librbd_py import rbd
from librbd_py.errors import rbd_errors
from librbd_py.image import clones
from librbd_py.image.directory import CreateOptions
from librbd_py.store.api import Store
from librbd_py.store.embedded import EmbeddedStore
from librbd_py.store.embedded.check import check
from librbd_py.store.memory import MemoryCluster
from tests.fault.surface_hand import Hand
from tests.fault.surface_ops import Surface, Wrong, shrink

SOAK = bool(os.environ.get("RBDPY_SOAK"))
SEED = int(os.environ.get("RBDPY_SEED") or (random.SystemRandom().randrange(1 << 32) if SOAK else 20261123))
SEQUENCES = 300 if SOAK else 16  # on each store
STEPS = 70


class OurHand(Hand):
    """Stores without a configuration are told the clone's format with the call."""

    def __init__(self, store: Store) -> None:
        super().__init__(rbd, store.open, None)

    def clone(
        self, place: str, name: str, snap: str, to: str, child: str, features: int, order: int, form: int
    ) -> None:
        with rbd_errors("clone"):
            clones.clone(
                self.io(place), name, snap, self.io(to), child, CreateOptions(order, features), clone_format=form
            )


@contextmanager
def memory() -> Iterator[list[Store]]:
    cluster = MemoryCluster()
    clients: list[Store] = [cluster.connect(), cluster.connect()]
    clients[0].pool_create("rbd")
    yield clients
    for client in clients:
        client.close()


@contextmanager
def embedded() -> Iterator[list[Store]]:
    with tempfile.TemporaryDirectory(prefix="rbdpy-surface-") as folder:
        with EmbeddedStore(folder, create=True) as one, EmbeddedStore(folder) as two:
            yield [one, two]
        findings = [str(finding) for finding in check(folder)]
        if findings:
            raise Wrong(f"the store's check: {findings}")


def run(world: Callable[[], object], program: list[int]) -> Counter[str]:
    with world() as clients:  # type: ignore[attr-defined]
        clients[0].pool_create("data")
        rbd.RBD().namespace_create(clients[0].open("rbd"), "space")
        hands = [OurHand(client) for client in clients]
        try:
            surface = Surface([*hands])
            surface.run(program, every=5)
            return surface.counts
        finally:
            for each in hands:
                each.close()


def failure(world: Callable[[], object], program: list[int]) -> str:
    try:
        run(world, program)
    except Wrong as wrong:
        return str(wrong)
    return ""


@pytest.mark.parametrize("world", [memory, embedded])
def test_random_programs_over_the_whole_surface(world: Callable[[], object]) -> None:
    counts: Counter[str] = Counter()
    for number in range(SEQUENCES):
        seeds = random.Random(SEED * 1000 + number)
        program = [seeds.randrange(1 << 32) for _ in range(STEPS)]
        try:
            counts += run(world, program)
        except Wrong:
            short = shrink(program, lambda some: bool(failure(world, some)))
            pytest.fail(f"RBDPY_SEED={SEED}, sequence {number}, {short}: {failure(world, short)}")
    assert set(counts) == set(Surface([]).verbs), "verbs that were never run"

"""Random programs on images against a model in memory.

RBDPY_SEED repeats a run, RBDPY_OPS makes it longer; both are printed when something goes wrong.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from librbd_py.store.api import Store
from librbd_py.store.embedded import EmbeddedStore
from librbd_py.store.embedded.check import check
from librbd_py.store.memory import MemoryCluster
from tests.fault.random_ops import Program

# Fixed where a failure must mean a change for the worse; `make soak` looks for new ones.
NEW = random.SystemRandom().randrange(1 << 32) if os.environ.get("RBDPY_SOAK") else 20261123
SEED = int(os.environ.get("RBDPY_SEED") or NEW)
OPS = int(os.environ.get("RBDPY_OPS") or 24000)
PROGRAMS = 4  # on each store
STEPS = OPS // (2 * PROGRAMS)


def run(clients: list[Store], part: int) -> None:
    print(f"RBDPY_SEED={SEED} RBDPY_OPS={OPS}, part {part}")
    try:
        program = Program([client.open("rbd") for client in clients], SEED * PROGRAMS + part)
        program.run(STEPS)
        assert STEPS < 2000 or all(program.counts[name] for name in program.actions), program.counts
    finally:
        for client in clients:
            client.close()


@pytest.mark.parametrize("part", range(PROGRAMS))
def test_random_programs_on_the_memory_store_do_what_the_model_says(part: int) -> None:
    cluster = MemoryCluster()
    clients = [cluster.connect(), cluster.connect()]
    clients[0].pool_create("rbd")
    run([*clients], part)


@pytest.mark.parametrize("part", range(PROGRAMS))
def test_random_programs_on_the_embedded_store_do_what_the_model_says(tmp_path: Path, part: int) -> None:
    folder = str(tmp_path / "store")
    run([EmbeddedStore(folder, create=True), EmbeddedStore(folder, create=True)], part)
    assert [str(finding) for finding in check(folder)] == []

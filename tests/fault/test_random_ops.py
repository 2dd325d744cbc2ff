"""Random programs on images against a model in memory.

RBDPY_SEED repeats a run, RBDPY_OPS makes it longer; both are printed when something goes wrong.
"""

from __future__ import annotations

import os
import random

import pytest
from random_ops import Program

from librbd_py.store.memory import MemoryCluster

SEED = int(os.environ.get("RBDPY_SEED") or random.SystemRandom().randrange(1 << 32))
OPS = int(os.environ.get("RBDPY_OPS") or 20000)
PROGRAMS = 8


@pytest.mark.parametrize("part", range(PROGRAMS))
def test_random_programs_on_the_memory_store_do_what_the_model_says(part: int) -> None:
    cluster = MemoryCluster()
    first, second = cluster.connect(), cluster.connect()
    first.pool_create("rbd")
    print(f"RBDPY_SEED={SEED} RBDPY_OPS={OPS}, part {part}")
    try:
        program = Program([first.open("rbd"), second.open("rbd")], SEED * PROGRAMS + part)
        program.run(OPS // PROGRAMS)
        assert all(program.counts[name] for name in program.actions) or OPS < 4000
    finally:
        first.close()
        second.close()

"""Random programs on images of a Ceph cluster against a model in memory, by two clients."""

from __future__ import annotations

import os

import pytest

from librbd_py.store import rados
from librbd_py.store.rados import ClusterOptions
from tests.fault.random_ops import Program

SEED = int(os.environ.get("RBDPY_SEED") or 20261123)
STEPS = int(os.environ.get("RBDPY_OPS") or 1600) // 2


@pytest.mark.parametrize("part", range(2))
def test_random_programs_do_what_the_model_says(ceph_conf: str, ceph_pool: str, part: int) -> None:
    print(f"RBDPY_SEED={SEED}, part {part}")
    options = ClusterOptions(ceph_conf, options=(("rbd_default_clone_format", "2"),))  # as without Ceph
    stores = [rados.connect(options, share=False) for _ in range(2)]
    try:
        Program([store.open(ceph_pool) for store in stores], SEED * 2 + part).run(STEPS)
    finally:
        for store in stores:
            store.close()

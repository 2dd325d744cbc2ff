"""Random programs over the whole surface on the same images by us and by real librbd in turns, against one model."""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ceph_peer import Peer

from librbd_py import rados, rbd
from librbd_py.devcluster import DevCluster
from tests.fault.surface_hand import on_cluster
from tests.fault.surface_ops import Surface, Wrong, shrink

SOAK = bool(os.environ.get("RBDPY_SOAK"))
SEED = int(os.environ.get("RBDPY_SEED") or (random.SystemRandom().randrange(1 << 32) if SOAK else 20261128))
SEQUENCES = 100 if SOAK else 8
STEPS = 40
_numbers = itertools.count(1)


class Remote:
    """A client that is Ceph's own module in another process."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        folder = str(Path(__file__).parents[1] / "fault")
        peer.ask(f"__import__('sys').path.append({folder!r})")

    def begin(self, prefix: str) -> None:
        self._peer.ask(f"(hand := __import__('surface_hand').on_cluster(rbd, program.cluster, {prefix!r})) and None")

    def call(self, verb: str, *args: Any) -> Any:
        return self._peer.ask(f"hand.call({verb!r}, *{args!r})")


@pytest.fixture
def remote(ceph_cluster: DevCluster) -> Iterator[Remote]:
    with rados.Rados(conffile=ceph_cluster.conf) as cluster:
        cluster.create_pool("surface peer")
        peer = Peer(ceph_cluster.conf, "surface peer", "surface peer", timeout=3600 if SOAK else 240)
        try:
            yield Remote(peer)
        finally:
            peer.kill()
            cluster.delete_pool("surface peer")


def run(conf: str, remote: Remote, program: list[int]) -> Counter[str]:
    """On pools that are made for it."""
    with rados.Rados(conffile=conf) as cluster:
        prefix = f"surface {next(_numbers)} "
        pools = [prefix + name for name in ("rbd", "data")]
        for pool in pools:
            cluster.create_pool(pool)
        try:
            for pool in pools:
                with cluster.open_ioctx(pool) as io:
                    rbd.RBD().pool_init(io, True)
                    if pool == pools[0]:
                        rbd.RBD().namespace_create(io, "space")
            ours = on_cluster(rbd, cluster, prefix)
            remote.begin(prefix)
            surface = Surface([ours, remote], librbd=True)
            try:
                surface.run(program, every=4)
            finally:
                ours.close()
                remote.call("close")
            return surface.counts
        finally:
            for pool in pools:
                cluster.delete_pool(pool)


def program_of(number: int) -> list[int]:
    seeds = random.Random(SEED * 1000 + number)
    return [seeds.randrange(1 << 32) for _ in range(STEPS)]


def test_random_programs_by_us_and_librbd_in_turns(ceph_conf: str, remote: Remote) -> None:
    def failure(some: list[int]) -> str:
        try:
            run(ceph_conf, remote, some)
        except Wrong as wrong:
            return str(wrong)
        return ""

    counts: Counter[str] = Counter()
    for number in range(SEQUENCES):
        program = program_of(number)
        try:
            counts += run(ceph_conf, remote, program)
        except Wrong:
            short = shrink(program, lambda some: bool(failure(some)), 25)
            pytest.fail(f"RBDPY_SEED={SEED}, sequence {number}, {short}: {failure(short)}")
    print(f"RBDPY_SEED={SEED}: {SEQUENCES} sequences, {counts.total()} steps")
    print(", ".join(f"{verb} {count}" for verb, count in counts.most_common()))
    never = set(Surface([]).verbs) - set(counts)
    assert not never, f"verbs that were never run: {sorted(never)}"

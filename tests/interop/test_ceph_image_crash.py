"""Operations on images of a real cluster, killed between any two operations of librados.

Called again they finish, or find that they are done; what is left over the check names, and following its advice
leaves the image as after an operation that was never killed. And after the same kill real librbd, which knows nothing
of us, can list, open and remove everything; what it leaves behind the check names.

A sample here; `make soak` kills every operation at every step.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ceph_peer import Peer

from librbd_py.devcluster import DevCluster
from librbd_py.devcluster.admin import Admin
from tests.fault.ceph_crash import OPERATIONS, Server
from tests.fault.surface_ops import differences

SOAK = bool(os.environ.get("RBDPY_SOAK"))
NAMES = list(OPERATIONS) if SOAK else list(OPERATIONS)[::4]
BARE = {"rbd_children", "rbd_directory", "rbd_group_directory", "rbd_info", "rbd_namespace", "rbd_trash"}
# What librbd cannot remove before we did what our check advises. A flatten that is cut short between its last two steps
# leaves the parent's snapshot with a clone too many; librbd's order would leave a clone that opens as long as nobody
# removes its parent. And it aborts no migration whose records are not there yet, though it leaves such itself.
CLONE_TOO_MANY = "which is none of its clones"
CUT_SHORT = "its migration was"
FOR_US = {
    "flatten": CLONE_TOO_MANY,
    **dict.fromkeys([name for name in OPERATIONS if name.startswith("migration")], CUT_SHORT),
}
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("tests.fault.ceph_crash") as server:
        yield server


@pytest.fixture(scope="module")
def peer(ceph_cluster: DevCluster) -> Iterator[Peer]:
    with pool_of(ceph_cluster) as pool:
        peer = Peer(ceph_cluster.conf, pool, pool, timeout=7200 if SOAK else 240)
        try:
            peer.ask(f"__import__('sys').path.append({str(Path(__file__).parents[1] / 'fault')!r})")
            yield peer
        finally:
            peer.kill()


class pool_of:
    """A pool for the time of a block."""

    def __init__(self, cluster: DevCluster) -> None:
        self._conf = cluster.conf
        self._name = f"crash-{next(_numbers)}"

    def __enter__(self) -> str:
        with Admin(self._conf) as admin:
            admin.mon("osd pool create", pool=self._name)
            admin.mon("osd pool application enable", pool=self._name, app="rbd")
        return self._name

    def __exit__(self, *exc: object) -> None:
        with Admin(self._conf) as admin:
            admin.mon("osd pool delete", pool=self._name, pool2=self._name, yes_i_really_really_mean_it=True)


def steps_of(name: str, count: int) -> list[int]:
    """In a run that is no soak not the same ones for all."""
    return list(range(1, count + 1)) if SOAK else [1 + sum(name.encode()) % count]


def count_of(name: str, cluster: DevCluster, server: Server) -> tuple[int, object]:
    with pool_of(cluster) as pool:
        server.call("prepare", name, cluster.conf, pool)
        before = server.call("survey", cluster.conf, pool)
        count = server.call("run", name, cluster.conf, pool, 0)
        after = server.call("survey", cluster.conf, pool)
    assert after != before, "the operation does nothing"
    return count, after


def killed(name: str, cluster: DevCluster, server: Server, pool: str, at: int) -> bool:
    server.call("prepare", name, cluster.conf, pool)
    changes = server.call("run", name, cluster.conf, pool, at)
    assert changes is None or changes < at, f"not killed at {at} of {changes}"
    return changes is None  # some runs set a timestamp or ask for the lock once more than others


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_operation_is_finished_by_another_call(name: str, ceph_cluster: DevCluster, server: Server) -> None:
    conf = ceph_cluster.conf
    count, after = count_of(name, ceph_cluster, server)
    for at in steps_of(name, count):
        with pool_of(ceph_cluster) as pool:
            if killed(name, ceph_cluster, server, pool, at):
                found = server.call("resume", name, conf, pool)
                told = f"killed at {at} of {count}, again: {found['again']}, check: {found['check']}"
                told += "\n" + differences(found["end"], after)
                assert found["end"] == after, told
                assert found["check at the end"] == [], told


@pytest.mark.parametrize("name", NAMES)
def test_librbd_removes_what_a_killed_operation_left(
    name: str, ceph_cluster: DevCluster, server: Server, peer: Peer
) -> None:
    conf = ceph_cluster.conf
    count, _ = count_of(name, ceph_cluster, server)
    for at in steps_of(name, count):
        with pool_of(ceph_cluster) as pool:
            if killed(name, ceph_cluster, server, pool, at):
                server.call("fence", conf, pool)
                clean = f"__import__('ceph_cleaner').clean(rbd, program.cluster.open_ioctx({pool!r}))"
                problems = peer.ask(clean)
                if problems and name in FOR_US:
                    assert FOR_US[name] in str(server.call("leftovers", conf, pool)["check"]), problems
                    server.call("advised", conf, pool)
                    problems = peer.ask(clean)
                left = server.call("leftovers", conf, pool)
                told = f"killed at {at} of {count}: {problems}, {left}"
                assert problems == [], told
                for oid in set(left["objects"]) - BARE:
                    image_id = oid.split(".")[1]
                    assert any(image_id in finding for finding in left["check"]), told

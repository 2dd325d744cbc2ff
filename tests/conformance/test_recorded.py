"""Every store answers random programs exactly as a real Ceph 16.2.15 did (see recording.py)."""

from __future__ import annotations

import class_programs
import op_programs
import pytest
import recording
from store_fixtures import StoreCluster, store_cluster

__all__ = ["store_cluster"]

_CLASSES = recording.load(recording.CLASSES)
_OPS = recording.load(recording.OPS)


@pytest.mark.parametrize("theme", list(class_programs.EPISODES))
def test_class_methods_answer_as_ceph_does(store_cluster: StoreCluster, theme: str) -> None:
    pool = store_cluster.pool()
    contexts = [store_cluster.default.open(pool), store_cluster.client().open(pool)]
    for episode in range(class_programs.EPISODES[theme]):
        expected = _CLASSES[theme, episode]
        answers = list(recording.class_answers(contexts, theme, episode))
        assert len(answers) == len(expected)
        for (done, answer), recorded in zip(answers, expected, strict=True):
            assert answer == recorded, f"{theme} {episode}: {done}"


def test_operations_and_snapshots_answer_as_ceph_does(store_cluster: StoreCluster) -> None:
    pool = store_cluster.pool()
    for episode in range(op_programs.EPISODES):
        io = store_cluster.default.open(pool, str(episode))
        expected = _OPS["operations", episode]
        answers = list(recording.op_answers(io, episode))
        assert len(answers) == len(expected)
        for (done, answer), recorded in zip(answers, expected, strict=True):
            assert answer == recorded, f"{episode}: {done}"

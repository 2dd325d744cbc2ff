"""Two to eight processes want the exclusive lock at once: it has one owner at a time, all get it, and nobody writes
without it. On Ceph three of eight are Ceph's own librbd; on the embedded store some die owning it."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.fault.lock_contestant import BLOCKS, Player
from tests.fault.lock_rig import Rig, ceph_rig, embedded_rig

ROUNDS = 500 if os.environ.get("RBDPY_SOAK") else 50
CONTESTANTS = 8
REAL = (1, 3, 6)  # of the contestants on Ceph
BLOCKS_A_TURN = 4
Row = tuple[float, float, int]  # from, to, epoch


class Race:
    """`turns`: every time of ownership so far, in order."""

    def __init__(self, rig: Rig, real: tuple[int, ...] = ()) -> None:
        self.rig = rig
        self.image = rig.image()
        self.players = rig.players(self.image, *(number in real for number in range(CONTESTANTS)))
        self.epoch = 0
        self.turns: list[Row] = []
        self.had: dict[int, int] = {}

    def round(self, count: int, then: Callable[[list[Player]], None] = lambda chosen: None) -> None:
        """One turn for each of so many. `then` comes when they have begun."""
        chosen = self.players[:count]
        for player in chosen:
            player.tell("turns", 1, BLOCKS_A_TURN)
        then(chosen)
        rows: list[Row] = []
        for player in chosen:
            rows += [tuple(row) for row in player.answer()]
            self.had[player.owner] = self.had.get(player.owner, 0) + 1
        rows.sort()
        for (_, ended, epoch), (begun, _, following) in itertools.pairwise(rows):
            assert ended <= begun, f"two owners at once: {rows}"
            assert epoch < following, f"an epoch came back: {rows}"
        assert rows[0][2] > self.epoch and (not self.turns or self.turns[-1][1] <= rows[0][0])
        self.turns += rows
        self.epoch = rows[-1][2]

    def verify(self) -> None:
        """As a client sees it that has nothing to do with them."""
        marks = self.rig.read(self.image)
        assert marks[0][1] == self.epoch and len(marks) == BLOCKS
        assert max(epoch for _, epoch, _ in marks) == self.epoch


def test_who_fights_for_the_lock_of_the_embedded_store(tmp_path: Path) -> None:
    with embedded_rig(tmp_path) as rig:
        race = Race(rig)
        deaths = 0
        for number in range(ROUNDS):
            if number % 10 == 5:
                victim = race.players.pop()
                victim.tell("die", BLOCKS_A_TURN)
                race.round(2 + number % 6)
                assert victim.process.wait(60) == -signal.SIGKILL
                race.players += rig.players(race.image, False)
                deaths += 1
            else:
                race.round(2 + number % 7)
        race.verify()
        turns = sum(2 + number % (6 if number % 10 == 5 else 7) for number in range(ROUNDS))
        assert len(race.turns) == turns, f"{len(race.turns)} of {turns} turns in {ROUNDS} rounds with {deaths} deaths"


def test_who_fights_for_the_lock_on_ceph(ceph_conf: str, ceph_pool: str) -> None:
    with ceph_rig(ceph_conf, ceph_pool) as rig:
        before = set(rig.blocklist())
        race = Race(rig, REAL)
        for number in range(ROUNDS):
            race.round(2 + number % 7)
        race.verify()
        turns = sum(2 + number % 7 for number in range(ROUNDS))
        real = sum(race.had[player.owner] for player in race.players if player.real)
        assert len(race.turns) == turns and real > turns // 4, f"{len(race.turns)} of {turns} turns, {real} of librbd's"
        assert set(rig.blocklist()) <= before  # who lives is asked, never fenced

"""An owner under load that is stopped while another takes its lock: it can never write again, on waking neither. One
that is merely slow loses nothing."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.lock_contestant import BLOCKS, DEADLINE, Player
from tests.fault.lock_rig import Rig, ceph_rig, embedded_rig

ZOMBIES = 20 if os.environ.get("RBDPY_SOAK") else 3
SLOW = 2
DEPTH = 8
SOON = 5.0  # seconds until a zombie on Ceph knows
EMBEDDED_WATCH, EMBEDDED_SLOW_WATCH = 1, 4  # seconds
CEPH_WATCH = 6  # of scratch clusters


@pytest.fixture(params=["embedded", "ceph"])
def rig(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    if request.param == "embedded":
        monkeypatch.setenv("RBDPY_WATCH_TIMEOUT", str(EMBEDDED_WATCH))
        with embedded_rig(tmp_path) as made:
            yield made
    else:
        with ceph_rig(request.getfixturevalue("ceph_conf"), request.getfixturevalue("ceph_pool")) as made:
            yield made


class Pair:
    """Who owns an image and who wants it."""

    def __init__(self, rig: Rig, first: Player, second: Player, image: str, *, lazily: bool) -> None:
        self.rig, self.image = rig, image
        self.owner, self.heir = first, second
        self.epoch = first.ask("own", lazily)
        first.ask("load", DEPTH)

    def dead_or_shut_out(self) -> None:
        """What becomes of the zombie once it may run again."""
        if not self.rig.ceph:
            assert self.owner.process.wait(DEADLINE) == -signal.SIGKILL
            return
        begun = time.monotonic()
        while (said := self.owner.ask("report"))["writing"]:
            assert time.monotonic() - begun < SOON, said
            time.sleep(0.05)
        assert len(said["errors"]) == DEPTH and {code for _, code in said["errors"]} == {errno.ESHUTDOWN}, said


def pairs(rig: Rig, count: int, *, lazily: bool) -> list[Pair]:
    """At once, each on an image of its own."""
    images = [rig.image() for _ in range(count)]
    players = [(rig.player(image), rig.player(image)) for image in images]
    for both in players:
        for player in both:
            player.answer()
    made = [Pair(rig, *both, image, lazily=lazily) for both, image in zip(players, images, strict=True)]
    for pair in made:
        pair.owner.written(200)
    return made


def test_a_zombie_writes_nothing_more(rig: Rig) -> None:
    found = pairs(rig, ZOMBIES, lazily=False)
    begun = time.monotonic()
    for pair in found:
        pair.owner.stand_still()
        pair.heir.tell("take_over")
    after = [pair.heir.answer() for pair in found]
    limit = CEPH_WATCH if rig.ceph else EMBEDDED_WATCH
    for pair, said in zip(found, after, strict=True):
        assert said["first"] - begun < limit + 10
        assert said["epoch"] == pair.epoch + 1
        before = [epoch for _, epoch, _ in said["before"]]
        assert pair.epoch in before and max(before) == pair.epoch
        assert len(rig.blocklist()) >= ZOMBIES
    for pair in found:
        pair.owner.go_on()
    for pair in found:
        pair.dead_or_shut_out()
    zombie_writes = wrong = 0
    for pair, said in zip(found, after, strict=True):
        for owner, epoch, _ in rig.read(pair.image):
            zombie_writes += owner == pair.owner.owner
            wrong += (owner, epoch) != (pair.heir.owner, said["epoch"])
        pair.heir.ask("look_at_all")
    checked = ZOMBIES * BLOCKS
    assert (zombie_writes, wrong) == (0, 0), f"{zombie_writes} zombie writes, {wrong} wrong blocks of {checked}"


def test_a_slow_owner_is_never_fenced(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands still for less than a watch lasts, and somebody wants its lock: it gives it up on waking, and may have
    it again."""
    monkeypatch.setenv("RBDPY_WATCH_TIMEOUT", str(EMBEDDED_SLOW_WATCH))
    before = rig.blocklist()
    found = pairs(rig, SLOW, lazily=True)
    for pair in found:
        pair.owner.stand_still()
    time.sleep(1.5)  # the pause itself: some of it before anybody looks
    for pair in found:
        pair.heir.tell("acquire")
    time.sleep(1.5 if rig.ceph else 2.5)
    for pair in found:
        pair.owner.go_on()
    for pair in found:
        pair.heir.answer()
        pair.heir.ask("begin")
        report = pair.owner.ask("report")
        assert {code for _, code in report["errors"]} <= {errno.EROFS}, report  # the heir keeps it by hand
        pair.owner.ask("stop")
        assert pair.heir.ask("look", 0) == [pair.heir.owner, pair.epoch + 1, 1]
    assert set(rig.blocklist()) <= set(before)
    for pair in found:
        pair.heir.tell("turns", 1, 1)
        pair.heir.answer()
        assert pair.owner.ask("own") == pair.epoch + 3  # alive and well

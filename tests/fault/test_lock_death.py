"""From `kill -9` of a lock's owner under load to the first write of who waits for it: at once on one machine; from
another machine, and for Ceph's own librbd, when the cluster knows, after its watch timeout (6 s in scratch clusters).
`pytest -rP` shows the times."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.fault.lock_contestant import DEADLINE, Player
from tests.fault.lock_rig import Rig, ceph_rig, embedded_rig

DEATHS = 50 if os.environ.get("RBDPY_SOAK") else 5
CEPH_WATCH = 6.0
ONE_HOST = 2.0  # seconds


def verified(rig: Rig, image: str, heir: Player, epoch: int) -> None:
    """The heir stamped every block; nothing came after it."""
    assert {(owner, number) for owner, number, _ in rig.read(image)} == {(heir.owner, epoch)}


def test_the_next_writer_on_one_machine(tmp_path: Path) -> None:
    with embedded_rig(tmp_path) as rig:
        image = rig.image()
        (heir,) = rig.players(image, False)
        took = []
        for number in range(DEATHS):
            (owner,) = rig.players(image, False)
            epoch = owner.ask("own", number % 2 == 0)  # given up when asked, or not
            owner.ask("load", 8)
            owner.written(100)
            begun = time.monotonic()
            owner.kill()
            said = heir.ask("take_over")
            took.append(said["first"] - begun)
            assert said["epoch"] == epoch + 1
            verified(rig, image, heir, said["epoch"])
            heir.ask("release")
        print(shown := f"{len(took)} deaths: {[f'{seconds:.3f}' for seconds in took]} s")
        assert max(took) < ONE_HOST, shown


def test_the_next_writer_when_the_owner_was_asked_already(tmp_path: Path) -> None:
    """It said that it gives the lock up, and dies before it does: nobody waits for the promise."""
    with embedded_rig(tmp_path) as rig:
        image = rig.image()
        owner, heir = rig.players(image, False, False)
        owner.ask("own", True)
        owner.ask("hold", DEADLINE)
        heir.tell("take_over")
        end = time.monotonic() + DEADLINE
        while "quiescing" not in owner.ask("state"):
            assert time.monotonic() < end
        begun = time.monotonic()
        owner.kill()
        said = heir.answer()
        assert said["first"] - begun < ONE_HOST
        verified(rig, image, heir, said["epoch"])


def test_the_next_writer_on_one_machine_on_ceph(ceph_conf: str, ceph_pool: str) -> None:
    """The kernel proves what the cluster does not know yet."""
    with ceph_rig(ceph_conf, ceph_pool) as rig:
        image = rig.image()
        (heir,) = rig.players(image, False)
        took = []
        for number in range(DEATHS):
            (owner,) = rig.players(image, False)
            epoch = owner.ask("own", number % 2 == 0)
            owner.ask("load", 8)
            owner.written(100)
            begun = time.monotonic()
            owner.kill()
            said = heir.ask("take_over")
            took.append(said["first"] - begun)
            assert said["epoch"] == epoch + 1
            verified(rig, image, heir, said["epoch"])
            assert owner.address in rig.blocklist()
            heir.ask("release")
        print(shown := f"{len(took)} deaths: {[f'{seconds:.3f}' for seconds in took]} s")
        assert max(took) < ONE_HOST, shown


def test_who_stands_still_is_not_taken_for_dead(ceph_conf: str, ceph_pool: str) -> None:
    """Nor is one whose process only forked."""
    with ceph_rig(ceph_conf, ceph_pool) as rig:
        image = rig.image()
        owner, heir = rig.players(image, False, False)
        owner.ask("own", True)
        owner.stand_still()
        heir.tell("own", True)
        time.sleep(1.0)  # much less than its watch lasts
        assert owner.address not in rig.blocklist()
        owner.go_on()
        heir.answer()
        assert owner.address not in rig.blocklist()


def test_the_next_writer_elsewhere_on_ceph(ceph_conf: str, ceph_pool: str, tmp_path: Path) -> None:
    """Two heirs of another host, and librbd."""
    with ceph_rig(ceph_conf, ceph_pool) as rig:
        images = [rig.image() for _ in range(3)]
        found = []
        for image in images:
            owner = rig.player(image)
            heir = rig.player(image, real=image is images[-1], host=str(tmp_path))
            for player in (owner, heir):
                player.address = player.answer()
            epoch = owner.ask("own")
            owner.ask("load", 8)
            owner.written(100)
            found.append((image, owner, heir, epoch))
        begun = time.monotonic()
        for _, owner, heir, _ in found:
            owner.kill()
            heir.tell("take_over")
        took = []
        for image, _, heir, epoch in found:
            said = heir.answer()
            took.append(said["first"] - begun)
            assert said["epoch"] == epoch + 1
            verified(rig, image, heir, said["epoch"])
        print(shown := f"{len(took)} deaths: {[f'{seconds:.3f}' for seconds in took]} s, the last heir librbd")
        assert max(took) < CEPH_WATCH + 10, shown
        assert len(set(rig.blocklist()) & {owner.address for _, owner, _, _ in found}) == len(found)

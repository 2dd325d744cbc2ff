"""After a hand-off of the lock from one of our clients to the next, Ceph's own tools and librbd (16.2.15) see the
second one as they see any owner: they name it, ask it, wait for it and break its lock when it is dead."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fault.lock_contestant import DEADLINE, Player
from tests.fault.lock_rig import Rig, ceph_rig

KEY = "uuid:6f1a7a34-59c3-4e4b-8f0e-0d4a3e0b9a11"


@pytest.fixture
def rig(ceph_conf: str, ceph_pool: str) -> Iterator[Rig]:
    with ceph_rig(ceph_conf, ceph_pool) as made:
        yield made


def rbd(rig: Rig, *words: str) -> Any:
    """Ceph's own command."""
    command = ["rbd", "--conf", rig.where["conffile"], "--format", "json", "--pool", rig.pool, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def moved(rig: Rig, image: str) -> tuple[Player, Player]:
    """Two of ours; the lock went from the first to the second."""
    here, there = rig.players(image, False, False)
    here.ask("own", True)
    there.ask("stand_by", KEY)
    assert here.ask("hand_over", KEY)["offered"]
    there.ask("come")
    there.ask("begin")
    return here, there


def address(player: Player) -> str:
    return player.address


def test_its_tools_name_the_second_owner(rig: Rig) -> None:
    image = rig.image()
    here, there = moved(rig, image)
    (lock,) = rbd(rig, "lock", "ls", image)
    assert lock["address"] == address(there) and lock["id"].startswith("auto ")
    watchers = {row["address"]: row["cookie"] for row in rbd(rig, "status", image)["watchers"]}
    assert set(watchers) == {address(here), address(there)}
    assert lock["id"] == f"auto {watchers[address(there)]}"
    client = next(row["client"] for row in rbd(rig, "status", image)["watchers"] if row["address"] == address(there))
    assert lock["locker"] == f"client.{client}"
    here.kill()
    there.ask("look_at_all")


def test_librbd_asks_the_second_owner_and_gets_it(rig: Rig) -> None:
    image = rig.image()
    here, there = moved(rig, image)
    real = rig.players(image, True)[0]
    before = rig.blocklist()
    assert real.ask("own", True) == 3
    (lock,) = rbd(rig, "lock", "ls", image)
    assert lock["address"] == address(real)
    assert there.ask("own", True) == 4  # and back
    (lock,) = rbd(rig, "lock", "ls", image)
    assert lock["address"] == address(there)
    assert set(rig.blocklist()) <= set(before)
    here.kill()


def test_librbd_breaks_the_lock_of_a_second_owner_that_died(rig: Rig) -> None:
    image = rig.image()
    here, there = moved(rig, image)
    there.ask("writer", 4)
    there.written(100)
    real = rig.players(image, True)[0]
    there.kill()
    said = real.ask("take_over")
    assert said["epoch"] == 3 and max(epoch for _, epoch, _ in said["before"]) == 2
    assert address(there) in rig.blocklist() and address(here) not in rig.blocklist()
    assert {(owner, epoch) for owner, epoch, _ in rig.read(image)} == {(real.owner, 3)}


def test_librbd_waits_while_the_lock_is_offered_and_is_served_then(rig: Rig) -> None:
    image = rig.image()
    here, there = rig.players(image, False, False)
    real = rig.players(image, True)[0]
    here.ask("own", True)
    there.ask("stand_by", KEY)
    assert here.ask("hand_over", KEY)["offered"]
    before = rig.blocklist()
    real.tell("own", True)
    end = time.monotonic() + DEADLINE
    while not here.ask("asked"):  # and was told to come again
        assert time.monotonic() < end, "librbd does not ask"
    (lock,) = rbd(rig, "lock", "ls", image)
    assert lock["address"] == address(here)
    there.ask("come")  # and its first write, before anybody else's
    assert real.answer() == 2
    assert there.ask("look", 0) == [real.owner, 2, 1]
    assert set(rig.blocklist()) <= set(before)
    here.kill()


def test_librbd_breaks_the_lock_of_a_source_that_died_offering(rig: Rig) -> None:
    """The offer dies with it: the destination is refused, its writes wait until an operator decides."""
    image = rig.image()
    here, there = rig.players(image, False, False)
    real = rig.players(image, True)[0]
    here.ask("own", True)
    there.ask("stand_by", KEY)
    assert here.ask("hand_over", KEY)["offered"]
    here.kill()
    assert real.ask("take_over")["epoch"] == 2
    with pytest.raises(AssertionError, match="somebody else owned the lock while the VM was moving"):
        there.ask("come")
    assert address(here) in rig.blocklist()
    assert {epoch for _, epoch, _ in rig.read(image)} == {2}


def test_the_record_is_one_that_librbd_decodes(rig: Rig) -> None:
    """Offered, taken: written by us byte for byte in the format of the class, which Ceph's own decoder reads."""
    image = rig.image()
    here, there = rig.players(image, False, False)
    here.ask("own", True)
    there.ask("stand_by", KEY)
    assert here.ask("hand_over", KEY)["offered"]
    prefix = rbd(rig, "info", image)["id"]
    for player, says in ((here, f"rbdpy hand-off {KEY}"), (there, "rbdpy taken")):
        if player is there:
            there.ask("come")
        command = ["rados", "--conf", rig.where["conffile"], "-p", rig.pool, "lock", "info", f"rbd_header.{prefix}"]
        done = subprocess.run([*command, "rbd_lock", "--format", "json"], capture_output=True, text=True, timeout=60)
        (locker,) = json.loads(done.stdout)["lockers"]
        assert locker["addr"] == address(player) and locker["description"].startswith(says)

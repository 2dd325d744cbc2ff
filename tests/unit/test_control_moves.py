"""A million random steps of a world in which VMs migrate: the lock of each moves with it, or its new host is refused.
RBDPY_SOAK: a hundred million. A failure names the seed: `MovingWorld(seed, clients(seed)).run(STEPS)` is it again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from librbd_py.control import handoff
from librbd_py.control import lock_events as le
from librbd_py.control.lock import ANSWERS, LockMachine
from librbd_py.control.lock_events import LockState
from tests.unit.control_moves import MovingWorld
from tests.unit.control_world import CALM, Chances, Violation

STEPS = 5000
PARTS = 4
SEEDS = 20_000 if os.environ.get("RBDPY_SOAK") else 200


def clients(seed: int) -> int:
    return 2 + seed % 4


def run(seed: int, chances: Chances | None = None, steps: int = STEPS) -> MovingWorld:
    world = MovingWorld(seed, clients(seed), chances)
    try:
        world.run(steps)
    except AssertionError as failure:  # a Violation, or a step that the machine's table does not know
        raise Violation(f"seed {seed}: {failure}") from failure
    return world


@pytest.mark.parametrize("part", range(PARTS))
def test_a_million_steps_of_migrations(part: int) -> None:
    worlds = [run(seed) for seed in range(part, SEEDS, PARTS)]
    assert sum(world.steps for world in worlds) >= STEPS * SEEDS // PARTS
    assert min(sum(world.moved for world in worlds), sum(world.returned for world in worlds)) > SEEDS // PARTS
    assert sum(world.refused for world in worlds) > 10 and sum(world.writes for world in worlds) > SEEDS


def test_somebody_is_fenced_in_every_state() -> None:
    missing = set(LockState) - {LockState.FENCED, LockState.STOPPED}
    # Slow, so that time passes in each.
    often = Chances(lost_answer=0.15, failure=0.05, watch_loss=0.1, blocklist=0.02, slow=0.3)
    for seed in range(300):
        missing -= run(seed, often).fenced_in
        if not missing:
            break
    assert not missing


def test_a_rough_network_changes_nothing() -> None:
    rough = Chances(0.15, 0.1, 0.3, 0.3, 0.1, 0.1, 0.03, 0.02, 0.2)
    for seed in range(20):
        run(3000 + seed, rough)


def test_without_faults_they_move_all_the_same() -> None:
    """But for hosts that die in a migration: the world allows nobody else to be fenced."""
    for seed in range(4):
        world = run(seed, CALM)
        assert world.moved > 2 and world.grants > 20
        assert not world.blocklist & {client.address for client in world.clients}


class Driver:
    """Of one machine, by hand."""

    def __init__(self) -> None:
        self.machine = LockMachine(4100, "10.0.0.1:0/1")
        self.machine.handle(le.WatchUp(5))

    def step(self, event: le.Event) -> le.Action:
        return self.machine.handle(event)[-1]

    def done(self, action: le.Action, value: object = None, code: int = 0) -> le.Action:
        return self.step(le.Done(action.op, code, value))  # type: ignore[union-attr]


@pytest.mark.parametrize("answer", [0, errno.ETIMEDOUT], ids=["still offered", "no answer"])
def test_a_vm_that_comes_back_while_the_offer_is_looked_at(answer: int) -> None:
    """A wait that had no exit."""
    d = Driver()
    announced = d.done(d.done(d.done(d.step(le.Acquire()), le.LockView())))
    assert isinstance(announced, le.AnnounceAcquired)
    mark = d.done(d.step(le.Offer("uuid:1")))
    assert isinstance(mark, le.Mark) and isinstance(d.done(mark), le.Offered)
    look = d.step(le.PeerAcquired(9, 9))
    assert d.machine.handle(le.TakeBack()) == []
    view = le.LockView(le.Locker(4100, "auto 5", "10.0.0.1:0/1", mark.new))
    assert isinstance(d.done(look, view, answer), le.Mark)
    assert d.machine.state is LockState.RETRACTING


def test_who_was_asked_gave_the_lock_to_somebody_else() -> None:
    source, stranger = (le.Locker(gid, f"auto {gid}", f"10.0.0.{gid}:0/1") for gid in (7, 8))
    d = Driver()
    d.machine.handle(le.StandBy("uuid:1", source))
    ask = d.done(d.done(d.step(le.TakeOver()), le.LockView(source)), True)
    assert isinstance(ask, le.Ask) and isinstance(d.done(ask, le.Answer(0)), le.Sleep)
    look = d.step(le.PeerAcquired(8, 8))
    assert d.done(look, le.LockView(stranger)) == le.Refused(errno.ESTALE)
    d.machine.handle(le.PeerReleased(8))
    d.machine.handle(le.PeerReleased(7))  # late
    look = d.step(le.TakeOver())
    for _ in range(handoff.LEAVE_ATTEMPTS):
        look = d.done(d.done(look, le.LockView()))
    assert d.done(look, le.LockView()) == le.Refused(errno.ESTALE)
    assert isinstance(d.step(le.TakeOver(force=True)), le.Look)


def test_who_expects_a_dead_owner_takes_its_place_at_once() -> None:
    """Broken and locked again there would be a moment for somebody else."""
    source = le.Locker(7, "auto 7", "10.0.0.7:0/1")
    d = Driver()
    d.machine.handle(le.StandBy("uuid:1", source))
    relook = d.done(d.done(d.step(le.TakeOver()), le.LockView(source)), False)
    assert isinstance(relook, le.Look)
    fence = d.done(relook, le.LockView(source))
    assert isinstance(fence, le.Blocklist)
    take = d.done(fence)
    assert isinstance(take, le.TakeOffer) and take.owner == source
    assert isinstance(d.done(take, code=errno.ECANCELED), le.Look)  # or somebody was faster


def test_a_view_older_than_the_stranger_proves_nothing() -> None:
    source = le.Locker(7, "auto 7", "10.0.0.7:0/1")
    d = Driver()
    d.machine.handle(le.StandBy("uuid:1", source))
    look = d.step(le.TakeOver())
    d.machine.handle(le.PeerAcquired(8, 8))
    look = d.done(look, le.LockView(source))
    assert isinstance(look, le.Look)
    assert isinstance(d.done(look, le.LockView(source)), le.CheckOwner)  # it has come back


def test_an_offer_in_doubt_does_not_keep_who_asks_waiting() -> None:
    """Nothing was offered, nobody here knows, and the one who asks would wait for ever."""
    d = Driver()
    d.done(d.done(d.done(d.step(le.Acquire()), le.LockView())))
    mark = d.done(d.step(le.Offer("uuid:1")))
    assert d.done(d.done(mark, code=errno.ETIMEDOUT), code=errno.ETIMEDOUT) == le.Offered(errno.ETIMEDOUT)
    assert d.machine.offered
    again, look = d.machine.handle(le.PeerRequested(9, 9))
    assert again == le.Reply(errno.EAGAIN)
    ready = d.done(look, le.LockView(le.Locker(4100, "auto 5", "10.0.0.1:0/1")))
    d.done(ready)
    assert d.machine.owning
    assert le.Reply(0) in d.machine.handle(le.PeerRequested(9, 9))


def test_requests_go_on_while_the_cookie_is_renewed() -> None:
    """The world would not have it if one of those writes arrived at another's image."""
    worlds = [run(seed, Chances(watch_loss=0.1, slow=0.3)) for seed in range(10)]
    assert sum(world.renewing for world in worlds) > 10


def test_a_lock_left_behind_stops_nobody() -> None:
    """The store does not let many unlock, and nobody closes the image that is lost with it."""
    worlds = [run(seed, Chances(failure=0.3, blocklist=0)) for seed in range(20)]
    assert sum(world.left_behind for world in worlds) > 10


# --- the simulation finds what is wrong ----------------------------------------------------------------------------


def takes_back_without_asking_the_store(machine: LockMachine, done: le.Done) -> None:
    handoff.retract_done(machine, le.Done(done.op, 0))


def believes_a_lost_take_over(machine: LockMachine, done: le.Done) -> None:
    handoff.taking_done(machine, le.Done(done.op, 0))


def forgets_who_waits_when_it_was_taken(machine: LockMachine, done: le.Done) -> None:
    handoff.retract_looked(machine, done)
    machine._out = [action for action in machine._out if not isinstance(action, le.Refused)]


def leaves_an_unanswered_offer(machine: LockMachine, done: le.Done) -> None:
    handoff.offering_done(machine, done)
    machine._out = [action for action in machine._out if not isinstance(action, le.Offered)]


def expects_nobody_once_it_has_asked(machine: LockMachine, owner: le.Locker) -> None:
    if machine.hand.standby is not None:
        machine.hand.standby = le.StandBy(machine.hand.standby.key, None)


def overlooks_who_was_faster(machine: LockMachine) -> bool:
    return False


def believes_old_farewells(machine: LockMachine, gid: int) -> None:
    standby = machine.hand.standby
    if standby is not None and standby.owner is not None:
        machine.hand.standby = replace(standby, left=gid == standby.owner.gid)


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("asks", expects_nobody_once_it_has_asked),
        ("overtaken", overlooks_who_was_faster),
        ("let_go", believes_old_farewells),
    ],
)
def test_the_simulation_catches_a_destination_that(
    name: str, mutant: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handoff, name, mutant)
    with pytest.raises(Violation, match=r"^seed \d+: .* owned the lock since"):
        for seed in range(400):
            run(seed)


@pytest.mark.parametrize(
    ("state", "mutant"),
    [
        (LockState.RETRACTING, takes_back_without_asking_the_store),
        (LockState.TAKING, believes_a_lost_take_over),
        (LockState.RETRACT_LOOKING, forgets_who_waits_when_it_was_taken),
        (LockState.OFFERING, leaves_an_unanswered_offer),
    ],
)
def test_the_simulation_catches_a_machine_that(
    state: LockState, mutant: Callable[[LockMachine, le.Done], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ANSWERS, state, mutant)
    with pytest.raises(Violation, match=r"^seed \d+: "):
        for seed in range(400):
            run(seed, steps=1000)

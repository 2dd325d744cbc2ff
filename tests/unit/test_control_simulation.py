"""Hundreds of thousands of random steps of watches and locks: never two owners, every wait ends."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from librbd_py.control import lock_events as le
from librbd_py.control.lock import ANSWERS, LockMachine
from librbd_py.control.lock_events import LockState
from librbd_py.format.lock import auto_cookie
from tests.unit.control_world import CALM, Chances, Violation, World

STEPS = 5000
SEEDS = range(44)


@pytest.mark.parametrize("start", range(0, len(SEEDS), 11))
def test_never_two_owners_and_every_wait_ends(start: int) -> None:
    for seed in SEEDS[start : start + 11]:
        world = World(seed, clients=2 + seed % 3)
        world.run(STEPS)
        assert world.steps >= STEPS
        assert world.grants > 20


def test_a_rough_network_changes_nothing() -> None:
    rough = Chances(0.15, 0.1, 0.3, 0.3, 0.1, 0.1, 0.03, 0.02, 0.2)
    for seed in range(6):
        World(1000 + seed, clients=4, chances=rough).run(STEPS)


def test_without_faults_the_lock_wanders_and_nobody_is_fenced() -> None:
    world = World(7, clients=4, chances=CALM)
    world.run(STEPS)
    assert world.grants > 100
    assert not world.blocklist


def breaks_without_fencing(machine: LockMachine, done: le.Done) -> None:
    owner = machine._seen.owner
    assert owner is not None
    if done.errno or done.value != machine._seen:
        machine._look()
    else:
        machine.state = LockState.BLOCKLISTING
        machine._do(LockState.BREAKING, lambda op: le.Break(op, owner))


def takes_the_living_for_dead(machine: LockMachine, done: le.Done) -> None:
    LockMachine._checked(machine, done if done.errno else le.Done(done.op, 0, False))


def owns_without_the_stores_word(machine: LockMachine, done: le.Done) -> None:
    LockMachine._locked(machine, le.Done(done.op, 0))


def forgets_to_read_the_lock_under_a_new_watch(machine: LockMachine, done: le.Done) -> None:
    machine.cookie = machine._pending = auto_cookie(machine.handle_now or 0)
    machine.state = LockState.RELOCKING
    machine._relock_finished()


def ignores_lost_answers(machine: LockMachine, done: le.Done) -> None:
    LockMachine._locked(machine, le.Done(done.op, errno.EIO) if done.errno == errno.ETIMEDOUT else done)


def waits_without_a_timer(machine: LockMachine, done: le.Done) -> None:
    LockMachine._asked_owner(machine, done)
    if machine.state is LockState.WAITING:
        machine._out.pop()


def drops_the_waiters(machine: LockMachine, done: le.Done) -> None:
    LockMachine._asked_owner(machine, done)
    machine._out = [action for action in machine._out if not isinstance(action, le.Refused)]


def unlocks_undrained(machine: LockMachine, done: le.Done) -> None:
    LockMachine._post_acquired(machine, done)
    if machine.cookie is not None:
        machine._out.append(le.Unlock(-1, machine.cookie))


@pytest.mark.parametrize(
    ("state", "mutant"),
    [
        (LockState.RELOOKING, breaks_without_fencing),
        (LockState.CHECKING, takes_the_living_for_dead),
        (LockState.LOCKING, owns_without_the_stores_word),
        (LockState.LOCKING, ignores_lost_answers),
        (LockState.RELOCK_LOOKING, forgets_to_read_the_lock_under_a_new_watch),
        (LockState.ASKING, waits_without_a_timer),
        (LockState.ASKING, drops_the_waiters),
        (LockState.POST_ACQUIRING, unlocks_undrained),
    ],
)
def test_the_simulation_catches_a_machine_that(
    state: LockState, mutant: Callable[[LockMachine, le.Done], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ANSWERS, state, mutant)
    with pytest.raises((Violation, AssertionError)):
        for seed in range(400):
            World(seed).run(500)

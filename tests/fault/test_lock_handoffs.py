"""A VM under load moves from process to process: what was acknowledged is there, what was not is not, and nobody writes
after the offer, not even those whose writes wait when they are killed. `pytest -rP` shows how long a hand-off takes."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

from tests.fault.lock_contestant import BLOCKS, NOTHING, Mark, Player
from tests.fault.lock_rig import Rig, ceph_rig, embedded_rig

MOVES = 40 if os.environ.get("RBDPY_SOAK") else 5
DEPTH = 8
KEY = "uuid:6f1a7a34-59c3-4e4b-8f0e-0d4a3e0b9a11"


def spread(what: str, seconds: list[float]) -> str:
    ms = sorted(1e3 * value for value in seconds)
    at = [ms[0], statistics.median(ms), ms[len(ms) * 9 // 10], ms[-1]]
    return f"{what}: min {at[0]:.2f}, median {at[1]:.2f}, 90 % {at[2]:.2f}, max {at[3]:.2f} ms"


def moves(rig: Rig) -> None:
    image = rig.image()
    (here,) = rig.players(image, False)
    here.ask("own", True)
    here.ask("writer", DEPTH)
    ledger: dict[int, Mark] = dict.fromkeys(range(BLOCKS), NOTHING)
    times: dict[str, list[float]] = {"offer": [], "take over": [], "offer to first write": []}
    checked = written = 0
    for _ in range(MOVES):
        (there,) = rig.players(image, False)
        there.ask("stand_by", KEY)
        here.written(200)
        said: dict[str, Any] = here.ask("hand_over", KEY)
        assert said["offered"]
        came = there.ask("come")
        ledger |= {lba: (owner, epoch, sequence) for lba, (owner, epoch, sequence) in said["acked"]}
        found = [tuple(mark) for mark in there.ask("look_at_all")]
        wrong = {lba: (found[lba], ledger[lba]) for lba in range(1, BLOCKS) if found[lba] != ledger[lba]}
        assert not wrong, f"block: (found, acknowledged): {wrong}"
        checked += BLOCKS - 1
        report = here.ask("report")
        assert not report["errors"] and report["writing"] == DEPTH, report  # they wait, and die waiting
        written += report["written"]
        times["offer"].append(said["ended"] - said["begun"])
        times["take over"].append(came["owned"] - came["begun"])
        times["offer to first write"].append(said["ended"] - said["begun"] + came["first"] - came["begun"])
        here.kill()
        there.ask("begin")
        there.ask("writer", DEPTH)
        here = there
    assert not rig.blocklist(), "nobody had to be fenced"
    shown = "; ".join(spread(what, seconds) for what, seconds in times.items())
    print(f"{MOVES} moves, {written} writes, 0 of {checked} blocks wrong. {shown}")


def test_a_vm_moves_on_the_embedded_store(tmp_path: Path) -> None:
    with embedded_rig(tmp_path) as rig:
        moves(rig)


def test_a_vm_moves_on_ceph(ceph_conf: str, ceph_pool: str) -> None:
    with ceph_rig(ceph_conf, ceph_pool) as rig:
        before = rig.blocklist()
        rig.blocklist = lambda: [row for row in Rig.blocklist(rig) if row not in before]  # type: ignore[method-assign]
        moves(rig)


def test_a_vm_that_goes_on_at_its_source(tmp_path: Path) -> None:
    """The destination dies between the offer and its ring start: nothing was lost, the writes that waited go on."""
    with embedded_rig(tmp_path) as rig:
        image = rig.image()
        here: Player
        here, there = rig.players(image, False, False)
        here.ask("own", True)
        here.ask("writer", DEPTH)
        for _ in range(3):
            here.written(100)
            there.ask("stand_by", KEY)
            said = here.ask("hand_over", KEY)
            there.kill()
            found = rig.read(image)
            assert {lba: found[lba] for lba, _ in said["acked"]} == {lba: tuple(mark) for lba, mark in said["acked"]}
            here.ask("take_back")
            before = here.ask("report")["written"]
            here.written(before + 50)
            (there,) = rig.players(image, False)
        assert not here.ask("report")["errors"] and not rig.blocklist()

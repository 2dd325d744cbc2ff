"""Live migrations in the simulated world of `control_world.py`: hand-offs of the lock, and everything that can come in
between. What the driver and the image do around the machine (driver.py, image/handle_moves.py) is said again here, in
scripts that wait in simulated time."""

from __future__ import annotations

import errno
from collections.abc import Generator

from librbd_py.control import lock_events as le
from librbd_py.control.lock_events import LockState
from librbd_py.format.lock import Offer
from tests.unit.control_world import Chances, Client, Violation, World

Script = Generator[float, None, bool]  # yields how long it waits

OFFER_SECONDS = 2.0
LOOK_SECONDS = 0.05


class MovingWorld(World):
    """A world in which VMs migrate all the time."""

    def __init__(self, seed: int, clients: int = 3, chances: Chances | None = None) -> None:
        self.moved = 0  # hand-offs that went as they should
        self.returned = 0
        self.refused = 0
        self.moving = 0  # migrations under way
        super().__init__(seed, clients, chances)

    def user(self) -> None:
        here, there = self.rng.sample(self.clients, 2)
        if self.hit(0.15) and not (here.moves or there.moves or here.lost or there.lost):
            here.moves = there.moves = True
            self.moving += 1
            self._play(self.migration(here, there))
            self.after(self.rng.random() * 0.5, self.user)
        else:
            super().user()

    def _play(self, script: Script) -> None:
        try:
            self.after(next(script), lambda: self._play(script))
        except StopIteration:
            self.moving -= 1

    # --- a migration -----------------------------------------------------------------------------------------------

    def migration(self, here: Client, there: Client) -> Script:
        vm = f"uuid:{self.rng.randrange(1000)}"
        key = "*" if self.hit(0.1) else vm
        try:
            standing = yield from self.stand_by(there, vm, park=self.hit(0.7))
            yield self.rng.random()
            offered = yield from self.offer(here, key)
            yield self.latency()
            fate = self.rng.random()
            if fate < 0.1 and here.alive:
                self.crash(here)
            if fate > 0.9 and there.alive:
                self.crash(there)
            if 0.05 < fate < 0.15:
                yield self.rng.random() * 5.0  # nobody says anything; strangers ask
            if standing and fate < 0.7:
                yield from self.take_over(there, "this" if offered else "any")
            elif offered and fate < 0.8 and standing and there.alive:
                self.moving += 1
                self._play(self.take_over(there, "race"))  # at the same time
                yield from self.take_back(here)
            elif fate < 0.85 and here.alive:
                self.stop(here)
            elif offered:
                yield from self.take_back(here)
            yield self.rng.random()
            return True
        finally:
            for client in (here, there):
                self.moving += 1
                self._play(self.end(client))

    def stop(self, client: Client) -> None:
        if not client.waits_stop and not client.closed:
            client.waits_stop = True
            self.tell_lock(client, le.Shutdown())

    def end(self, client: Client) -> Script:
        """The service does not leave a client in the middle of a move, whatever happened."""
        try:
            while client.alive and not (client.lost or client.lock.stopping or client.waits_stop):
                if client.waits_move or client.waits_offer:
                    yield LOOK_SECONDS
                elif client.lock.offered:
                    yield from self.take_back(client)
                elif client.lock.hand.standby is not None or client.lock.hand.offer is not None:
                    self.tell_lock(client, le.StandDown())
                    yield LOOK_SECONDS
                else:
                    break
            return True
        finally:
            client.parked = client.moves = False

    # --- what driver and handle do ------------------------------------------------------------------------------------

    def stand_by(self, client: Client, key: str, park: bool) -> Script:
        client.parked = park
        client.heard.clear()
        yield self.latency()
        now = self.owner
        while client.alive:
            owner = now
            told = client.lock.state in (LockState.UNLOCKED, LockState.NO_WATCH) and not client.lock.wanted
            if told:
                self.tell_lock(client, le.StandBy(key, owner))
            if not told or client.lock.hand.standby is None:
                break
            yield self.latency()
            now = self.owner
            if now == owner:
                return True
        client.parked = False
        return False

    def offer(self, client: Client, key: str) -> Script:
        client.parked = True
        while client.writing:
            yield LOOK_SECONDS
        if client.alive and not client.lock.owning and not client.lock.hand.moving:
            client.waits_lock = True
            self.tell_lock(client, le.Acquire())
            patience = self.now + OFFER_SECONDS
            while client.waits_lock and client.alive and self.now < patience:
                yield LOOK_SECONDS
            if client.waits_lock or client.answer:
                self.abandon(client)
                client.parked = False
                return False
        client.waits_offer = client.alive
        self.tell_lock(client, le.Offer(key))
        while client.waits_offer and client.alive:
            yield LOOK_SECONDS
        if not client.alive or client.answer:
            client.parked = False
            return False
        return True

    def take_back(self, client: Client) -> Script:
        client.waits_move, client.expected = client.alive, None
        self.tell_lock(client, le.TakeBack())
        while client.waits_move and client.alive:
            yield LOOK_SECONDS
        if client.alive and not client.answer:
            client.parked = False
            self.returned += 1
            return True
        if client.alive and client.lock.offered and not client.lost:
            yield 1.0  # the store did not answer: once more, and then let go
            if client.alive and client.lock.offered and not client.lock.stopping:
                client.waits_release = True
                self.tell_lock(client, le.Release())
                while client.waits_release and client.alive:
                    yield LOOK_SECONDS
        return False

    def take_over(self, client: Client, whose: str) -> Script:
        before = self.owner
        client.expected = client.lock.hand.standby.owner if client.lock.hand.standby is not None else None
        client.waits_move = client.alive
        self.tell_lock(client, le.TakeOver())
        while client.waits_move and client.alive:
            yield LOOK_SECONDS
        if not client.alive:
            return False
        if client.answer == 0:
            client.parked = False
            self.moved += 1
        elif client.answer == errno.ESTALE:
            self.refused += 1
            self._judge_refusal(client, whose, before)
            yield self.rng.random()
            if client.alive and self.hit(0.5):
                client.waits_move, client.expected = True, None
                self.tell_lock(client, le.TakeOver(force=True))  # an operator's word
                while client.waits_move and client.alive:
                    yield LOOK_SECONDS
        return client.answer == 0

    def granted(self, client: Client) -> None:
        """Nobody it has heard of came between the owner that was there when it began to stand by, and itself. Who
        offers it may be another one by now, but of the same VM."""
        expected = client.expected if client.waits_move else None
        if self.owner is None or self.owner.gid != client.gid or self.owner.mark or expected is None:
            return
        before = next((gid for gid in reversed(self.owners) if gid != client.gid), expected.gid)
        if before != expected.gid and before in client.heard:
            raise Violation(f"{client} stood by for client {expected.gid}, and client {before} owned the lock since")

    def _judge_refusal(self, client: Client, whose: str, before: le.Locker | None) -> None:
        """While it is offered and nobody came, a destination is not refused."""
        offer = Offer.parse(self.owner.mark) if self.owner is not None else None
        standby = client.lock.hand.standby
        if whose != "this" or offer is None or standby is None or self.owner != before:
            return
        if offer.meant_for(standby.key):
            raise Violation(f"{client} is refused what is offered to it")

    # --- the end ---------------------------------------------------------------------------------------------------

    def settle(self, seconds: float) -> None:
        deadline = self.now + seconds
        while self.moving:
            self.calm()
            if self.now > deadline or not self.step():
                raise Violation("a migration does not end: " + "; ".join(str(c) for c in self.clients if c.moves))
        super().settle(seconds)

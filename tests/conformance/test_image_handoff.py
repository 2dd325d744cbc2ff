"""The lock moves with a VM from one host to the next, on every store: two handles of two clients, and strangers."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from image_fixtures import MIB, Cluster, R, cluster, io

from librbd_py.control import wire
from librbd_py.control.lock_events import Locker
from librbd_py.image.datapath import NativeImage
from librbd_py.image.handle import ImageHandle
from librbd_py.image.locks import lockers, watchers
from librbd_py.store.api import ObjectContext

__all__ = ["cluster", "io"]
KEY = "uuid:6f1a7a34-59c3-4e4b-8f0e-0d4a3e0b9a11"
DEADLINE = 30.0

Open = Callable[[], ImageHandle]


@pytest.fixture
def host(cluster: Cluster, io: ObjectContext) -> Iterator[Open]:
    """Each call opens image `a` as one more client."""
    R.create(io, "a", 8 * MIB)
    opened: list[ImageHandle] = []

    def make() -> ImageHandle:
        opened.append(ImageHandle.open(cluster.connect().open("rbd"), "a"))
        return opened[-1]

    yield make
    for handle in opened:
        handle.close()


def owner(handle: ImageHandle) -> str | None:
    rows = lockers(handle).lockers
    return rows[0][2] if rows else None


def address(handle: ImageHandle) -> str:
    return handle.store.client.address


def refused(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.errno


def wait_until_taken(handle: ImageHandle) -> None:
    """The one before hears of it from its heir."""
    end = time.monotonic() + DEADLINE
    while handle.handing_over:
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def at_once(calls: Sequence[Callable[[], None]]) -> list[int | None]:
    """Runs them together; the errno of each, None for those that worked."""
    together = threading.Barrier(len(calls))
    results: list[int | None] = [errno.EINPROGRESS] * len(calls)

    def run(number: int) -> None:
        together.wait(DEADLINE)
        try:
            calls[number]()
            results[number] = None
        except OSError as failure:
            results[number] = failure.errno

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive(), "a call does not end"
    return results


class Writer:
    """One write that may have to wait."""

    def __init__(self, handle: ImageHandle, data: bytes, offset: int) -> None:
        self.failure: OSError | None = None
        self._thread = threading.Thread(target=self._run, args=(handle, data, offset))
        self._thread.start()

    def _run(self, handle: ImageHandle, data: bytes, offset: int) -> None:
        try:
            handle.data.write(offset, data)
        except OSError as failure:
            self.failure = failure

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> None:
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), "the write still waits"
        if self.failure is not None:
            raise self.failure


def test_the_lock_goes_from_host_to_host_and_is_never_free(host: Open) -> None:
    here, there = host(), host()
    here.data.write(0, b"source")
    for turn in range(4):
        there.stand_by(KEY, park=True)
        assert here.offer(KEY)
        assert owner(there) == address(here) and not here.is_lock_owner and here.handing_over
        there.take_over()
        assert owner(here) == address(there) and there.is_lock_owner
        there.data.write(4096 * turn, b"turn %d" % turn)
        assert there.data.read(4096 * turn, 6) == b"turn %d" % turn
        wait_until_taken(here)
        here.close()
        here, there = there, host()


def test_requests_wait_on_both_sides_until_the_lock_is_there(host: Open) -> None:
    here, there = host(), host()
    here.data.write(0, b"source")
    there.stand_by(KEY, park=True)
    late = Writer(there, b"destination", 0)
    assert here.offer(KEY)
    parked = Writer(here, b"too late", 8192)
    assert late.waits and parked.waits
    there.take_over()
    late.end()
    assert there.data.read(0, 11) == b"destination"
    assert parked.waits
    here.close()
    with pytest.raises(OSError):
        parked.end()
    assert there.data.read(8192, 8) == bytes(8)


def test_a_source_that_goes_on_takes_the_lock_back(host: Open) -> None:
    here, there = host(), host()
    here.data.write(0, b"source")
    there.stand_by(KEY, park=True)
    for turn in range(3):
        assert here.offer(KEY)
        write = Writer(here, b"again%d" % turn, 0)
        here.take_back()
        write.end()
        assert here.is_lock_owner and owner(there) == address(here)
    assert here.offer(KEY)  # and the next migration works
    there.take_over()
    assert owner(here) == address(there)


def test_of_take_back_and_take_over_one_wins(host: Open) -> None:
    here, there = host(), host()
    here.data.write(0, b"source")
    for _ in range(5):
        there.stand_by(KEY, park=True)
        assert here.offer(KEY)
        results = at_once([here.take_back, there.take_over])
        # Who loses asks the winner as any client would, or was told that somebody else is there.
        assert results.count(None) >= 1 and set(results) <= {None, errno.ESTALE}
        assert not (here.is_lock_owner and there.is_lock_owner)
        assert owner(here) in (address(here), address(there))
        here.close()
        there.close()
        here, there = host(), host()
        here.data.write(0, b"source")


def test_two_destinations_cannot_both_take_it(host: Open) -> None:
    here, rivals = host(), [host(), host(), host()]
    here.data.write(0, b"source")
    for rival in rivals:
        rival.stand_by(KEY, park=True)
    assert here.offer(KEY)
    results = at_once([rival.take_over for rival in rivals])
    assert sorted(results, key=str) == [errno.ESTALE, errno.ESTALE, None]
    assert sum(rival.is_lock_owner for rival in rivals) == 1


def test_a_stranger_who_owned_it_in_between_makes_both_refuse(host: Open) -> None:
    here, there, stranger = host(), host(), host()
    here.data.write(0, b"source")
    there.stand_by(KEY, park=True)
    assert here.offer(KEY)
    ((client, cookie, _),) = lockers(stranger).lockers
    # What `rbd lock remove` does, without fencing the source: the worst case for a hand-off.
    wire.break_lock(stranger.ctx, stranger.oid, Locker(int(client.removeprefix("client.")), cookie, ""))
    stranger.data.write(0, b"stranger")
    assert refused(there.take_over) == errno.ESTALE
    assert refused(here.take_back) == errno.ESTALE
    assert stranger.is_lock_owner
    write = Writer(there, b"not yet", 0)
    assert write.waits
    there.take_over(force=True)  # an operator's word
    write.end()
    assert there.is_lock_owner and not stranger.is_lock_owner
    assert there.data.read(0, 8) == b"not yetr"


def test_who_asks_meanwhile_waits_and_gets_it_from_the_heir(host: Open) -> None:
    here, there, third = host(), host(), host()
    here.data.write(0, b"source")
    there.stand_by(KEY, park=True)
    assert here.offer(KEY)
    write = Writer(third, b"third", 4096)
    time.sleep(0.2)  # it asks and is told to come again
    assert write.waits and owner(third) == address(here)
    there.take_over()
    write.end()
    assert there.data.read(4096, 5) == b"third"
    there.data.write(0, b"destination")
    assert third.data.read(0, 11) == b"destination"


def test_a_source_without_the_lock_gets_it_to_hand_it_over(host: Open) -> None:
    here, there = host(), host()
    there.stand_by(KEY, park=True)
    assert here.offer(KEY)
    there.take_over()
    assert there.is_lock_owner


def test_an_offer_to_another_vm_is_not_taken(host: Open) -> None:
    here, there = host(), host()
    here.data.write(0, b"source")
    there.stand_by("uuid:another", park=True)
    assert here.offer(KEY)
    assert refused(there.take_over) == errno.ESTALE
    here.take_back()
    assert here.is_lock_owner


def test_a_destination_without_an_offer_asks_the_owner_it_found(host: Open) -> None:
    here, there = host(), host()
    here.data.write(0, b"source")
    there.stand_by(KEY, park=True)
    there.take_over()
    assert there.is_lock_owner and not here.is_lock_owner


def test_an_offer_taken_away_by_closing_is_as_good(host: Open) -> None:
    here, there = host(), host()
    here.data.write(0, b"source")
    there.stand_by(KEY, park=True)
    assert here.offer(KEY)
    here.close()
    assert owner(there) is None
    there.take_over()
    assert owner(there) == address(there)


def test_maintenance_is_refused_while_the_lock_moves(host: Open) -> None:
    here, there = host(), host()
    here.data.write(0, b"source")
    there.stand_by(KEY, park=True)
    assert refused(there.acquire_lock) == errno.EBUSY
    assert here.offer(KEY)
    assert refused(here.acquire_lock) == errno.EBUSY
    assert here.offer(KEY)  # said again
    here.take_back()
    assert refused(lambda: here.stand_by(KEY, park=True)) == errno.EBUSY
    here.data.write(0, b"goes on")


def test_an_owner_that_says_it_leaves_is_followed(host: Open) -> None:
    """A VM that was paused before it moved, and one on NBD whose program ends before the first write."""
    a, b = host(), host()
    a.acquire_lock()
    b.stand_by(KEY, park=False)
    a.close()
    b.take_over()
    assert b.is_lock_owner


def test_an_owner_that_leaves_while_it_is_followed(host: Open) -> None:
    for _ in range(5):
        a, b = host(), host()
        a.acquire_lock()
        b.stand_by(KEY, park=False)
        assert at_once([a.close, b.take_over]) == [None, None]
        assert b.is_lock_owner
        b.close()


def test_a_stranger_that_came_and_went_after_the_owner_left(host: Open) -> None:
    a, b, stranger = host(), host(), host()
    a.acquire_lock()
    b.stand_by(KEY, park=True)
    a.close()
    stranger.acquire_lock()
    stranger.close()
    assert refused(b.take_over) == errno.ESTALE
    b.take_over(force=True)


def test_a_vm_that_comes_home_to_the_same_handle(host: Open) -> None:
    a, b = host(), host()
    a.acquire_lock()
    for _ in range(3):
        for here, there in ((a, b), (b, a)):
            there.stand_by(KEY, park=True)
            assert not there.lock_offered_to(KEY)
            assert here.offer(KEY)
            assert there.lock_offered_to(KEY) and not there.lock_offered_to("uuid:other")
            there.take_over()
            wait_until_taken(here)
            assert there.is_lock_owner and not here.is_lock_owner


def test_a_vm_that_does_not_come(host: Open) -> None:
    """Standing down: reads go on, and a write takes the lock as ever, also one that waited."""
    a, b = host(), host()
    a.acquire_lock()
    b.stand_by(KEY, park=True)
    writer = Writer(b, b"w" * 512, 0)
    assert owner(b) == address(a)
    b.stand_down()
    writer.end()
    assert owner(b) == address(b)


def test_who_hands_over_hears_of_a_write_that_waits(host: Open) -> None:
    a, b = host(), host()
    a.acquire_lock()
    asked = threading.Event()
    b.on_wanted = asked.set
    b.stand_by(KEY, park=False)
    assert b.data.read(0, 512) == bytes(512)
    assert not asked.is_set()
    writer = Writer(b, b"w" * 512, 0)
    if not isinstance(b.data, NativeImage):
        assert refused(writer.end) == errno.EBUSY  # the store in memory has no engine in which it could wait
        return
    assert asked.wait(DEADLINE)
    assert writer.waits and owner(b) == address(a)
    b.take_over()
    writer.end()


def test_an_offer_that_was_taken_can_be_forgotten(host: Open) -> None:
    a, b = host(), host()
    a.acquire_lock()
    b.stand_by(KEY, park=True)
    assert a.offer(KEY)
    b.take_over()
    wait_until_taken(a)
    a.stand_down()
    assert a.data.read(0, 512) == bytes(512)
    Writer(a, b"x" * 512, 0).end()
    assert owner(b) == address(a)


def test_a_vm_that_comes_home_before_anybody_heard_that_it_arrived(host: Open) -> None:
    a, b = host(), host()
    a.acquire_lock()
    b.stand_by(KEY, park=True)
    assert a.offer(KEY)
    b.take_over()
    assert b.offer(KEY)
    a.take_back()
    assert a.is_lock_owner and owner(b) == address(a)
    wait_until_taken(b)


def test_standing_by_while_offering_leaves_requests_parked(host: Open) -> None:
    a = host()
    a.acquire_lock()
    assert a.offer(KEY)
    writer = Writer(a, b"w" * 512, 0)
    assert refused(lambda: a.stand_by(KEY, park=True)) == errno.EBUSY
    assert refused(lambda: a.stand_by(KEY, park=False)) == errno.EBUSY
    assert a.handing_over and writer.waits
    a.take_back()
    writer.end()


def test_an_offer_of_a_host_that_stands_by_leaves_requests_parked(host: Open) -> None:
    a, b = host(), host()
    a.acquire_lock()
    b.stand_by(KEY, park=True)
    writer = Writer(b, b"w" * 512, 0)
    assert not b.offer(KEY)
    assert writer.waits and owner(b) == address(a)
    b.take_over()
    writer.end()


def test_an_offer_whose_outcome_nobody_knows_leaves_requests_parked(
    host: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = host(), host()
    a.acquire_lock()
    b.stand_by(KEY, park=True)
    mark, get_lock = wire.mark, wire.get_lock

    def lost(ctx: ObjectContext, *arguments: Any) -> None:
        mark(ctx, *arguments)
        monkeypatch.setattr(wire, "get_lock", silent)
        raise OSError(errno.ETIMEDOUT, "no answer")

    def silent(ctx: ObjectContext, oid: str) -> Any:
        raise OSError(errno.ETIMEDOUT, "no answer")

    monkeypatch.setattr(wire, "mark", lost)
    assert refused(lambda: a.offer(KEY)) == errno.ETIMEDOUT
    monkeypatch.setattr(wire, "mark", mark)
    monkeypatch.setattr(wire, "get_lock", get_lock)
    assert a.handing_over
    writer = Writer(a, b"too late", 0)
    b.take_over()  # it was offered
    wait_until_taken(a)
    assert writer.waits
    a.close()
    with pytest.raises(OSError):
        writer.end()
    assert b.data.read(0, 8) == bytes(8)


def test_nobody_owned_it_and_then_the_vm_wrote(host: Open) -> None:
    a, b = host(), host()
    b.stand_by(KEY, park=True)
    a.data.write(0, b"first")
    b.take_over()
    assert b.is_lock_owner


def test_closing_while_requests_do_not_end(host: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock cannot go before them. The handle stays as it is, and closing it again ends cleanly."""
    a, b = host(), host()
    a.data.write(0, b"before")
    block = a.data.block

    def stuck(which: int, timeout: float) -> None:
        raise OSError(errno.ETIMEDOUT, "requests in flight do not end")

    monkeypatch.setattr(a.data, "block", stuck)
    assert refused(a.close) == errno.ETIMEDOUT
    assert not a.closed and a.is_lock_owner and owner(b) == address(a)
    monkeypatch.setattr(a.data, "block", block)
    a.data.write(0, b"after ")
    a.close()
    a.close()
    assert a.closed and owner(b) is None
    assert b.data.read(0, 6) == b"after "
    assert [row.address for row in watchers(b)] == [address(b)]

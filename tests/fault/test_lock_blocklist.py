"""A client is blocklisted in each state that its lock can be in: all its I/O ends with ESHUTDOWN within five seconds,
nothing hangs, nothing of it is written later, and another client has the image."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from librbd_py import rbd
from librbd_py.image.handle import ImageHandle
from librbd_py.store.api import ObjectContext
from librbd_py.store.rados import ClusterOptions, connect

TIMES = 25 if os.environ.get("RBDPY_SOAK") else 1
SOON = 5.0  # seconds until all of it has ended
DEADLINE = 30.0  # reached only when something hangs
WRITERS = 4
BLOCK = 4096
SIZE = 8 << 20
HEADER, MAP = "rbd_header.", "rbd_object_map."


class Pausing:
    """A context whose next call of a class method on an object can be held up."""

    def __init__(self, real: ObjectContext) -> None:
        self._real = real
        self._point: tuple[str, str, str] | None = None
        self.reached = threading.Event()
        self._go_on = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def pause_at(self, oid: str, cls: str, method: str) -> None:
        self._point = oid, cls, method

    def go_on(self) -> None:
        self._go_on.set()

    def exec(self, oid: str, cls: str, method: str, data: bytes = b"") -> Any:
        point = self._point
        if point is not None and oid.startswith(point[0]) and (cls, method) == point[1:]:
            self._point = None
            self.reached.set()
            assert self._go_on.wait(DEADLINE)
        return self._real.exec(oid, cls, method, data)


class Victim:
    def __init__(self, ctx: Pausing, name: str) -> None:
        self.ctx = ctx
        self.handle = ImageHandle.open(ctx, name)  # type: ignore[arg-type]
        self.ended: list[tuple[float, int]] = []
        self.written = 0
        self._threads: list[threading.Thread] = []

    @property
    def state(self) -> str:
        return self.handle.control.state.partition(", ")[2]  # type: ignore[union-attr]

    def write(self, count: int = WRITERS) -> None:
        """Threads that write until it fails."""
        self._threads = [threading.Thread(target=self._write, args=(number,), daemon=True) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _write(self, number: int) -> None:
        try:
            while True:
                self.handle.data.write(number * (1 << 20), b"victim!!" * (BLOCK // 8))
                self.written += 1
        except OSError as failure:
            self.ended.append((time.monotonic(), failure.errno or 0))

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end, self.handle.control.state  # type: ignore[union-attr]
            time.sleep(0.002)

    def all_ended(self, begun: float) -> None:
        for thread in self._threads:
            thread.join(max(begun + SOON - time.monotonic(), 0))
        assert not any(thread.is_alive() for thread in self._threads), "writes hang"
        assert {code for _, code in self.ended} <= {errno.ESHUTDOWN}, self.ended
        assert len(self.ended) == len(self._threads)


@pytest.fixture
def clients(ceph_conf: str, ceph_pool: str) -> Iterator[tuple[Pausing, ObjectContext]]:
    """The victim's and another's."""
    with ExitStack() as stack:
        stores = [stack.enter_context(connect(ClusterOptions(ceph_conf), share=False)) for _ in range(2)]
        yield Pausing(stores[0].open(ceph_pool)), stores[1].open(ceph_pool)


def idle(victim: Victim, other: ImageHandle) -> None:
    assert victim.state == "unlocked"


def acquiring(victim: Victim, other: ImageHandle) -> None:
    victim.ctx.pause_at(HEADER, "lock", "lock")
    victim.write()
    assert victim.ctx.reached.wait(DEADLINE) and victim.state == "locking"


def post_acquire(victim: Victim, other: ImageHandle) -> None:
    victim.ctx.pause_at(MAP, "lock", "lock")
    victim.write()
    assert victim.ctx.reached.wait(DEADLINE) and victim.state == "post_acquiring"


def locked(victim: Victim, other: ImageHandle) -> None:
    victim.write()
    victim.until(lambda: victim.written > 100)
    assert victim.state == "locked"


def releasing(victim: Victim, other: ImageHandle) -> None:
    locked(victim, other)
    victim.ctx.pause_at(HEADER, "lock", "unlock")
    other.request_lock()
    assert victim.ctx.reached.wait(DEADLINE) and victim.state == "unlocking"


def waiting(victim: Victim, other: ImageHandle) -> None:
    """The owner said that it would give the lock up, and is busy."""
    victim.write()
    victim.until(lambda: victim.state == "waiting")


def renewing(victim: Victim, other: ImageHandle) -> None:
    locked(victim, other)
    control = victim.handle.control
    assert control is not None and control.watch_handle is not None
    victim.ctx.pause_at(HEADER, "lock", "set_cookie")
    control._watch_error(control.watch_handle, OSError(errno.ENOTCONN, "as the store says it"))
    assert victim.ctx.reached.wait(DEADLINE) and victim.state == "relocking"


def offered(victim: Victim, other: ImageHandle) -> None:
    """The VM leaves: nothing runs, everything waits."""
    locked(victim, other)
    assert victim.handle.offer("name:web")
    assert victim.state == "offered"


def standing_by(victim: Victim, other: ImageHandle) -> None:
    """The VM will come: its requests wait for that."""
    other.acquire_lock()
    victim.handle.stand_by("name:web", park=True)
    victim.write()
    victim.until(lambda: victim.handle.native.stats().parked == WRITERS)


STATES = (idle, acquiring, post_acquire, locked, releasing, waiting, renewing, offered, standing_by)


@pytest.mark.parametrize("reach", STATES, ids=lambda reach: reach.__name__)
@pytest.mark.parametrize("time_", range(TIMES))
def test_blocklisted(
    clients: tuple[Pausing, ObjectContext], reach: Callable[[Victim, ImageHandle], None], time_: int
) -> None:
    ctx, other_ctx = clients
    rbd.RBD().create(other_ctx, "a", SIZE)
    with ImageHandle.open(other_ctx, "a") as other, ExitStack() as stack:
        victim = Victim(ctx, "a")
        if reach is waiting:
            busy = stack.enter_context(ExitStack())
            busy.enter_context(other.exclusive())
        reach(victim, other)
        begun = time.monotonic()
        other.store.blocklist_add(ctx.store.client.address, 300)
        ctx.go_on()
        victim.all_ended(begun)
        for late in (
            lambda: victim.handle.data.write(0, b"late"),
            lambda: victim.handle.data.read(0, 8),
            victim.handle.data.flush,
        ):
            with pytest.raises(OSError) as caught:
                late()
            assert caught.value.errno == errno.ESHUTDOWN
        victim.until(lambda: victim.state == "fenced")
        with pytest.raises(OSError) as caught:
            victim.handle.acquire_lock()
        assert caught.value.errno == errno.ESHUTDOWN
        assert time.monotonic() - begun < SOON, f"{reach.__name__}: {time.monotonic() - begun:.1f} s"
        stack.close()

        other.acquire_lock()
        for number in range(WRITERS):
            other.data.write(number << 20, b"other..." * (BLOCK // 8))
        victim.handle.close()
        assert time.monotonic() - begun < 2 * SOON
        for number in range(WRITERS):
            assert other.data.read(number << 20, BLOCK) == b"other..." * (BLOCK // 8)

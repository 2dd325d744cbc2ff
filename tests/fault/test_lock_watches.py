"""The watch of a lock owner is lost again and again under load: no request fails, each new watch has a new cookie, the
lock follows it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from librbd_py import rados, rbd
from librbd_py.devcluster import DevCluster
from librbd_py.format.lock import auto_cookie
from librbd_py.image import locks
from librbd_py.store.embedded import EmbeddedStore
from librbd_py.store.embedded.messages import Lost

LOSSES = 200 if os.environ.get("RBDPY_SOAK") else 12
IMAGES = 4
DEPTH = 128  # of each image
BLOCK = 4096
BLOCKS = 4096
SIZE = BLOCKS * BLOCK
DEADLINE = 60.0  # seconds; reached only when something hangs
WATCH_SECONDS = 2


def content(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK // 8)


class Load:
    """Keeps DEPTH writes in flight until stopped."""

    def __init__(self, image: rbd.Image) -> None:
        self._image = image
        self._changed = threading.Condition()
        self._stopping = False
        self.written = 0
        self.failed: list[int] = []
        self._number = 0
        self._busy: set[int] = set()
        self._held: dict[int, int] = {}  # block -> number of the last write to it; one at a time
        for _ in range(DEPTH):
            with self._changed:
                number = self._next()
            self._send(number)

    def _next(self) -> int:
        """The number of the next write. Its block is busy from here on, so that stop() waits for it."""
        while True:
            self._number += 1
            block = self._number % BLOCKS
            if block not in self._busy:
                break
        self._busy.add(block)
        self._held[block] = self._number
        return self._number

    def _send(self, number: int) -> None:
        block = number % BLOCKS
        self._image.aio_write(content(number), block * BLOCK, partial(self._done, block))

    def _done(self, block: int, completion: Any) -> None:
        result = completion.get_return_value()
        with self._changed:
            self._busy.discard(block)
            self.written += 1
            if result < 0:
                self.failed.append(result)
            number = self._next() if not self._stopping and result >= 0 else None
            self._changed.notify_all()
        if number is not None:
            self._send(number)

    def wait(self, count: int) -> None:
        """So many more writes than now."""
        with self._changed:
            goal = self.written + count
            assert self._changed.wait_for(lambda: self.written >= goal or bool(self.failed), DEADLINE)

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            assert self._changed.wait_for(lambda: not self._busy, DEADLINE), "requests hang"

    def verify(self) -> None:
        held = self._image.read(0, SIZE)
        for block, number in self._held.items():
            assert held[block * BLOCK : (block + 1) * BLOCK] == content(number), block


def until(condition: Callable[[], bool], seconds: float = DEADLINE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.002)


def settled(image: rbd.Image) -> bool:
    """The lock quotes the watch."""
    control = image.handle.control
    held = locks.lockers(image.handle).lockers
    return control.watch_handle is not None and [row[1] for row in held] == [auto_cookie(control.watch_handle)]


@contextmanager
def loaded(io: rados.Ioctx, count: int) -> Iterator[list[tuple[rbd.Image, Load]]]:
    """Images whose lock is ours, under load."""
    images = []
    try:
        for number in range(count):
            rbd.RBD().create(io, f"a{number}", SIZE)
            images.append(rbd.Image(io, f"a{number}"))
            images[-1].write(b"x", SIZE - 1)
        yield [(image, Load(image)) for image in images]
    finally:
        for image in images:
            image.close()


def finish(image: rbd.Image, load: Load, cookies: list[int | None]) -> None:
    load.wait(DEPTH)
    until(lambda: settled(image))
    load.stop()
    assert load.failed == []
    assert len(cookies) == len(set(cookies))
    until(image.is_exclusive_lock_owner)
    load.verify()


def test_lost_watches_on_the_embedded_store(tmp_path: Path) -> None:
    with (
        rados.Rados(conf={"rbdpy_store": f"embedded:{tmp_path / 'store'}"}) as cluster,
        cluster.open_ioctx("rbd") as io,
    ):
        store = cluster.store
        assert isinstance(store, EmbeddedStore)
        with loaded(io, 1) as ((image, load),):
            cookies = [image.handle.control.watch_handle]
            for _ in range(LOSSES):
                load.wait(DEPTH)
                store.registry.drop_client(store.client.gid)
                store.dispatcher.tell({store.client.gid}, Lost())
                until(lambda: image.handle.control.watch_handle not in (None, cookies[-1]) and settled(image))
                cookies.append(image.handle.control.watch_handle)
            finish(image, load, cookies)
            assert len(cookies) == LOSSES + 1, f"0 errors in {load.written} writes, {len(cookies) - 1} watches lost"


def test_lost_watches_on_ceph(new_ceph_cluster: Callable[..., DevCluster]) -> None:
    """A client that sends no pings (an option of librados for tests): the OSD ends its watch and says so."""
    silent = {"objecter_inject_no_watch_ping": "true"}
    cluster = new_ceph_cluster(settings=(("osd client watch timeout", str(WATCH_SECONDS)),))
    with rados.Rados(conffile=cluster.conf, conf=silent) as client, client.open_ioctx("rbd") as io:
        with loaded(io, IMAGES) as running:
            cookies: list[list[int | None]] = [[image.handle.control.watch_handle] for image, _ in running]
            each = -(-LOSSES // IMAGES)

            def look() -> bool:
                for (image, load), seen in zip(running, cookies, strict=True):
                    now = image.handle.control.watch_handle
                    if now not in (None, seen[-1]):
                        seen.append(now)
                    assert not load.failed, load.failed
                return all(len(seen) > each for seen in cookies)

            until(look, DEADLINE + 5 * WATCH_SECONDS * each)
            written = 0
            for (image, load), seen in zip(running, cookies, strict=True):
                finish(image, load, seen)
                written += load.written
            lost = sum(len(seen) - 1 for seen in cookies)
            assert lost >= LOSSES, f"0 errors in {written} writes, {lost} watches lost"

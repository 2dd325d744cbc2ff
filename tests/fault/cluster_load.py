"""Stamped reads, writes and flushes through an NBD export without a pause, while a test troubles the cluster."""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nbd_client import FLUSH, READ, WRITE, Client
from stack import Stack, stack

from librbd_py import rados, rbd
from librbd_py.devcluster import DevCluster

SECTOR = 4096
SECTORS = 256  # in use, spread over the image
STEP = 68 << 10  # bytes from one to the next
SIZE = 32 << 20
DEPTH = 16
PATIENCE = 60.0  # seconds for a reply; reached only when something hangs


def stamp(sector: int, number: int) -> bytes:
    return struct.pack("<QQ", sector, number) * (SECTOR // 16)


class Load:
    """`errors`: (seconds since its start, errno). `longest`: seconds a request took at most. `held`: what each
    sector holds for sure, and what it may hold when a write failed."""

    def __init__(self, client: Client, seed: int = 1) -> None:
        self._client = client
        self._rng = random.Random(seed)
        self._begin = time.monotonic()
        self._stop = False
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._number = 0
        self.held: dict[int, set[int]] = {sector: {0} for sector in range(SECTORS)}
        self.replies = 0
        self.errors: list[tuple[float, int]] = []
        self.longest = 0.0
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    @property
    def now(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._begin

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as failure:  # the test's thread raises it
            self._failure = failure
        with self._changed:
            self._stop = True
            self._changed.notify_all()

    def _loop(self) -> None:
        waiting: dict[int, tuple[int, int, int, float]] = {}  # cookie -> kind, sector, number, when
        while waiting or not self._stop:
            while len(waiting) < DEPTH and not self._stop:
                self._send(waiting)
            if not waiting:
                return
            reply = self._client.reply()
            kind, sector, number, begun = waiting.pop(reply.cookie)
            took = time.monotonic() - begun
            with self._changed:
                self.replies += 1
                self.longest = max(self.longest, took)
                if reply.error:
                    self.errors.append((self.now, reply.error))
                    if kind == WRITE:
                        self.held[sector].add(number)
                elif kind == WRITE:
                    self.held[sector] = {number}
                elif kind == READ:
                    self._check(sector, reply.data)
                self._changed.notify_all()

    def _send(self, waiting: dict[int, tuple[int, int, int, float]]) -> None:
        chance = self._rng.random()
        now = time.monotonic()
        if chance < 0.03:
            waiting[self._client.start(FLUSH)] = (FLUSH, -1, 0, now)
            return
        busy = {entry[1] for entry in waiting.values()}
        sector = self._rng.choice([n for n in range(SECTORS) if n not in busy])
        if chance < 0.3:
            waiting[self._client.start(READ, sector * STEP, SECTOR)] = (READ, sector, 0, now)
            return
        self._number += 1
        data = stamp(sector, self._number)
        waiting[self._client.start(WRITE, sector * STEP, SECTOR, data=data)] = (WRITE, sector, self._number, now)

    def _check(self, sector: int, data: bytes) -> None:
        found = struct.unpack_from("<QQ", data)[1]
        assert found in self.held[sector], f"sector {sector} holds {found}, not one of {self.held[sector]}"
        assert data == (stamp(sector, found) if found else bytes(SECTOR)), f"sector {sector} is torn"
        self.held[sector] = {found}

    # --- for the test

    def wait_for_replies(self, count: int, seconds: float = PATIENCE) -> None:
        """So many more than now."""
        with self._changed:
            goal = self.replies + count
            done = self._changed.wait_for(lambda: self.replies >= goal or self._stop, seconds)
            assert done, f"{goal - self.replies} of {count} replies missing after {seconds} s"
        self._raise()

    def wait_for_error(self, seconds: float) -> int:
        """errno of the first."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self.errors) or self._stop, seconds)
            assert self.errors, f"no error after {seconds} s"
            return self.errors[0][1]

    def stop(self) -> None:
        """Lets no more requests out and waits for those in flight."""
        with self._changed:
            self._stop = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "requests hang"
        self._raise()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def verify(self, client: Client) -> None:
        """Every sector holds what was acknowledged last."""
        for sector in range(SECTORS):
            self._check(sector, client.read(sector * STEP, SECTOR))

    def verify_through_library(self, cluster: DevCluster, name: str = "image") -> None:
        with opened(cluster, name, read_only=True) as image:
            for sector in range(SECTORS):
                self._check(sector, image.read(sector * STEP, SECTOR))


@contextmanager
def opened(cluster: DevCluster, name: str = "image", **more: Any) -> Iterator[rbd.Image]:
    with (
        rados.Rados(conf={"rbdpy_store": cluster.url}) as client,
        client.open_ioctx("rbd") as ioctx,
        rbd.Image(ioctx, name, **more) as image,
    ):
        yield image


def create(cluster: DevCluster, name: str = "image", size: int = SIZE) -> None:
    with rados.Rados(conf={"rbdpy_store": cluster.url}) as client, client.open_ioctx("rbd") as ioctx:
        rbd.RBD().create(ioctx, name, size)


@contextmanager
def served(cluster: DevCluster, folder: Path, *images: str) -> Iterator[Stack]:
    """A daemon with these new images (else `image`) as NBD exports."""
    names = images or ("image",)
    for name in names:
        create(cluster, name)
    with stack(folder, cluster.url) as made:
        made.serve(*names)
        yield made

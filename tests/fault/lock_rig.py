"""An image on one of the stores, and processes that want its lock (lock_contestant.py)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from librbd_py import rados, rbd
from tests.fault.lock_contestant import BLOCKS, SIZE, Mark, Player, read_stamp, zlib

_numbers = itertools.count(1)
POOL = "rbd"


class Rig:
    """`where`: arguments of Rados(). Everything started here ends with it."""

    def __init__(self, where: dict[str, Any], pool: str) -> None:
        self.where = where
        self.pool = pool
        self.ceph = "conffile" in where
        self.cluster = rados.Rados(**where)
        self.cluster.connect()
        self.io = self.cluster.open_ioctx(pool)
        self._players: list[Player] = []
        self._owners = itertools.count(1)

    def image(self) -> str:
        name = f"lock-{os.getpid()}-{next(_numbers)}"
        rbd.RBD().create(self.io, name, SIZE)
        return name

    def player(self, image: str, *, real: bool = False, host: str | None = None) -> Player:
        """Not ready yet: `answer()` is its address."""
        self._players.append(Player(self.where, self.pool, image, next(self._owners), real=real, host=host))
        return self._players[-1]

    def players(self, image: str, *real: bool) -> list[Player]:
        """As many, which start together and are ready."""
        made = [self.player(image, real=kind) for kind in real]
        for player in made:
            player.address = player.answer()
        return made

    def read(self, image: str) -> list[Mark]:
        """Every block, by a client that has nothing to do with the rest."""
        with (
            rados.Rados(**self.where) as cluster,
            cluster.open_ioctx(self.pool) as io,
            rbd.Image(io, image, read_only=True) as opened,
        ):
            number = zlib.crc32(opened.id().encode())
            return [read_stamp(number, lba, opened.read(lba * 69632, 4096)) for lba in range(BLOCKS)]

    def blocklist(self) -> list[str]:
        return list(self.cluster.store.blocklist())

    def close(self) -> None:
        for player in self._players:
            player.close()
        self.io.close()
        self.cluster.shutdown()


@contextmanager
def embedded_rig(folder: Path) -> Iterator[Rig]:
    made = Rig({"conf": {"rbdpy_store": f"embedded:{folder / 'store'}"}}, POOL)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def ceph_rig(conf: str, pool: str) -> Iterator[Rig]:
    made = Rig({"conffile": conf}, pool)
    try:
        yield made
    finally:
        made.close()

"""Looks every moment which images the pools of the service have: each shall have sockets before somebody attaches it.

libvirt calls no hook when a disk is attached, so there is no other moment to make them. A namespace's images get theirs
by `rbd-image-socket`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable

from librbd_py.image.cls import list_images
from librbd_py.store.api import Store
from qemu_glue.nodes import STORES

SECONDS = 1.0
SECONDS_AFTER_FAILURE = 10.0
IMAGES_MAX = 2048  # beyond it, sockets are made when they are asked for: each takes two descriptors

log = logging.getLogger(__name__)


class Scanner:
    """`found(names)` is called on the loop with all (pool, image) whenever they have changed."""

    def __init__(self, url: str, pools: tuple[str, ...], found: Callable[[set[tuple[str, str]]], None]) -> None:
        self._url = url
        self._pools = pools
        self._found = found

    async def run(self) -> None:
        known: set[tuple[str, str]] | None = None
        told = ""
        store: Store | None = None
        try:
            while True:
                pause = SECONDS
                try:
                    if store is None:
                        store = await asyncio.to_thread(STORES.take, self._url)
                    names = await asyncio.to_thread(self._look, store)
                    told = ""
                    if names != known:
                        if len(names) > IMAGES_MAX:
                            log.warning("%d images: the first %d have sockets", len(names), IMAGES_MAX)
                        self._found(set(sorted(names)[:IMAGES_MAX]))
                        known = names
                except OSError as error:  # the store is away: what there is stays
                    pause = SECONDS_AFTER_FAILURE
                    if str(error) != told:
                        told = str(error)
                        log.warning("the images of pools %s cannot be listed: %s", ", ".join(self._pools), error)
                    if store is not None and error.errno == errno.ESHUTDOWN:
                        STORES.shut_out(store)
                        STORES.give_back(self._url, store)
                        store = None
                await asyncio.sleep(pause)
        finally:
            if store is not None:
                STORES.give_back(self._url, store)

    def _look(self, store: Store) -> set[tuple[str, str]]:
        names = set()
        for pool in self._pools:
            try:
                names |= {(pool, name) for name in list_images(store.open(pool))}
            except FileNotFoundError:
                continue  # not made yet
        return names

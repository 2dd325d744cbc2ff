"""Who this daemon was before: its addresses at the stores, kept in its journal.

An address is remembered before the first image is opened, so before any lock. Whoever holds the journal's kernel lock
knows that all earlier writers of it are dead, and may break their locks at once, without waiting for a watch to expire.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from librbd_py.store.api import Store
from qemu_glue.state import Journal

KEPT = 8  # addresses of one store: images that nobody has opened since may still be locked by them
VERB = "x-client"  # the command that records carry; nobody may call it


class Former:
    """Thread-safe. Without a journal nothing is known and nothing kept."""

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._dead: dict[str, list[str]] = {}  # store URL -> addresses, oldest first
        self._mine: dict[tuple[str, str], str] = {}  # (store URL, address) -> key of the record
        for command in journal.commands.values() if journal else ():
            if command["execute"] == VERB:
                said = command["arguments"]
                self._dead.setdefault(str(said.get("store")), []).append(str(said.get("address")))

    def of(self, url: str, store: Store) -> frozenset[str]:
        """Addresses of dead incarnations at that store. This one's is on the disk when it returns. Blocks; OSError."""
        if self._journal is None:
            return frozenset()
        address = store.client.address
        with self._lock:
            if (url, address) not in self._mine:
                key = f"client {address} {url}"
                self._journal.remember(key, {"execute": VERB, "arguments": {"store": url, "address": address}})
                self._mine[url, address] = key
                dead = self._dead.get(url, [])
                if len(dead) > KEPT:
                    self._forget(f"client {old} {url}" for old in dead[:-KEPT])
                    self._dead[url] = dead[-KEPT:]
            return frozenset(self._dead.get(url, ()))

    def left(self) -> None:
        """Everything was closed in order: nobody has to look for this incarnation's locks. Blocks."""
        with self._lock:
            self._forget(self._mine.values())
            self._mine.clear()

    def _forget(self, keys: Iterable[str]) -> None:
        assert self._journal is not None or not keys
        for key in list(keys):
            assert self._journal is not None
            self._journal.forget(key)

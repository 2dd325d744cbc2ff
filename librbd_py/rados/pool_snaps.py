"""Snapshots of whole pools: the monitors' on Ceph, of our own keeping elsewhere."""

from __future__ import annotations

import errno
import json
from typing import Any

from librbd_py.store import api
from librbd_py.store.pool_state import PoolSnap, PoolState
from librbd_py.store.rados import RadosStore


class PoolSnaps:
    """Of the pool of a context."""

    def __init__(self, store: api.Store, ctx: api.ObjectContext) -> None:
        self._store = store
        self._ctx = ctx

    def _state(self) -> PoolState:
        return PoolState(self._ctx)

    def _pool(self, store: RadosStore) -> dict[str, Any]:
        """What the monitors know of it. ENOENT."""
        pools: list[dict[str, Any]] = json.loads(store.mon_command({"prefix": "osd dump", "format": "json"}))["pools"]
        for pool in pools:
            if pool["pool"] == self._ctx.pool_id:
                return pool
        raise OSError(errno.ENOENT, f"no pool {self._ctx.pool_id}")

    def _change(self, store: RadosStore, what: str, name: str) -> None:
        pool = self._pool(store)["pool_name"]
        store.mon_command({"prefix": f"osd pool {what}", "pool": pool, "snap": name})
        store.latest_map()

    def list(self) -> list[PoolSnap]:
        """By id."""
        if not isinstance(self._store, RadosStore):
            return self._state().snaps()
        from datetime import datetime

        return [
            PoolSnap(int(row["snapid"]), row["name"], datetime.fromisoformat(row["stamp"]).timestamp())
            for row in self._pool(self._store)["pool_snaps"]
        ]

    def find(self, name: str) -> PoolSnap:
        """ENOENT."""
        for found in self.list():
            if found.name == name:
                return found
        raise OSError(errno.ENOENT, f"the pool has no snapshot {name!r}")

    def create(self, name: str) -> None:
        """EEXIST; EINVAL: there are snapshots of images in the pool."""
        if not isinstance(self._store, RadosStore):
            self._state().snap_create(name)
            return
        if any(found.name == name for found in self.list()):  # which the monitors do not mind
            raise OSError(errno.EEXIST, f"the pool has a snapshot {name!r}")
        self._change(self._store, "mksnap", name)

    def remove(self, name: str) -> None:
        """ENOENT."""
        if not isinstance(self._store, RadosStore):
            self._state().snap_remove(name)
            return
        self.find(name)
        self._change(self._store, "rmsnap", name)

    def context(self) -> api.SnapContext:
        """For writes on a store that does not know of them itself."""
        return self._state().snap_context()

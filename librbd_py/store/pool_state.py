"""What Ceph's monitors keep of a pool, for stores without monitors: applications and snapshots of the whole pool.

One object in a namespace of its own (POOL_STATE), which listings leave out; each change is one atomic operation list.
"""

from __future__ import annotations

import errno
import json
import time
from contextlib import suppress

from librbd_py.format.values import dataclass

from .api import POOL_STATE, Create, ObjectContext, OmapGetVals, OmapRmKeys, OmapSet, Remove, SnapContext, WriteFull

OID = "pool"
_APPLICATION, _SNAP = b"application_", b"snap_"


@dataclass(frozen=True)
class PoolSnap:
    snap_id: int
    name: str
    stamp: float  # seconds since 1970


class PoolState:
    """Any number of clients at once."""

    def __init__(self, ctx: ObjectContext) -> None:
        self._pool = ctx
        self._ctx = ctx.store.open(ctx.pool_id, POOL_STATE)

    def _rows(self, prefix: bytes) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        after, more = b"", True
        while more:
            try:
                rows, more = self._ctx.read(OID, [OmapGetVals(after, prefix)])[0]
            except FileNotFoundError:
                return found
            found.update(rows)
            after = max(rows, default=b"")
        return found

    # --- applications

    def applications(self) -> dict[str, dict[str, str]]:
        """name -> its metadata."""
        rows = self._rows(_APPLICATION)
        return {key.removeprefix(_APPLICATION).decode(): json.loads(value) for key, value in rows.items()}

    def application_enable(self, name: str, *, force: bool = False) -> None:
        """EPERM: the pool has another application, and not `force`."""
        found = self.applications()
        if name in found:
            return
        if found and not force:
            raise OSError(errno.EPERM, f"the pool is for {', '.join(found)}")
        self._set(name, {})

    def application_set(self, name: str, key: str, value: str | None) -> None:
        """None removes it. ENOENT: no such application."""
        values = self.application(name)
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value
        self._set(name, values)

    def application(self, name: str) -> dict[str, str]:
        """ENOENT."""
        found = self.applications()
        if name not in found:
            raise OSError(errno.ENOENT, f"the pool has no application {name}")
        return found[name]

    def _set(self, name: str, values: dict[str, str]) -> None:
        self._ctx.write(OID, [OmapSet({_APPLICATION + name.encode(): json.dumps(values).encode()})])

    # --- snapshots

    def snaps(self) -> list[PoolSnap]:
        """By id."""
        found = []
        for key, value in self._rows(_SNAP).items():
            row = json.loads(value)
            found.append(PoolSnap(int(key.removeprefix(_SNAP), 16), row["name"], row["stamp"]))
        return found

    def snap(self, name: str) -> PoolSnap:
        """ENOENT."""
        for found in self.snaps():
            if found.name == name:
                return found
        raise OSError(errno.ENOENT, f"the pool has no snapshot {name!r}")

    def snap_create(self, name: str) -> PoolSnap:
        """EEXIST; EINVAL: snapshots of images are in use in this pool, as Ceph says it."""
        if any(found.name == name for found in self.snaps()):
            raise OSError(errno.EEXIST, f"the pool has a snapshot {name!r}")
        if any(oid.startswith("rbd_header.") for oid in self._pool.objects()):
            raise OSError(errno.EINVAL, "a pool with images has no snapshots of its own")
        made = PoolSnap(self._pool.snap_create(), name, time.time())
        row = json.dumps({"name": name, "stamp": made.stamp}).encode()
        self._change([OmapSet({_SNAP + b"%016x" % made.snap_id: row})])
        return made

    def snap_remove(self, name: str) -> None:
        """ENOENT."""
        found = self.snap(name)
        self._change([OmapRmKeys([_SNAP + b"%016x" % found.snap_id])])
        self._pool.snap_remove(found.snap_id)

    def _change(self, ops: list[object]) -> None:
        self._ctx.write(OID, [Create(), *ops])

    def snap_context(self) -> SnapContext:
        """Of every write to the pool that brings none."""
        ids = tuple(sorted((found.snap_id for found in self.snaps()), reverse=True))
        return SnapContext(ids[0] if ids else 0, ids)

    # --- a measurement

    def write_and_remove(self, data: bytes, size: int, count: int) -> None:
        """`count` bytes in objects of `size`."""
        names = [f"bench.{number}" for number in range(-(-count // size))]
        try:
            for number, name in enumerate(names):
                self._ctx.write(name, [WriteFull(data[: min(size, count - number * size)])])
        finally:
            for name in names:
                with suppress(FileNotFoundError):
                    self._ctx.write(name, [Remove()])

"""When the trash of pools and namespaces is emptied of what has expired, on stores without a manager of Ceph.

Kept in an object of each pool, in its default namespace: an omap key for each level (the pool: empty; a namespace: its
name; all pools: `*`, in every pool there is when it is set). Who calls `run`, a timer for example, purges what is due.
"""

from __future__ import annotations

import errno
import json
import re
import time
from collections.abc import Iterator

from librbd_py.format.values import dataclass
from librbd_py.store.api import ObjectContext, OmapGetVals, OmapRmKeys, OmapSet, Store

from .objects import ignoring
from .pool import namespaces
from .trash import purge

OID = "rbd_trash_purge_schedule"
EVERYWHERE = "*"
_LAST = "last."  # before a level: when it was purged last
_SECONDS = {"m": 60, "h": 3600, "d": 86400}
_START = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?(Z|[+-]\d{2}:\d{2})?")


@dataclass(frozen=True)
class Item:
    interval: str  # 30m, 4h, 1d
    start_time: str | None  # HH:MM:SS

    @classmethod
    def parse(cls, interval: str, start: str = "") -> Item:
        """EINVAL."""
        if not re.fullmatch(r"[1-9]\d{0,5}[mhd]", interval):
            raise OSError(errno.EINVAL, f"Invalid interval ({interval})")
        found = _START.fullmatch(start) if start else None
        if start and (found is None or int(found[1]) > 23 or int(found[2]) > 59 or int(found[3] or 0) > 59):
            raise OSError(errno.EINVAL, f"Invalid start time {start}")
        at = None if found is None else f"{int(found[1]):02}:{found[2]}:{found[3] or '00'}{found[4] or ''}"
        return cls(interval, at)

    @property
    def seconds(self) -> int:
        return int(self.interval[:-1]) * _SECONDS[self.interval[-1]]

    def before(self, now: float) -> float:
        """The last moment it named, not later than `now` (Unix time; days begin at 00:00 UTC)."""
        hours, minutes, rest = (self.start_time or "00:00:00").split(":", 2)
        anchor = int(hours) * 3600 + int(minutes) * 60 + int(rest[:2])
        if len(rest) > 3:
            sign = -1 if rest[2] == "+" else 1
            anchor += sign * (int(rest[3:5]) * 3600 + int(rest[6:8]) * 60)
        return anchor + (now - anchor) // self.seconds * self.seconds

    def row(self) -> dict[str, str]:
        return {"interval": self.interval} | ({"start_time": self.start_time} if self.start_time else {})


def _read(ctx: ObjectContext) -> dict[str, bytes]:
    with ignoring(errno.ENOENT):
        rows: dict[bytes, bytes] = ctx.read(OID, [OmapGetVals()])[0][0]
        return {key.decode(): value for key, value in rows.items()}
    return {}


def _items(value: bytes) -> list[Item]:
    return [Item(row["interval"], row.get("start_time")) for row in json.loads(value)]


def _pools(store: Store, pool: str) -> list[tuple[str, ObjectContext]]:
    return [(row.name, store.open(row.pool_id)) for row in store.pools() if pool in ("", row.name)]


def change(store: Store, pool: str, namespace: str, add: Item | None, remove: Item | None) -> None:
    """Adds an item to a level, or takes one away; neither: takes all. `pool` empty: all pools. ENOENT."""
    level = namespace if pool else EVERYWHERE
    if namespace and namespace not in namespaces(_pools(store, pool)[0][1]):
        raise OSError(errno.ENOENT, f"no namespace {namespace!r}")
    found = False
    for _, ctx in _pools(store, pool):
        now = _items(_read(ctx).get(level, b"[]"))
        found = found or (bool(now) and (remove is None or remove in now))
        kept = [] if add is None and remove is None else [item for item in now if item not in (add, remove)]
        kept += [add] if add is not None else []
        if kept:
            ctx.write(OID, [OmapSet({level.encode(): json.dumps([item.row() for item in kept]).encode()})])
        elif now:
            ctx.write(OID, [OmapRmKeys((level.encode(),))])
    if add is None and remove is not None and not found:
        raise OSError(errno.ENOENT, "no such schedule")


def listed(store: Store, pool: str, namespace: str, recursive: bool) -> list[tuple[str, str, list[Item]]]:
    """(pool, namespace, items) of the level; `recursive`: and of the levels above and below it that hold there. "-":
    all."""
    found: dict[tuple[str, str], list[Item]] = {}
    for name, ctx in _pools(store, pool):
        for level, value in sorted(_read(ctx).items()):
            if level.startswith(_LAST):
                continue
            where = ("-", "-") if level == EVERYWHERE else (name, level or "-")
            asked = (pool or "-", namespace or "-")
            if where == asked or (recursive and (not namespace or level in (EVERYWHERE, "", namespace))):
                found[where] = _items(value)
    return [(*where, items) for where, items in sorted(found.items())]


def _levels(store: Store, pool: str = "", namespace: str = "") -> Iterator[tuple[str, str, ObjectContext, list[Item]]]:
    """(pool, namespace, context, items that hold there): the closest level that has any."""
    for name, ctx in _pools(store, pool):
        rows = _read(ctx)
        for space in ["", *namespaces(ctx)]:
            for level in dict.fromkeys((space, "", EVERYWHERE)):
                if level in rows and namespace in ("", space):
                    yield name, space, ctx, _items(rows[level])
                    break


def upcoming(store: Store, pool: str = "", namespace: str = "") -> list[tuple[float, str, str]]:
    """(Unix time, pool, namespace) of the next purges, soonest first."""
    now = time.time()
    rows = []
    for name, space, _, items in _levels(store, pool, namespace):
        rows.append((min(item.before(now) + item.seconds for item in items), name, space))
    return sorted(rows)


def run(store: Store, now: float | None = None) -> list[tuple[str, str, int]]:
    """Purges what is due: (pool, namespace, 0 or errno) of each level that was. Two at once are as good as one."""
    now = time.time() if now is None else now
    done = []
    for name, space, ctx, items in _levels(store):
        key = f"{_LAST}{name}/{space}"
        last = _read(ctx).get(key)
        if last is not None and max(item.before(now) for item in items) <= float(last):
            continue
        ctx.write(OID, [OmapSet({key.encode(): repr(now).encode()})])
        if last is None:  # the schedule is new: its first moment is still to come
            continue
        code = 0
        try:
            purge(store.open(ctx.pool_id, space), now)
        except OSError as failure:
            code = failure.errno or errno.EIO
        done.append((name, space, code))
    return done

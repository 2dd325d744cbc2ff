"""Objects of the memory store: what a cluster holds, as plain Python values."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence

from librbd_py.format.values import dataclass, field

from . import record
from .api import Client, SnapSet, WatcherInfo
from .record import EMPTY_SNAPSET, Changes, Step

Place = tuple[int, str, str]  # pool id, namespace, object name


class Content:
    """One version of an object (an `ObjectState`)."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.attributes: dict[str, bytes] = {}
        self.omap: dict[bytes, bytes] = {}
        self.keys: list[bytes] = []  # of omap, sorted
        self.mtime_ns = 0

    def copy(self) -> Content:
        other = Content()
        other.data = bytearray(self.data)
        other.attributes = dict(self.attributes)
        other.omap = dict(self.omap)
        other.keys = list(self.keys)
        other.mtime_ns = self.mtime_ns
        return other

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(memoryview(self.data)[offset : offset + length])

    def extents(self, offset: int, length: int) -> Sequence[tuple[int, int]]:
        end = min(offset + length, len(self.data))
        return [(offset, end - offset)] if offset < end else []

    def xattr(self, name: str) -> bytes | None:
        return self.attributes.get(name)

    def xattrs(self) -> dict[str, bytes]:
        return dict(self.attributes)

    def omap_get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        return {key: self.omap[key] for key in sorted(set(keys)) if key in self.omap}

    def omap_rows(self, start_after: bytes, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        at = bisect_left(self.keys, prefix)
        if start_after:
            at = max(at, bisect_right(self.keys, start_after))
        for index in range(at, len(self.keys)):
            key = self.keys[index]
            if not key.startswith(prefix):
                return
            yield key, self.omap[key]

    def step(self, step: Step) -> None:
        match step:
            case record.PutData():
                self._grow(step.offset + len(step.data))
                self.data[step.offset : step.offset + len(step.data)] = step.data
            case record.ZeroData():
                self.data[step.offset : step.offset + step.length] = bytes(step.length)
            case record.SetSize():
                self._grow(step.size)
                del self.data[step.size :]
            case record.PutXattr():
                self.attributes[step.name] = step.value
            case record.DropXattr():
                self.attributes.pop(step.name, None)
            case record.PutOmap():
                for key, value in step.values.items():
                    if key not in self.omap:
                        insort(self.keys, key)
                    self.omap[key] = value
            case record.DropOmap():
                self._drop(step.keys)
            case record.DropOmapRange():
                first, last = bisect_left(self.keys, step.begin), bisect_left(self.keys, step.end)
                self._drop(self.keys[first:last])
            case record.ClearOmap():
                self.omap.clear()
                self.keys.clear()
            case record.Touch():
                pass
            case _:
                raise AssertionError(step)

    def _grow(self, size: int) -> None:
        if size > len(self.data):
            self.data.extend(bytes(size - len(self.data)))

    def _drop(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            if self.omap.pop(key, None) is not None:
                del self.keys[bisect_left(self.keys, key)]


@dataclass
class Record:
    head: Content | None = None
    version: int = 0
    snapset: SnapSet = EMPTY_SNAPSET
    clones: dict[int, Content] = field(default_factory=dict)


@dataclass
class Pool:
    pool_id: int
    name: str
    objects: dict[tuple[str, str], Record] = field(default_factory=dict)  # (namespace, name)
    last_snap: int = 0
    removed_snaps: set[int] = field(default_factory=set)


class MemoryTransaction:
    """A record.Transaction on a Pool, under the cluster's mutex."""

    def __init__(
        self, pool: Pool, place: Place, client: Client, now_ns: int, version: int, watchers: list[WatcherInfo]
    ) -> None:
        self.pool_id, self.namespace, self.oid = place
        self.client = client
        self.now_ns = now_ns
        self._pool = pool
        self._next_version = version
        self._watchers = watchers
        self._record = pool.objects.get((self.namespace, self.oid), Record())

    def head(self) -> Content | None:
        return self._record.head

    def version(self) -> int:
        return self._record.version if self._record.head is not None else 0

    def snapset(self) -> SnapSet:
        return self._record.snapset

    def clone(self, clone_id: int) -> Content:
        return self._record.clones[clone_id]

    def is_removed_snap(self, snap_id: int) -> bool:
        return snap_id in self._pool.removed_snaps

    def watchers(self) -> list[WatcherInfo]:
        return self._watchers

    def apply(self, changes: Changes) -> None:
        held = self._record
        if changes.clone is not None and held.head is not None:
            held.clones[changes.clone.clone_id] = held.head.copy()
        head = held.head
        for step in changes.steps:
            if isinstance(step, record.Delete):
                head = None
            elif isinstance(step, record.Restore):
                head = held.clones[step.clone_id].copy()
            else:
                head = Content() if head is None else head
                head.step(step)
        held.head = head
        held.version = self._next_version
        held.snapset = changes.snapset
        if head is not None:
            head.mtime_ns = self.now_ns
        if changes.forget:
            self._pool.objects.pop((self.namespace, self.oid), None)
        else:
            self._pool.objects[self.namespace, self.oid] = held


def trim_pool(pool: Pool, snap_id: int) -> None:
    """Drops what only this removed snapshot needed."""
    for key, held in list(pool.objects.items()):
        if not any(snap_id in clone.snaps for clone in held.snapset.clones):
            continue
        trimmed = record.trim(held.snapset, [snap_id])
        held.snapset = trimmed.snapset
        for clone_id in trimmed.dropped:
            del held.clones[clone_id]
        if held.head is None and not trimmed.snapset.clones:
            del pool.objects[key]

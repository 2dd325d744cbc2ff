"""Ordinary objects: a record `Transaction` on meta.db."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .. import record
from ..api import Client, CloneInfo, SnapSet, WatcherInfo
from ..record import EMPTY_SNAPSET, Changes, LayoutSpec, ObjectState, Step
from . import content
from .schema import ORDINARY


class Row(NamedTuple):
    id: int
    kind: int
    present: int
    size: int
    mtime: int
    version: int
    snap_seq: int


def load_row(c: sqlite3.Connection, pool: int, namespace: str, oid: str) -> Row | None:
    found = c.execute(
        "SELECT id, kind, present, size, mtime, version, snap_seq FROM objects WHERE pool=? AND ns=? AND oid=?",
        (pool, namespace, oid),
    ).fetchone()
    return None if found is None else Row(*found)


def snap_removed(c: sqlite3.Connection, pool: int, snap_id: int) -> bool:
    if snap_id >= 1 << 63:
        return False
    row = c.execute(
        "SELECT last FROM removed_snaps WHERE pool=? AND first<=? ORDER BY first DESC LIMIT 1", (pool, snap_id)
    ).fetchone()
    return row is not None and snap_id <= row[0]


class StoredState:
    """A head or a clone in meta.db."""

    def __init__(self, c: sqlite3.Connection, content_id: int, size: int, mtime_ns: int) -> None:
        self._c = c
        self._content = content_id
        self.size = size
        self.mtime_ns = mtime_ns

    def read(self, offset: int, length: int) -> bytes:
        length = min(length, self.size - offset)
        return content.read_data(self._c, self._content, offset, length) if length > 0 else b""

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        length = min(length, self.size - offset)
        return content.data_extents(self._c, self._content, offset, length) if length > 0 else []

    def xattr(self, name: str) -> bytes | None:
        return content.xattr(self._c, self._content, name)

    def xattrs(self) -> dict[str, bytes]:
        return content.xattrs(self._c, self._content)

    def omap_get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        return content.omap_get(self._c, self._content, keys)

    def omap_rows(self, start_after: bytes, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        return content.omap_rows(self._c, self._content, start_after, prefix)


class StoredTransaction:
    """`watchers` and `header_changed` are the store's: the list of watches, and what to do about an image's layout
    when `rbd.create` ran on this object (a spec) or the object went away (None)."""

    def __init__(
        self,
        c: sqlite3.Connection,
        place: tuple[int, str, str],
        client: Client,
        now_ns: int,
        watchers: Callable[[], list[WatcherInfo]],
        header_changed: Callable[[LayoutSpec | None], None],
    ) -> None:
        self.c = c
        self.pool_id, self.namespace, self.oid = place
        self.client = client
        self.now_ns = now_ns
        self.removed = False  # apply() took the head away
        self.changed = False
        self._watchers = watchers
        self._header_changed = header_changed
        self.row = load_row(c, *place)
        self._snapset: SnapSet | None = None

    def head(self) -> ObjectState | None:
        row = self.row
        if row is None or not row.present:
            return None
        return StoredState(self.c, row.id, row.size, row.mtime)

    def version(self) -> int:
        return self.row.version if self.row is not None and self.row.present else 0

    def snapset(self) -> SnapSet:
        if self._snapset is None:
            self._snapset = self._load_snapset()
        return self._snapset

    def _load_snapset(self) -> SnapSet:
        row = self.row
        if row is None:
            return EMPTY_SNAPSET
        if row.snap_seq == 0:
            return EMPTY_SNAPSET
        rows = self.c.execute(
            "SELECT clone, snaps, size, overlap FROM clones WHERE object=? ORDER BY clone", (row.id,)
        ).fetchall()
        clones = tuple(
            CloneInfo(clone, tuple(json.loads(snaps)), size, tuple((o, n) for o, n in json.loads(overlap)))
            for clone, snaps, size, overlap in rows
        )
        return SnapSet(row.snap_seq, clones)

    def clone(self, clone_id: int) -> ObjectState:
        assert self.row is not None
        found = self.c.execute(
            "SELECT id, size, mtime FROM clones WHERE object=? AND clone=?", (self.row.id, clone_id)
        ).fetchone()
        return StoredState(self.c, -found[0], found[1], found[2])

    def is_removed_snap(self, snap_id: int) -> bool:
        return snap_removed(self.c, self.pool_id, snap_id)

    def watchers(self) -> list[WatcherInfo]:
        return self._watchers()

    # --- changes

    def apply(self, changes: Changes) -> None:
        c = self.c
        self.changed = True
        row = self.row
        existed = row is not None and bool(row.present)
        number = row.id if row is not None else self._insert()
        if changes.clone is not None:
            self._make_clone(number, changes.clone)
        for step in changes.steps:
            self._step(number, step)
        if changes.forget:
            c.execute("DELETE FROM objects WHERE id=?", (number,))
        else:
            if changes.snapset.clones or (row is not None and row.snap_seq):
                self._update_clones(number, changes.snapset)
            c.execute(
                "UPDATE objects SET kind=?, present=?, size=?, mtime=?, version=?, snap_seq=? WHERE id=?",
                (
                    ORDINARY,
                    changes.exists,
                    changes.size,
                    self.now_ns,
                    next_version(c),
                    changes.snapset.seq,
                    number,
                ),
            )
        self.removed = existed and not changes.exists
        if changes.layout is not None:
            self._header_changed(changes.layout)
        elif self.removed:
            self._header_changed(None)

    def _insert(self) -> int:
        cursor = self.c.execute(
            "INSERT INTO objects(pool, ns, oid, kind, present, size, mtime, version, snap_seq) "
            "VALUES (?,?,?,?,0,0,?,0,0)",
            (self.pool_id, self.namespace, self.oid, ORDINARY, self.now_ns),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _step(self, number: int, step: Step) -> None:
        c = self.c
        match step:
            case record.PutData():
                content.write_data(c, number, step.offset, step.data)
            case record.ZeroData():
                content.zero_data(c, number, step.offset, step.length)
            case record.SetSize():
                content.cut_data(c, number, step.size)
            case record.Restore():
                self._restore(number, step.clone_id)
            case record.Delete():
                content.drop(c, number)
            case record.Touch():
                pass
            case _:
                keys_step(c, number, step)

    def _clone_row(self, number: int, clone_id: int) -> int:
        row_id: int = self.c.execute("SELECT id FROM clones WHERE object=? AND clone=?", (number, clone_id)).fetchone()[
            0
        ]
        return row_id

    def _restore(self, number: int, clone_id: int) -> None:
        content.drop(self.c, number)
        content.copy(self.c, -self._clone_row(number, clone_id), number)

    def _make_clone(self, number: int, clone: CloneInfo) -> None:
        assert self.row is not None
        cursor = self.c.execute(
            "INSERT INTO clones(object, clone, snaps, overlap, size, mtime) VALUES (?,?,?,?,?,?)",
            (number, clone.clone_id, _json(clone.snaps), _json(clone.overlap), clone.size, self.row.mtime),
        )
        assert cursor.lastrowid is not None
        content.copy(self.c, number, -cursor.lastrowid)
        self.c.executemany(
            "INSERT INTO clone_snaps VALUES (?,?,?)",
            [(self.pool_id, snap, cursor.lastrowid) for snap in clone.snaps],
        )

    def _update_clones(self, number: int, after: SnapSet) -> None:
        """Overlaps change with every write."""
        for clone in after.clones:
            self.c.execute(
                "UPDATE clones SET overlap=?2 WHERE object=?3 AND clone=?1 AND overlap<>?2",
                (clone.clone_id, _json(clone.overlap), number),
            )


def keys_step(c: sqlite3.Connection, number: int, step: Step) -> None:
    """Steps on xattrs and omap."""
    match step:
        case record.PutXattr():
            content.set_xattr(c, number, step.name, step.value)
        case record.DropXattr():
            content.drop_xattr(c, number, step.name)
        case record.PutOmap():
            content.omap_set(c, number, step.values)
        case record.DropOmap():
            content.omap_drop(c, number, step.keys)
        case record.DropOmapRange():
            content.omap_drop_range(c, number, step.begin, step.end)
        case record.ClearOmap():
            content.omap_clear(c, number)
        case _:
            raise AssertionError(step)


def is_keys_step(step: Step) -> bool:
    return isinstance(
        step,
        record.PutXattr | record.DropXattr | record.PutOmap | record.DropOmap | record.DropOmapRange | record.ClearOmap,
    )


def next_number(c: sqlite3.Connection, counter: str) -> int:
    """A number that was never given before, also not before a crash."""
    value: int = c.execute("UPDATE counters SET value=value+1 WHERE name=? RETURNING value", (counter,)).fetchall()[0][
        0
    ]
    return value


def next_version(c: sqlite3.Connection) -> int:
    return next_number(c, "version")


def drop_object(c: sqlite3.Connection, number: int) -> None:
    """The record with its clones."""
    for (clone,) in c.execute("SELECT id FROM clones WHERE object=?", (number,)).fetchall():
        drop_clone(c, clone)
    content.drop(c, number)
    c.execute("DELETE FROM objects WHERE id=?", (number,))


def drop_clone(c: sqlite3.Connection, clone: int) -> None:
    """clones.id"""
    content.drop(c, -clone)
    row = c.execute(
        "SELECT o.pool, k.snaps FROM clones k JOIN objects o ON o.id=k.object WHERE k.id=?", (clone,)
    ).fetchone()
    if row is not None:
        c.executemany(
            "DELETE FROM clone_snaps WHERE pool=? AND snap=? AND clone=?",
            [(row[0], snap, clone) for snap in json.loads(row[1])],
        )
    c.execute("DELETE FROM clones WHERE id=?", (clone,))


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))

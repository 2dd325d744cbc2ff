"""Self-managed snapshots of a pool: ids, which of them are gone, and clearing up behind those."""

from __future__ import annotations

import errno
import json
import sqlite3
from typing import TYPE_CHECKING

from .. import record
from ..api import CloneInfo, SnapSet
from . import content
from .layouts import LayoutRow
from .steps import step

if TYPE_CHECKING:
    from .store import EmbeddedStore


def create(c: sqlite3.Connection, pool: int) -> int:
    row = c.execute("UPDATE pools SET snap_seq=snap_seq+1 WHERE id=? RETURNING snap_seq", (pool,)).fetchall()
    snap: int = row[0][0]
    return snap


def remove(c: sqlite3.Connection, pool: int, snap: int, gid: int) -> bool:
    """Records it. False: it was removed before, or never given."""
    seq = c.execute("SELECT snap_seq FROM pools WHERE id=?", (pool,)).fetchone()[0]
    if not 0 < snap <= seq:
        return False
    before = c.execute(
        "SELECT first, last FROM removed_snaps WHERE pool=? AND first<=? ORDER BY first DESC LIMIT 1", (pool, snap)
    ).fetchone()
    if before is not None and snap <= before[1]:
        return False
    first, last = snap, snap
    if before is not None and before[1] == snap - 1:
        first = before[0]
    after = c.execute("SELECT last FROM removed_snaps WHERE pool=? AND first=?", (pool, snap + 1)).fetchone()
    if after is not None:
        last = after[0]
        c.execute("DELETE FROM removed_snaps WHERE pool=? AND first=?", (pool, snap + 1))
    c.execute("INSERT OR REPLACE INTO removed_snaps VALUES (?,?,?)", (pool, first, last))
    c.execute("INSERT INTO trims VALUES (?,?,?)", (pool, snap, gid))
    return True


def trim(store: EmbeddedStore, pool: int, snap: int) -> None:
    """Drops what only the removed snapshot needed. May be cut short anywhere and begun again by anybody."""
    with store.reading() as c:
        row = c.execute("SELECT snap_seq FROM pools WHERE id=?", (pool,)).fetchone()
        layouts = [
            LayoutRow(*found)
            for found in c.execute(
                "SELECT folder, pool, ns, prefix, objorder, header_pool, header FROM layouts WHERE pool=?", (pool,)
            )
        ]
        failure: OSError | None = None  # of an image that is damaged: the others must not suffer
        for layout in layouts if row is not None else ():
            try:
                store.layouts.trim(c, layout, snap, row[0] + 1)
            except OSError as error:
                if error.errno != errno.ENOENT:  # removed meanwhile
                    failure = error
    step("snap: layouts trimmed")
    with store.writing() as c:
        for (clone,) in c.execute("SELECT clone FROM clone_snaps WHERE pool=? AND snap=?", (pool, snap)).fetchall():
            _drop_snap(c, pool, clone, snap)
        if failure is None:
            c.execute("DELETE FROM trims WHERE pool=? AND snap=?", (pool, snap))
    if failure is not None:
        raise failure


def _drop_snap(c: sqlite3.Connection, pool: int, clone: int, snap: int) -> None:
    """The clone (clones.id) no longer serves this snapshot."""
    found = c.execute("SELECT object FROM clones WHERE id=?", (clone,)).fetchone()
    if found is None:
        return
    number = found[0]
    rows = c.execute(
        "SELECT id, clone, snaps, size, overlap FROM clones WHERE object=? ORDER BY clone", (number,)
    ).fetchall()
    ids = {clone_id: row_id for row_id, clone_id, *_ in rows}
    seq, present = c.execute("SELECT snap_seq, present FROM objects WHERE id=?", (number,)).fetchone()
    before = SnapSet(
        seq,
        tuple(
            CloneInfo(clone_id, tuple(json.loads(snaps)), size, tuple((o, n) for o, n in json.loads(overlap)))
            for _, clone_id, snaps, size, overlap in rows
        ),
    )
    after = record.trim(before, (snap,))
    for clone_id in after.dropped:
        content.drop(c, -ids[clone_id])
        c.execute("DELETE FROM clones WHERE id=?", (ids[clone_id],))
    for info in after.snapset.clones:
        c.execute(
            "UPDATE clones SET snaps=?, overlap=? WHERE id=?",
            (json.dumps(info.snaps), json.dumps(info.overlap), ids[info.clone_id]),
        )
    c.execute("DELETE FROM clone_snaps WHERE pool=? AND snap=? AND clone=?", (pool, snap, clone))
    if not present and not after.snapset.clones:
        c.execute("DELETE FROM objects WHERE id=?", (number,))

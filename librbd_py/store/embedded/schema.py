"""Tables of meta.db.

Content (data, xattrs, omap) hangs on a content id: `objects.id` for heads, `-clones.id` for clones.
"""

from __future__ import annotations

APPLICATION_ID = 0x52424450  # "RBDP"
VERSION = 1  # PRAGMA user_version
STORE_VERSION = 1  # store.json
CHUNK = 64 << 10  # bytes of object data per row
CHUNK_SHIFT = 12  # chunks.id = content << 12 | number; objects are at most 128 MiB = 2^11 chunks
FIRST_GID = 4100

# objects.kind
ORDINARY = 0
MAP_IN_LAYOUT = 1  # HEAD object map whose data is kept in the index of the image's layout
SIDE = 2  # xattrs and omap of a data object that lives in a layout: not an object of its own

TABLES = f"""
CREATE TABLE counters(
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL          -- the last one given: gid, pool, folder, version
) WITHOUT ROWID;
CREATE TABLE pools(
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    snap_seq INTEGER NOT NULL       -- highest self-managed snapshot id given
);
CREATE TABLE removed_snaps(         -- intervals, not touching
    pool INTEGER NOT NULL,
    first INTEGER NOT NULL,
    last INTEGER NOT NULL,
    PRIMARY KEY(pool, first)
) WITHOUT ROWID;
CREATE TABLE trims(                 -- removed snapshots whose clones may still be there
    pool INTEGER NOT NULL,
    snap INTEGER NOT NULL,
    gid INTEGER NOT NULL,           -- who is at it
    PRIMARY KEY(pool, snap)
) WITHOUT ROWID;
CREATE TABLE objects(
    id INTEGER PRIMARY KEY,
    pool INTEGER NOT NULL,
    ns TEXT NOT NULL,
    oid TEXT NOT NULL,
    kind INTEGER NOT NULL,
    present INTEGER NOT NULL,       -- 0: only clones are left
    size INTEGER NOT NULL,
    mtime INTEGER NOT NULL,         -- nanoseconds
    version INTEGER NOT NULL,
    snap_seq INTEGER NOT NULL,
    UNIQUE(pool, ns, oid)
);
CREATE TABLE chunks(
    id INTEGER PRIMARY KEY,
    data BLOB NOT NULL              -- at most {CHUNK} bytes; what is missing at its end reads as zeros
);
CREATE TABLE xattrs(
    content INTEGER NOT NULL,
    name BLOB NOT NULL,             -- UTF-8
    value BLOB NOT NULL,
    PRIMARY KEY(content, name)
) WITHOUT ROWID;
CREATE TABLE omap(
    content INTEGER NOT NULL,
    key BLOB NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY(content, key)
) WITHOUT ROWID;
CREATE TABLE clones(
    id INTEGER PRIMARY KEY,
    object INTEGER NOT NULL,
    clone INTEGER NOT NULL,         -- clone id: the newest snapshot it serves
    snaps TEXT NOT NULL,            -- JSON list, ascending
    overlap TEXT NOT NULL,          -- JSON list of [offset, length] shared with the next newer
    size INTEGER NOT NULL,
    mtime INTEGER NOT NULL,
    UNIQUE(object, clone)
);
CREATE TABLE clone_snaps(           -- which clones a removed snapshot concerns
    pool INTEGER NOT NULL,
    snap INTEGER NOT NULL,
    clone INTEGER NOT NULL,         -- clones.id
    PRIMARY KEY(pool, snap, clone)
) WITHOUT ROWID;
CREATE TABLE layouts(
    folder INTEGER PRIMARY KEY,     -- data/<folder>
    pool INTEGER NOT NULL,          -- of the data objects
    ns TEXT NOT NULL,
    prefix TEXT NOT NULL,
    objorder INTEGER NOT NULL,
    header_pool INTEGER NOT NULL,
    header TEXT NOT NULL,           -- rbd_header.<id>; the layout goes with it. '': with its pool
    UNIQUE(pool, ns, prefix)
);
CREATE INDEX layouts_header ON layouts(header_pool, ns, header);
CREATE TABLE trash(
    folder INTEGER PRIMARY KEY      -- of a removed layout; the folder may still exist
);
CREATE TABLE blocklist(
    address TEXT PRIMARY KEY,
    expires REAL NOT NULL           -- time.time()
) WITHOUT ROWID;
INSERT INTO counters VALUES ('gid', {FIRST_GID}), ('pool', 1), ('folder', 0), ('version', 0);
INSERT INTO pools VALUES (1, 'rbd', 0);
"""

WATCH_TABLES = """
CREATE TABLE IF NOT EXISTS watches(
    pool INTEGER NOT NULL,
    ns TEXT NOT NULL,
    oid TEXT NOT NULL,
    gid INTEGER NOT NULL,
    cookie INTEGER NOT NULL,
    timeout INTEGER NOT NULL,       -- seconds of silence after which it ends
    PRIMARY KEY(pool, ns, oid, gid, cookie)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS watches_gid ON watches(gid);
"""


def statements(tables: str) -> list[str]:
    """One by one, for executescript() would commit first."""
    return [part for part in tables.split(";\n") if part.strip()]

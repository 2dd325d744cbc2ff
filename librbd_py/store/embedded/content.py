"""Content of an object in meta.db: data in chunks, xattrs, omap. Functions on a connection inside a transaction.

`content` is `objects.id` of a head or `-clones.id` of a clone.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence

from .schema import CHUNK, CHUNK_SHIFT

_OMAP_PAGE = 512  # rows fetched at once: more than most callers take
_KEYS_AT_ONCE = 500  # SQL variables of one statement


def _row(content: int, number: int) -> int:
    return (content << CHUNK_SHIFT) + number


def read_data(c: sqlite3.Connection, content: int, offset: int, length: int) -> bytes:
    """Exactly length bytes; what is not stored is zeros."""
    first, last = offset // CHUNK, (offset + length - 1) // CHUNK
    rows = c.execute(
        "SELECT id, data FROM chunks WHERE id BETWEEN ? AND ?", (_row(content, first), _row(content, last))
    ).fetchall()
    if len(rows) == 1 and first == last:
        start = offset - first * CHUNK
        piece: bytes = rows[0][1][start : start + length]
        return piece if len(piece) == length else piece.ljust(length, b"\0")
    out = bytearray(length)
    for row, data in rows:
        at = (row - _row(content, 0)) * CHUNK - offset
        skip = max(-at, 0)
        piece = data[skip : length - at]
        out[at + skip : at + skip + len(piece)] = piece
    return bytes(out)


def data_extents(c: sqlite3.Connection, content: int, offset: int, length: int) -> list[tuple[int, int]]:
    """Stored ranges inside [offset, offset + length), joined where they touch."""
    out: list[tuple[int, int]] = []
    first, last = offset // CHUNK, (offset + length - 1) // CHUNK
    rows = c.execute(
        "SELECT id, length(data) FROM chunks WHERE id BETWEEN ? AND ? ORDER BY id",
        (_row(content, first), _row(content, last)),
    )
    for row, stored in rows:
        begin = (row - _row(content, 0)) * CHUNK
        start, stop = max(begin, offset), min(begin + stored, offset + length)
        if start >= stop:
            continue
        if out and out[-1][0] + out[-1][1] == start:
            out[-1] = (out[-1][0], stop - out[-1][0])
        else:
            out.append((start, stop - start))
    return out


def write_data(c: sqlite3.Connection, content: int, offset: int, data: bytes) -> None:
    at = 0
    while at < len(data):
        number, inside = divmod(offset + at, CHUNK)
        piece = data[at : at + CHUNK - inside]
        at += len(piece)
        if inside or len(piece) < CHUNK:
            old = _chunk(c, content, number)
            if old:
                piece = old[:inside].ljust(inside, b"\0") + piece + old[inside + len(piece) :]
            elif inside:
                piece = bytes(inside) + piece
        _put_chunk(c, content, number, piece)


def zero_data(c: sqlite3.Connection, content: int, offset: int, length: int) -> None:
    """Whole chunks go; the rest is overwritten."""
    end = offset + length
    first, last = -(-offset // CHUNK), end // CHUNK  # whole chunks: first <= n < last
    if first < last:
        c.execute("DELETE FROM chunks WHERE id >= ? AND id < ?", (_row(content, first), _row(content, last)))
    edges = {offset // CHUNK, (end - 1) // CHUNK}
    for number in edges:
        if first <= number < last:
            continue
        start, stop = max(offset - number * CHUNK, 0), min(end - number * CHUNK, CHUNK)
        old = _chunk(c, content, number)
        if len(old) <= start:
            continue
        if stop >= len(old):
            _put_chunk(c, content, number, old[:start])
        else:
            _put_chunk(c, content, number, old[:start] + bytes(stop - start) + old[stop:])


def cut_data(c: sqlite3.Connection, content: int, size: int) -> None:
    """Nothing is stored at or after size any more."""
    number, inside = divmod(size, CHUNK)
    c.execute(
        "DELETE FROM chunks WHERE id >= ? AND id < ?",
        (_row(content, number + (inside > 0)), _row(content + 1, 0)),
    )
    if inside:
        old = _chunk(c, content, number)
        if len(old) > inside:
            _put_chunk(c, content, number, old[:inside])


def _chunk(c: sqlite3.Connection, content: int, number: int) -> bytes:
    row = c.execute("SELECT data FROM chunks WHERE id=?", (_row(content, number),)).fetchone()
    return bytes(row[0]) if row is not None else b""


def _put_chunk(c: sqlite3.Connection, content: int, number: int, data: bytes) -> None:
    if data:
        c.execute("INSERT OR REPLACE INTO chunks VALUES (?,?)", (_row(content, number), data))
    else:
        c.execute("DELETE FROM chunks WHERE id=?", (_row(content, number),))


def drop(c: sqlite3.Connection, content: int) -> None:
    c.execute("DELETE FROM chunks WHERE id >= ? AND id < ?", (_row(content, 0), _row(content + 1, 0)))
    c.execute("DELETE FROM xattrs WHERE content=?", (content,))
    c.execute("DELETE FROM omap WHERE content=?", (content,))


def copy(c: sqlite3.Connection, source: int, target: int) -> None:
    """`target` must be empty."""
    shift = _row(target, 0) - _row(source, 0)
    c.execute(
        "INSERT INTO chunks SELECT id + ?, data FROM chunks WHERE id >= ? AND id < ?",
        (shift, _row(source, 0), _row(source + 1, 0)),
    )
    c.execute("INSERT INTO xattrs SELECT ?, name, value FROM xattrs WHERE content=?", (target, source))
    c.execute("INSERT INTO omap SELECT ?, key, value FROM omap WHERE content=?", (target, source))


# --- xattrs


def _name(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def xattr(c: sqlite3.Connection, content: int, name: str) -> bytes | None:
    try:
        raw = _name(name)
    except UnicodeEncodeError:
        return None
    row = c.execute("SELECT value FROM xattrs WHERE content=? AND name=?", (content, raw)).fetchone()
    return None if row is None else bytes(row[0])


def xattrs(c: sqlite3.Connection, content: int) -> dict[str, bytes]:
    rows = c.execute("SELECT name, value FROM xattrs WHERE content=?", (content,))
    return {bytes(name).decode("utf-8", "surrogateescape"): bytes(value) for name, value in rows}


def set_xattr(c: sqlite3.Connection, content: int, name: str, value: bytes) -> None:
    c.execute("INSERT OR REPLACE INTO xattrs VALUES (?,?,?)", (content, _name(name), value))


def drop_xattr(c: sqlite3.Connection, content: int, name: str) -> None:
    c.execute("DELETE FROM xattrs WHERE content=? AND name=?", (content, _name(name)))


# --- omap


def omap_get(c: sqlite3.Connection, content: int, keys: Sequence[bytes]) -> dict[bytes, bytes]:
    if len(keys) == 1:
        row = c.execute("SELECT value FROM omap WHERE content=? AND key=?", (content, keys[0])).fetchone()
        return {} if row is None else {keys[0]: row[0]}
    found: dict[bytes, bytes] = {}
    for at in range(0, len(keys), _KEYS_AT_ONCE):
        some = keys[at : at + _KEYS_AT_ONCE]
        marks = ",".join("?" * len(some))
        found.update(c.execute(f"SELECT key, value FROM omap WHERE content=? AND key IN ({marks})", (content, *some)))
    return found


def omap_rows(c: sqlite3.Connection, content: int, start_after: bytes, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Ascending keys > start_after (b"": from the first) with the prefix."""
    end = after_prefix(prefix)
    # An empty key exists only for those who start before everything.
    at, relation = (start_after, ">") if start_after and start_after >= prefix else (prefix, ">=")
    while True:
        if end is None:
            rows = c.execute(
                f"SELECT key, value FROM omap WHERE content=? AND key {relation} ? ORDER BY key LIMIT {_OMAP_PAGE}",
                (content, at),
            ).fetchall()
        else:
            rows = c.execute(
                f"SELECT key, value FROM omap WHERE content=? AND key {relation} ? AND key < ? "
                f"ORDER BY key LIMIT {_OMAP_PAGE}",
                (content, at, end),
            ).fetchall()
        yield from rows
        if len(rows) < _OMAP_PAGE:
            return
        at, relation = rows[-1][0], ">"


def after_prefix(prefix: bytes) -> bytes | None:
    """The lowest key above all that begin with prefix; None: there is no upper end."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else None


def omap_set(c: sqlite3.Connection, content: int, values: dict[bytes, bytes]) -> None:
    c.executemany(
        "INSERT OR REPLACE INTO omap VALUES (?,?,?)", [(content, key, value) for key, value in values.items()]
    )


def omap_drop(c: sqlite3.Connection, content: int, keys: Sequence[bytes]) -> None:
    c.executemany("DELETE FROM omap WHERE content=? AND key=?", [(content, key) for key in keys])


def omap_drop_range(c: sqlite3.Connection, content: int, begin: bytes, end: bytes) -> None:
    c.execute("DELETE FROM omap WHERE content=? AND key >= ? AND key < ?", (content, begin, end))


def omap_clear(c: sqlite3.Connection, content: int) -> None:
    c.execute("DELETE FROM omap WHERE content=?", (content,))

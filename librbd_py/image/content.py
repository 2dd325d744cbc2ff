"""What an image holds at a view, parents included, read object by object through the store: for copies, diffs and
rollbacks, which read snapshots without an image in the engine for each.
"""

from __future__ import annotations

import errno

from librbd_py.store.api import Read

from .layout import Extent
from .view import ViewSpec


def parent_ranges(view: ViewSpec, objno: int) -> list[tuple[int, int]]:
    """The parts of the parent, as image ranges, that show through where this object does not exist."""
    if (view.parent is None and view.fetch is None) or not view.overlap:
        return []
    return view.layout.within(objno, 0, view.layout.object_size, view.overlap)


def read_view(view: ViewSpec, offset: int, length: int) -> bytes:
    """Image content through a view. The parent's end and holes read as zeros."""
    out = bytearray(length)
    for piece in view.layout.map(offset, length):
        try:
            data = view.data.ctx.read(view.data.oid(piece.objno), [Read(piece.offset, piece.length)], view.snap_id)[0]
            out[piece.position : piece.position + len(data)] = data
        except OSError as failure:
            if failure.errno != errno.ENOENT:
                raise
            if view.parent is None:
                if view.fetch is not None and view.overlap:
                    data = _fetched(view, piece)
                    out[piece.position : piece.position + len(data)] = data
                continue
            at = piece.position
            for start, size in view.layout.unmap(piece.objno, piece.offset, piece.length):
                shown = min(size, view.overlap - start, view.parent.size - start)
                if shown > 0:
                    out[at : at + shown] = read_view(view.parent, start, shown)
                at += size
    return bytes(out)


def _fetched(view: ViewSpec, piece: Extent) -> bytes:
    """Of an object that is absent and has no parent, but somebody who knows what it holds."""
    assert view.fetch is not None
    found = view.fetch(piece.objno)
    if isinstance(found, bytes):
        return found[piece.offset : piece.offset + piece.length]
    if not found:
        return b""
    data: bytes = view.data.ctx.read(view.data.oid(piece.objno), [Read(piece.offset, piece.length)], view.snap_id)[0]
    return data

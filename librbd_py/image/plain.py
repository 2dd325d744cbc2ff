"""The data path in plain Python: for stores without a C data plane (the memory fake), and a readable statement of what
the C engine does. Same interface as `datapath.NativeImage`; slow, but object for object what librbd does.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from librbd_py.store.api import (
    NO_SNAPS,
    Create,
    Exec,
    Op,
    Read,
    Remove,
    Truncate,
    Write,
    WriteFull,
    Zero,
)

from .objects import exists
from .view import ViewSpec


class ObjectMapKeeper:
    """What keeps the HEAD object map true while data changes; this one has no map to keep."""

    def exists(self, objno: int) -> None:
        """Called before an object may come into being or change."""

    def copied_up(self, objno: int, snap_ids: Sequence[int], *, only: bool) -> None:
        """Called before an object comes into being in these snapshots (newest first) and in HEAD. `only`: no write
        follows."""

    def pending(self, objno: int) -> None:
        """Called before an object is removed."""

    def gone(self, objno: int) -> None:
        """Called after it was removed."""

    @property
    def broken(self) -> bool:
        """A change failed: the header calls the map invalid since then."""
        return False

    def stop(self) -> None:
        """The map is not kept any more. No request may run that changes objects."""


NO_MAP = ObjectMapKeeper()
WRITES, EVERYTHING = 1, 3


class PlainData:
    def __init__(self, view: ViewSpec, lock_needed: Callable[[], None]) -> None:
        """`lock_needed` runs on the thread of a write that found `need_lock`; it returns when the lock is held."""
        self._view = view
        self._lock_needed = lock_needed
        self.object_map: ObjectMapKeeper = NO_MAP
        self._gate = threading.Condition()
        self._blocked = {"read": 0, "write": 0}
        self._running = {"read": 0, "write": 0}
        self._fenced = 0
        self._one_writer = threading.RLock()

    # --- gate ------------------------------------------------------------------------------------------------------

    def publish(self, view: ViewSpec) -> None:
        with self._gate:
            self._view = view
            self._gate.notify_all()

    def block(self, which: int, timeout: float) -> None:
        classes = ("write",) if which == WRITES else ("read", "write")
        with self._gate:
            for name in classes:
                self._blocked[name] += 1
            if not self._gate.wait_for(lambda: not any(self._running[name] for name in classes), timeout):
                for name in classes:
                    self._blocked[name] -= 1
                self._gate.notify_all()
                raise OSError(errno.ETIMEDOUT, "requests in flight did not complete in time")

    def unblock(self, which: int) -> None:
        with self._gate:
            for name in ("write",) if which == WRITES else ("read", "write"):
                self._blocked[name] -= 1
            self._gate.notify_all()

    def fence(self, code: int) -> None:
        with self._gate:
            self._fenced = self._fenced or code
            self._gate.notify_all()

    in_use = False  # nothing but Python can serve it

    def close(self) -> None:
        self.fence(errno.ESHUTDOWN)
        with self._gate:
            self._gate.wait_for(lambda: not any(self._running.values()))

    @contextmanager
    def _admitted(self, kind: str, offset: int, length: int) -> Iterator[ViewSpec]:
        while True:
            with self._gate:
                self._gate.wait_for(lambda: self._fenced or not self._blocked[kind])
                if self._fenced:
                    raise OSError(self._fenced, os.strerror(self._fenced))
                view = self._view
                if offset < 0 or length < 0 or offset + length > view.size:
                    raise OSError(errno.EINVAL, f"{offset}~{length} is beyond the image's {view.size} bytes")
                if kind == "write" and view.read_only:
                    raise OSError(errno.EROFS, "the image is read-only")
                if kind == "read" or not view.need_lock:
                    self._running[kind] += 1
                    break
            self._lock_needed()
        try:
            yield view
        finally:
            with self._gate:
                self._running[kind] -= 1
                self._gate.notify_all()

    # --- requests --------------------------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        with self._admitted("read", offset, length) as view:
            return read_view(view, offset, length)

    def write(self, offset: int, data: bytes) -> None:
        with self._admitted("write", offset, len(data)) as view, self._one_writer:
            self._write(view, offset, data)

    def discard(self, offset: int, length: int, *, exact: bool = False) -> None:
        with self._admitted("write", offset, length) as view, self._one_writer:
            grain = 1 if exact else max(view.discard_granularity, 1)
            for piece in view.layout.map(offset, length):
                start = -(-piece.offset // grain) * grain
                end = piece.offset + piece.length
                if end != view.layout.used(piece.objno, view.size):
                    end = end // grain * grain
                if start < end:
                    self._zero(view, piece.objno, start, end - start)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        with self._admitted("write", offset, length) as view, self._one_writer:
            for piece in view.layout.map(offset, length):
                if unmap:
                    self._zero(view, piece.objno, piece.offset, piece.length)
                else:
                    self._put(view, piece.objno, piece.offset, bytes(piece.length))

    def compare_and_write(self, offset: int, compare: bytes, data: bytes) -> int | None:
        with self._admitted("write", offset, len(data)) as view, self._one_writer:
            found = read_view(view, offset, len(compare))
            for index, byte in enumerate(found):
                if byte != compare[index]:
                    return offset + index
            self._write(view, offset, data)
            return None

    def flush(self) -> None:
        with self._admitted("read", 0, 0):
            return

    def copyup(self, objno: int) -> bool:
        with self._admitted("write", 0, 0) as view, self._one_writer:
            return self._copyup(view, objno, only=True)

    # --- objects ---------------------------------------------------------------------------------------------------

    def _write(self, view: ViewSpec, offset: int, data: bytes) -> None:
        for piece in view.layout.map(offset, len(data)):
            self._put(view, piece.objno, piece.offset, data[piece.position : piece.position + piece.length])

    def _put(self, view: ViewSpec, objno: int, offset: int, data: bytes) -> None:
        whole = offset == 0 and len(data) == view.layout.object_size
        if not whole or view.snapc.ids:
            self._copyup(view, objno)
        self.object_map.exists(objno)
        op: Op = WriteFull(data) if whole else Write(offset, data)
        view.data.ctx.write(view.data.oid(objno), [op], view.snapc)

    def _zero(self, view: ViewSpec, objno: int, offset: int, length: int) -> None:
        oid = view.data.oid(objno)
        used = view.layout.used(objno, view.size)
        to_end = offset + length >= used
        covered = bool(parent_ranges(view, objno))
        if offset == 0 and to_end and not covered:
            if self._exists(view, objno):
                self.object_map.pending(objno)
                view.data.ctx.write(oid, [Remove()], view.snapc)
                self.object_map.gone(objno)
            return
        if covered and not (offset == 0 and to_end and not view.snapc.ids):
            self._copyup(view, objno)
        if offset == 0 and to_end:
            # A tombstone: an empty object hides the parent's.
            self.object_map.exists(objno)
            view.data.ctx.write(oid, [Create(), Truncate(0)], view.snapc)
        elif self._exists(view, objno):
            self.object_map.exists(objno)
            view.data.ctx.write(oid, [Truncate(offset) if to_end else Zero(offset, length)], view.snapc)

    def _exists(self, view: ViewSpec, objno: int) -> bool:
        return exists(view.data.ctx, view.data.oid(objno))

    def _copyup(self, view: ViewSpec, objno: int, *, only: bool = False) -> bool:
        ranges = parent_ranges(view, objno)
        if not ranges or view.parent is None or self._exists(view, objno):
            return False
        pieces = [read_view(view.parent, start, length) for start, length in ranges]
        # The parts of an object that lie below the overlap are its beginning.
        data = b"".join(pieces).rstrip(b"\0")
        if not data:
            return False
        self.object_map.copied_up(objno, view.snapc.ids, only=only)
        # An empty snap context: the copy belongs to every snapshot of the child too.
        view.data.ctx.write(view.data.oid(objno), [Exec("rbd", "copyup", data)], NO_SNAPS)
        return True


def parent_ranges(view: ViewSpec, objno: int) -> list[tuple[int, int]]:
    """The parts of the parent, as image ranges, that show through where this object does not exist."""
    if view.parent is None or not view.overlap:
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
                continue
            at = piece.position
            for start, size in view.layout.unmap(piece.objno, piece.offset, piece.length):
                shown = min(size, view.overlap - start, view.parent.size - start)
                if shown > 0:
                    out[at : at + shown] = read_view(view.parent, start, shown)
                at += size
    return bytes(out)

"""The data path of stores without a C data plane, which is the store in memory: what tests and examples need, no more.

Guests are never served by it: exports ask for `NativeImage`. Striping is `layout.py`'s and reading through parents
`content.py`'s, as everywhere in Python; the rules of writing (copy-up, tombstones, the object map) are those of the C
engine, said again. tests/conformance and tests/fault/random_ops.py run the same programs on both.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from librbd_py.format.logs import logger
from librbd_py.format.object_map import EXISTS, EXISTS_CLEAN, NONEXISTENT, PENDING
from librbd_py.store.api import (
    NO_SNAPS,
    Create,
    Exec,
    ObjectContext,
    Op,
    Remove,
    Truncate,
    Write,
    WriteFull,
    Zero,
)

from . import object_map
from .cls import call, u8, u64
from .content import parent_ranges, read_view
from .header import map_oid
from .objects import exists
from .view import NO_MAP, WRITES, ObjectMapKeeper, ViewSpec

log = logger("librbd_py.image")


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
        if not whole or view.snapc.ids or view.fetch is not None:
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
        if covered and not (offset == 0 and to_end and not view.snapc.ids and view.fetch is None):
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
        if not ranges or self._exists(view, objno):
            return False
        if view.fetch is not None:
            return view.fetch(objno) is True
        if view.parent is None:
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


class HeadMap(ObjectMapKeeper):
    """The HEAD map in memory while this client owns the image; used where the store does not keep it itself."""

    def __init__(self, ctx: ObjectContext, image_id: str, failed: Callable[[OSError], None]) -> None:
        self._ctx = ctx
        self._image_id = image_id
        self._oid = map_oid(image_id)
        self._failed = failed
        self._states = object_map.load(ctx, image_id)
        self._broken = False

    def exists(self, objno: int) -> None:
        if objno < len(self._states) and self._states[objno] != EXISTS:
            self._update(objno, EXISTS, None)

    def copied_up(self, objno: int, snap_ids: Sequence[int], *, only: bool) -> None:
        """Changed in the oldest snapshot, unchanged since in the others; in HEAD too when it was just copied."""
        for snap_id in reversed(snap_ids):
            state = EXISTS if snap_id == snap_ids[-1] else EXISTS_CLEAN
            update = call("object_map_update", u64(objno), u64(objno + 1), u8(state), u8(0))
            try:
                self._ctx.write(map_oid(self._image_id, snap_id), [update])
            except OSError as failure:
                # The snapshot was smaller, or has no map.
                if failure.errno not in (errno.ERANGE, errno.ENOENT):
                    self._failed(failure)
        if objno < len(self._states):
            self._update(objno, EXISTS_CLEAN if only and snap_ids else EXISTS, None)

    def pending(self, objno: int) -> None:
        if objno < len(self._states) and self._states[objno] != NONEXISTENT:
            self._update(objno, PENDING, None)

    def gone(self, objno: int) -> None:
        if objno < len(self._states) and self._states[objno] == PENDING:
            self._update(objno, NONEXISTENT, PENDING)

    @property
    def broken(self) -> bool:
        return self._broken

    def _update(self, objno: int, state: int, current: int | None) -> None:
        if self._broken:
            return
        filtered = u8(0) if current is None else u8(1) + u8(current)
        update = call("object_map_update", u64(objno), u64(objno + 1), u8(state), filtered)
        try:
            self._ctx.write(self._oid, [object_map.assert_locked(), update])
        except OSError as failure:
            # As librbd: mark the map invalid and go on without it.
            log.warning("%s: cannot be updated: %s", self._oid, failure)
            self._broken = True
            self._failed(failure)
            return
        self._states[objno] = state

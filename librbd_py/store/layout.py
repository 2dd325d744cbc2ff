"""An image's data objects in the embedded store, as objects: wraps `rbdn_layout_*` and `rbdn_obj_*`.

A layout is opened once per process, however many stores and images use it, and closed with its last user.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from librbd_py.native import check, ffi, lib

from .api import NOSNAP, SnapContext

MAX_PAIRS = 4096  # extents of one call; more are merged by C
_MAX_CLONES = 4096
CHECK_TEXT = 1 << 20  # bytes of findings that are kept


class Layout:
    """Methods raise OSError with C's errno. Object numbers beyond what an index holds: EFBIG."""

    def __init__(self, handle: Any, order: int, key: tuple[int, int]) -> None:
        self.handle = handle
        self.order = order
        self.object_size = 1 << order
        self._key = key
        self._users = 1  # under _lock of the module

    def stat(self, objno: int, snap_id: int = NOSNAP) -> int | None:
        """Size in bytes; None when there is no such object."""
        size: int = lib.rbdn_obj_stat(self.handle, objno, snap_id)
        return None if size == -errno.ENOENT else check(size, "stat")

    def read(self, objno: int, offset: int, length: int, snap_id: int = NOSNAP) -> bytes:
        """Short at the end of the object."""
        length = min(length, self.object_size - offset)
        if length <= 0:
            return b""
        buffer = bytearray(length)
        got = lib.rbdn_obj_read(self.handle, objno, snap_id, offset, ffi.from_buffer(buffer), length)
        return bytes(memoryview(buffer)[: check(got, "read")])

    def extents(self, objno: int, offset: int, length: int, snap_id: int = NOSNAP) -> list[tuple[int, int]]:
        length = min(length, self.object_size - offset)
        if length <= 0:
            return []
        pairs = ffi.new("uint64_t[]", 2 * MAX_PAIRS)
        count = check(
            lib.rbdn_obj_extents(self.handle, objno, snap_id, offset, length, pairs, MAX_PAIRS), "find extents"
        )
        return [(pairs[2 * i], pairs[2 * i + 1]) for i in range(count)]

    def write(self, objno: int, offset: int, data: bytes, snapc: SnapContext) -> None:
        source = ffi.from_buffer(data)
        check(lib.rbdn_obj_write(self.handle, objno, offset, source, len(data), *_context(snapc)), "write")

    def zero(self, objno: int, offset: int, length: int, snapc: SnapContext) -> None:
        check(lib.rbdn_obj_zero(self.handle, objno, offset, length, *_context(snapc)), "zero")

    def truncate(self, objno: int, size: int, snapc: SnapContext, *, create: bool = False) -> None:
        check(lib.rbdn_obj_truncate(self.handle, objno, size, create, *_context(snapc)), "truncate")

    def remove(self, objno: int, snapc: SnapContext) -> None:
        check(lib.rbdn_obj_remove(self.handle, objno, *_context(snapc)), "remove")

    def copyup(self, objno: int, data: bytes) -> None:
        check(lib.rbdn_obj_copyup(self.handle, objno, ffi.from_buffer(data), len(data)), "copy up")

    def rollback(self, objno: int, snap_id: int, snapc: SnapContext) -> None:
        check(lib.rbdn_layout_rollback(self.handle, objno, snap_id, *_context(snapc)), "roll back")

    def clones(self, objno: int) -> list[tuple[int, int, int]]:
        """(clone id, highest snapshot id below those it serves, size), oldest first."""
        size = 64
        while True:
            rows = ffi.new("uint64_t[]", 3 * size)
            count = check(lib.rbdn_layout_clones(self.handle, objno, rows, size), "list clones")
            if count < size or size >= _MAX_CLONES:
                return [(rows[3 * i], rows[3 * i + 1], rows[3 * i + 2]) for i in range(count)]
            size *= 8

    def snap_seq(self, objno: int) -> int:
        return int(lib.rbdn_layout_snap_seq(self.handle, objno))

    def objects(self, *, clones: bool = False) -> Iterator[int]:
        """Numbers of the objects whose head exists (or, with clones, of which anything exists), ascending."""
        at = 0
        while True:
            at = lib.rbdn_layout_next(self.handle, at, clones)
            if at == -errno.ENOENT:
                return
            yield check(at, "list objects")
            at += 1

    def flush(self) -> None:
        check(lib.rbdn_store_flush(self.handle), "flush")

    def trim(self, live: Sequence[int]) -> None:
        """`live`: ascending, ends with the lowest id not given out yet."""
        check(lib.rbdn_layout_trim(self.handle, ffi.new("uint64_t[]", list(live)), len(live)), "trim snapshots")

    def map_states(self) -> bytes | None:
        """One byte per object; None when no HEAD object map is kept."""
        count = lib.rbdn_layout_map_get(self.handle, ffi.NULL, 0)
        if count == -errno.ENOENT:
            return None
        check(count, "read the object map")
        states = bytearray(count)
        now = lib.rbdn_layout_map_get(self.handle, ffi.from_buffer(states), count)
        return None if now == -errno.ENOENT else bytes(states[: check(now, "read the object map")])

    def set_map_states(self, states: bytes | None) -> None:
        """Durable on return."""
        if states is None:
            check(lib.rbdn_layout_map_set(self.handle, ffi.NULL, -1), "drop the object map")
        else:
            check(lib.rbdn_layout_map_set(self.handle, ffi.from_buffer(states), len(states)), "set the object map")

    def complete_snap_map(self, snap_id: int, before: int, states: bytearray) -> bool:
        """Adds what copy-ups gave to the snapshot after its object map was made; `before`: the one before it, or 0.
        False: nothing."""
        if not states:
            return False
        view = ffi.from_buffer(states)
        found = lib.rbdn_layout_snap_map(self.handle, snap_id, before, view, len(states))
        return check(found, "read the object map of a snapshot") > 0

    def own(self, seconds: float) -> None:
        check(lib.rbdn_layout_own(self.handle, int(min(seconds, 1e6) * 1000)), "take the data lock")

    def write_back(self) -> None:
        """Begins to write HEAD to the disk; promises nothing."""
        lib.rbdn_layout_write_back(self.handle)

    def bulk(self, on: bool) -> None:
        """Whether large writes go past the page cache where they can."""
        check(lib.rbdn_layout_past_cache(self.handle, on), "writes past the page cache")

    def reserve(self, objno: int, count: int) -> None:
        """Takes room on the disk for objects that will be written soon and whole. ENOSPC, EOPNOTSUPP: not to be had."""
        check(lib.rbdn_layout_reserve(self.handle, objno, count), "room for objects")

    def give_back(self, objno: int, count: int) -> None:
        """Of that room, what nobody wrote."""
        check(lib.rbdn_layout_give_back(self.handle, objno, count), "room for objects")

    def disown(self) -> None:
        check(lib.rbdn_layout_disown(self.handle), "give the data lock back")

    def findings(self) -> list[str]:
        """Verifies the files; nobody else may be using them."""
        text = ffi.new("char[]", CHECK_TEXT)
        count = check(lib.rbdn_layout_check(self.handle, text, CHECK_TEXT), "check")
        lines: list[str] = ffi.string(text).decode(errors="replace").splitlines()
        if count > len(lines):
            lines.append(f"and {count - len(lines)} more findings")
        return lines

    def hold(self) -> Layout:
        """One more user, on top of one that is sure to stay until this returns."""
        with _lock:
            self._users += 1
        return self

    def release(self) -> None:
        """Drops one user. The last one closes it: everything is durable then."""
        with _lock:
            self._users -= 1
            if self._users:
                return
            if _open.get(self._key) is self:
                del _open[self._key]
            # Under the lock: who opens it again must find it closed, or it would look as if a crash had left it.
            lib.rbdn_store_close(self.handle)
            self.handle = ffi.NULL


_lock = threading.Lock()
_open: dict[tuple[int, int], Layout] = {}  # (device, inode) of the folder


def acquire(parent: int, name: str, order: int, *, create: bool = False) -> Layout:
    """One more user of the folder `name` in the directory `parent` (a descriptor). Release it afterwards.

    ELOOP, ENOTDIR, ENOENT; EIO for a damaged index, EINVAL for another order.
    """
    with _lock:
        try:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            status = None
        if status is not None:
            known = _open.get((status.st_dev, status.st_ino))
            if known is not None:
                known._users += 1
                return known
        error = ffi.new("int *")
        handle = lib.rbdn_layout_open(f"/proc/self/fd/{parent}/{name}".encode(), order, create, error)
        if handle == ffi.NULL:
            raise OSError(-error[0], f"open layout {name}: {os.strerror(-error[0])}")
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        layout = Layout(handle, order, (status.st_dev, status.st_ino))
        _open[layout._key] = layout
        return layout


def _forget_all() -> None:
    """In the child of a fork: the handles belong to the parent. They are neither used nor closed."""
    global _lock
    _lock = threading.Lock()
    _open.clear()


os.register_at_fork(after_in_child=_forget_all)


def _context(snapc: SnapContext) -> tuple[int, Any, int]:
    return snapc.seq, (ffi.new("uint64_t[]", list(snapc.ids)) if snapc.ids else ffi.NULL), len(snapc.ids)

"""Reads and writes with librbd's rules on ranges, and the times of access and change it keeps."""

from __future__ import annotations

import errno
import time

from librbd_py.store.api import NOSNAP

from . import cls
from .handle import ImageHandle
from .objects import ignoring

REPEATED = 4 << 20  # bytes of a repeated pattern written at once
MAX_DISCARD = (1 << 31) - 1  # bytes in one call, as the Python module of Ceph


def clip(handle: ImageHandle, offset: int, length: int) -> int:
    """The length that fits into the image. EINVAL when nothing does."""
    if not length:
        return 0
    header = handle.header
    if handle.snap_id != NOSNAP and handle.snap_id not in header.snaps:
        raise OSError(errno.ENOENT, "the snapshot was removed")
    size = header.size_at(handle.snap_id)
    if offset >= size:
        raise OSError(errno.EINVAL, f"{offset} is not within the image's {size} bytes")
    return min(length, size - offset)


def read(handle: ImageHandle, offset: int, length: int) -> bytes:
    """Short at the end of the image; EINVAL beyond it."""
    length = clip(handle, offset, length)
    if not length:
        return b""
    touch(handle, "access")
    return handle.data.read(offset, length)


def write(handle: ImageHandle, offset: int, data: bytes) -> int:
    """How many bytes were written: fewer at the end of the image. EINVAL beyond it, EROFS."""
    handle.require_writable()
    length = clip(handle, offset, len(data))
    if length:
        before_write(handle)
        handle.data.write(offset, data if length == len(data) else data[:length])
    return length


def discard(handle: ImageHandle, offset: int, length: int) -> None:
    """Gives space back; what is read afterwards is zeros, except at ragged ends, which may stay. EINVAL, EROFS."""
    handle.require_writable()
    if length > MAX_DISCARD:
        raise OSError(errno.EINVAL, f"{length} bytes are too many for one discard")
    length = clip(handle, offset, length)
    if length:
        before_write(handle)
        handle.data.discard(offset, length)


def write_zeroes(handle: ImageHandle, offset: int, length: int, *, thick: bool = False) -> None:
    """Reads back as zeros. `thick`: space stays allocated. EINVAL, EROFS."""
    handle.require_writable()
    length = clip(handle, offset, length)
    if length:
        before_write(handle)
        handle.data.write_zeroes(offset, length, unmap=not thick)


def write_same(handle: ImageHandle, offset: int, length: int, data: bytes) -> int:
    """`data` again and again. EINVAL: not a whole number of times, or beyond the image; EROFS."""
    handle.require_writable()
    if not data or length % len(data) or clip(handle, offset, length) != length:
        raise OSError(errno.EINVAL, f"{length} bytes from {offset} are no repetitions of {len(data)} within the image")
    if not length:
        return 0
    before_write(handle)
    if not any(data):
        handle.data.write_zeroes(offset, length)
        return length
    step = max(REPEATED // len(data), 1) * len(data)
    block = data * (min(step, length) // len(data))
    for at in range(0, length, step):
        handle.data.write(offset + at, block[: length - at])
    return length


def compare_and_write(handle: ImageHandle, offset: int, compare: bytes, data: bytes) -> int | None:
    """Writes if the image holds `compare`; otherwise the offset of the first difference. EINVAL: sizes, or across
    stripe units; EROFS."""
    handle.require_writable()
    unit = handle.header.layout.stripe_unit
    if len(compare) != len(data) or clip(handle, offset, len(data)) != len(data):
        raise OSError(errno.EINVAL, "both buffers must have the same length, within the image")
    if data and offset // unit != (offset + len(data) - 1) // unit:
        raise OSError(errno.EINVAL, "a compare-and-write stays within one stripe unit")
    if not data:
        return None
    before_write(handle)
    return handle.data.compare_and_write(offset, compare, data)


def flush(handle: ImageHandle) -> None:
    """What was written before is durable afterwards."""
    if handle.read_only or handle.snap_id != NOSNAP:
        return
    handle.data.flush()


def before_write(handle: ImageHandle) -> None:
    """Takes the lock if the image wants one; notes the time. The data path waits for a lock that moves with a VM."""
    if handle.uses_lock and not handle.is_lock_owner:
        try:
            handle.acquire_lock()
        except OSError as failure:
            if failure.errno != errno.EBUSY or not handle.moving:
                raise
            return
    touch(handle, "modify")


def touch(handle: ImageHandle, which: str) -> None:
    """Sets the access or modify time at most once in its interval. Failing to is no failure of the request."""
    interval = handle.settings.atime_interval if which == "access" else handle.settings.mtime_interval
    if handle.control is None or not interval:
        return
    now = time.monotonic()
    if now < handle.next_touch.get(which, 0.0):
        return
    with ignoring(errno.ENOENT, errno.ESHUTDOWN, errno.EROFS):
        age = time.time() - cls.timestamp(handle.ctx, handle.oid, which)
        if age >= interval:
            handle.ctx.exec(handle.oid, "rbd", f"set_{which}_timestamp")
            age = 0.0
        handle.next_touch[which] = now + interval - max(age, 0.0)

"""Checks that all sources share."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from .api import MAX_READ, MAX_SIZE, SourceSnapshot


def size_at(size: int, snapshots: Sequence[SourceSnapshot], snapshot: int | None) -> int:
    """Bytes at a point. EINVAL: there is none such."""
    if snapshot is None:
        return size
    if not 0 <= snapshot < len(snapshots):
        raise OSError(errno.EINVAL, f"the source has {len(snapshots)} snapshots, no number {snapshot}")
    return snapshots[snapshot].size


def within(offset: int, length: int, size: int) -> None:
    """EINVAL for a range that is not within `size` bytes."""
    if offset < 0 or length < 0 or offset + length > size:
        raise OSError(errno.EINVAL, f"{length} bytes from {offset} are not within the source's {size}")


def readable(offset: int, length: int, size: int) -> None:
    """EINVAL: not within, or more than MAX_READ."""
    within(offset, length, size)
    if length > MAX_READ:
        raise OSError(errno.EINVAL, f"{length} bytes are more than the {MAX_READ} of one read")


def before(since: int | None, snapshot: int | None, count: int) -> None:
    """EINVAL unless `since` is a snapshot older than `snapshot`."""
    if since is not None and not 0 <= since < (count if snapshot is None else snapshot):
        raise OSError(errno.EINVAL, f"{since} is no older snapshot than {'HEAD' if snapshot is None else snapshot}")


def bounded(size: int, what: str) -> int:
    """A size that somebody else told. EFBIG, EINVAL."""
    if size < 0:
        raise OSError(errno.EINVAL, f"{what} says that it has {size} bytes")
    if size > MAX_SIZE:
        raise OSError(errno.EFBIG, f"{what} says that it has {size} bytes: more than a source may have")
    return size

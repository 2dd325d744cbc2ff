"""What the data path needs to know of an image: an immutable view, published anew after every change.

The C engine has its own form of it (`rbdn_view`, made in `datapath.py`); `plain.py` follows this one directly.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Protocol

from librbd_py.format.values import dataclass
from librbd_py.store.api import NO_SNAPS, NOSNAP, NativeData, ObjectContext, SnapContext

from .layout import Layout

DISCARD_GRANULARITY = 65536  # bytes; Ceph's rbd_discard_granularity_bytes


class DataObjects:
    """The data objects of one image, and the C data plane's handle on them where the store has one."""

    def __init__(self, ctx: ObjectContext, prefix: str, order: int) -> None:
        self.ctx = ctx
        self.prefix = prefix
        self.order = order
        self.native: NativeData | None = None

    def open(self) -> DataObjects:
        """Takes the C handle. A store without a C data plane answers EOPNOTSUPP: then `plain.py` does the work."""
        try:
            self.native = self.ctx.native_data(self.prefix, self.order)
        except OSError as failure:
            if failure.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        return self

    def oid(self, objno: int) -> str:
        return f"{self.prefix}.{objno:016x}"

    def close(self) -> None:
        native, self.native = self.native, None
        if native is not None:
            native.close()


# Brings an object over: True, it is here now; False, there is nothing, and what is not written reads as zeros; bytes:
# it stays away, and this is what it holds (nothing of it may be changed through the view). Any thread; OSError.
Fetch = Callable[[int], bool | bytes]


@dataclass(frozen=True)
class ViewSpec:
    size: int  # bytes
    layout: Layout
    data: DataObjects
    snap_id: int = NOSNAP
    snapc: SnapContext = NO_SNAPS  # of writes
    read_only: bool = False  # EROFS
    need_lock: bool = False  # writes wait for the exclusive lock
    parent: ViewSpec | None = None  # a view at a snapshot
    overlap: int = 0  # bytes of the parent seen through this view
    fetch: Fetch | None = None  # absent objects within the overlap, before they are changed; without a parent, or read
    discard_granularity: int = DISCARD_GRANULARITY

    def chain(self) -> list[ViewSpec]:
        """This view and its parents, youngest first."""
        views = []
        view: ViewSpec | None = self
        while view is not None:
            views.append(view)
            view = view.parent
        return views


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


class DataPath(Protocol):
    """Guest-visible I/O on one image: the C engine, or `plain.PlainData`. Ranges beyond the view's size are EINVAL."""

    object_map: ObjectMapKeeper

    def publish(self, view: ViewSpec) -> None: ...

    def block(self, which: int, timeout: float) -> None:
        """Parks new requests (1 writes, 3 everything) and waits for those admitted; ETIMEDOUT leaves it open again."""

    def unblock(self, which: int) -> None: ...

    def fence(self, code: int) -> None:
        """Every request from now on fails with this errno. Final."""

    def read(self, offset: int, length: int) -> bytes: ...

    def write(self, offset: int, data: bytes) -> None: ...

    def discard(self, offset: int, length: int, *, exact: bool = False) -> None: ...

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None: ...

    def compare_and_write(self, offset: int, compare: bytes, data: bytes) -> int | None:
        """None when written, else the image offset of the first difference."""

    def flush(self) -> None: ...

    def copyup(self, objno: int) -> bool:
        """Copies one object of the parent into the image unless it exists there; True when something was copied."""

    @property
    def in_use(self) -> bool:
        """An export serves the image."""

    def close(self) -> None: ...

"""An open image: its header, its view for the data path, its watch and its exclusive lock.

Threads: any number may use a handle. `_one_op` serialises maintenance operations and may be held for long; `_state`
guards the header and the view and is held for a read of the header at most. Callbacks of `HeaderControl` take `_state`
only, and wait for maintenance operations through `_holds`, so a lock request never dead-locks with an operation that is
itself waiting for the lock.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

from librbd_py.control.driver import HeaderControl
from librbd_py.format import features as ft
from librbd_py.format import notify as nf
from librbd_py.format.logs import logger
from librbd_py.store.api import NOSNAP, ObjectContext

from .datapath import NativeImage
from .handle_lock import announce
from .handle_moves import HandleMoves
from .handle_view import name_by_id, resolve_snapshot
from .header import Header, image_id_of, load, require_migrated_to
from .proxy import Reply, Requests, Served
from .quiesce import QuiesceWatchers

__all__ = ["ImageHandle", "announce", "name_by_id"]

log = logger("librbd_py.image")


class ImageHandle(HandleMoves):
    """Open with `ImageHandle.open`, close with `close`. Failures are OSError."""

    def __init__(
        self,
        ctx: ObjectContext,
        name: str,
        header: Header,
        *,
        read_only: bool,
        snap_id: int = NOSNAP,
        alone: bool = False,
    ) -> None:
        self._served: Served | None = None
        super().__init__(ctx, name, header, read_only=read_only, snap_id=snap_id, alone=alone)
        self.requests = Requests(self)
        self.quiesce = QuiesceWatchers(self.id)

    @classmethod
    def open(
        cls,
        ctx: ObjectContext,
        name: str | None = None,
        *,
        image_id: str | None = None,
        snapshot: str | int | None = None,
        read_only: bool = False,
        former: frozenset[str] = frozenset(),
        alone: bool = False,
    ) -> ImageHandle:
        """By name or by id; `snapshot` is a name (user namespace) or an id, and makes the view read-only. `former`:
        addresses of clients known to be dead, whose lock is broken without waiting for their watch to expire.

        `alone`: as if it did not migrate; for the steps of a migration.

        ENOENT: no such image or snapshot. ENOSYS: features this library lacks. EROFS: it migrates elsewhere, or its
        migration is being prepared or aborted. A read-write open registers a watch.
        """
        if image_id is None:
            if not name:
                raise OSError(errno.ENOENT, "an image has a name")
            image_id = image_id_of(ctx, name)
        elif name is None:
            name = name_by_id(ctx, image_id)
        header = load(ctx, image_id, read_only=read_only, alone=alone)
        snap_id = resolve_snapshot(header, snapshot)
        if header.has(ft.NON_PRIMARY):
            read_only = True
        if header.migration is not None and not (read_only or alone):
            require_migrated_to(header.migration)
        handle = cls(ctx, name or "", header, read_only=read_only, snap_id=snap_id, alone=alone)
        if not read_only:
            control = HeaderControl(ctx, handle.oid, handle, former=former)
            control.diary.facts = handle.facts
            try:
                control.open()
                handle.control = control
                handle.refresh()
            except BaseException:
                handle.close()
                raise
        return handle

    @property
    def describe(self) -> Mapping[str, str]:
        """What others are told of this handle when they ask who holds the image: short texts, of a VM for example
        {"vm": "uuid:...", "name": "..."}. Assign a new one to change it."""
        return {} if self.control is None else self.control.diary.about

    @describe.setter
    def describe(self, about: Mapping[str, str]) -> None:
        if self.control is not None:
            self.control.diary.about = dict(about)

    def facts(self) -> dict[str, Any]:
        """Of its I/O, for who asks (control/who.py). Quick, and on any thread."""
        if self.closed or not isinstance(self.data, NativeImage):
            return {}
        stats = self.data.stats()
        idle = {"io_age": stats.idle_ns // 1_000_000, "io_kind": stats.last} if stats.last else {}
        return {"in_flight": stats.in_flight, "parked": stats.parked, **idle}

    # --- HeaderControl's callbacks, but those of the lock -----------------------------------------------------------

    def header_updated(self) -> None:
        try:
            self._follow()
        except OSError as failure:
            log.warning("image %s: the header cannot be read: %s", self.id, failure)
            return
        with self._state:
            watchers = [*self._update_watchers.values()]
        for watcher in watchers:
            watcher()

    def peer_op(self, message: Any, reply: Reply) -> None:
        if isinstance(message, nf.AsyncProgress | nf.AsyncComplete):
            self.requests.heard(message)
            reply(0)
            return
        if isinstance(message, nf.Quiesce | nf.Unquiesce):
            self.quiesce.heard(message, reply)
            return
        with self._state:
            if self._served is None:
                from .served_ops import OPERATIONS

                self._served = Served(self, OPERATIONS)
        self._served.accept(message, reply)

    # --- end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Releases the lock, ends the watch and the data path. Idempotent.

        EBUSY: an export serves the image. ETIMEDOUT: requests in flight do not end, so the lock cannot go: the handle
        stays open, lock, watch and gate as they were, to be closed again (or its process ended). After other errors it
        is closed.
        """
        with self._one_op:
            if self.closed:
                return
            if self.data.in_use:
                raise OSError(errno.EBUSY, "an export serves the image")
            failure: OSError | None = None
            if self.control is not None:
                try:
                    self.control.close()
                except OSError as problem:
                    if problem.errno == errno.ETIMEDOUT:
                        raise
                    failure = problem
            with self._state:
                self.closed = True  # nothing is published from here on
            try:
                self.data.close()
            except OSError:
                self.closed = False
                raise
            self._close_objects()
        if failure is not None and self._lost is None and not self.gone:
            raise failure

    def __enter__(self) -> ImageHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

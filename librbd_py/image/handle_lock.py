"""The exclusive lock of an open image: who wants it here, who needs it to stay, what happens when it comes and goes.

`_holds` makes a release wait for maintenance operations, so that a lock request never dead-locks with an operation that
is itself waiting for the lock.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from librbd_py.control import wire
from librbd_py.control.driver import HeaderControl
from librbd_py.control.pool import control_pool
from librbd_py.format import features as ft
from librbd_py.format.logs import INFO, WARNING, logger
from librbd_py.format.values import replace
from librbd_py.native import check, lib
from librbd_py.store.api import NOSNAP, ObjectContext

from .handle_map import HandleMap
from .header import Header
from .objects import ignoring
from .view import EVERYTHING, WRITES, DataObjects

DRAIN_SECONDS = 60.0  # how long a change waits for requests in flight
OWN_SECONDS = 30.0  # how long a new lock owner waits for the last write of the one before
REFUSE_AGAIN_SECONDS = 1.0  # when ending the requests that wait for a lock failed
NOTIFY_MS = 5000

log = logger("librbd_py.image")


class HandleLock(HandleMap):
    """`post_acquire`, `pre_release` and `lost` are HeaderControl's callbacks."""

    def __init__(
        self, ctx: ObjectContext, name: str, header: Header, *, read_only: bool, snap_id: int, alone: bool = False
    ) -> None:
        self._holds = threading.Condition()
        self._in_use = 0  # maintenance operations that need the lock to stay; guarded by _holds
        self._releasing = False  # guarded by _holds
        self._released_by_hand = False
        self.on_wanted: Callable[[], None] | None = None  # a write waits while the lock moves; on the event thread
        super().__init__(ctx, name, header, read_only=read_only, snap_id=snap_id, alone=alone)

    @property
    def is_lock_owner(self) -> bool:
        return self._owner and self.control is not None and self.control.arrived

    @property
    def asks_owner(self) -> bool:
        """Whether maintenance operations need a lock that this handle does not own. Not inside `exclusive`: there it is
        owned, even while somebody waits for it."""
        if self._in_use:
            return False
        return self.control is not None and self._locks(self.header) and not self.is_lock_owner

    def acquire_lock(self) -> None:
        """Waits until this handle owns the exclusive lock. EROFS: it was given up by hand, or the owner keeps it."""
        self._seeking().acquire()

    def try_lock(self) -> bool:
        """As `acquire_lock`, but a living owner is left alone: False."""
        return self._seeking().try_acquire()

    def _seeking(self) -> HeaderControl:
        if self._lost is not None:
            raise OSError(self._lost.errno, self._lost.strerror)
        if self.control is None or self._released_by_hand:
            raise OSError(errno.EROFS, "this handle does not take the exclusive lock")
        return self.control

    def request_lock(self) -> None:
        """Starts acquiring and returns at once: what waits for the lock starts when the gate opens."""
        if self._lost is not None or self.control is None or self._released_by_hand:
            self._refuse_waiting()
            return
        if self.control.moving:
            if self.on_wanted is not None:
                self.on_wanted()
            return  # the hand-off lets them go on
        self.control.request_acquire().add_done_callback(self._lock_answered)

    def _lock_answered(self, answer: Future[None]) -> None:
        failure = answer.exception()
        if failure is not None and not (self.control is not None and self.control.moving):
            ends = getattr(failure, "errno", 0) == errno.ESHUTDOWN  # `lost` or `close` ends them with that
            level = INFO if ends else WARNING
            log.log(level, "image %s: the exclusive lock cannot be had: %s", self.id, failure)
            if not ends:
                control_pool().submit(self._refuse_waiting)

    def _refuse_waiting(self) -> None:
        """Requests that wait for a lock nobody gives end with EROFS, as in librbd; later ones ask again."""
        with self._state:
            if not self.closed and not self._owner:
                try:
                    self.data.publish(replace(self._view(self._header), read_only=True, need_lock=False))
                    self._publish()
                except OSError as failure:  # no memory: but nobody else would ever end those requests
                    log.warning("image %s: %s; trying again", self.id, failure)
                    control_pool().call_later(REFUSE_AGAIN_SECONDS, self._refuse_waiting)

    def lock_by_hand(self) -> None:
        """lock_acquire: takes the lock and keeps it when others ask. EINVAL: the image has no such feature."""
        self._require_lock_feature()
        assert self.control is not None
        self._released_by_hand = False
        before = self.control.policy
        self.control.set_policy("exclusive")  # first: who asks in between would be given what we were just granted
        try:
            self.acquire_lock()
        except BaseException:
            self.control.set_policy(before)
            raise

    def unlock_by_hand(self) -> None:
        """lock_release: gives it up; writes fail with EROFS until it is taken again. EINVAL: not the owner."""
        self._require_lock_feature()
        assert self.control is not None
        if not self.is_lock_owner:
            raise OSError(errno.EINVAL, "this handle does not own the exclusive lock")
        self.control.set_policy("automatic")
        self._released_by_hand = True
        self.control.release()

    def _require_lock_feature(self) -> None:
        if self.control is None or self.snap_id != NOSNAP or not self.header.has(ft.EXCLUSIVE_LOCK):
            raise OSError(errno.EINVAL, "the exclusive-lock feature is not usable here")

    @contextmanager
    def exclusive(self) -> Iterator[Header]:
        """The time of a maintenance operation: one at a time, owning the lock throughout. Yields the fresh header."""
        self.require_writable()
        with self._one_op:
            held = self._hold()
            try:
                yield self.header
            finally:
                if held:
                    with self._holds:
                        self._in_use -= 1
                        self._holds.notify_all()

    def require_writable(self) -> None:
        if self.read_only or self.snap_id != NOSNAP:
            raise OSError(errno.EROFS, "the image is open read-only")

    def require_no_other_owner(self) -> None:
        """EROFS: a living client owns the exclusive lock. For what librbd neither takes the lock from it for nor can
        ask it to do."""
        if self.control is not None and not self.is_lock_owner and self.control.owner_lives():
            raise OSError(errno.EROFS, "another client owns the exclusive lock")

    def _hold(self) -> bool:
        if not self.header.has(ft.EXCLUSIVE_LOCK):
            return False
        while True:
            with self._holds:
                # _one_op is ours, so a hold that exists is an outer one of this very thread.
                if self._in_use or (self._owner and not self._releasing):
                    self._in_use += 1
                    return True
            self.acquire_lock()

    @contextmanager
    def quiesced(self, which: int = EVERYTHING) -> Iterator[None]:
        """No request runs inside. ETIMEDOUT when those in flight do not end."""
        self.data.block(which, DRAIN_SECONDS)
        try:
            yield
        finally:
            self.data.unblock(which)

    def changed(self) -> None:
        """After a change of the header: publish it here, tell everybody else."""
        self.refresh()
        self.announce()

    def announce(self) -> None:
        with ignoring(errno.ENOENT):
            announce(self.ctx, self.oid)

    # --- HeaderControl's callbacks ---------------------------------------------------------------------------------

    def post_acquire(self) -> None:
        with self._state:
            if self.closed:
                raise OSError(errno.ESHUTDOWN, "the image is closed")
            native = self.objects.native
            if native is not None:
                native.own(OWN_SECONDS)
            try:
                header = self._take_map()
                if header.migrates:
                    self._complete_objects(header)
                self._owner = True
                self._publish(header)
            except BaseException:
                self._owner = False
                if native is not None:
                    native.disown()
                raise

    def pre_release(self, final: bool) -> None:
        with self._holds:
            self._releasing = True
            self._holds.wait_for(lambda: self._in_use == 0)
        try:
            self.data.block(WRITES, DRAIN_SECONDS)
            try:
                flush_objects(self.objects)
                self._give_map()
                with self._state:
                    self._owner = False
                    self._publish()
                if self.objects.native is not None:
                    self.objects.native.disown()
            except OSError as failure:
                if final and failure.errno != errno.ETIMEDOUT:  # the lock goes all the same: no write may come after it
                    self.data.fence(errno.ESHUTDOWN)
                raise
            finally:
                self.data.unblock(WRITES)
        finally:
            with self._holds:
                self._releasing = False
                self._holds.notify_all()

    def lost(self, failure: OSError) -> None:
        with self._state:
            self._lost = failure
            self._owner = False
            if not self.closed:
                self.data.fence(failure.errno or errno.ESHUTDOWN)

    def lock_no_longer_used(self) -> None:
        """The exclusive-lock feature went while this handle owned the lock. Called inside `exclusive`."""
        control = self.control
        assert control is not None
        with self._holds:
            held, self._in_use = self._in_use, 0
        try:
            control.release()
        finally:
            with self._holds:
                self._in_use = held


def announce(ctx: ObjectContext, oid: str) -> None:
    """HeaderUpdate to every watcher of a header."""
    ctx.notify(oid, wire.header_update(), NOTIFY_MS)


def flush_objects(objects: DataObjects) -> None:
    """Everything written so far is durable afterwards, past the gate."""
    if objects.native is not None:
        check(lib.rbdn_store_flush(objects.native.handle), "flush")

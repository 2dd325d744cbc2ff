"""An open image: its header, its view for the data path, its watch and its exclusive lock.

Threads: any number may use a handle. `_one_op` serialises maintenance operations and may be held for long; `_state`
guards the header and the view and is held for a read of the header at most. Callbacks of `HeaderControl` take `_state`
only, and wait for maintenance operations through `_holds`, so a lock request never dead-locks with an operation that is
itself waiting for the lock.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from librbd_py.control import wire
from librbd_py.control.driver import HeaderControl
from librbd_py.control.pool import control_pool
from librbd_py.format import features as ft
from librbd_py.format import header as fh
from librbd_py.format import notify as nf
from librbd_py.format.header import ParentImageSpec
from librbd_py.native import check, lib
from librbd_py.store.api import NOSNAP, ObjectContext, Version

from . import cls, object_map
from .datapath import NativeImage, NativeMap
from .header import MAX_PARENTS, Header, header_oid, image_id_of, load
from .objects import ignoring
from .plain import HeadMap, PlainData
from .proxy import Reply, Requests, Served
from .quiesce import QuiesceWatchers
from .view import EVERYTHING, NO_MAP, WRITES, DataObjects, DataPath, ObjectMapKeeper, ViewSpec

DRAIN_SECONDS = 60.0  # how long a change waits for requests in flight
OFFER_SECONDS = 2.0  # how long a client that leaves waits for a lock it does not have
OWN_SECONDS = 30.0  # how long a new lock owner waits for the last write of the one before
REFUSE_AGAIN_SECONDS = 1.0  # when ending the requests that wait for a lock failed
NOTIFY_MS = 5000

log = logging.getLogger("librbd_py.image")


class ImageHandle:
    """Open with `ImageHandle.open`, close with `close`. Failures are OSError."""

    def __init__(
        self, ctx: ObjectContext, name: str, header: Header, *, read_only: bool, snap_id: int = NOSNAP
    ) -> None:
        self.ctx = ctx
        self.store = ctx.store
        self.name = name
        self.id = header.id
        self.oid = header_oid(header.id)
        self.read_only = read_only
        self.snap_id = snap_id
        self.closed = False
        self.gone = False  # removed by this handle
        self.control: HeaderControl | None = None
        self._header = header
        self._state = threading.RLock()
        self._one_op = threading.RLock()
        self._holds = threading.Condition()
        self._in_use = 0  # maintenance operations that need the lock to stay; guarded by _holds
        self._releasing = False  # guarded by _holds
        self._owner = False
        self._released_by_hand = False
        self.on_wanted: Callable[[], None] | None = None  # a write waits while the lock moves; on the event thread
        self._parked = False  # the gate is closed for a hand-off; guarded by _state
        self._map_reported = False
        self._seen_seq = 0
        self._size_limit: int | None = None
        self._update_watchers: dict[int, Callable[[], None]] = {}
        self._next_watcher = 0
        self._lost: OSError | None = None
        self.requests = Requests(self)
        self.quiesce = QuiesceWatchers(self.id)
        self._served: Served | None = None
        self.next_touch: dict[str, float] = {}  # access, modify: time.monotonic() of the next look at the times
        self._parents: tuple[ParentImageSpec, ViewSpec, list[DataObjects]] | None = None
        self._retired: list[DataObjects] = []  # parents of older views; requests in flight may still read them
        pool = header.data_pool_id
        self.data_ctx = ctx if pool in (-1, ctx.pool_id) else ctx.store.open(pool, ctx.namespace)
        self.objects = DataObjects(self.data_ctx, header.object_prefix, header.order).open()
        try:
            self.data: DataPath = make_data(self._view(header), self.acquire_lock, self.request_lock)
        except BaseException:
            self._close_objects()
            raise

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
    ) -> ImageHandle:
        """By name or by id; `snapshot` is a name (user namespace) or an id, and makes the view read-only. `former`:
        addresses of clients known to be dead, whose lock is broken without waiting for their watch to expire.

        ENOENT: no such image or snapshot. ENOSYS: features this library lacks. A read-write open registers a watch.
        """
        if image_id is None:
            if not name:
                raise OSError(errno.ENOENT, "an image has a name")
            image_id = image_id_of(ctx, name)
        elif name is None:
            name = name_by_id(ctx, image_id)
        header = load(ctx, image_id, read_only=read_only)
        snap_id = resolve_snapshot(header, snapshot)
        if header.has(ft.NON_PRIMARY | ft.MIGRATING):
            read_only = True
        handle = cls(ctx, name or "", header, read_only=read_only, snap_id=snap_id)
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

    # --- header and view -------------------------------------------------------------------------------------------

    @property
    def header(self) -> Header:
        """The header as of the last update anybody announced. ESHUTDOWN when fenced."""
        if self._lost is not None:
            raise OSError(self._lost.errno, self._lost.strerror)
        control = self.control
        if control is not None and (control.header_seq != self._seen_seq or self._map_broke()):
            self._follow()
        return self._header

    def _map_broke(self) -> bool:
        """Whether the data path has set flags in the header that nobody here has read yet."""
        broke = not self._map_reported and self.data.object_map.broken
        self._map_reported |= broke
        return broke

    @property
    def stale(self) -> bool:
        """Whether the next look at `header` has to read it."""
        return self.control is not None and self.control.header_seq != self._seen_seq

    def watch_updates(self, callback: Callable[[], None]) -> int:
        """`callback()` runs on a control thread after somebody, this client included, changed the header. Returns a
        number for `unwatch_updates`. EINVAL: a read-only handle has no watch."""
        if self.control is None:
            raise OSError(errno.EINVAL, "the image is open read-only: nothing tells of changes")
        with self._state:
            self._next_watcher += 1
            self._update_watchers[self._next_watcher] = callback
            return self._next_watcher

    def unwatch_updates(self, number: int) -> None:
        """ENOENT."""
        with self._state:
            if self._update_watchers.pop(number, None) is None:
                raise OSError(errno.ENOENT, f"no update watcher {number}")

    def refresh(self) -> Header:
        """Reads the header again and publishes what follows from it."""
        with self._state:
            if self.closed:
                return self._header
            seq = self.control.header_seq if self.control is not None else 0
            header = load(self.ctx, self.id, read_only=self.read_only)
            self._publish(header)
            self._seen_seq = seq
            return header

    def _follow(self) -> None:
        """After an update was announced, our own too: reads the header again if it changed since it was read."""
        with self._state:
            seq = self.control.header_seq if self.control is not None else 0
            if not self.closed and self.ctx.read(self.oid, [Version()])[0] != self._header.version:
                self.refresh()
            else:
                self._seen_seq = seq

    def _publish(self, header: Header | None = None) -> None:
        """Publishes the view that follows from the header, a new one if given. Under `_state`. The data path comes
        first: who reads a new size off the header may use it."""
        header = header or self._header
        self.data.publish(self._view(header))
        self._header = header

    def _view(self, header: Header) -> ViewSpec:
        snap_id = self.snap_id
        if snap_id != NOSNAP and snap_id not in header.snaps:
            # Removed under us: nothing is left to read.
            return ViewSpec(0, header.layout, self.objects, snap_id, read_only=True)
        overlap = header.overlap_at(snap_id)
        size = header.size_at(snap_id)
        limit = size if self._size_limit is None else min(size, self._size_limit)
        return ViewSpec(
            size=limit,
            layout=header.layout,
            data=self.objects,
            snap_id=snap_id,
            snapc=header.snapc,
            read_only=self.read_only or snap_id != NOSNAP,
            need_lock=self._locks(header) and not self._owner,
            parent=self._parent_view(header) if overlap else None,
            overlap=min(overlap, limit),
        )

    def limit_size(self, size: int | None) -> None:
        """HEAD ends at `size` whatever the header says: while it shrinks."""
        with self._state:
            self._size_limit = size
            self._publish()

    def view_at(self, snap_id: int) -> ViewSpec:
        """A view for reading this image at a snapshot or HEAD without moving the handle."""
        with self._state:
            header = self._header
            overlap = header.overlap_at(snap_id)
            return ViewSpec(
                size=header.size_at(snap_id),
                layout=header.layout,
                data=self.objects,
                snap_id=snap_id,
                snapc=header.snapc,
                read_only=True,
                parent=self._parent_view(header) if overlap else None,
                overlap=overlap,
            )

    def _parent_view(self, header: Header) -> ViewSpec:
        if self._parents is not None and self._parents[0] == header.parent:
            return self._parents[1]
        opened: list[DataObjects] = []
        try:
            view = parent_view(self.store, header.parent, opened, {(self.ctx.pool_id, self.ctx.namespace, self.id)})
        except BaseException:
            for objects in opened:
                objects.close()
            raise
        if self._parents is not None:
            self._retired += self._parents[2]
        self._parents = (header.parent, view, opened)
        return view

    def set_snapshot(self, snapshot: str | int | None) -> None:
        """Moves the handle to a snapshot (name or id) or back to HEAD (None)."""
        header = self.header
        with self._one_op, self._state:
            self.snap_id = resolve_snapshot(header, snapshot)
            self._publish()

    @contextmanager
    def at_head(self) -> Iterator[None]:
        """For operations that librbd allows while the handle is set to a snapshot: HEAD meanwhile."""
        with self._one_op:
            snap_id, self.snap_id = self.snap_id, NOSNAP
            try:
                yield
            finally:
                with self._state:
                    self.snap_id = snap_id
                    self._publish()

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

    @property
    def native(self) -> NativeImage:
        """The image in the C engine, for exports and statistics. EOPNOTSUPP: the store has no C data plane."""
        if not isinstance(self.data, NativeImage):
            raise OSError(errno.EOPNOTSUPP, "this store has no C data plane")
        return self.data

    # --- exclusive lock --------------------------------------------------------------------------------------------

    @property
    def uses_lock(self) -> bool:
        return self._locks(self._header)

    def _locks(self, header: Header) -> bool:
        return not self.read_only and self.snap_id == NOSNAP and header.has(ft.EXCLUSIVE_LOCK)

    @property
    def is_lock_owner(self) -> bool:
        return self._owner and self.control is not None and self.control.is_owner

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
            level = logging.INFO if ends else logging.WARNING
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

    # --- the lock moves with a VM: control/handoff.py

    def offer(self, key: str, seconds: float = OFFER_SECONDS) -> bool:
        """The VM `key` ("*": unknown) leaves: parks all requests, drains, flushes and offers the lock to its next host.
        True: it may take it from now on, and requests stay parked until `take_back` or `close`. False: the lock is
        another client's; requests go on. OSError (ETIMEDOUT: requests in flight do not end; what flushing said):
        everything is as before. EINVAL: the image has no exclusive lock.
        """
        control = self._moving_control()
        self._park()
        try:
            offered = control.offer(key, seconds)
        except BaseException:
            self._unpark()
            raise
        if not offered:
            self._unpark()
        return offered

    def take_back(self) -> None:
        """The VM stays after all: owns the lock again and lets requests go on. ESTALE: a stranger owned the lock
        meanwhile; requests stay parked."""
        self._moving_control().take_back()
        self._unpark()

    def stand_by(self, key: str, *, park: bool) -> None:
        """The VM `key` will come here from the host that owns the lock now. `park`: requests wait for `take_over`; else
        reads are answered. EBUSY: this handle owns the lock or is after it. EINVAL: no exclusive lock."""
        control = self._moving_control()
        if park:
            self._park()
        try:
            control.stand_by(key)
        except BaseException:
            self._unpark()
            raise
        if not park:
            self._unpark()

    def stand_down(self) -> None:
        """After `stand_by`, or an `offer` that was taken: the VM is not here. Requests go on, and the lock is taken as
        ever, when a write needs it."""
        self._moving_control().stand_down()
        self._unpark()
        with self._state:
            if not self.closed:
                self._publish()  # a write that waited has asked once, in vain: the new view makes it ask again

    def lock_offered_to(self, key: str) -> bool:
        """Whether the lock's owner offers it to the VM `key` just now."""
        return self._moving_control().offered_to(key)

    def take_over(self, force: bool = False) -> None:
        """The VM runs here from now on: takes the lock and lets requests go on. ESTALE: a stranger owned it after
        `stand_by`; requests stay parked, until `force`."""
        self._moving_control().take_over(force)
        self._unpark()

    @property
    def handing_over(self) -> bool:
        """The lock is offered and not taken yet, as far as is known: closing the handle would take the offer away."""
        return self.control is not None and self.control.offered

    def _moving_control(self) -> HeaderControl:
        if self._lost is not None:
            raise OSError(self._lost.errno, self._lost.strerror)
        if self.control is None or not self.uses_lock:
            raise OSError(errno.EINVAL, "the image has no exclusive lock to hand over")
        return self.control

    def _park(self) -> None:
        with self._state:
            if self._parked:
                return
            self._parked = True
        try:
            self.data.block(EVERYTHING, DRAIN_SECONDS)
        except BaseException:
            self._parked = False
            raise

    def _unpark(self) -> None:
        with self._state:
            parked, self._parked = self._parked, False
        if parked:
            self.data.unblock(EVERYTHING)

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

    def post_acquire(self) -> None:
        with self._state:
            if self.closed:
                raise OSError(errno.ESHUTDOWN, "the image is closed")
            header = load(self.ctx, self.id, read_only=False)
            native = self.objects.native
            if native is not None:
                native.own(OWN_SECONDS)
            try:
                if header.has(ft.OBJECT_MAP):
                    self._take_map(header)
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

    def _take_map(self, header: Header) -> None:
        try:
            object_map.lock(self.ctx, self.id)
            self._load_map(header)
        except OSError as failure:
            self.map_failed(failure)

    def _give_map(self) -> None:
        """Before the lock goes. OSError: the map stays ours, and kept."""
        self._keep_map(NO_MAP)
        if self._header.has(ft.OBJECT_MAP):
            try:
                object_map.unlock(self.ctx, self.id)
            except OSError:
                self._load_map(self._header)
                raise

    def take_map(self) -> None:
        """After the map was made, resized or rewritten: load it again."""
        if self._owner:
            self._load_map(self._header)

    def _load_map(self, header: Header) -> None:
        """Under a gate closed for writes."""
        self._keep_map(NO_MAP)
        if self.keeps_map or not header.has(ft.OBJECT_MAP):
            return
        native = self.objects.native
        if native is None or isinstance(self.data, PlainData):
            self._keep_map(HeadMap(self.ctx, self.id, self.map_failed))
        elif not load(self.ctx, self.id, read_only=False).flags_at(NOSNAP) & ft.FLAG_OBJECT_MAP_INVALID:
            # C believes what the map says of absence, so the flags are read after whatever led here.
            states = bytes(object_map.load(self.ctx, self.id))
            diff, lock = header.has(ft.FAST_DIFF), object_map.ASSERT_LOCKED
            keeper = NativeMap(native.handle, self.ctx.pool_id, self.id, states, fast_diff=diff, assert_locked=lock)
            self._keep_map(keeper)

    def _keep_map(self, keeper: ObjectMapKeeper) -> None:
        before, self.data.object_map = self.data.object_map, keeper
        before.stop()
        self._map_reported = False

    @property
    def keeps_map(self) -> bool:
        """The store records existence by itself."""
        return self.objects.native is not None and self.objects.native.keeps_object_map

    def forget_map(self) -> None:
        """The image is about to go, and its map with it."""
        self._keep_map(NO_MAP)
        self.gone = True

    def drop_map(self) -> None:
        """The object-map feature goes: its lock too."""
        self._keep_map(NO_MAP)
        object_map.unlock(self.ctx, self.id)

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

    def map_failed(self, failure: OSError) -> None:
        """The HEAD map can no longer be believed; a rebuild makes it true again."""
        log.warning("image %s: its object map is marked invalid: %s", self.id, failure)
        both = ft.FLAG_OBJECT_MAP_INVALID | ft.FLAG_FAST_DIFF_INVALID
        object_map.invalidate(self.ctx, self.oid, [NOSNAP], both)

    # --- end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Releases the lock, ends the watch and the data path. Idempotent. EBUSY while an export serves the image."""
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

    def _close_objects(self) -> None:
        with self._state:
            rest = [self.objects, *self._retired, *(self._parents[2] if self._parents is not None else [])]
            self._parents, self._retired = None, []
        for objects in rest:
            objects.close()

    def __enter__(self) -> ImageHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def announce(ctx: ObjectContext, oid: str) -> None:
    """HeaderUpdate to every watcher of a header."""
    ctx.notify(oid, wire.header_update(), NOTIFY_MS)


def make_data(view: ViewSpec, acquire: Callable[[], None], request: Callable[[], None]) -> DataPath:
    """The C engine where every store of the chain has one, else plain Python. `acquire` waits for the lock, `request`
    does not."""
    if all(level.data.native is not None for level in view.chain()):
        return NativeImage(view, request)
    return PlainData(view, acquire)


def flush_objects(objects: DataObjects) -> None:
    """Everything written so far is durable afterwards, past the gate."""
    if objects.native is not None:
        check(lib.rbdn_store_flush(objects.native.handle), "flush")


def resolve_snapshot(header: Header, snapshot: str | int | None) -> int:
    """The id of a snapshot given by name (user namespace) or id. ENOENT."""
    if snapshot is None:
        return NOSNAP
    if isinstance(snapshot, int):
        if snapshot not in header.snaps:
            raise OSError(errno.ENOENT, f"no snapshot {snapshot}")
        return snapshot
    snap = header.snap_named(snapshot, fh.NAMESPACE_USER)
    if snap is None:
        raise OSError(errno.ENOENT, f"no snapshot named {snapshot!r}")
    return snap.id


def name_by_id(ctx: ObjectContext, image_id: str) -> str:
    """Its name in the directory or in the trash; empty when it is in neither."""
    with ignoring(errno.ENOENT):
        return cls.name_of(ctx, image_id)
    with ignoring(errno.ENOENT):
        return cls.trash_get(ctx, image_id).name
    return ""


def parent_view(
    store: Any, spec: ParentImageSpec, opened: list[DataObjects], seen: set[tuple[int, str, str]]
) -> ViewSpec:
    """The view of a parent snapshot, its own parents included. Appends the data objects taken to `opened`.

    ELOOP: an image is its own ancestor, or the chain is deeper than MAX_PARENTS.
    """
    key = (spec.pool_id, spec.pool_namespace, spec.image_id)
    if key in seen or len(seen) > MAX_PARENTS:
        raise OSError(errno.ELOOP, f"the chain of parents through image {spec.image_id} does not end")
    seen.add(key)
    ctx = store.open(spec.pool_id, spec.pool_namespace)
    header = load(ctx, spec.image_id, read_only=True)
    if spec.snap_id not in header.snaps:
        raise OSError(errno.ENOENT, f"parent image {spec.image_id} has no snapshot {spec.snap_id}")
    data_ctx = ctx if header.data_pool_id == -1 else store.open(header.data_pool_id, spec.pool_namespace)
    objects = DataObjects(data_ctx, header.object_prefix, header.order).open()
    opened.append(objects)
    overlap = header.overlap_at(spec.snap_id)
    return ViewSpec(
        size=header.size_at(spec.snap_id),
        layout=header.layout,
        data=objects,
        snap_id=spec.snap_id,
        read_only=True,
        parent=parent_view(store, header.parent, opened, seen) if overlap else None,
        overlap=overlap,
    )

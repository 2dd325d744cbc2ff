"""What an open image knows and shows: its header, the views that follow from it, its parents.

The lowest of the layers that make an `ImageHandle`: view <- map <- lock <- moves <- handle.
"""

from __future__ import annotations

import errno
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from librbd_py.control.driver import HeaderControl
from librbd_py.format import features as ft
from librbd_py.format import header as fh
from librbd_py.format.header import ParentImageSpec
from librbd_py.store.api import NOSNAP, ObjectContext, Version

from . import cls
from .datapath import NativeImage
from .header import MAX_PARENTS, Header, header_oid, load
from .objects import ignoring
from .plain import PlainData
from .settings import DEFAULTS, Lookup, Settings, read
from .view import DataObjects, DataPath, Fetch, ViewSpec

if TYPE_CHECKING:
    from .migration.imported import Imported


class HandleView(ABC):
    """`_one_op` serialises maintenance operations; `_state` guards the header and the view: see handle.py."""

    def __init__(
        self, ctx: ObjectContext, name: str, header: Header, *, read_only: bool, snap_id: int, alone: bool = False
    ) -> None:
        self.ctx = ctx
        self.store = ctx.store
        self.name = name
        self.id = header.id
        self.oid = header_oid(header.id)
        self.read_only = read_only
        self.alone = alone  # what it migrates from or to is left out of account
        self.snap_id = snap_id
        self.closed = False
        self.gone = False  # removed by this handle
        self.next_touch: dict[str, float] = {}  # access, modify: time.monotonic() of the next look at the times
        self.control: HeaderControl | None = None
        self._header = header
        self._state = threading.RLock()
        self._one_op = threading.RLock()
        self._owner = False
        self._map_reported = False
        self._seen_seq = 0
        self._size_limit: int | None = None
        self._update_watchers: dict[int, Callable[[], None]] = {}
        self._next_watcher = 0
        self._lost: OSError | None = None
        self.settings = DEFAULTS
        self._lookup: Lookup | None = None
        self._configured = False
        self._parents: dict[ParentImageSpec, tuple[ViewSpec, list[DataObjects]]] = {}
        self.bringing: set[int] = set()  # objects that come over just now; guarded by brought
        self.brought = threading.Condition()
        self.imported: Imported | None = None  # what it imports from, once that was needed
        self._retired: list[DataObjects] = []  # parents of older views; requests in flight may still read them
        pool = header.data_pool_id
        self.data_ctx = ctx if pool in (-1, ctx.pool_id) else ctx.store.open(pool, ctx.namespace)
        self.objects = DataObjects(self.data_ctx, header.object_prefix, header.order).open()
        try:
            self.data: DataPath = make_data(self._view(header), self.acquire_lock, self.request_lock)
        except BaseException:
            self._close_objects()
            raise

    @abstractmethod
    def acquire_lock(self) -> None:
        """Waits until this handle owns the exclusive lock."""

    @abstractmethod
    def request_lock(self) -> None:
        """Starts acquiring and returns at once."""

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
            header = self._load()
            if self._configured:
                self._apply(read(self.ctx, self.oid, self._lookup))
            self._publish(header)
            self._seen_seq = seq
            return header

    def configure(self, lookup: Lookup | None) -> None:
        """From now on the options of image, pool and (`lookup`) program or cluster hold, also as they change."""
        found = read(self.ctx, self.oid, lookup)
        with self._state:
            self._lookup, self._configured = lookup, True
            if self._apply(found):
                self._publish()

    def _apply(self, settings: Settings) -> bool:
        """Whether the view changes by it."""
        before, self.settings = self.settings, settings
        if settings.limits != before.limits and isinstance(self.data, NativeImage):
            self.data.limits(settings.limits)
        if (settings.atime_interval, settings.mtime_interval) != (before.atime_interval, before.mtime_interval):
            self.next_touch.clear()
        return settings.discard_granularity != before.discard_granularity

    def _load(self) -> Header:
        return load(self.ctx, self.id, read_only=self.read_only, alone=self.alone)

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
        as_it_was = self._source_view(header, snap_id)
        if as_it_was is not None:
            return as_it_was
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
            parent=self._parent_view(header, snap_id) if overlap else None,
            overlap=min(overlap, limit),
            fetch=self._fetcher(header, snap_id) if overlap else None,
            discard_granularity=self.settings.discard_granularity,
        )

    def _fetcher(self, header: Header, snap_id: int) -> Fetch | None:
        """An object of an image that migrates comes over with what the source's snapshots hold of it."""
        if not header.migrates or header.migration is None:
            return None
        writes = snap_id == NOSNAP and not self.read_only and (self._owner or not self._locks(header))
        if not writes or not (header.imports or header.migration.snap_seqs):
            return self._reader(header, snap_id)
        from .migration.objects import Bringer

        return Bringer(self, header)

    def _reader(self, header: Header, snap_id: int) -> Fetch | None:
        """For those who only read an import."""
        if not header.imports:
            return None
        from .migration.objects import Reader

        return Reader(self, header, snap_id)

    def _complete_objects(self, header: Header) -> None:
        """What a former owner of an image that migrates left half done."""
        from .migration.objects import complete

        complete(self, header)

    def limit_size(self, size: int | None) -> None:
        """HEAD ends at `size` whatever the header says: while it shrinks."""
        with self._state:
            self._size_limit = size
            self._publish()

    def view_at(self, snap_id: int, *, whole: bool = True, header: Header | None = None) -> ViewSpec:
        """A view for reading this image at a snapshot or HEAD without moving the handle. Not `whole`: of a snapshot
        that migrates, what has come over, above its source. `header`: an older one."""
        with self._state:
            header = header or self._header
            as_it_was = self._source_view(header, snap_id) if whole else None
            if as_it_was is not None:
                return as_it_was
            overlap = header.overlap_at(snap_id)
            return ViewSpec(
                size=header.size_at(snap_id),
                layout=header.layout,
                data=self.objects,
                snap_id=snap_id,
                snapc=header.snapc,
                read_only=True,
                parent=self._parent_view(header, snap_id) if overlap else None,
                overlap=overlap,
                fetch=self._reader(header, snap_id) if overlap else None,
            )

    def _source_view(self, header: Header, snap_id: int) -> ViewSpec | None:
        """A snapshot that migrates is read where it comes from: here an object may just be coming over, version by
        version."""
        spec = header.parent_at(snap_id)
        if not header.migrates or header.imports or spec.snap_id == NOSNAP:
            return None
        return self._parent_view(header, snap_id)

    def _parent_view(self, header: Header, snap_id: int) -> ViewSpec | None:
        if header.imports:
            return None
        spec = header.parent_at(snap_id)
        if spec in self._parents:
            return self._parents[spec][0]
        opened: list[DataObjects] = []
        try:
            view = parent_view(self.store, spec, opened, {(self.ctx.pool_id, self.ctx.namespace, self.id)})
        except BaseException:
            for objects in opened:
                objects.close()
            raise
        for old in [old for old in self._parents if old.image_id != spec.image_id]:
            self._retired += self._parents.pop(old)[1]
        self._parents[spec] = (view, opened)
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
                    if not self.closed:  # by another thread, which an operation asked for by a peer does not stop
                        self._publish()

    @property
    def native(self) -> NativeImage:
        """The image in the C engine, for exports and statistics. EOPNOTSUPP: the store has no C data plane."""
        if not isinstance(self.data, NativeImage):
            raise OSError(errno.EOPNOTSUPP, "this store has no C data plane")
        return self.data

    @property
    def uses_lock(self) -> bool:
        return self._locks(self._header)

    def _locks(self, header: Header) -> bool:
        return not self.read_only and self.snap_id == NOSNAP and header.has(ft.EXCLUSIVE_LOCK)

    def _close_objects(self) -> None:
        with self._state:
            rest = [self.objects, *self._retired]
            for _, opened in self._parents.values():
                rest += opened
            self._parents, self._retired = {}, []
        for objects in rest:
            objects.close()
        if self.imported is not None:
            self.imported.close()


def make_data(view: ViewSpec, acquire: Callable[[], None], request: Callable[[], None]) -> DataPath:
    """The C engine where every store of the chain has one, else plain Python. `acquire` waits for the lock, `request`
    does not."""
    if all(level.data.native is not None for level in view.chain()):
        return NativeImage(view, request)
    return PlainData(view, acquire)


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
    """The view of a parent snapshot, or of a migration's source at HEAD, its own parents included.
    Appends the data objects taken to `opened`.

    ELOOP: an image is its own ancestor, or the chain is deeper than MAX_PARENTS.
    """
    key = (spec.pool_id, spec.pool_namespace, spec.image_id)
    if key in seen or len(seen) > MAX_PARENTS:
        raise OSError(errno.ELOOP, f"the chain of parents through image {spec.image_id} does not end")
    seen.add(key)
    ctx = store.open(spec.pool_id, spec.pool_namespace)
    header = load(ctx, spec.image_id, read_only=True)
    if spec.snap_id != NOSNAP and spec.snap_id not in header.snaps:
        raise OSError(errno.ENOENT, f"parent image {spec.image_id} has no snapshot {spec.snap_id}")
    data_ctx = ctx if header.data_pool_id == -1 else store.open(header.data_pool_id, spec.pool_namespace)
    objects = DataObjects(data_ctx, header.object_prefix, header.order).open()
    opened.append(objects)
    overlap = header.overlap_at(spec.snap_id)
    if overlap and header.imports:
        raise OSError(errno.EBUSY, f"parent image {spec.image_id} is being imported")
    return ViewSpec(
        size=header.size_at(spec.snap_id),
        layout=header.layout,
        data=objects,
        snap_id=spec.snap_id,
        read_only=True,
        parent=parent_view(store, header.parent_at(spec.snap_id), opened, seen) if overlap else None,
        overlap=overlap,
    )

"""The object map of an open image: who keeps it, and what happens when it cannot be kept."""

from __future__ import annotations

from librbd_py.format import features as ft
from librbd_py.format.logs import logger
from librbd_py.store.api import NOSNAP

from . import object_map
from .datapath import NativeMap
from .handle_view import HandleView
from .header import Header
from .plain import HeadMap, PlainData
from .view import NO_MAP, ObjectMapKeeper

log = logger("librbd_py.image")


class HandleMap(HandleView):
    """With the exclusive lock comes the HEAD object map: it is locked and kept as long as this handle owns the lock."""

    def _take_map(self) -> Header:
        """After the image's lock. Returns the header as it is then. The map's lock comes before the header: what the
        header says of the map is believed, and an owner that is gone may have changed both until then."""
        likely = self._header.has(ft.OBJECT_MAP)
        failure = self._lock_map() if likely else None
        header = self._load()
        if header.has(ft.OBJECT_MAP) != likely:  # changed while nobody here looked
            failure = self._lock_map() if not likely else None
            header = self._load()
        if header.has(ft.OBJECT_MAP):
            try:
                if failure is not None:
                    raise failure
                self._load_map(header, header.flags)
            except OSError as problem:
                self.map_failed(problem)
                header = self._load()
        return header

    def _lock_map(self) -> OSError | None:
        try:
            object_map.lock(self.ctx, self.id)
        except OSError as failure:
            return failure
        return None

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

    def _load_map(self, header: Header, flags: int | None = None) -> None:
        """Under a gate closed for writes. `flags`: HEAD's, where they were read after whatever led here."""
        self._keep_map(NO_MAP)
        if self.keeps_map or not header.has(ft.OBJECT_MAP):
            return
        native = self.objects.native
        if native is None or isinstance(self.data, PlainData):
            self._keep_map(HeadMap(self.ctx, self.id, self.map_failed))
            return
        if flags is None:
            flags = self._load().flags
        if not flags & ft.FLAG_OBJECT_MAP_INVALID:
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

    def map_failed(self, failure: OSError) -> None:
        """The HEAD map can no longer be believed; a rebuild makes it true again."""
        log.warning("image %s: its object map is marked invalid: %s", self.id, failure)
        both = ft.FLAG_OBJECT_MAP_INVALID | ft.FLAG_FAST_DIFF_INVALID
        object_map.invalidate(self.ctx, self.oid, [NOSNAP], both)

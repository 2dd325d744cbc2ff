"""The `native` format of a source spec: an image of any of our stores, in this cluster or another."""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import quote

from librbd_py import store as stores
from librbd_py.format import header as fh
from librbd_py.source import DATA, ZERO, Extent, Source, SourceSnapshot
from librbd_py.source.checks import before, readable, size_at, within
from librbd_py.source.spec_values import optional_text, text
from librbd_py.store.api import NOSNAP, ObjectContext, Store

from .diff import changes
from .handle import ImageHandle

KEPT_OPEN = 4  # points of the image that nobody reads just now
SECRET = "config://"


def open_any(spec: Mapping[str, Any], store: Store, *, import_only: bool = True) -> Source:
    """A source of any format, `native` included: `store` is where pools of a native spec without a "store" are, and
    whose monitors keep what `config://` keys stand for. What `open_source` and `NativeSource.of` raise."""
    from librbd_py.source import open_source  # here: it brings every format and stream

    return open_source(
        spec,
        native=lambda each: NativeSource.of(each, store, import_only=import_only),
        secret=lambda key: _config_key(store, key),
    )


def _config_key(store: Store, path: str) -> str:
    """EOPNOTSUPP: a store without monitors. ENOENT."""
    command: Callable[[Mapping[str, Any]], bytes] | None = getattr(store, "mon_command", None)
    if command is None:
        raise OSError(errno.EOPNOTSUPP, f"this store keeps no config keys: {SECRET}{path}")
    answer = command({"prefix": "config-key get", "key": path})
    return answer.decode("utf-8", "surrogateescape")


class NativeSource:
    """Snapshots are the image's user snapshots up to the point that was opened; HEAD is that point. The image is opened
    without a watch: a HEAD that somebody writes to is read as it is at each moment, so import-only wants a snapshot."""

    def __init__(self, ctx: ObjectContext, handle: ImageHandle, owned: Store | None = None) -> None:
        """`handle` is open read-only at the point; it and `owned` are closed with the source."""
        header, point = handle.header, handle.snap_id
        self._ctx = ctx
        self._owned = owned
        self._size = header.size_at(point)
        rows = [snap for snap in header.snaps.values() if snap.namespace == fh.USER and snap.id <= point]
        self._snapshots = tuple(SourceSnapshot(snap.name, snap.size) for snap in rows)
        self._ids = [snap.id for snap in rows]
        self._point = point
        self._image_id = handle.id
        self._guard = threading.Lock()
        self._idle: OrderedDict[int, list[ImageHandle]] = OrderedDict({point: [handle]})
        self._users = 0
        self._closed = False

    @classmethod
    def of(cls, spec: Mapping[str, Any], store: Store, *, import_only: bool = True) -> NativeSource:
        """Ceph's keys: pool_name or pool_id, pool_namespace, image_name, image_id, snap_name or snap_id, and
        cluster_name with client_name for another cluster; ours: store, the URL of any store.

        EINVAL: missing or contradicting keys; `import_only` without a snapshot. ENOENT: no such store, pool, image or
        snapshot."""
        pool = _pool_of(spec)
        snapshot = _snapshot_of(spec)
        if import_only and snapshot is None:
            raise OSError(errno.EINVAL, "an image is imported from a snapshot: the source spec names none")
        name = text(spec, "image_name", "the image")
        image_id = optional_text(spec, "image_id", "the image")
        namespace = optional_text(spec, "pool_namespace", "the image") if spec.get("pool_namespace") else ""
        owned = _other_store(spec)
        try:
            ctx = (owned or store).open(pool, namespace or "")
            handle = ImageHandle.open(ctx, name, image_id=image_id, snapshot=snapshot, read_only=True)
            try:
                return cls(ctx, handle, owned)
            except BaseException:
                handle.close()
                raise
        except BaseException:
            if owned is not None:
                owned.close()
            raise

    @property
    def size(self) -> int:
        return self._size

    @property
    def snapshots(self) -> Sequence[SourceSnapshot]:
        return self._snapshots

    def read(self, offset: int, length: int, snapshot: int | None = None) -> bytes:
        readable(offset, length, size_at(self._size, self._snapshots, snapshot))
        if not length:
            return b""
        with self._at(snapshot) as handle:
            return handle.data.read(offset, length)

    def extents(
        self, offset: int, length: int, snapshot: int | None = None, since: int | None = None
    ) -> Iterator[Extent]:
        """What the image's own diff says: by object maps where they can be believed, exactly otherwise."""
        within(offset, length, size_at(self._size, self._snapshots, snapshot))
        before(since, snapshot, len(self._snapshots))
        return self._extents(offset, length, snapshot, 0 if since is None else self._ids[since])

    def _extents(self, offset: int, length: int, snapshot: int | None, start: int) -> Iterator[Extent]:
        with self._at(snapshot) as handle:
            for at, size, data in changes(handle, offset, length, start) if length else ():
                yield Extent(at, size, DATA if data else ZERO)

    @contextmanager
    def _at(self, snapshot: int | None) -> Iterator[ImageHandle]:
        """A handle at that point that nobody else uses meanwhile."""
        point = self._point if snapshot is None else self._ids[snapshot]
        with self._guard:
            if self._closed:
                raise OSError(errno.EBADF, "the source is closed")
            idle = self._idle.get(point)
            handle = idle.pop() if idle else None
            if idle == []:
                del self._idle[point]
            self._users += 1
        try:
            if handle is None:
                at = None if point == NOSNAP else point
                handle = ImageHandle.open(self._ctx, image_id=self._image_id, snapshot=at, read_only=True)
            yield handle
        finally:
            self._give_back(point, handle)

    def _give_back(self, point: int, handle: ImageHandle | None) -> None:
        with self._guard:
            self._users -= 1
            if handle is not None:
                self._idle.setdefault(point, []).append(handle)
                self._idle.move_to_end(point)
        self._trim()

    def close(self) -> None:
        """Whoever still reads closes the rest when it is done: an iterator may be forgotten half way."""
        with self._guard:
            self._closed = True
        self._trim()

    def _trim(self) -> None:
        """Closes what is open without need: all, once the source is closed."""
        owned: Store | None = None
        extra: list[ImageHandle] = []
        with self._guard:
            while sum(map(len, self._idle.values())) > (0 if self._closed else KEPT_OPEN):
                oldest, handles = next(iter(self._idle.items()))
                extra.append(handles.pop(0))
                if not handles:
                    del self._idle[oldest]
            if self._closed and not self._users:
                owned, self._owned = self._owned, None
        for handle in extra:
            with suppress(OSError):
                handle.close()
        if owned is not None:
            owned.close()


def _number(value: object, what: str) -> int:
    try:
        if isinstance(value, str | int) and not isinstance(value, bool) and 0 <= (found := int(value)) < NOSNAP:
            return found
    except ValueError:
        pass
    raise OSError(errno.EINVAL, f"'{what}' of the source spec is no number of one")


def _pool_of(spec: Mapping[str, Any]) -> str | int:
    name, number = optional_text(spec, "pool_name", "the image"), spec.get("pool_id")
    if name is not None and number is not None:
        raise OSError(errno.EINVAL, "the source spec has both 'pool_name' and 'pool_id'")
    if name is None and number is None:
        raise OSError(errno.EINVAL, "the source spec has neither 'pool_name' nor 'pool_id'")
    return name if name is not None else _number(number, "pool_id")


def _snapshot_of(spec: Mapping[str, Any]) -> str | int | None:
    name, number = optional_text(spec, "snap_name", "the image"), spec.get("snap_id")
    if name is not None and number is not None:
        raise OSError(errno.EINVAL, "the source spec has both 'snap_name' and 'snap_id'")
    return name if number is None else _number(number, "snap_id")


def _other_store(spec: Mapping[str, Any]) -> Store | None:
    """A connection of its own to the store that the spec names; None: it names none."""
    url = optional_text(spec, "store", "the image")
    cluster = optional_text(spec, "cluster_name", "the image")
    client = optional_text(spec, "client_name", "the image")
    if url is not None and (cluster or client):
        raise OSError(errno.EINVAL, "the source spec has both 'store' and a cluster's name")
    if url is not None:
        return stores.connect(url, create=False)
    if cluster is None:
        if client is not None:
            raise OSError(errno.EINVAL, "the source spec has 'client_name' without 'cluster_name'")
        return None
    if "/" in cluster:
        raise OSError(errno.EINVAL, f"{cluster!r} is no name of a cluster")
    user = f"?user={quote((client or 'client.admin').removeprefix('client.'))}"
    return stores.connect(f"ceph:/etc/ceph/{cluster}.conf{user}")

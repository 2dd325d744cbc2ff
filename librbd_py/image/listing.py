"""What listings show of many images at once: one read per image, without opening any."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from librbd_py.format import features as ft
from librbd_py.format import header as fh
from librbd_py.format import lock as fl
from librbd_py.format.encoding import Decoder
from librbd_py.format.values import dataclass, field
from librbd_py.store.api import GetXattrs, ObjectContext, OmapGetVals
from librbd_py.store.rados import RadosStore

from .feature_names import SUPPORTED
from .handle import ImageHandle, name_by_id
from .header import header_oid

LOCK = fl.XATTR_PREFIX + fl.RBD_LOCK_NAME
AT_ONCE = 16  # reads under way, where a read waits for a network


@dataclass(frozen=True)
class SnapshotRow:
    id: int
    name: str
    size: int  # bytes
    protected: bool
    namespace_type: int
    timestamp: float  # seconds since 1970


@dataclass
class ImageRows:
    """`rows`: the image, then its user snapshots by id. `error`: why there are none."""

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: OSError | None = None


def overview(ctx: ObjectContext, images: Iterable[tuple[str, str]]) -> Iterator[ImageRows]:
    """Of (name, id) in their order. An image without a header has ENOENT, a damaged one EIO or EINVAL."""
    parents = _Parents(ctx)
    if not isinstance(ctx.store, RadosStore):
        yield from (_image(ctx, name, image_id, parents) for name, image_id in images)
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(lambda row: _image(ctx, row[0], row[1], parents), images)


def _image(ctx: ObjectContext, name: str, image_id: str, parents: _Parents) -> ImageRows:
    found = ImageRows(name)
    try:
        found.rows = _rows(ctx, name, image_id, parents)
    except OSError as failure:
        found.error = failure
    return found


def _rows(ctx: ObjectContext, name: str, image_id: str, parents: _Parents) -> list[dict[str, Any]]:
    oid = header_oid(image_id)
    (values, more), xattrs = ctx.read(oid, [OmapGetVals(), GetXattrs()])
    while more:
        page, more = ctx.read(oid, [OmapGetVals(start_after=max(values))])[0]
        values |= page
    if b"size" not in values or b"features" not in values:
        raise OSError(errno.EINVAL, f"image {image_id}: the header is not whole")
    features = Decoder(values[b"features"]).u64()
    if features & ft.INCOMPATIBLE & ~SUPPORTED:
        raise OSError(errno.ENOSYS, f"image {image_id} uses features this library lacks")
    parent = fh.Parent.decode(values[b"parent"]) if b"parent" in values else None
    spec = parent.spec if parent is not None and parent.exists else None
    overlap = parent.head_overlap if parent is not None else None
    lock = fl.LockState.decode(xattrs[LOCK]) if LOCK in xattrs else fl.LockState()
    kind = "" if not lock.lockers else "excl" if lock.type == fl.LOCK_EXCLUSIVE else "shr"
    shown = parents.shown(spec) if spec is not None and overlap else None
    head = {"image": name, "id": image_id, "size": Decoder(values[b"size"]).u64(), "parent": shown, "lock": kind}
    rows = [head]
    for key, value in values.items():
        if not key.startswith(b"snapshot_"):
            continue
        snap = fh.Snap.decode(value)
        if snap.namespace.type == fh.NAMESPACE_USER:
            rows.append(
                {
                    "image": name,
                    "id": image_id,
                    "snapshot": snap.name,
                    "snapshot_id": snap.id,
                    "size": snap.image_size,
                    "parent": parents.shown(spec) if spec is not None and snap.parent_overlap else None,
                    "protected": snap.protection_status != fh.PROTECTION_UNPROTECTED,
                }
            )
    return rows


class _Parents:
    """Names of parents, each looked up once."""

    def __init__(self, ctx: ObjectContext) -> None:
        self._store = ctx.store
        self._pools: dict[int, str] = {}
        self._known: dict[tuple[int, str, str, int], dict[str, Any] | None] = {}

    def shown(self, spec: fh.ParentImageSpec) -> dict[str, Any] | None:
        key = (spec.pool_id, spec.pool_namespace, spec.image_id, spec.snap_id)
        if key not in self._known:
            self._known[key] = self._look(spec)
        return self._known[key]

    def _look(self, spec: fh.ParentImageSpec) -> dict[str, Any] | None:
        ctx = self._store.open(spec.pool_id, spec.pool_namespace)
        if spec.pool_id not in self._pools:
            self._pools = {row.pool_id: row.name for row in self._store.pools()}
        key = b"snapshot_%016x" % spec.snap_id
        values, _ = ctx.read(header_oid(spec.image_id), [OmapGetVals(prefix=key)])[0]
        if key not in values:
            raise OSError(errno.ENOENT, f"parent image {spec.image_id} has no snapshot {spec.snap_id}")
        return {
            "pool_name": self._pools.get(spec.pool_id, ""),
            "pool_namespace": spec.pool_namespace,
            "image_name": name_by_id(ctx, spec.image_id),
            "snap_name": fh.Snap.decode(values[key]).name,
        }


def snapshots_of(handle: ImageHandle) -> list[SnapshotRow]:
    """All snapshots of an open image, by id."""
    return [
        SnapshotRow(
            snap.id,
            snap.name,
            snap.size,
            snap.is_user and snap.protection != fh.PROTECTION_UNPROTECTED,
            snap.namespace.type,
            snap.timestamp,
        )
        for snap in handle.header.snaps.values()
    ]

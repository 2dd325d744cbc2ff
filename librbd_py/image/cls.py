"""The class methods of `rbd` that images use, as typed functions: one place that knows their arguments.

Every function may raise what the store raises: ENOENT for a missing object, the method's own errno otherwise.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

from librbd_py.format import header as fh
from librbd_py.format import names
from librbd_py.format.encoding import Decoder, Encoder, Time
from librbd_py.format.trash import SOURCE_REMOVING, TrashImageSpec
from librbd_py.format.values import dataclass
from librbd_py.store.api import NOSNAP, Create, Exec, ObjectContext, OmapGetByKeys, OmapGetVals, SnapContext, Version

T = TypeVar("T")
PAGE = 1024  # rows per listing call


@dataclass(frozen=True)
class Snapshot:
    id: int
    name: str
    size: int  # bytes
    namespace: fh.SnapshotNamespace
    protection: int
    flags: int
    timestamp: float  # seconds since 1970
    children: int  # format v2 clones
    parent_overlap: int | None  # bytes; None: this snapshot needs no parent

    @property
    def is_user(self) -> bool:
        return self.namespace.type == fh.NAMESPACE_USER

    @property
    def is_trash(self) -> bool:
        return self.namespace.type == fh.NAMESPACE_TRASH


@dataclass(frozen=True)
class BaseHeader:
    order: int
    size: int
    features: int
    incompatible: int
    object_prefix: str
    flags: int
    snapc: SnapContext
    data_pool_id: int
    parent: fh.ParentImageSpec
    parent_overlap: int | None
    version: int  # of the header object
    snaps: dict[int, Snapshot]  # as many as one read gives


# --- arguments --------------------------------------------------------------------------------------------------


def u8(value: int) -> bytes:
    return Encoder().u8(value).done()


def u64(value: int) -> bytes:
    return Encoder().u64(value).done()


def text(value: str) -> bytes:
    return Encoder().string(value).done()


def encoded(value: fh.ParentImageSpec | fh.ChildImageSpec) -> bytes:
    out = Encoder()
    value.encode(out)
    return out.done()


def parent_key(parent: fh.ParentImageSpec) -> bytes:
    """How the class methods on `rbd_children` name a snapshot."""
    return Encoder().s64(parent.pool_id).string(parent.image_id).u64(parent.snap_id).done()


def namespace(value: fh.SnapshotNamespace) -> bytes:
    out = Encoder()
    fh.encode_namespace(out, value)
    return out.done()


def seconds(value: Time) -> float:
    return value.seconds + value.nanoseconds / 1e9


def moment(value: float) -> Time:
    return Time.from_ns(int(value * 1e9))


def call(method: str, *parts: bytes) -> Exec:
    return Exec("rbd", method, b"".join(parts))


def _ask(ctx: ObjectContext, oid: str, method: str, *parts: bytes) -> Decoder:
    return Decoder(ctx.exec(oid, "rbd", method, b"".join(parts)))


# --- header -----------------------------------------------------------------------------------------------------


def create_header(
    ctx: ObjectContext,
    oid: str,
    size: int,
    order: int,
    features: int,
    prefix: str,
    data_pool: int | None,
    stripe: tuple[int, int] | None,
) -> None:
    parts = [u64(size), u8(order), u64(features), text(prefix)]
    if data_pool is not None:
        parts.append(Encoder().s64(data_pool).done())
    ctx.write(oid, [Create(exclusive=True), call("create", *parts)])
    if stripe is not None:
        # Of its own: a method does not see what an earlier one of the same op wrote.
        ctx.write(oid, [call("set_stripe_unit_count", u64(stripe[0]), u64(stripe[1]))])


def read_header(ctx: ObjectContext, oid: str, read_only: bool) -> BaseHeader:
    head = u64(NOSNAP)
    version, (records, _), *answers = ctx.read(
        oid,
        [
            Version(),
            # the records themselves: four calls of methods for each are what makes many snapshots slow
            OmapGetVals(prefix=fh.SNAP_PREFIX),
            call("get_size", head),
            call("get_features", head, u8(read_only)),
            call("get_object_prefix"),
            call("get_flags", head),
            call("get_snapcontext"),
            call("get_data_pool"),
            call("parent_get"),
            call("parent_overlap_get", head),
        ],
    )
    size, features, prefix, flags, snapc, pool, parent, overlap = map(Decoder, answers)
    order = size.u8()
    existing = fh.SnapContextReply.decode(snapc.rest())
    return BaseHeader(
        order=order,
        size=size.u64(),
        features=features.u64(),
        incompatible=features.u64(),
        object_prefix=prefix.string(),
        flags=flags.u64(),
        snapc=SnapContext(existing.seq, existing.ids),
        data_pool_id=pool.s64(),
        parent=fh.ParentImageSpec.decode(parent),
        parent_overlap=overlap.optional(Decoder.u64),
        version=version,
        snaps={snap.id: snap for snap in map(_snapshot, records.values())},
    )


def read_snapshots(ctx: ObjectContext, oid: str, ids: Sequence[int]) -> list[Snapshot]:
    """ENOENT when one of them has gone meanwhile. EIO: damaged."""
    snaps = []
    for start in range(0, len(ids), PAGE):
        keys = [fh.snap_key(snap_id) for snap_id in ids[start : start + PAGE]]
        found = ctx.read(oid, [OmapGetByKeys(keys)])[0]
        for snap_id, key in zip(ids[start:], keys, strict=False):
            if key not in found:
                raise OSError(errno.ENOENT, f"{oid} has no snapshot {snap_id}")
            snaps.append(_snapshot(found[key]))
    return snaps


@lru_cache(maxsize=8192)
def _snapshot(record: bytes) -> Snapshot:
    snap = fh.Snap.decode(record)
    return Snapshot(
        id=snap.id,
        name=snap.name,
        size=snap.image_size,
        namespace=snap.namespace,
        protection=snap.protection_status,
        flags=snap.flags,
        timestamp=seconds(snap.timestamp),
        children=snap.child_count,
        parent_overlap=snap.parent_overlap,
    )


def op_features(ctx: ObjectContext, oid: str) -> int:
    return _ask(ctx, oid, "op_features_get").u64()


def stripe(ctx: ObjectContext, oid: str) -> tuple[int, int]:
    answer = _ask(ctx, oid, "get_stripe_unit_count")
    return answer.u64(), answer.u64()


def timestamp(ctx: ObjectContext, oid: str, which: str) -> float:
    """`which`: create, access or modify. Seconds since 1970."""
    return seconds(_ask(ctx, oid, f"get_{which}_timestamp").time())


def snap_limit(ctx: ObjectContext, oid: str) -> int:
    return _ask(ctx, oid, "snapshot_get_limit").u64()


def group_of(ctx: ObjectContext, oid: str) -> tuple[int, str]:
    """Pool and id of the image's group; (-1, "") when it is in none."""
    answer = _ask(ctx, oid, "image_group_get")
    with answer.struct(1, "group spec"):
        return answer.s64(), answer.string()


def protection(ctx: ObjectContext, oid: str, snap_id: int) -> int:
    return _ask(ctx, oid, "get_protection_status", u64(snap_id)).u8()


def children(ctx: ObjectContext, oid: str, snap_id: int) -> list[fh.ChildImageSpec]:
    """Format v2 clones of a snapshot."""
    try:
        found = fh.decode_children(ctx.exec(oid, "rbd", "children_list", u64(snap_id)))
    except OSError as failure:
        if failure.errno == errno.ENOENT:
            return []
        raise
    return sorted(found, key=lambda child: child.sort_key)


def v1_children(ctx: ObjectContext, parent: fh.ParentImageSpec) -> list[str]:
    """Ids of the format v1 clones of a snapshot in this pool."""
    try:
        return _ask(ctx, names.CHILDREN, "get_children", parent_key(parent)).list(Decoder.string, 4)
    except OSError as failure:
        if failure.errno == errno.ENOENT:
            return []
        raise


def metadata(ctx: ObjectContext, oid: str) -> dict[str, bytes]:
    rows: dict[str, bytes] = {}
    start = ""
    while True:
        page = _ask(ctx, oid, "metadata_list", text(start), u64(PAGE)).map(Decoder.string, Decoder.blob, 8)
        rows.update(page)
        if len(page) < PAGE:
            return rows
        start = max(page)


def metadata_value(ctx: ObjectContext, oid: str, key: str) -> bytes:
    return _ask(ctx, oid, "metadata_get", text(key)).blob()


def encode_metadata(values: dict[str, bytes]) -> bytes:
    return Encoder().map(dict(sorted(values.items())), Encoder.string, Encoder.blob).done()


def migration(ctx: ObjectContext, oid: str) -> fh.MigrationSpec:
    """EINVAL: the image does not migrate."""
    return fh.MigrationSpec.decode(ctx.exec(oid, "rbd", "migration_get"))


# --- directories ------------------------------------------------------------------------------------------------


def get_id(ctx: ObjectContext, oid: str) -> str:
    return _ask(ctx, oid, "get_id").string()


def id_in_directory(ctx: ObjectContext, name: str) -> str:
    """ENOENT."""
    return _ask(ctx, names.DIRECTORY, "dir_get_id", text(name)).string()


def name_of(ctx: ObjectContext, image_id: str) -> str:
    """ENOENT: not in the directory (perhaps in the trash)."""
    return _ask(ctx, names.DIRECTORY, "dir_get_name", text(image_id)).string()


def pages(ctx: ObjectContext, oid: str, method: str, read: Callable[[Decoder], dict[str, T]]) -> dict[str, T]:
    """All rows of a listing method; none when there is no object."""
    rows: dict[str, T] = {}
    start = ""
    while True:
        try:
            page = read(_ask(ctx, oid, method, text(start), u64(PAGE)))
        except OSError as failure:
            if failure.errno == errno.ENOENT:
                return rows
            raise
        rows.update(page)
        if len(page) < PAGE:
            return rows
        start = max(page)


def list_images(ctx: ObjectContext) -> dict[str, str]:
    """name -> id, sorted by name."""
    return pages(ctx, names.DIRECTORY, "dir_list", lambda answer: answer.map(Decoder.string, Decoder.string, 8))


def all_images(ctx: ObjectContext) -> list[tuple[str, str]]:
    """(name, id): those of the directory by name, then those whose removal began and has not ended."""
    named = list_images(ctx)
    ids = set(named.values())
    rest = trash_list(ctx).items()
    return [
        *named.items(),
        *((spec.name, key) for key, spec in rest if spec.source == SOURCE_REMOVING and key not in ids),
    ]


def list_namespaces(ctx: ObjectContext) -> list[str]:
    def page(answer: Decoder) -> dict[str, None]:
        return dict.fromkeys(answer.list(Decoder.string, 4))

    return [*pages(ctx, names.NAMESPACES, "namespace_list", page)]


def trash_get(ctx: ObjectContext, image_id: str) -> TrashImageSpec:
    """ENOENT."""
    return TrashImageSpec.decode_from(_ask(ctx, names.TRASH, "trash_get", text(image_id)))


def trash_list(ctx: ObjectContext) -> dict[str, TrashImageSpec]:
    """By image id."""

    def page(answer: Decoder) -> dict[str, TrashImageSpec]:
        return answer.map(Decoder.string, TrashImageSpec.decode_from, 10)

    return pages(ctx, names.TRASH, "trash_list", page)


def trash_add(ctx: ObjectContext, image_id: str, spec: TrashImageSpec) -> None:
    ctx.write(names.TRASH, [call("trash_add", text(image_id), spec.encode())])


def trash_state(ctx: ObjectContext, image_id: str, state: int, expected: int) -> None:
    """ESTALE: it is in neither state."""
    ctx.exec(names.TRASH, "rbd", "trash_state_set", text(image_id) + u8(state) + u8(expected))


def trash_forget(ctx: ObjectContext, image_id: str) -> None:
    ctx.exec(names.TRASH, "rbd", "trash_remove", text(image_id))

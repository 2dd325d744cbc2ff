"""Values in the omap of `rbd_header.<id>` and in the replies of class `rbd` about one image."""

from __future__ import annotations

import itertools
import struct
from functools import lru_cache

from librbd_py.format.values import dataclass, field

from .encoding import NEVER, DecodeError, Decoder, Encoder, Time

NOSNAP = 0xFFFFFFFFFFFFFFFE

PROTECTION_UNPROTECTED = 0
PROTECTION_UNPROTECTING = 1
PROTECTION_PROTECTED = 2

NAMESPACE_USER = 0
NAMESPACE_GROUP = 1
NAMESPACE_TRASH = 2
NAMESPACE_MIRROR = 3

MIRROR_PRIMARY = 0
MIRROR_PRIMARY_DEMOTED = 1
MIRROR_NON_PRIMARY = 2
MIRROR_NON_PRIMARY_DEMOTED = 3


# --- keys


def snap_key(snap_id: int) -> bytes:
    return b"snapshot_%016x" % snap_id


def snap_children_key(snap_id: int) -> bytes:
    return b"snap_children_%016x" % snap_id


SNAP_PREFIX = b"snapshot_"
SNAP_CHILDREN_PREFIX = b"snap_children_"
METADATA_PREFIX = b"metadata_"
COPY_KEY = b"rbdpy_copy"  # ours: of an image that is still being copied from another store
COPYING, COPIED = b"copying ", b"whole"  # its values: half of an image, by whom; all of it, without its name so far


# --- snapshot namespaces


@dataclass(frozen=True)
class UserNamespace:
    type = NAMESPACE_USER


@dataclass(frozen=True)
class GroupNamespace:
    group_pool: int
    group_id: str
    group_snapshot_id: str
    type = NAMESPACE_GROUP


@dataclass(frozen=True)
class TrashNamespace:
    original_name: str
    original_type: int = NAMESPACE_USER
    type = NAMESPACE_TRASH


@dataclass(frozen=True)
class MirrorNamespace:
    state: int
    complete: bool
    peers: tuple[str, ...]  # sorted
    primary_mirror_uuid: str = ""
    primary_snap_id: int = NOSNAP  # the primary's own: clean_since_snap_id
    last_copied_object: int = 0
    snap_seqs: dict[int, int] = field(default_factory=dict, hash=False)
    type = NAMESPACE_MIRROR


@dataclass(frozen=True)
class UnknownNamespace:
    """Of a newer Ceph. Kept as it came; snapshot_add refuses it."""

    type: int
    body: bytes = b""


SnapshotNamespace = UserNamespace | GroupNamespace | TrashNamespace | MirrorNamespace | UnknownNamespace
USER = UserNamespace()


def encode_namespace(out: Encoder, value: SnapshotNamespace) -> None:
    with out.struct(1, 1):
        out.u32(value.type)
        match value:
            case UserNamespace():
                pass
            case GroupNamespace():
                out.s64(value.group_pool).string(value.group_id).string(value.group_snapshot_id)
            case TrashNamespace():
                out.string(value.original_name).u32(value.original_type)
            case MirrorNamespace():
                out.u8(value.state).bool(value.complete).list(value.peers, Encoder.string)
                out.string(value.primary_mirror_uuid).u64(value.primary_snap_id).u64(value.last_copied_object)
                out.map(dict(sorted(value.snap_seqs.items())), Encoder.u64, Encoder.u64)
            case UnknownNamespace():
                out.raw(value.body)


def decode_namespace(source: Decoder) -> SnapshotNamespace:
    with source.struct(1, "snapshot namespace"):
        kind = source.u32()
        if kind == NAMESPACE_USER:
            return USER
        if kind == NAMESPACE_GROUP:
            pool, group = source.s64(), source.string()
            return GroupNamespace(pool, group, source.string())
        if kind == NAMESPACE_TRASH:
            name = source.string()
            return TrashNamespace(name, source.u32())
        if kind == NAMESPACE_MIRROR:
            state, complete = source.u8(), source.bool()
            peers = tuple(sorted(set(source.list(Decoder.string, 4))))
            uuid, primary, copied = source.string(), source.u64(), source.u64()
            seqs = source.map(Decoder.u64, Decoder.u64, 16)
            return MirrorNamespace(state, complete, peers, uuid, primary, copied, seqs)
        return UnknownNamespace(kind, source.rest())


# --- parents and children


@dataclass(frozen=True)
class ParentImageSpec:
    """Which snapshot of which image is the parent. A null spec: no parent."""

    pool_id: int = -1
    pool_namespace: str = ""
    image_id: str = ""
    snap_id: int = NOSNAP

    @property
    def exists(self) -> bool:
        return self.pool_id >= 0 and bool(self.image_id) and self.snap_id != NOSNAP

    def encode(self, out: Encoder) -> None:
        with out.struct(1, 1):
            out.s64(self.pool_id).string(self.pool_namespace).string(self.image_id).u64(self.snap_id)

    @classmethod
    def decode(cls, source: Decoder) -> ParentImageSpec:
        with source.struct(1, "parent image spec"):
            pool, namespace = source.s64(), source.string()
            image = source.string()
            return cls(pool, namespace, image, source.u64())


@dataclass(frozen=True)
class Parent:
    """The omap value `parent`. No overlap while the record exists: HEAD is flattened, some snapshot is not."""

    spec: ParentImageSpec = ParentImageSpec()
    head_overlap: int | None = None  # bytes

    @property
    def exists(self) -> bool:
        return self.spec.exists

    def encode(self) -> bytes:
        out = Encoder()
        with out.struct(2, 2):
            spec = self.spec
            out.s64(spec.pool_id).string(spec.pool_namespace).string(spec.image_id).u64(spec.snap_id)
            out.optional(self.head_overlap, Encoder.u64)
        return out.done()

    @classmethod
    def decode_from(cls, source: Decoder) -> Parent:
        with source.struct(2, "parent") as version:
            pool = source.s64()
            namespace = source.string() if version >= 2 else ""
            image, snap = source.string(), source.u64()
            overlap = source.optional(Decoder.u64) if version >= 2 else source.u64()
            return cls(ParentImageSpec(pool, namespace, image, snap), overlap)

    @classmethod
    def decode(cls, data: bytes) -> Parent:
        return cls.decode_from(Decoder(data))


@dataclass(frozen=True)
class ChildImageSpec:
    """A clone (v2) recorded in the header of its parent."""

    pool_id: int
    image_id: str
    pool_namespace: str = ""

    @property
    def sort_key(self) -> tuple[int, str, str]:
        return (self.pool_id, self.pool_namespace, self.image_id)

    def encode(self, out: Encoder) -> None:
        with out.struct(2, 1):
            out.s64(self.pool_id).string(self.image_id).string(self.pool_namespace)

    @classmethod
    def decode(cls, source: Decoder) -> ChildImageSpec:
        with source.struct(2, "child image spec") as version:
            pool, image = source.s64(), source.string()
            return cls(pool, image, source.string() if version >= 2 else "")


def encode_children(children: frozenset[ChildImageSpec]) -> bytes:
    """The value of `snap_children_<id>` and the reply of children_list."""
    held = sorted(children, key=lambda child: child.sort_key)
    return Encoder().list(held, lambda out, child: child.encode(out)).done()


def decode_children(data: bytes) -> frozenset[ChildImageSpec]:
    return frozenset(Decoder(data).list(ChildImageSpec.decode, 18))


# --- snapshots


@dataclass(frozen=True)
class Snap:
    """The omap value `snapshot_<%016x id>` (cls_rbd_snap), written as Nautilus and later do."""

    id: int
    name: str
    image_size: int  # bytes
    protection_status: int = PROTECTION_UNPROTECTED
    flags: int = 0
    namespace: SnapshotNamespace = USER
    timestamp: Time = NEVER
    child_count: int = 0
    parent_overlap: int | None = None  # bytes

    def encode(self) -> bytes:
        out = Encoder()
        with out.struct(8, 8):
            out.u64(self.id).string(self.name).u64(self.image_size).u8(self.protection_status).u64(self.flags)
            encode_namespace(out, self.namespace)
            out.time(self.timestamp).u32(self.child_count).optional(self.parent_overlap, Encoder.u64)
        return out.done()

    @classmethod
    def decode(cls, data: bytes) -> Snap:
        """Also the layouts before Nautilus, which carry features and a whole parent record."""
        return _decode_snap(bytes(data))


@lru_cache(maxsize=8192)
def _decode_snap(data: bytes) -> Snap:
    """Remembered: an image with many snapshots reads the same ones with every refresh."""
    source = Decoder(data)
    compat = source.peek_u8(1)
    with source.struct(8, "snapshot") as version:
        snap_id, name, size = source.u64(), source.string(), source.u64()
        overlap: int | None = None
        if compat < 8:
            source.u64()
            if version >= 2:
                parent = Parent.decode_from(source)
                overlap = parent.head_overlap if parent.exists else None
        protection = source.u8() if version >= 3 else PROTECTION_UNPROTECTED
        flags = source.u64() if version >= 4 else 0
        namespace = decode_namespace(source) if version >= 5 else USER
        timestamp = source.time() if version >= 6 else NEVER
        children = source.u32() if version >= 7 else 0
        if version >= 8:
            overlap = source.optional(Decoder.u64)
        return Snap(snap_id, name, size, protection, flags, namespace, timestamp, children, overlap)


@dataclass(frozen=True)
class SnapshotInfo:
    """The reply of snapshot_get."""

    id: int
    namespace: SnapshotNamespace
    name: str
    image_size: int  # bytes
    timestamp: Time = NEVER
    child_count: int = 0

    def encode(self) -> bytes:
        out = Encoder()
        with out.struct(1, 1):
            out.u64(self.id)
            encode_namespace(out, self.namespace)
            out.string(self.name).u64(self.image_size).time(self.timestamp).u32(self.child_count)
        return out.done()

    @classmethod
    def decode(cls, data: bytes) -> SnapshotInfo:
        source = Decoder(data)
        with source.struct(1, "snapshot info"):
            snap_id, namespace = source.u64(), decode_namespace(source)
            name, size = source.string(), source.u64()
            timestamp = source.time()
            return cls(snap_id, namespace, name, size, timestamp, source.u32())


@dataclass(frozen=True)
class SnapContextReply:
    """The reply of get_snapcontext: highest id ever given, and those that exist, newest first."""

    seq: int
    ids: tuple[int, ...]

    def encode(self) -> bytes:
        return struct.pack(f"<QI{len(self.ids)}Q", self.seq, len(self.ids), *self.ids)

    @classmethod
    def decode(cls, data: bytes) -> SnapContextReply:
        source = Decoder(data)
        seq, count = source.u64(), source.u32()
        rest = source.rest()
        if len(rest) < 8 * count:
            raise DecodeError("snap context: the list is longer than the data")
        ids = struct.unpack_from(f"<{count}Q", rest)
        if any(b >= a for a, b in itertools.pairwise(ids)) or (ids and ids[0] > seq):
            raise DecodeError("snap context is not newest first")
        return cls(seq, ids)


# --- migration

MIGRATION_SOURCE = 1
MIGRATION_DESTINATION = 2
MIGRATION_ERROR, MIGRATION_PREPARING, MIGRATION_PREPARED = 0, 1, 2
MIGRATION_EXECUTING, MIGRATION_EXECUTED, MIGRATION_ABORTING = 3, 4, 5
MIGRATION_KEY = b"migration"  # of the header's omap


@dataclass(frozen=True)
class MigrationSpec:
    """The omap value `migration` of both images of a migration."""

    header_type: int
    pool_id: int
    pool_namespace: str
    image_name: str
    image_id: str
    snap_seqs: dict[int, int] = field(default_factory=dict, hash=False)
    overlap: int = 0  # bytes
    flatten: bool = False
    mirroring: bool = False
    state: int = MIGRATION_ERROR
    state_description: str = ""
    mirror_image_mode: int = 0
    source_spec: str = ""

    def encode(self) -> bytes:
        out = Encoder()
        with out.struct(3, 3 if self.source_spec else 1):
            out.u8(self.header_type).s64(self.pool_id).string(self.pool_namespace).string(self.image_name)
            out.string(self.image_id).map(dict(sorted(self.snap_seqs.items())), Encoder.u64, Encoder.u64)
            out.u64(self.overlap).bool(self.flatten).bool(self.mirroring).u8(self.state)
            out.string(self.state_description).u8(self.mirror_image_mode).string(self.source_spec)
        return out.done()

    @classmethod
    def decode(cls, data: bytes) -> MigrationSpec:
        source = Decoder(data)
        with source.struct(3, "migration spec") as version:
            kind, pool = source.u8(), source.s64()
            namespace, name, image = source.string(), source.string(), source.string()
            seqs = source.map(Decoder.u64, Decoder.u64, 16)
            overlap, flatten, mirroring = source.u64(), source.bool(), source.bool()
            state, text = source.u8(), source.string()
            mode = source.u8() if version >= 2 else 0
            spec = source.string() if version >= 3 else ""
            return cls(kind, pool, namespace, name, image, seqs, overlap, flatten, mirroring, state, text, mode, spec)

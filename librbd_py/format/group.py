"""Records of consistency groups: `rbd_group_directory`, `rbd_group_header.<id>`, `rbd_group_ref` in image headers."""

from __future__ import annotations

from librbd_py.format.values import dataclass

from .encoding import Decoder, Encoder

GROUP_DIRECTORY = "rbd_group_directory"
GROUP_HEADER_PREFIX = "rbd_group_header."
GROUP_REF_KEY = b"rbd_group_ref"
IMAGE_PREFIX = b"image_"
SNAPSHOT_PREFIX = b"snapshot_"

LINK_ATTACHED = 0
LINK_INCOMPLETE = 1
SNAPSHOT_INCOMPLETE = 0
SNAPSHOT_COMPLETE = 1


@dataclass(frozen=True)
class GroupSpec:
    """Which group. The null spec: none."""

    pool_id: int = -1
    group_id: str = ""

    @property
    def exists(self) -> bool:
        return self.pool_id != -1 and bool(self.group_id)

    def encode(self) -> bytes:
        out = Encoder()
        with out.struct(1, 1):
            out.s64(self.pool_id).string(self.group_id)
        return out.done()

    @classmethod
    def decode(cls, data: bytes) -> GroupSpec:
        source = Decoder(data)
        with source.struct(1, "group spec"):
            pool = source.s64()
            return cls(pool, source.string())


@dataclass(frozen=True)
class GroupImageSpec:
    image_id: str = ""
    pool_id: int = -1

    @property
    def key(self) -> bytes:
        """Omap key of the member; the null spec gives the prefix, from which listing starts."""
        if self.pool_id == -1 and not self.image_id:
            return IMAGE_PREFIX
        return (
            IMAGE_PREFIX + b"%016x_" % (self.pool_id & (1 << 64) - 1) + self.image_id.encode("utf-8", "surrogateescape")
        )

    def encode_to(self, out: Encoder) -> None:
        with out.struct(1, 1):
            out.string(self.image_id).s64(self.pool_id)

    @classmethod
    def decode_from(cls, source: Decoder) -> GroupImageSpec:
        with source.struct(1, "group image spec"):
            image = source.string()
            return cls(image, source.s64())


@dataclass(frozen=True)
class GroupImageStatus:
    spec: GroupImageSpec
    state: int = LINK_INCOMPLETE

    def encode_to(self, out: Encoder) -> None:
        with out.struct(1, 1):
            self.spec.encode_to(out)
            out.u8(self.state)

    @classmethod
    def decode_from(cls, source: Decoder) -> GroupImageStatus:
        with source.struct(1, "group image status"):
            spec = GroupImageSpec.decode_from(source)
            return cls(spec, source.u8())


@dataclass(frozen=True)
class ImageSnapshotSpec:
    pool_id: int
    image_id: str
    snap_id: int

    def encode_to(self, out: Encoder) -> None:
        with out.struct(1, 1):
            out.s64(self.pool_id).string(self.image_id).u64(self.snap_id)

    @classmethod
    def decode_from(cls, source: Decoder) -> ImageSnapshotSpec:
        with source.struct(1, "image snapshot spec"):
            pool, image = source.s64(), source.string()
            return cls(pool, image, source.u64())


@dataclass(frozen=True)
class GroupSnapshot:
    id: str
    name: str = ""
    state: int = SNAPSHOT_INCOMPLETE
    snapshots: tuple[ImageSnapshotSpec, ...] = ()

    @property
    def key(self) -> bytes:
        return SNAPSHOT_PREFIX + self.id.encode("utf-8", "surrogateescape")

    def encode_to(self, out: Encoder) -> None:
        with out.struct(1, 1):
            out.string(self.id).string(self.name).u8(self.state)
            out.list(self.snapshots, lambda o, spec: spec.encode_to(o))

    def encode(self) -> bytes:
        out = Encoder()
        self.encode_to(out)
        return out.done()

    @classmethod
    def decode_from(cls, source: Decoder) -> GroupSnapshot:
        with source.struct(1, "group snapshot"):
            snap_id, name, state = source.string(), source.string(), source.u8()
            return cls(snap_id, name, state, tuple(source.list(ImageSnapshotSpec.decode_from, 26)))

    @classmethod
    def decode(cls, data: bytes) -> GroupSnapshot:
        return cls.decode_from(Decoder(data))


def group_snap_name(pool_id: int, group_id: str, group_snapshot_id: str) -> str:
    """Name of an image's snapshot that belongs to a group snapshot. The pool id is in hex."""
    return f".group.{pool_id:x}_{group_id}_{group_snapshot_id}"

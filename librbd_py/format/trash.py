"""Records of `rbd_trash` and of its watch point."""

from __future__ import annotations

from librbd_py.format.values import dataclass

from .encoding import NEVER, DecodeError, Decoder, Encoder, Time

TRASH_OBJECT = "rbd_trash"
KEY_PREFIX = b"id_"

SOURCE_USER = 0
SOURCE_MIRRORING = 1
SOURCE_MIGRATION = 2
SOURCE_REMOVING = 3
SOURCE_USER_PARENT = 4
SOURCE_NAMES = {
    SOURCE_USER: "user",
    SOURCE_MIRRORING: "mirroring",
    SOURCE_MIGRATION: "migration",
    SOURCE_REMOVING: "removing",
    SOURCE_USER_PARENT: "user_parent",
}

STATE_NORMAL = 0
STATE_MOVING = 1
STATE_REMOVING = 2
STATE_RESTORING = 3


def key(image_id: str) -> bytes:
    return KEY_PREFIX + image_id.encode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class TrashImageSpec:
    source: int
    name: str
    deletion_time: Time = NEVER
    deferment_end_time: Time = NEVER
    state: int = STATE_NORMAL

    def encode_to(self, out: Encoder) -> None:
        with out.struct(2, 1):
            out.u8(self.source).string(self.name).time(self.deletion_time).time(self.deferment_end_time)
            out.u8(self.state)

    def encode(self) -> bytes:
        out = Encoder()
        self.encode_to(out)
        return out.done()

    @classmethod
    def decode_from(cls, source: Decoder) -> TrashImageSpec:
        with source.struct(2, "trash image spec") as version:
            kind, name = source.u8(), source.string()
            deleted, deferred = source.time(), source.time()
            return cls(kind, name, deleted, deferred, source.u8() if version >= 2 else STATE_NORMAL)

    @classmethod
    def decode(cls, data: bytes) -> TrashImageSpec:
        return cls.decode_from(Decoder(data))


@dataclass(frozen=True)
class ImageAdded:
    """Notify on rbd_trash."""

    image_id: str
    spec: TrashImageSpec


@dataclass(frozen=True)
class ImageRemoved:
    """Notify on rbd_trash."""

    image_id: str


def encode_notify(message: ImageAdded | ImageRemoved) -> bytes:
    out = Encoder()
    with out.struct(1, 1):
        if isinstance(message, ImageAdded):
            out.u32(0).string(message.image_id)
            message.spec.encode_to(out)
        else:
            out.u32(1).string(message.image_id)
    return out.done()


def decode_notify(data: bytes) -> ImageAdded | ImageRemoved:
    source = Decoder(data)
    with source.struct(1, "trash notify"):
        kind = source.u32()
        if kind == 0:
            image = source.string()
            return ImageAdded(image, TrashImageSpec.decode_from(source))
        if kind == 1:
            return ImageRemoved(source.string())
        raise DecodeError(f"trash notify: unknown kind {kind}")

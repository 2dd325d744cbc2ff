"""The streams of `rbd export`, `export-diff` and `merge-diff`: their records, written and read.

A diff stream is a banner, records, and the byte `e`. In version 1 a record is a tag and its fields; version 2 puts the
length of the fields behind each tag. An export of format 2 is a banner, records about the image, `E`, another banner,
the number of diffs, and a diff of version 2 for every snapshot and for the head.

Reading is bounded: names are at most 4096 bytes, data is handed on in pieces, and a stream that ends early raises
BadStream (EDOM, as librbd's reader does).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator
from typing import Protocol

from librbd_py.format.values import dataclass

DIFF_V1 = b"rbd diff v1\n"
DIFF_V2 = b"rbd diff v2\n"
IMAGE_V2 = b"rbd image v2\n"
DIFFS_V2 = b"rbd image diffs v2\n"

FROM_SNAP, TO_SNAP, SIZE, WRITE, ZERO, END = b"f", b"t", b"s", b"w", b"z", b"e"
PROTECTED = b"p"  # version 2 only
ORDER, FEATURES, STRIPE_UNIT, STRIPE_COUNT, METADATA, IMAGE_END = b"O", b"T", b"U", b"C", b"M", b"E"
_IMAGE_NUMBERS = {ORDER: "order", FEATURES: "features", STRIPE_UNIT: "stripe_unit", STRIPE_COUNT: "stripe_count"}

NAME_LIMIT = 4096  # bytes of a snapshot's name
METADATA_LIMIT = 1 << 24  # bytes of a key or a value, far beyond what an OSD takes
UNKNOWN_LIMIT = 64  # records of unknown kinds in one diff; in version 1, where they have no length, bytes
PIECE = 4 << 20  # bytes of data handed on at once
_U64 = struct.Struct("<Q")
_EXTENT = struct.Struct("<QQ")


class BadStream(OSError):
    """What cannot be a stream of this kind. EDOM: it ends too early; EINVAL: it is something else."""


class BadBanner(BadStream):
    """EINVAL: it begins otherwise. `found`: how."""

    def __init__(self, found: bytes) -> None:
        super().__init__(errno.EINVAL, "invalid or unexpected diff banner")
        self.found = found


class Source(Protocol):
    def read(self, count: int, /) -> bytes | None: ...


class Reader:
    """Exact reads of a file or pipe; `position` counts what was taken."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.position = 0

    def take(self, count: int, what: str) -> bytes:
        """BadStream EDOM: the stream ended."""
        parts: list[bytes] = []
        while count:
            part = self._source.read(count)
            if not part:
                raise BadStream(errno.EDOM, f"failed to decode {what}")
            self.position += len(part)
            parts.append(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def u64(self, what: str) -> int:
        return int(_U64.unpack(self.take(8, what))[0])

    def name(self, limit: int, what: str) -> bytes:
        """A u32 length and as many bytes. BadStream EINVAL beyond `limit`."""
        length = int.from_bytes(self.take(4, what), "little")
        if length > limit:
            raise BadStream(errno.EINVAL, f"failed to decode {what}")
        return self.take(length, what)

    def pieces(self, length: int, what: str) -> Iterator[bytes]:
        while length:
            part = self.take(min(PIECE, length), what)
            length -= len(part)
            yield part

    def skip(self, length: int) -> None:
        for _ in self.pieces(length, "skipped tag data"):
            pass

    def banner(self, expected: bytes) -> None:
        """BadStream."""
        found = self.take(len(expected), "diff banner")
        if found != expected:
            raise BadBanner(found)


# --- writing


def record(tag: bytes, fields: bytes, version: int, data: int = 0) -> bytes:
    """A record of a diff; `data` bytes of content follow it."""
    return tag + (_U64.pack(len(fields) + data) if version == 2 else b"") + fields


def _named(text: bytes) -> bytes:
    return struct.pack("<I", len(text)) + text


def diff_head(version: int, from_snap: str | None, to_snap: str | None, size: int, protected: bool = False) -> bytes:
    """Everything before the extents."""
    out = DIFF_V1 if version == 1 else DIFF_V2
    if from_snap is not None:
        out += record(FROM_SNAP, _named(from_snap.encode()), version)
    if to_snap is not None:
        out += record(TO_SNAP, _named(to_snap.encode()), version)
        if version == 2:
            out += record(PROTECTED, bytes([protected]), version, data=7)  # librbd calls this byte 8 bytes long
    return out + record(SIZE, _U64.pack(size), version)


def extent(offset: int, length: int, is_data: bool, version: int) -> bytes:
    """The head of an extent. Data is followed by `length` bytes."""
    fields = _EXTENT.pack(offset, length)
    return record(WRITE if is_data else ZERO, fields, version, length if is_data else 0)


@dataclass(frozen=True)
class ImageHead:
    """What an export of format 2 says of the image. 0: not said."""

    order: int = 0
    features: int = 0
    stripe_unit: int = 0
    stripe_count: int = 0
    metadata: tuple[tuple[str, bytes], ...] = ()

    def encode(self, diffs: int) -> bytes:
        """With the number of diffs that follow."""
        out = IMAGE_V2
        for tag, name in _IMAGE_NUMBERS.items():
            out += record(tag, _U64.pack(getattr(self, name)), 2)
        for key, value in self.metadata:
            out += record(METADATA, _named(key.encode("utf-8", "surrogateescape")) + _named(value), 2)
        return out + IMAGE_END + DIFFS_V2 + _U64.pack(diffs)


# --- reading


def read_image_head(source: Reader, warn: Callable[[str], None]) -> ImageHead:
    """Up to the banner of the diffs, which it leaves. BadStream. Unknown records are skipped, with a warning."""
    source.banner(IMAGE_V2)
    numbers: dict[str, int] = {}
    metadata: dict[str, bytes] = {}
    while (tag := source.take(1, "tag")) != IMAGE_END:
        length = source.u64("tag length")
        if tag in _IMAGE_NUMBERS:
            if length != 8:
                raise BadStream(errno.EINVAL, "failed to decode image option")
            numbers[_IMAGE_NUMBERS[tag]] = source.u64("image option")
        elif tag == METADATA:
            limit = min(length, METADATA_LIMIT)
            key = source.name(limit, "metadata key").decode("utf-8", "surrogateescape")
            metadata[key] = source.name(limit, "metadata value")
        else:
            warn(f"rbd: invalid tag in image properties zone: {tag.decode('latin-1')}Skip it.")
            source.skip(length)
    return ImageHead(**numbers, metadata=tuple(metadata.items()))


@dataclass(frozen=True)
class Extent:
    offset: int
    length: int
    is_data: bool


@dataclass(frozen=True)
class Named:
    """A snapshot: where the diff begins (`start`) or what it leads to."""

    name: str
    start: bool


@dataclass(frozen=True)
class Resized:
    size: int


@dataclass(frozen=True)
class Protection:
    protected: bool


Record = Extent | Named | Resized | Protection


def read_diff(source: Reader, version: int, warn: Callable[[str], None]) -> Iterator[Record]:
    """The records behind the banner, up to the end. Who gets an Extent of data takes its bytes (`Reader.pieces`) before
    going on. BadStream."""
    source.banner(DIFF_V1 if version == 1 else DIFF_V2)
    unknown = 0
    while (tag := source.take(1, "tag")) != END:
        length = source.u64("tag length") if version == 2 else 0
        if tag in (FROM_SNAP, TO_SNAP):
            what = f"{'start' if tag == FROM_SNAP else 'end'} snap name"
            yield Named(source.name(NAME_LIMIT, what).decode("utf-8", "surrogateescape"), tag == FROM_SNAP)
        elif tag == SIZE:
            yield Resized(source.u64("image size"))
        elif tag in (WRITE, ZERO):
            offset, size = _EXTENT.unpack(source.take(16, "IO length"))
            if offset + size >= 1 << 63:
                raise BadStream(errno.EINVAL, "failed to decode IO length")
            yield Extent(offset, size, tag == WRITE)
        elif tag == PROTECTED and version == 2:
            yield Protection(source.take(1, "snap protection status") != b"\0")
        else:
            warn(f"unrecognized tag byte {tag[0]} in stream; skipping")
            unknown += 1
            if unknown > UNKNOWN_LIMIT:
                raise BadStream(errno.EDOM, "failed to decode tag")
            source.skip(length)

"""What backups look like: manifests, indexes of parts, parts. Bytes <-> values; everything is checked when it is read.

    manifests/SET/NNNNNN-ID.json    a line with the SHA-256 of the rest, then JSON; written last
    data/ID/index-NNNNN-DIGEST      up to 4096 rows of digest (32 bytes) and size (u64) of a part
    data/ID/NNNNNNNN-DIGEST         a part: ranges of the image and their bytes

Integers are little-endian."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import NoReturn
from urllib.parse import quote, unquote

VERSION = 1
MAGIC = b"rbdpart1"
MAX_PART = 64 << 20  # bytes of data
LEAST_PART = 64 << 10
MAX_ROWS = 64 << 10  # ranges in one part
INDEX_ROWS = 4096
MAX_MANIFEST = 16 << 20
MAX_SIZE = 1 << 62
RECORD = "rbdpy_backup_"  # begins the image-meta key that says which backup a snapshot was restored from; then its id
_ROW = struct.Struct("<QQB")
_INDEX_ROW = struct.Struct("<32sQ")
_ID = re.compile(r"[0-9a-f]{24}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MANIFEST = re.compile(r"manifests/((?:[^/]+/)+)(\d{6})-([0-9a-f]{24})\.json")


def damaged(what: str) -> NoReturn:
    """EBADMSG."""
    raise OSError(errno.EBADMSG, f"damaged backup: {what}")


def digest_of(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


# --- manifests


@dataclass(frozen=True)
class Manifest:
    """One backup of one snapshot. `parent`: the backup it is an increment to; empty: it is full. `indexes`: digests."""

    id: str
    set: str
    number: int
    parent: str
    created: float  # seconds since 1970
    image_id: str
    image: str
    snapshot_id: int
    snapshot: str
    snapshot_time: float
    protected: bool
    size: int
    order: int
    stripe_unit: int
    stripe_count: int
    features: int
    part_size: int
    parts: int
    stored: int  # bytes of all parts
    indexes: list[str] = field(repr=False)
    metadata: dict[str, str] = field(repr=False, default_factory=dict)

    @property
    def key(self) -> str:
        return f"{folder_of(self.set)}{self.number:06}-{self.id}.json"

    def index_key(self, number: int) -> str:
        return f"data/{self.id}/index-{number:05}-{self.indexes[number]}"

    def encode(self) -> bytes:
        body = json.dumps({"rbdpy-backup": VERSION, **asdict(self)}, sort_keys=True, indent=1).encode()
        return digest_of(body).encode() + b"\n" + body

    @classmethod
    def decode(cls, data: bytes, key: str) -> Manifest:
        """EBADMSG; EOPNOTSUPP: of a later version."""
        line, _, body = data.partition(b"\n")
        if line.decode("ascii", "replace") != digest_of(body):
            damaged(f"{key} is not as it was written")
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            damaged(f"{key} is no manifest")
        if not isinstance(values, dict):
            damaged(f"{key} is no manifest")
        version = values.pop("rbdpy-backup", None)
        if version != VERSION:
            raise OSError(errno.EOPNOTSUPP, f"{key} is of version {version!r}, known is {VERSION}")
        if set(values) != {each.name for each in fields(cls)}:
            damaged(f"{key} lacks something")
        made = cls(**values)
        if not made._sound() or set_and_id(key) != (made.set, made.id) or made.key != key:
            damaged(f"{key} contradicts itself")
        return made

    def _sound(self) -> bool:
        texts = (self.set, self.image_id, self.image, self.snapshot)
        numbers = (self.number, self.snapshot_id, self.size, self.order, self.stripe_unit, self.stripe_count,
                   self.features, self.part_size, self.parts, self.stored)  # fmt: skip
        return (
            all(isinstance(text, str) and text for text in texts)
            and all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < 1 << 64 for each in numbers)
            and all(isinstance(each, int | float) for each in (self.created, self.snapshot_time))
            and isinstance(self.id, str)
            and bool(_ID.fullmatch(self.id))
            and isinstance(self.parent, str)
            and (not self.parent or bool(_ID.fullmatch(self.parent)))
            and (self.number == 0) == (not self.parent)
            and self.size <= MAX_SIZE
            and isinstance(self.indexes, list)
            and all(isinstance(each, str) and _DIGEST.fullmatch(each) for each in self.indexes)
            and len(self.indexes) == -(-self.parts // INDEX_ROWS)
            and isinstance(self.metadata, dict)
            and all(isinstance(each, str) for pair in self.metadata.items() for each in pair)
        )


def folder_of(name: str) -> str:
    """Where the manifests of a set are; ends with a slash. EINVAL: a name that cannot be."""
    parts = name.split("/")
    if not all(parts) or len(name) > 900 or any(part in (".", "..") for part in parts):
        raise OSError(errno.EINVAL, f"{name!r} cannot be the name of a set of backups")
    return "manifests/" + "".join(quote(part, safe="@+=,~ ") + "/" for part in parts)


def set_and_id(key: str) -> tuple[str, str] | None:
    """Of the key of a manifest; None: it is none."""
    found = _MANIFEST.fullmatch(key)
    return (unquote(found[1][:-1]), found[3]) if found else None


# --- indexes


@dataclass(frozen=True)
class PartRef:
    number: int
    digest: str
    size: int  # bytes of the object

    def key(self, backup: str) -> str:
        return f"data/{backup}/{self.number:08}-{self.digest}"


def encode_index(rows: list[PartRef]) -> bytes:
    return b"".join(_INDEX_ROW.pack(bytes.fromhex(row.digest), row.size) for row in rows)


def decode_index(data: bytes, first: int, count: int) -> list[PartRef]:
    """Of `count` parts from number `first` on. EBADMSG."""
    if len(data) != count * _INDEX_ROW.size:
        damaged("an index has another length")
    rows = [PartRef(first + n, digest.hex(), size) for n, (digest, size) in enumerate(_INDEX_ROW.iter_unpack(data))]
    if any(row.size > MAX_PART + len(MAGIC) + 4 + MAX_ROWS * _ROW.size for row in rows):
        damaged("an index names a part that is too large")
    return rows


INDEX_BYTES = INDEX_ROWS * _INDEX_ROW.size


# --- parts


class Part:
    """Collects ranges until it is full."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, bool]] = []  # offset, length, whether there is data
        self.data: list[bytes] = []
        self.bytes = 0

    def add(self, offset: int, length: int, data: bytes | None) -> None:
        """Without data: zeros."""
        if self.rows:
            before, size, kind = self.rows[-1]
            if before + size == offset and kind == (data is not None):
                self.rows[-1] = (before, size + length, kind)
                offset = -1
        if offset >= 0:
            self.rows.append((offset, length, data is not None))
        if data is not None:
            self.data.append(data)
            self.bytes += length

    def encode(self) -> bytes:
        head = MAGIC + struct.pack("<I", len(self.rows)) + b"".join(_ROW.pack(*row) for row in self.rows)
        return b"".join([head, *self.data])


def decode_part(data: bytes, size: int) -> Iterator[tuple[int, int, memoryview | None]]:
    """(offset, length, data; None: zeros) within an image of `size` bytes, ascending. EBADMSG, before the first."""
    at = len(MAGIC) + 4
    if data[: len(MAGIC)] != MAGIC or len(data) < at:
        damaged("a part is none")
    count = int.from_bytes(data[len(MAGIC) : at], "little")
    if count > MAX_ROWS or at + count * _ROW.size > len(data):
        damaged("a part has more ranges than it can have")
    rows = [_ROW.unpack_from(data, at + number * _ROW.size) for number in range(count)]
    at += count * _ROW.size
    end, left = 0, len(data) - at
    for offset, length, kind in rows:
        if offset < end or not length or offset + length > size or kind > 1 or (kind and length > left):
            damaged("a range of a part is not within the image")
        end = offset + length
        left -= length if kind else 0
    if left:
        damaged("a part has bytes that belong nowhere")
    view = memoryview(data)
    for offset, length, kind in rows:
        yield offset, length, view[at : at + length] if kind else None
        at += length if kind else 0

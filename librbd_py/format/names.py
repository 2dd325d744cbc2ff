"""Names of RADOS objects, and what users may call pools, namespaces, images and snapshots."""

from __future__ import annotations

import os
import re

from librbd_py.format.values import dataclass

DIRECTORY = "rbd_directory"
CHILDREN = "rbd_children"
INFO = "rbd_info"
NAMESPACES = "rbd_namespace"
TRASH = "rbd_trash"
INFO_DATA = b"overwrite validated"  # content of rbd_info in a validated pool

HEADER_PREFIX = "rbd_header."
ID_PREFIX = "rbd_id."
DATA_PREFIX = "rbd_data."
OBJECT_MAP_PREFIX = "rbd_object_map."

NOSNAP = 0xFFFFFFFFFFFFFFFE
MAX_NAME = 4096  # bytes of a user's name; object names end at 2048 anyway
MAX_ID = 64


def check_id(image_id: str) -> str:
    """ValueError unless ASCII letters and digits. Returns it."""
    if re.fullmatch(r"[0-9A-Za-z]+", image_id, re.ASCII) is None or len(image_id) > MAX_ID:
        raise ValueError(f"{image_id!r} is not an image id")
    return image_id


def make_id(gid: int) -> str:
    """A new image (or group) id: the client's global id and 32 random bits, in hex, at most 14 characters."""
    return f"{gid:x}{int.from_bytes(os.urandom(4)):x}"[-14:]


def header(image_id: str) -> str:
    return HEADER_PREFIX + image_id


def id_object(image_name: str) -> str:
    return ID_PREFIX + image_name


def old_header(image_name: str) -> str:
    """Header of an image of format 1, which we only detect."""
    return image_name + ".rbd"


def data_prefix(image_id: str, meta_pool: int | None = None) -> str:
    """Object prefix of the data; `meta_pool` when the image has a separate data pool."""
    return f"{DATA_PREFIX}{image_id}" if meta_pool is None else f"{DATA_PREFIX}{meta_pool}.{image_id}"


def data_object(prefix: str, number: int) -> str:
    return f"{prefix}.{number:016x}"


def parse_data_object(oid: str) -> tuple[str, int] | None:
    """(object prefix, object number), or None when `oid` does not name a data object of a v2 image."""
    match = re.fullmatch(r"(rbd_data\.(?:[0-9]{1,19}\.)?[0-9A-Za-z]{1,64})\.([0-9a-f]{16})", oid, re.ASCII)
    return (match[1], int(match[2], 16)) if match is not None else None


def object_map(image_id: str, snap_id: int = NOSNAP) -> str:
    return f"{OBJECT_MAP_PREFIX}{image_id}" if snap_id == NOSNAP else f"{OBJECT_MAP_PREFIX}{image_id}.{snap_id:016x}"


def parse_object_map(oid: str) -> tuple[str, int] | None:
    """(image id, snap id or NOSNAP), or None."""
    match = re.fullmatch(r"rbd_object_map\.([0-9A-Za-z]{1,64})(?:\.([0-9a-f]{16}))?", oid, re.ASCII)
    if match is None:
        return None
    return match[1], NOSNAP if match[2] is None else int(match[2], 16)


# --- what users type ------------------------------------------------------------------------------------------------


def _check(kind: str, text: str, forbidden: str) -> str:
    if not text:
        raise ValueError(f"the {kind} name is empty")
    bad = sorted({c for c in text if c in forbidden or c == "\0"})
    if bad:
        raise ValueError(f"{kind} name {text!r} contains {' '.join(map(repr, bad))}")
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{kind} name {text!r} is not text") from None
    if length > MAX_NAME:
        raise ValueError(f"{kind} name of {length} bytes; at most {MAX_NAME}")
    return text


def check_pool_name(text: str) -> str:
    return _check("pool", text, "/@")


def check_namespace_name(text: str) -> str:
    return _check("namespace", text, "/@")


def check_image_name(text: str) -> str:
    return _check("image", text, "/@")


def check_snap_name(text: str) -> str:
    return _check("snapshot", text, "/@")


def check_group_name(text: str) -> str:
    return _check("group", text, "/@")


@dataclass(frozen=True)
class ImageSpec:
    """`[pool/[namespace/]]image[@snap]`. None: not given."""

    image: str
    pool: str | None = None
    namespace: str | None = None
    snap: str | None = None

    def __str__(self) -> str:
        text = self.image if self.pool is None else f"{self.pool}/{self.image}"
        if self.pool is not None and self.namespace:
            text = f"{self.pool}/{self.namespace}/{self.image}"
        return text if self.snap is None else f"{text}@{self.snap}"


def parse_image_spec(text: str) -> ImageSpec:
    """ValueError says what is wrong with it."""
    head, at, snap = text.partition("@")
    if at:
        check_snap_name(snap)
    parts = head.split("/")
    if len(parts) > 3:
        raise ValueError(f"{text!r}: at most pool/namespace/image")
    check_image_name(parts[-1])
    pool = check_pool_name(parts[0]) if len(parts) > 1 else None
    namespace = parts[1] if len(parts) == 3 else None
    if namespace:
        check_namespace_name(namespace)
    return ImageSpec(parts[-1], pool, namespace, snap if at else None)


def parse_pool_spec(text: str) -> tuple[str, str]:
    """`pool[/namespace]` -> (pool, namespace or "")."""
    pool, slash, namespace = text.partition("/")
    check_pool_name(pool)
    if slash:
        check_namespace_name(namespace)
    return pool, namespace

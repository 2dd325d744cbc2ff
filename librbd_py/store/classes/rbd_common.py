"""What the files of class `rbd` share: typed omap values, iteration over snapshots, operation features."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import TypeVar

from librbd_py.format import features as bits
from librbd_py.format import header
from librbd_py.format.encoding import Decoder, Encoder, decode_string, decode_u64, encode_u64
from librbd_py.format.header import NOSNAP, Parent, Snap

from .context import Context, stored

T = TypeVar("T")

MAX_SNAP = 0xFFFFFFFFFFFFFFFD  # CEPH_MAXSNAP
BATCH = 64  # rows a listing asks for at a time, and what "no limit given" means


def invalid(text: str) -> OSError:
    return OSError(errno.EINVAL, text)


def read_value(context: Context, key: bytes, decode: Callable[[Decoder], T]) -> T:
    """ENOENT; EIO when damaged."""
    return stored(lambda raw: decode(Decoder(raw)), context.omap_get(key))


def read_u64(context: Context, key: bytes, default: int | None = None) -> int:
    """ENOENT when the key is missing and there is no default."""
    try:
        return read_value(context, key, decode_u64)
    except OSError as e:
        if e.errno == errno.ENOENT and default is not None:
            return default
        raise


def read_string(context: Context, key: bytes) -> str:
    return read_value(context, key, decode_string)


def write_value(context: Context, key: bytes, value: bytes) -> None:
    context.omap_set({key: value})


def write_u64(context: Context, key: bytes, value: int) -> None:
    write_value(context, key, encode_u64(value))


def has_key(context: Context, key: bytes) -> bool:
    try:
        context.omap_get(key)
    except OSError as e:
        if e.errno == errno.ENOENT:
            return False
        raise
    return True


def check_exists(context: Context) -> None:
    context.stat()


def need_feature(context: Context, need: int) -> None:
    """ENOEXEC without the feature, EINVAL when this is no header of format 2."""
    try:
        held = read_u64(context, b"features")
    except OSError as e:
        if e.errno == errno.ENOENT:
            raise invalid("not an image header of format 2") from e
        raise
    if held & need != need:
        raise OSError(errno.ENOEXEC, f"the image lacks the feature {' '.join(bits.names(need))}")


def set_op_features(context: Context, value: int, mask: int) -> None:
    """Changes `op_features` under the mask; the feature bit OPERATIONS follows."""
    features = read_u64(context, b"features")
    before = read_u64(context, b"op_features", 0)
    after = before & ~mask | value & mask
    if after == before:
        return
    if after:
        write_u64(context, b"op_features", after)
        wanted = features | bits.OPERATIONS
    else:
        context.omap_remove([b"op_features"])
        wanted = features & ~bits.OPERATIONS
    if wanted != features:
        write_u64(context, b"features", wanted)


def read_snap(context: Context, snap_id: int) -> Snap:
    """ENOENT."""
    return stored(Snap.decode, context.omap_get(header.snap_key(snap_id)))


def write_snap(context: Context, snap: Snap) -> None:
    write_value(context, header.snap_key(snap.id), snap.encode())


def snaps(context: Context) -> Iterator[Snap]:
    """Every snapshot record, by ascending id."""
    for raw in rows(context, header.SNAP_PREFIX).values():
        yield stored(Snap.decode, raw)


def rows(context: Context, prefix: bytes, start_after: bytes = b"", limit: int = 1 << 62) -> dict[bytes, bytes]:
    """Omap rows with the prefix, after the key `start_after`, at most `limit`."""
    return context.omap_vals(start_after, prefix, limit)[0]


def read_parent(context: Context) -> Parent:
    """The null parent when there is no record."""
    try:
        raw = context.omap_get(b"parent")
    except OSError as e:
        if e.errno == errno.ENOENT:
            return Parent()
        raise
    return stored(Parent.decode, raw)


def head_or_snap(context: Context, snap_id: int) -> Snap | None:
    """None for HEAD, else the snapshot's record (ENOENT)."""
    return None if snap_id == NOSNAP else read_snap(context, snap_id)


def u64(value: int) -> bytes:
    return encode_u64(value)


def encode_map(values: dict[str, bytes]) -> bytes:
    """map<string, already encoded value>, in key order (bytewise)."""
    out = Encoder().u32(len(values))
    for key, value in values.items():
        out.string(key).raw(value)
    return out.done()


def text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def raw(value: str) -> bytes:
    return value.encode("utf-8", "surrogateescape")

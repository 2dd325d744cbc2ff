"""Class `rbd`, rbd_group_header.<id>: members and snapshots of a consistency group."""

from __future__ import annotations

import errno

from librbd_py.format.encoding import DecodeError, Decoder, Encoder
from librbd_py.format.group import (
    IMAGE_PREFIX,
    SNAPSHOT_INCOMPLETE,
    SNAPSHOT_PREFIX,
    GroupImageSpec,
    GroupImageStatus,
    GroupSnapshot,
)

from .context import Context, stored
from .rbd_common import has_key, invalid, raw, rows, text, write_value
from .registry import method


@method("rbd", "group_image_set", writes=True)
def group_image_set(context: Context, data: bytes) -> bytes:
    status = GroupImageStatus.decode_from(Decoder(data))
    write_value(context, status.spec.key, bytes([status.state]))
    return b""


@method("rbd", "group_image_remove", writes=True)
def group_image_remove(context: Context, data: bytes) -> bytes:
    context.omap_remove([GroupImageSpec.decode_from(Decoder(data)).key])
    return b""


def _member(key: bytes) -> GroupImageSpec:
    pool, _, image = key[len(IMAGE_PREFIX) :].partition(b"_")
    try:
        return GroupImageSpec(text(image), int(pool, 16))
    except ValueError:
        raise DecodeError(f"group member key {key!r}") from None


@method("rbd", "group_image_list", writes=False)
def group_image_list(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    start, limit = GroupImageSpec.decode_from(source), source.u64()
    out = Encoder()
    found = rows(context, IMAGE_PREFIX, start.key, limit)
    out.u32(len(found))
    for key, value in found.items():
        state = stored(lambda held: Decoder(held).u8(), value)
        GroupImageStatus(stored(_member, key), state).encode_to(out)
    return out.done()


@method("rbd", "group_snap_set", writes=True)
def group_snap_set(context: Context, data: bytes) -> bytes:
    snapshot = GroupSnapshot.decode(data)
    if not snapshot.name or not snapshot.id:
        raise invalid("a group snapshot needs a name and an id")
    if snapshot.state == SNAPSHOT_INCOMPLETE and has_key(context, snapshot.key):
        raise OSError(errno.EEXIST, f"group snapshot {snapshot.id} exists")
    for held in rows(context, SNAPSHOT_PREFIX).values():
        other = stored(GroupSnapshot.decode, held)
        if other.name == snapshot.name and other.id != snapshot.id:
            raise OSError(errno.EEXIST, f"group snapshot {snapshot.name!r} exists")
    write_value(context, snapshot.key, snapshot.encode())
    return b""


@method("rbd", "group_snap_remove", writes=True)
def group_snap_remove(context: Context, data: bytes) -> bytes:
    context.omap_remove([SNAPSHOT_PREFIX + Decoder(data).blob()])
    return b""


@method("rbd", "group_snap_get_by_id", writes=False)
def group_snap_get_by_id(context: Context, data: bytes) -> bytes:
    key = SNAPSHOT_PREFIX + Decoder(data).blob()
    return stored(GroupSnapshot.decode, context.omap_get(key)).encode()


@method("rbd", "group_snap_list", writes=False)
def group_snap_list(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    start, limit = GroupSnapshot.decode_from(source), source.u64()
    found = rows(context, SNAPSHOT_PREFIX, SNAPSHOT_PREFIX + raw(start.id), limit)
    out = Encoder().u32(len(found))
    for value in found.values():
        stored(GroupSnapshot.decode, value).encode_to(out)
    return out.done()

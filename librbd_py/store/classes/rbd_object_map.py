"""Class `rbd`, object maps: rbd_object_map.<id> and rbd_object_map.<id>.<snap>."""

from __future__ import annotations

import errno

from librbd_py.format import object_map
from librbd_py.format.encoding import Decoder
from librbd_py.format.object_map import EXISTS, EXISTS_CLEAN

from .context import Context, stored
from .rbd_common import check_exists, invalid
from .registry import method


def _load(context: Context) -> bytearray:
    """ENOENT when the object is empty or missing."""
    held = context.read()
    if not held:
        raise OSError(errno.ENOENT, f"{context.oid} holds no object map")
    return stored(object_map.decode, held)


def _save(context: Context, states: bytes | bytearray) -> None:
    context.write_full(object_map.encode(states))


@method("rbd", "object_map_load", writes=False)
def object_map_load(context: Context, data: bytes) -> bytes:
    return object_map.encode(_load(context), crc=False)


@method("rbd", "object_map_save", writes=True)
def object_map_save(context: Context, data: bytes) -> bytes:
    _save(context, object_map.decode(data))
    return b""


@method("rbd", "object_map_resize", writes=True)
def object_map_resize(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    count, default = source.u64(), source.u8()
    if count > object_map.MAX_OBJECTS:
        raise invalid(f"{count} objects are too many for an object map")
    try:
        states = _load(context)
    except OSError as e:
        if e.errno != errno.ENOENT:
            raise
        states = bytearray()
    if count < len(states):
        tail = states[count:]
        if tail.count(default) != len(tail):
            raise OSError(errno.ESTALE, "objects beyond the new end still exist")
        del states[count:]
    else:
        states.extend(bytes([default & 3]) * (count - len(states)))
    _save(context, states)
    return b""


@method("rbd", "object_map_update", writes=True)
def object_map_update(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    start, end, new = source.u64(), source.u64(), source.u8()
    current = source.optional(Decoder.u8)
    check_exists(context)
    if not context.read(0, 1):
        raise invalid(f"{context.oid} is empty")
    states = _load(context)
    if start >= end or end > len(states):
        raise OSError(errno.ERANGE, f"objects {start}..{end} of {len(states)}")
    before = states[start:end]
    if current is None:
        after = bytearray([new & 3]) * len(before)
    else:
        # Whoever expects "exists" does not care whether a snapshot saw the same content.
        sources = bytes([EXISTS, EXISTS_CLEAN]) if current == EXISTS else bytes([current & 3])
        after = before.translate(bytes.maketrans(sources, bytes([new & 3]) * len(sources)))
    if after == before:
        return b""
    states[start:end] = after
    _write_range(context, states, start, end)
    return b""


def _write_range(context: Context, states: bytearray, start: int, end: int) -> None:
    """Rewrites only the blocks (and their CRCs) that hold objects start..end."""
    per_block = object_map.BLOCK * 4
    first, last = start // per_block, (end - 1) // per_block
    packed = object_map.pack(states[first * per_block : (last + 1) * per_block])
    context.write(object_map.DATA_OFFSET + first * object_map.BLOCK, packed)
    crcs = b"".join(
        object_map.crc32c(packed[at : at + object_map.BLOCK]).to_bytes(4, "little")
        for at in range(0, len(packed), object_map.BLOCK)
    )
    context.write(object_map.crc_offset(len(states), first), crcs)


@method("rbd", "object_map_snap_add", writes=True)
def object_map_snap_add(context: Context, data: bytes) -> bytes:
    states = _load(context)
    after = states.translate(bytes.maketrans(bytes([EXISTS]), bytes([EXISTS_CLEAN])))
    if after != states:
        _save(context, after)
    return b""


@method("rbd", "object_map_snap_remove", writes=True)
def object_map_snap_remove(context: Context, data: bytes) -> bytes:
    removed = object_map.decode(data)
    states = _load(context)
    after = bytearray(states)
    at = after.find(EXISTS_CLEAN)
    while at >= 0:
        if at >= len(removed) or removed[at] == EXISTS:
            after[at] = EXISTS
        at = after.find(EXISTS_CLEAN, at + 1)
    if after != states:
        _save(context, after)
    return b""

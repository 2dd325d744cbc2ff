"""Class `rbd`, image header: creation, size, features, flags, striping, timestamps."""

from __future__ import annotations

import errno

from librbd_py.format import features as bits
from librbd_py.format import names
from librbd_py.format.encoding import NEVER, Decoder, Encoder, Time, encode_string, encode_u64
from librbd_py.format.header import NOSNAP
from librbd_py.format.values import replace

from .context import Context
from .rbd_common import (
    check_exists,
    has_key,
    head_or_snap,
    invalid,
    need_feature,
    read_parent,
    read_snap,
    read_string,
    read_u64,
    read_value,
    set_op_features,
    u64,
    write_snap,
    write_u64,
    write_value,
)
from .registry import method

MIN_ORDER, MAX_ORDER = 12, 25


def _now(context: Context) -> bytes:
    return Encoder().time(Time.from_ns(context.now_ns)).done()


@method("rbd", "create", writes=True)
def create(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    size, order, features, prefix = source.u64(), source.u8(), source.u64(), source.string()
    data_pool = -1 if source.at_end else source.s64()
    if features & ~bits.ALL:
        raise OSError(errno.ENOSYS, f"unknown features 0x{features & ~bits.ALL:x}")
    if not prefix:
        raise invalid("the object prefix is empty")
    if has_key(context, b"object_prefix"):
        raise OSError(errno.EEXIST, "the header has been created already")
    if features & bits.OPERATIONS:
        raise invalid("the feature `operations` cannot be asked for")
    if bool(features & bits.DATA_POOL) != (data_pool != -1):
        raise invalid("a data pool and the feature `data-pool` come together")
    now = _now(context)
    values = {
        b"size": encode_u64(size),
        b"order": bytes([order]),
        b"features": encode_u64(features),
        b"object_prefix": encode_string(prefix),
        b"snap_seq": encode_u64(0),
        b"create_timestamp": now,
        b"access_timestamp": now,
        b"modify_timestamp": now,
    }
    if data_pool != -1:
        values[b"data_pool_id"] = Encoder().s64(data_pool).done()
    context.omap_set(values)
    if MIN_ORDER <= order <= MAX_ORDER and names.parse_data_object(names.data_object(prefix, 0)) is not None:
        context.register_layout(prefix, order, data_pool)
    return b""


@method("rbd", "get_size", writes=False)
def get_size(context: Context, data: bytes) -> bytes:
    snap_id = Decoder(data).u64()
    order = read_value(context, b"order", Decoder.u8)
    snap = head_or_snap(context, snap_id)
    size = read_u64(context, b"size") if snap is None else snap.image_size
    return Encoder().u8(order).u64(size).done()


@method("rbd", "set_size", writes=True)
def set_size(context: Context, data: bytes) -> bytes:
    size = Decoder(data).u64()
    before = read_u64(context, b"size")
    write_u64(context, b"size", size)
    if size < before:
        parent = read_parent(context)
        if parent.exists and (parent.head_overlap or 0) > size:
            write_value(context, b"parent", replace(parent, head_overlap=size).encode())
    return b""


@method("rbd", "get_features", writes=False)
def get_features(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    source.u64()
    read_only = False if source.at_end else source.bool()
    features = read_u64(context, b"features")
    return Encoder().u64(features).u64(bits.incompatible(features, read_only)).done()


@method("rbd", "set_features", writes=True)
def set_features(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    features, mask = source.u64(), source.u64()
    before = read_u64(context, b"features")
    if mask & bits.INTERNAL:
        raise invalid("internal features cannot be set")
    mask &= bits.ALL
    enabled, disabled = features & mask, ~features & mask
    free = bits.MUTABLE | bits.MUTABLE_INTERNAL
    if enabled & ~free:
        raise invalid(f"cannot enable {' '.join(bits.names(enabled & ~free))}")
    if disabled & ~(free | bits.DISABLE_ONLY):
        raise invalid(f"cannot disable {' '.join(bits.names(disabled & ~(free | bits.DISABLE_ONLY)))}")
    write_u64(context, b"features", before & ~mask | features & mask)
    return b""


@method("rbd", "get_all_features", writes=False)
def get_all_features(context: Context, data: bytes) -> bytes:
    return u64(bits.ALL)


@method("rbd", "get_flags", writes=False)
def get_flags(context: Context, data: bytes) -> bytes:
    snap = head_or_snap(context, Decoder(data).u64())
    return u64(read_u64(context, b"flags", 0) if snap is None else snap.flags)


@method("rbd", "set_flags", writes=True)
def set_flags(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    flags, mask = source.u64(), source.u64()
    snap_id = NOSNAP if source.at_end else source.u64()
    if snap_id == NOSNAP:
        before = read_u64(context, b"flags", 0)
        write_u64(context, b"flags", before & ~mask | flags & mask)
    else:
        snap = read_snap(context, snap_id)
        write_snap(context, replace(snap, flags=snap.flags & ~mask | flags & mask))
    return b""


@method("rbd", "op_features_get", writes=False)
def op_features_get(context: Context, data: bytes) -> bytes:
    return u64(read_u64(context, b"op_features", 0))


@method("rbd", "op_features_set", writes=True)
def op_features_set(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    value, mask = source.u64(), source.u64()
    if mask & ~bits.OP_ALL:
        raise invalid(f"unknown operation features 0x{mask & ~bits.OP_ALL:x}")
    set_op_features(context, value, mask)
    return b""


@method("rbd", "get_object_prefix", writes=False)
def get_object_prefix(context: Context, data: bytes) -> bytes:
    return encode_string(read_string(context, b"object_prefix"))


@method("rbd", "get_data_pool", writes=False)
def get_data_pool(context: Context, data: bytes) -> bytes:
    pool = read_value(context, b"data_pool_id", Decoder.s64) if has_key(context, b"data_pool_id") else -1
    return Encoder().s64(pool).done()


@method("rbd", "get_stripe_unit_count", writes=False)
def get_stripe_unit_count(context: Context, data: bytes) -> bytes:
    check_exists(context)
    need_feature(context, bits.STRIPINGV2)
    unit = read_u64(context, b"stripe_unit", 1 << read_value(context, b"order", Decoder.u8))
    return Encoder().u64(unit).u64(read_u64(context, b"stripe_count", 1)).done()


@method("rbd", "set_stripe_unit_count", writes=True)
def set_stripe_unit_count(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    unit, count = source.u64(), source.u64()
    if not unit or not count:
        raise invalid("stripe unit and count must not be 0")
    check_exists(context)
    need_feature(context, bits.STRIPINGV2)
    object_size = 1 << read_value(context, b"order", Decoder.u8)
    if object_size % unit or unit > object_size:
        raise invalid(f"the stripe unit {unit} does not divide the object size {object_size}")
    context.omap_set({b"stripe_unit": encode_u64(unit), b"stripe_count": encode_u64(count)})
    return b""


def _get_time(context: Context, key: bytes) -> bytes:
    value = read_value(context, key, Decoder.time) if has_key(context, key) else NEVER
    return Encoder().time(value).done()


@method("rbd", "get_create_timestamp", writes=False)
def get_create_timestamp(context: Context, data: bytes) -> bytes:
    return _get_time(context, b"create_timestamp")


@method("rbd", "get_access_timestamp", writes=False)
def get_access_timestamp(context: Context, data: bytes) -> bytes:
    return _get_time(context, b"access_timestamp")


@method("rbd", "get_modify_timestamp", writes=False)
def get_modify_timestamp(context: Context, data: bytes) -> bytes:
    return _get_time(context, b"modify_timestamp")


@method("rbd", "set_access_timestamp", writes=True)
def set_access_timestamp(context: Context, data: bytes) -> bytes:
    check_exists(context)
    write_value(context, b"access_timestamp", _now(context))
    return b""


@method("rbd", "set_modify_timestamp", writes=True)
def set_modify_timestamp(context: Context, data: bytes) -> bytes:
    check_exists(context)
    write_value(context, b"modify_timestamp", _now(context))
    return b""

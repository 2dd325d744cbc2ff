"""Class `rbd`, image-meta (also of the pool, on rbd_info), groups' mark on an image, migration."""

from __future__ import annotations

import errno

from librbd_py.format import features as bits
from librbd_py.format.encoding import Decoder, Encoder
from librbd_py.format.group import GROUP_REF_KEY, GroupSpec
from librbd_py.format.header import METADATA_PREFIX, MigrationSpec
from librbd_py.format.values import replace

from .context import Context, stored
from .rbd_common import (
    BATCH,
    encode_map,
    has_key,
    invalid,
    raw,
    read_u64,
    rows,
    set_op_features,
    text,
    write_u64,
    write_value,
)
from .registry import method


@method("rbd", "metadata_list", writes=False)
def metadata_list(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    start, limit = source.string(), source.u64()
    found = rows(context, METADATA_PREFIX, METADATA_PREFIX + raw(start), limit or BATCH)
    return encode_map({text(key[len(METADATA_PREFIX) :]): Encoder().blob(value).done() for key, value in found.items()})


@method("rbd", "metadata_get", writes=False)
def metadata_get(context: Context, data: bytes) -> bytes:
    return Encoder().blob(context.omap_get(METADATA_PREFIX + Decoder(data).blob())).done()


@method("rbd", "metadata_set", writes=True)
def metadata_set(context: Context, data: bytes) -> bytes:
    values = Decoder(data).map(Decoder.blob, Decoder.blob, 8)
    context.omap_set({METADATA_PREFIX + key: value for key, value in values.items()})
    return b""


@method("rbd", "metadata_remove", writes=True)
def metadata_remove(context: Context, data: bytes) -> bytes:
    context.omap_remove([METADATA_PREFIX + Decoder(data).blob()])
    return b""


# --- membership in a consistency group


def _group(context: Context) -> GroupSpec | None:
    if not has_key(context, GROUP_REF_KEY):
        return None
    return stored(GroupSpec.decode, context.omap_get(GROUP_REF_KEY))


@method("rbd", "image_group_add", writes=True)
def image_group_add(context: Context, data: bytes) -> bytes:
    spec = GroupSpec.decode(data)
    held = _group(context)
    if held is not None:
        if held != spec:
            raise OSError(errno.EEXIST, "the image is in another group")
        return b""
    set_op_features(context, bits.OP_GROUP, bits.OP_GROUP)
    write_value(context, GROUP_REF_KEY, spec.encode())
    return b""


@method("rbd", "image_group_remove", writes=True)
def image_group_remove(context: Context, data: bytes) -> bytes:
    spec = GroupSpec.decode(data)
    held = _group(context)
    if held is None:
        raise OSError(errno.ENOENT, "the image is in no group")
    if held != spec:
        raise OSError(errno.EBADF, "the image is in another group")
    context.omap_remove([GROUP_REF_KEY])
    set_op_features(context, 0, bits.OP_GROUP)
    return b""


@method("rbd", "image_group_get", writes=False)
def image_group_get(context: Context, data: bytes) -> bytes:
    return (_group(context) or GroupSpec()).encode()


# --- migration


def _migration(context: Context) -> MigrationSpec:
    if not read_u64(context, b"features") & bits.MIGRATING:
        raise invalid("the image is not migrating")
    return stored(MigrationSpec.decode, context.omap_get(b"migration"))


@method("rbd", "migration_set", writes=True)
def migration_set(context: Context, data: bytes) -> bytes:
    spec = MigrationSpec.decode(data)
    features = read_u64(context, b"features")
    if features & bits.MIGRATING:
        raise OSError(errno.EEXIST, "the image is migrating already")
    write_u64(context, b"features", features | bits.MIGRATING)
    write_value(context, b"migration", spec.encode())
    return b""


@method("rbd", "migration_set_state", writes=True)
def migration_set_state(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    state, description = source.u8(), source.string()
    spec = _migration(context)
    write_value(context, b"migration", replace(spec, state=state, state_description=description).encode())
    return b""


@method("rbd", "migration_get", writes=False)
def migration_get(context: Context, data: bytes) -> bytes:
    return _migration(context).encode()


@method("rbd", "migration_remove", writes=True)
def migration_remove(context: Context, data: bytes) -> bytes:
    features = read_u64(context, b"features")
    if features & bits.MIGRATING:
        write_u64(context, b"features", features & ~bits.MIGRATING)
    context.omap_remove([b"migration"])
    return b""

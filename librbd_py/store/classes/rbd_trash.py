"""Class `rbd`, rbd_trash: images waiting for their removal."""

from __future__ import annotations

import errno

from librbd_py.format.encoding import Decoder
from librbd_py.format.trash import KEY_PREFIX, TrashImageSpec
from librbd_py.format.values import replace

from .context import Context, stored
from .rbd_common import check_exists, encode_map, has_key, raw, rows, text, write_value
from .rbd_directory import check_id
from .registry import method


@method("rbd", "trash_add", writes=True)
def trash_add(context: Context, data: bytes) -> bytes:
    context.create()
    source = Decoder(data)
    image = source.string()
    spec = TrashImageSpec.decode_from(source)
    check_id(image)
    key = KEY_PREFIX + raw(image)
    if has_key(context, key):
        raise OSError(errno.EEXIST, "the image is in the trash already")
    write_value(context, key, spec.encode())
    return b""


@method("rbd", "trash_remove", writes=True)
def trash_remove(context: Context, data: bytes) -> bytes:
    key = KEY_PREFIX + Decoder(data).blob()
    context.omap_get(key)
    context.omap_remove([key])
    return b""


@method("rbd", "trash_get", writes=False)
def trash_get(context: Context, data: bytes) -> bytes:
    return context.omap_get(KEY_PREFIX + Decoder(data).blob())


@method("rbd", "trash_list", writes=False)
def trash_list(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    start, limit = source.string(), source.u64()
    found = rows(context, KEY_PREFIX, KEY_PREFIX + raw(start), limit)
    return encode_map(
        {text(key[len(KEY_PREFIX) :]): stored(TrashImageSpec.decode, value).encode() for key, value in found.items()}
    )


@method("rbd", "trash_state_set", writes=True)
def trash_state_set(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    key, wanted, expected = KEY_PREFIX + source.blob(), source.u8(), source.u8()
    check_exists(context)
    spec = stored(TrashImageSpec.decode, context.omap_get(key))
    if spec.state == wanted:
        return b""
    if spec.state != expected:
        raise OSError(errno.ESTALE, f"the image in the trash is in state {spec.state}")
    write_value(context, key, replace(spec, state=wanted).encode())
    return b""

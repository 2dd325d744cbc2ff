"""Class `rbd`, names: rbd_directory (and the group directory, same layout), rbd_id.<name>, rbd_namespace."""

from __future__ import annotations

import errno
import re

from librbd_py.format.encoding import Decoder, Encoder, encode_string

from .context import Context, stored
from .rbd_common import (
    check_exists,
    encode_map,
    has_key,
    invalid,
    raw,
    read_string,
    read_value,
    rows,
    text,
    write_value,
)
from .registry import method

_NAME, _ID, _STATE = b"name_", b"id_", b"state"
STATE_READY, STATE_ADD_DISABLED = 0, 1


def check_id(value: str) -> None:
    if re.fullmatch(r"[0-9A-Za-z]+", value, re.ASCII) is None:
        raise invalid(f"{value!r} is not an id")


def _add(context: Context, name: str, item: str, unique_id: bool = True) -> None:
    if not name:
        raise invalid("the name is empty")
    check_id(item)
    if has_key(context, _NAME + raw(name)):
        raise OSError(errno.EEXIST, f"{name!r} exists")
    if unique_id and has_key(context, _ID + raw(item)):
        raise OSError(errno.EBADF, f"id {item} is in use")
    context.omap_set({_NAME + raw(name): encode_string(item), _ID + raw(item): encode_string(name)})


def _remove(context: Context, name: str, item: str) -> None:
    held_id, held_name = read_string(context, _NAME + raw(name)), read_string(context, _ID + raw(item))
    if held_id != item or held_name != name:
        raise OSError(errno.ESTALE, f"{name!r} and {item} do not belong together")
    context.omap_remove([_NAME + raw(name), _ID + raw(item)])


def _list(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    start, limit = source.string(), source.u64()
    found = rows(context, _NAME, _NAME + raw(start), limit)
    return encode_map({text(key[len(_NAME) :]): encode_string(stored(_string, value)) for key, value in found.items()})


def _string(value: bytes) -> str:
    return Decoder(value).string()


def _two(data: bytes) -> tuple[str, str]:
    source = Decoder(data)
    return source.string(), source.string()


@method("rbd", "dir_get_id", writes=False)
def dir_get_id(context: Context, data: bytes) -> bytes:
    return encode_string(read_string(context, _NAME + Decoder(data).blob()))


@method("rbd", "dir_get_name", writes=False)
def dir_get_name(context: Context, data: bytes) -> bytes:
    return encode_string(read_string(context, _ID + Decoder(data).blob()))


@method("rbd", "dir_list", writes=False)
def dir_list(context: Context, data: bytes) -> bytes:
    return _list(context, data)


@method("rbd", "dir_add_image", writes=True)
def dir_add_image(context: Context, data: bytes) -> bytes:
    name, image = _two(data)
    context.create()
    _add(context, name, image)
    return b""


@method("rbd", "dir_remove_image", writes=True)
def dir_remove_image(context: Context, data: bytes) -> bytes:
    _remove(context, *_two(data))
    return b""


def _rename(context: Context, data: bytes) -> None:
    source = Decoder(data)
    old, new, item = source.string(), source.string(), source.string()
    _remove(context, old, item)
    _add(context, new, item, unique_id=False)


@method("rbd", "dir_rename_image", writes=True)
def dir_rename_image(context: Context, data: bytes) -> bytes:
    _rename(context, data)
    return b""


def _state(context: Context) -> int:
    return read_value(context, _STATE, Decoder.u8)


@method("rbd", "dir_state_assert", writes=False)
def dir_state_assert(context: Context, data: bytes) -> bytes:
    wanted = Decoder(data).u8()
    if _state(context) != wanted:
        raise OSError(errno.ENOENT, "the directory is in another state")
    return b""


@method("rbd", "dir_state_set", writes=True)
def dir_state_set(context: Context, data: bytes) -> bytes:
    wanted = Decoder(data).u8()
    if wanted == STATE_ADD_DISABLED:
        check_exists(context)
        if rows(context, _NAME, _NAME, 1) or rows(context, _ID, _ID, 1):
            raise OSError(errno.EBUSY, "the directory is not empty")
    elif wanted != STATE_READY:
        raise invalid(f"directory state {wanted}")
    context.create()
    if not has_key(context, _STATE) or _state(context) != wanted:
        write_value(context, _STATE, bytes([wanted]))
    return b""


@method("rbd", "get_id", writes=False)
def get_id(context: Context, data: bytes) -> bytes:
    held = context.read()
    if not held:
        raise OSError(errno.ENOENT, "no id is stored here")
    return encode_string(stored(_string, held))


@method("rbd", "set_id", writes=True)
def set_id(context: Context, data: bytes) -> bytes:
    size = context.stat().size
    item = Decoder(data).string()
    check_id(item)
    if size:
        raise OSError(errno.EEXIST, "an id is stored here")
    context.write(0, encode_string(item))
    return b""


@method("rbd", "namespace_add", writes=True)
def namespace_add(context: Context, data: bytes) -> bytes:
    key = _NAME + Decoder(data).blob()
    if has_key(context, key):
        raise OSError(errno.EEXIST, "the namespace exists")
    write_value(context, key, b"")
    return b""


@method("rbd", "namespace_remove", writes=True)
def namespace_remove(context: Context, data: bytes) -> bytes:
    key = _NAME + Decoder(data).blob()
    context.omap_get(key)
    context.omap_remove([key])
    return b""


@method("rbd", "namespace_list", writes=False)
def namespace_list(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    start, limit = source.string(), source.u64()
    found = rows(context, _NAME, _NAME + raw(start), limit)
    return Encoder().list([key[len(_NAME) :] for key in found], Encoder.blob).done()


@method("rbd", "group_dir_list", writes=False)
def group_dir_list(context: Context, data: bytes) -> bytes:
    return _list(context, data)


@method("rbd", "group_dir_add", writes=True)
def group_dir_add(context: Context, data: bytes) -> bytes:
    name, group = _two(data)
    context.create()
    _add(context, name, group)
    return b""


@method("rbd", "group_dir_rename", writes=True)
def group_dir_rename(context: Context, data: bytes) -> bytes:
    _rename(context, data)
    return b""


@method("rbd", "group_dir_remove", writes=True)
def group_dir_remove(context: Context, data: bytes) -> bytes:
    _remove(context, *_two(data))
    return b""

"""Image-meta: small key-value pairs in the header. Keys `conf_<option>` override configuration for one image."""

from __future__ import annotations

import errno

from librbd_py.format import notify as nf

from . import cls
from .cls import text
from .handle import ImageHandle
from .options import OF_IMAGES, require
from .proxy import perform

CONFIG_PREFIX = "conf_"


def get(handle: ImageHandle, key: str) -> str:
    """ENOENT."""
    return cls.metadata_value(handle.ctx, handle.oid, key).decode(errors="surrogateescape")


def items(handle: ImageHandle) -> dict[str, str]:
    """Sorted by key."""
    return {key: value.decode(errors="surrogateescape") for key, value in cls.metadata(handle.ctx, handle.oid).items()}


def put(handle: ImageHandle, key: str, value: str | bytes) -> None:
    """EROFS; EINVAL: a `conf_` key that is no option an image may have, or not with this value."""
    handle.require_writable()
    data = value.encode() if isinstance(value, str) else value
    asked = data.decode(errors="surrogateescape")
    if key.startswith(CONFIG_PREFIX):
        require(key.removeprefix(CONFIG_PREFIX), asked, OF_IMAGES)
    perform(handle, lambda request: nf.MetadataUpdate(key, asked, request), lambda: _put(handle, key, data))


def _put(handle: ImageHandle, key: str, data: bytes) -> None:
    with handle.exclusive():
        handle.ctx.exec(handle.oid, "rbd", "metadata_set", cls.encode_metadata({key: data}))
    handle.announce()


def remove(handle: ImageHandle, key: str) -> None:
    """ENOENT, EROFS."""
    handle.require_writable()
    perform(
        handle,
        lambda request: nf.MetadataUpdate(key, None, request),
        lambda: _remove(handle, key),
        done_already=errno.ENOENT,
    )


def _remove(handle: ImageHandle, key: str) -> None:
    with handle.exclusive():
        cls.metadata_value(handle.ctx, handle.oid, key)
        handle.ctx.exec(handle.oid, "rbd", "metadata_remove", text(key))
    handle.announce()

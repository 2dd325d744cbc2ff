"""Image-meta: small key-value pairs in the header. Keys `conf_<option>` override configuration for one image."""

from __future__ import annotations

import errno

from . import cls
from .cls import text
from .handle import ImageHandle

CONFIG_PREFIX = "conf_"


def get(handle: ImageHandle, key: str) -> str:
    """ENOENT."""
    return cls.metadata_value(handle.ctx, handle.oid, key).decode(errors="surrogateescape")


def items(handle: ImageHandle) -> dict[str, str]:
    """Sorted by key."""
    return {key: value.decode(errors="surrogateescape") for key, value in cls.metadata(handle.ctx, handle.oid).items()}


def put(handle: ImageHandle, key: str, value: str | bytes) -> None:
    """EROFS; EINVAL: a `conf_` key that is no option of RBD."""
    handle.require_writable()
    if key.startswith(CONFIG_PREFIX) and not key.startswith(CONFIG_PREFIX + "rbd_"):
        raise OSError(errno.EINVAL, f"{key[len(CONFIG_PREFIX) :]!r} is no option of RBD")
    data = value.encode() if isinstance(value, str) else value
    with handle.exclusive():
        handle.ctx.exec(handle.oid, "rbd", "metadata_set", cls.encode_metadata({key: data}))
    handle.announce()


def remove(handle: ImageHandle, key: str) -> None:
    """ENOENT, EROFS."""
    handle.require_writable()
    with handle.exclusive():
        cls.metadata_value(handle.ctx, handle.oid, key)
        handle.ctx.exec(handle.oid, "rbd", "metadata_remove", text(key))
    handle.announce()

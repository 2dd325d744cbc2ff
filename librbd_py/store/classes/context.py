"""What a class method sees of its object, and how it changes it (an OSD's `cls_cxx_*` calls).

Reads answer from the object as it was before the op list; existence and size follow the ops already done. Writes are
collected by the executor and take effect only when the whole list succeeds.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from librbd_py.format.encoding import DecodeError

from ..api import Client, ObjectStat

T = TypeVar("T")


def stored(decode: Callable[[bytes], T], raw: bytes) -> T:
    """Decodes what the object holds: EIO when it is damaged (a request that does not parse is EINVAL instead)."""
    try:
        return decode(raw)
    except DecodeError as e:
        raise OSError(errno.EIO, f"stored value: {e.strerror}") from e


class Context(Protocol):
    oid: str
    pool_id: int
    namespace: str
    client: Client  # who sent the op
    now_ns: int  # the store's clock

    @property
    def exists(self) -> bool: ...

    def stat(self) -> ObjectStat:
        """ENOENT."""

    def read(self, offset: int = 0, length: int = 0) -> bytes:
        """Short at the end; length 0 = to the end; b"" when the object did not exist."""

    def xattr(self, name: str) -> bytes:
        """ENODATA; ENOENT when the object did not exist."""

    def xattrs(self) -> dict[str, bytes]:
        """ENOENT."""

    def omap_get(self, key: bytes) -> bytes:
        """ENOENT; also when the object did not exist."""

    def omap_vals(
        self, start_after: bytes = b"", prefix: bytes = b"", limit: int = 1 << 62
    ) -> tuple[dict[bytes, bytes], bool]:
        """Rows in key order and whether there are more. `limit` is the only bound."""

    def snap_seq(self) -> int:
        """Of the object's snapset; ENOENT when there is neither a head nor a clone."""

    def create(self, exclusive: bool = False) -> None:
        """EEXIST."""

    def remove(self) -> None:
        """ENOENT."""

    def write(self, offset: int, data: bytes) -> None: ...

    def write_full(self, data: bytes) -> None: ...

    def truncate(self, size: int) -> None: ...

    def zero(self, offset: int, length: int) -> None: ...

    def set_xattr(self, name: str, value: bytes) -> None: ...

    def omap_set(self, values: Mapping[bytes, bytes]) -> None: ...

    def omap_remove(self, keys: Sequence[bytes]) -> None:
        """ENOENT when the object does not exist; keys need not."""

    def register_layout(self, object_prefix: str, order: int, data_pool: int) -> None:
        """Where the image with this header keeps its data. data_pool -1: in this pool."""

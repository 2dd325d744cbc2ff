"""What the classes of the `rbd` face share: argument checks, the way from an I/O context to the store, times."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from librbd_py.errors import rbd as exceptions
from librbd_py.store.api import ObjectContext
from librbd_py.store.rados import foreign

if TYPE_CHECKING:
    from datetime import datetime

U64_END = 1 << 64
F = TypeVar("F", bound=Callable[..., Any])
# Ceph's module takes any callable and, like librbd, ignores what a progress callback returns.
OnProgress = Callable[[int, int], object] | None


def cstr(val: Any, name: str, encoding: str = "utf-8", opt: bool = False) -> bytes | None:
    """A byte string from a str or bytes. InvalidArgument for anything else, None included unless `opt`."""
    if opt and val is None:
        return None
    if isinstance(val, bytes):
        return val
    if isinstance(val, str):
        return val.encode(encoding, "surrogateescape")
    raise exceptions.InvalidArgument(f"{name} must be a string")


def decode_cstr(val: bytes | None, encoding: str = "utf-8") -> str | None:
    return None if val is None else val.decode(encoding)


def text(val: Any, name: str) -> str:
    """A name argument as str; bytes that are no UTF-8 survive. InvalidArgument."""
    data = cstr(val, name)
    assert data is not None
    return data.decode("utf-8", "surrogateescape")


def number(val: Any, end: int = U64_END, kind: str = "uint64_t") -> int:
    """An unsigned number as C takes it: OverflowError outside, TypeError for what is no number."""
    if isinstance(val, float):
        value = int(val)
    elif hasattr(val, "__index__"):
        value = val.__index__()
    else:
        raise TypeError("an integer is required")
    if value < 0:
        raise OverflowError(f"can't convert negative value to {kind}")
    if value >= end:
        raise OverflowError("Python int too large to convert to C unsigned long")
    return int(value)


def context(ioctx: Any) -> ObjectContext:
    """The object context behind a `rados.Ioctx`, ours or Ceph's (or such a context itself)."""
    if foreign.is_foreign(ioctx):
        return foreign.open_foreign(ioctx)
    found = ioctx if isinstance(ioctx, ObjectContext) else getattr(ioctx, "context", None)
    if callable(found):
        found = found()
    if not isinstance(found, ObjectContext):
        raise TypeError("an rados.Ioctx is required")
    return found


def moment(seconds: float) -> datetime:
    """A naive UTC time with whole seconds, as Ceph's module gives it."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(int(seconds), UTC).replace(tzinfo=None)


def requires_not_closed(f: F) -> F:
    @wraps(f)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.require_not_closed()
        return f(self, *args, **kwargs)

    return wrapper  # type: ignore[return-value]

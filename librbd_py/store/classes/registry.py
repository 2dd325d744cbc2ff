"""Which class methods exist, and whether they may change the object."""

from __future__ import annotations

import errno
import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

from .context import Context

Body = Callable[[Context, bytes], bytes]


@dataclass(frozen=True)
class Method:
    cls: str
    name: str
    writes: bool
    body: Body


_methods: dict[tuple[str, str], Method] = {}
_loading = threading.Lock()
_complete = threading.Event()
_FILES = (
    "cls_lock",
    "rbd_header",
    "rbd_snapshots",
    "rbd_parents",
    "rbd_metadata",
    "rbd_directory",
    "rbd_trash",
    "rbd_groups",
    "rbd_object_map",
    "rbd_data",
    "hello",
)


def method(cls: str, name: str, *, writes: bool) -> Callable[[Body], Body]:
    """Decorator: registers a class method."""

    def register(body: Body) -> Body:
        if (cls, name) in _methods:
            raise ValueError(f"class method {cls}.{name} is defined twice")
        _methods[cls, name] = Method(cls, name, writes, body)
        return body

    return register


def find(cls: str, name: str) -> Method:
    """EOPNOTSUPP for a class or a method that is not there."""
    if not _complete.is_set():
        with _loading:  # two threads at once: neither may look into half a table
            for module in _FILES:
                importlib.import_module(f"librbd_py.store.classes.{module}")
            _complete.set()
    try:
        return _methods[cls, name]
    except KeyError:
        raise OSError(errno.EOPNOTSUPP, f"no class method {cls}.{name}") from None

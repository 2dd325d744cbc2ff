"""The compiled data plane. The only module that imports it; everything else takes `ffi` and `lib` from here."""

from __future__ import annotations

import os
from typing import Any

from librbd_py import _native  # type: ignore[attr-defined]  # compiled: mypy cannot see into it

ffi: Any = _native.ffi
lib: Any = _native.lib


def check(result: int, what: str) -> int:
    """The result, or OSError with its errno. C returns -errno."""
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result

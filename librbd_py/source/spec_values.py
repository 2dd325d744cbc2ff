"""Values of a source spec, with what is wrong in words."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

MAX_TEXT = 4096  # characters of a value


def text(spec: Mapping[str, Any], key: str, what: str) -> str:
    """EINVAL: missing, empty, no text, too long, or with a NUL."""
    value = spec.get(key)
    if not isinstance(value, str) or not value:
        raise OSError(errno.EINVAL, f"{what} of the source spec has no '{key}', or it is no text")
    if len(value) > MAX_TEXT or "\0" in value:
        raise OSError(errno.EINVAL, f"'{key}' of the source spec is no sensible text")
    return value


def optional_text(spec: Mapping[str, Any], key: str, what: str) -> str | None:
    """None: not given. EINVAL."""
    return None if spec.get(key) is None else text(spec, key, what)


def section(spec: Mapping[str, Any], key: str, what: str) -> Mapping[str, Any]:
    """EINVAL: missing, or no object."""
    value = spec.get(key)
    if not isinstance(value, Mapping):
        raise OSError(errno.EINVAL, f"{what} of the source spec has no '{key}' object")
    return value

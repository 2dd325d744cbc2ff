"""Feature masks and their names as librbd reads and writes them, and what this library can do."""

from __future__ import annotations

import errno

from librbd_py.format import features as ft

# What an image may have for this library to open it.
SUPPORTED = (
    ft.LAYERING
    | ft.STRIPINGV2
    | ft.EXCLUSIVE_LOCK
    | ft.OBJECT_MAP
    | ft.MIGRATING
    | ft.FAST_DIFF
    | ft.DEEP_FLATTEN
    | ft.DATA_POOL
    | ft.OPERATIONS
)


def to_string(features: int) -> str:
    """Names in alphabetical order, as librbd prints them. EINVAL for unknown bits."""
    if features & ~ft.ALL:
        raise OSError(errno.EINVAL, f"unknown feature bits {features & ~ft.ALL:#x}")
    return ",".join(sorted(ft.names(features)))


def from_string(text: str) -> int:
    """A number or names separated by commas; the default for an empty string. EINVAL for an unknown name."""
    if not text.strip():
        return ft.DEFAULT
    try:
        return int(text, 0)
    except ValueError:
        pass
    features = 0
    for name in text.split(","):
        if name.strip() not in ft.BITS:
            raise OSError(errno.EINVAL, f"unknown feature {name.strip()!r}")
        features |= ft.BITS[name.strip()]
    return features

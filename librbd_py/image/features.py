"""Feature bits, their names and their rules."""

from __future__ import annotations

import errno

LAYERING = 1 << 0
STRIPINGV2 = 1 << 1
EXCLUSIVE_LOCK = 1 << 2
OBJECT_MAP = 1 << 3
FAST_DIFF = 1 << 4
DEEP_FLATTEN = 1 << 5
JOURNALING = 1 << 6
DATA_POOL = 1 << 7
OPERATIONS = 1 << 8
MIGRATING = 1 << 9
NON_PRIMARY = 1 << 10
DIRTY_CACHE = 1 << 11

ALL = (1 << 12) - 1
DEFAULT = LAYERING | EXCLUSIVE_LOCK | OBJECT_MAP | FAST_DIFF | DEEP_FLATTEN
INTERNAL = OPERATIONS | MIGRATING
# What an image may have for this library to open it read-write.
SUPPORTED = LAYERING | STRIPINGV2 | EXCLUSIVE_LOCK | OBJECT_MAP | FAST_DIFF | DEEP_FLATTEN | DATA_POOL | OPERATIONS
MUTABLE = EXCLUSIVE_LOCK | OBJECT_MAP | FAST_DIFF | JOURNALING
DISABLE_ONLY = DEEP_FLATTEN

OP_CLONE_PARENT, OP_CLONE_CHILD, OP_GROUP, OP_SNAP_TRASH = 1, 2, 4, 8
FLAG_OBJECT_MAP_INVALID, FLAG_FAST_DIFF_INVALID = 1, 2
MAX_MAP_OBJECTS = 256_000_000  # EINVAL above

NAMES = {
    "layering": LAYERING,
    "striping": STRIPINGV2,
    "exclusive-lock": EXCLUSIVE_LOCK,
    "object-map": OBJECT_MAP,
    "fast-diff": FAST_DIFF,
    "deep-flatten": DEEP_FLATTEN,
    "journaling": JOURNALING,
    "data-pool": DATA_POOL,
    "operations": OPERATIONS,
    "migrating": MIGRATING,
    "non-primary": NON_PRIMARY,
    "dirty-cache": DIRTY_CACHE,
}


def to_string(features: int) -> str:
    """Names in alphabetical order, as librbd prints them. EINVAL for unknown bits."""
    if features & ~ALL:
        raise OSError(errno.EINVAL, f"unknown feature bits {features & ~ALL:#x}")
    return ",".join(sorted(name for name, bit in NAMES.items() if features & bit))


def from_string(text: str) -> int:
    """A number or names separated by commas; the default for an empty string. EINVAL for an unknown name."""
    if not text.strip():
        return DEFAULT
    try:
        return int(text, 0)
    except ValueError:
        pass
    features = 0
    for name in text.split(","):
        if name.strip() not in NAMES:
            raise OSError(errno.EINVAL, f"unknown feature {name.strip()!r}")
        features |= NAMES[name.strip()]
    return features

"""Sizes, feature names and other words on the command line -> values. ValueError with `rbd`'s wording."""

from __future__ import annotations

import re

_SUFFIX = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}
_SIZE = re.compile(r"(\d{1,20})\s*(?:([BKMGTPE])(?:i?B)?)?", re.IGNORECASE)
MAX = (1 << 63) - 1  # bytes; what an image or request can have

FEATURES = {
    "layering": 1 << 0,
    "striping": 1 << 1,
    "exclusive-lock": 1 << 2,
    "object-map": 1 << 3,
    "fast-diff": 1 << 4,
    "deep-flatten": 1 << 5,
    "journaling": 1 << 6,
    "data-pool": 1 << 7,
    "operations": 1 << 8,
    "migrating": 1 << 9,
    "non-primary": 1 << 10,
    "dirty-cache": 1 << 11,
}
SETTABLE = ("layering", "exclusive-lock", "object-map", "fast-diff", "deep-flatten", "journaling")
OP_FEATURES = {"clone-parent": 1, "clone-child": 2, "group": 4, "snap-trash": 8}
FLAGS = {"object map invalid": 1, "fast diff invalid": 2}


def size(text: str, default_unit: str = "M") -> int:
    """Bytes of "10", "10G", "4KiB". A bare number is in `default_unit`."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a size")
    value = int(match[1]) << _SUFFIX[(match[2] or default_unit).upper()]
    if value > MAX:
        raise ValueError(f"{text!r} is more than {MAX} bytes")
    return value


def order(text: str) -> int:
    """Object size in bytes (a power of two) -> order."""
    value = size(text, "B")
    if value < 4096 or value > 32 << 20 or value & (value - 1):
        raise ValueError("object size must be a power of two between 4K and 32M")
    return value.bit_length() - 1


def features(words: list[str]) -> int:
    """Names, separated by commas or given one by one, or one number -> bits."""
    bits = 0
    for word in ",".join(words).split(","):
        name = word.strip()
        if name.isdigit():
            bits |= int(name)
        elif name in SETTABLE:
            bits |= FEATURES[name]
        else:
            raise ValueError(f"{name!r} is not an image feature")
    if bits & FEATURES["fast-diff"]:
        bits |= FEATURES["object-map"]
    return bits


def names(bits: int, table: dict[str, int]) -> list[str]:
    return [name for name, bit in table.items() if bits & bit]

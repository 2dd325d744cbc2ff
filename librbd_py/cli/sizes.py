"""Sizes, feature names and other words on the command line -> values. ValueError with `rbd`'s wording."""

from __future__ import annotations

_SHIFT = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}
MAX = (1 << 63) - 1  # bytes; what an image or request can have


def byte_count(text: str) -> int:
    """Bytes of "10", "4K", "4Ki", "10GB". Ceph looks at no more than the first letter of a unit of at most two."""
    digits = text.lstrip("0123456789+-")
    number, unit = text[: len(text) - len(digits)], digits
    if not number.lstrip("+-").isdigit() or len(unit) > 2 or unit == "Bi" or (unit and unit[0] not in _SHIFT):
        raise ValueError(f"{text!r} is not a size")
    value = int(number) << (_SHIFT[unit[0]] if unit else 0)
    if not 0 <= value <= MAX:
        raise ValueError(f"{text!r} is not between 0 and {MAX} bytes")
    return value


def image_size(text: str) -> int:
    """Bytes of "10", "10G": a bare number counts mebibytes, as far as 64 bits go."""
    value = byte_count(text)
    return (value << 20) % (1 << 64) if text[-1:].isdigit() else value


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
OP_FEATURES = {"clone-parent": 1, "clone-child": 2, "group": 4, "snap-trash": 8}
FLAGS = {"object map invalid": 1, "fast diff invalid": 2}


def feature_bits(text: str) -> int:
    """Names separated by commas -> bits. Ceph takes the names of internal features too and refuses them later."""
    bits = 0
    for name in filter(None, text.split(",")):
        if name not in FEATURES or FEATURES[name] > FEATURES["operations"]:
            raise ValueError(f"{name!r} is not an image feature")
        bits |= FEATURES[name]
    return bits


def names(bits: int, table: dict[str, int]) -> list[str]:
    return [name for name, bit in table.items() if bits & bit]

"""Feature, operation-feature and flag bits of an image, their names and their rules."""

from __future__ import annotations

from collections.abc import Iterable

LAYERING = 1 << 0
STRIPINGV2 = 1 << 1
EXCLUSIVE_LOCK = 1 << 2
OBJECT_MAP = 1 << 3
FAST_DIFF = 1 << 4
DEEP_FLATTEN = 1 << 5
JOURNALING = 1 << 6
DATA_POOL = 1 << 7
OPERATIONS = 1 << 8  # internal: set while op_features is not 0
MIGRATING = 1 << 9  # internal
NON_PRIMARY = 1 << 10  # secondary of a snapshot mirror: read-only to everyone but the mirror daemon
DIRTY_CACHE = 1 << 11  # some host's write-back log holds data that is not in the store yet

ALL = 0xFFF  # what Ceph 16 knows
DEFAULT = LAYERING | EXCLUSIVE_LOCK | OBJECT_MAP | FAST_DIFF | DEEP_FLATTEN

INCOMPATIBLE = LAYERING | STRIPINGV2 | DATA_POOL | DIRTY_CACHE  # a reader must understand them
RW_INCOMPATIBLE = (
    INCOMPATIBLE
    | EXCLUSIVE_LOCK
    | OBJECT_MAP
    | FAST_DIFF
    | DEEP_FLATTEN
    | JOURNALING
    | OPERATIONS
    | MIGRATING
    | NON_PRIMARY
)  # a writer must understand them
MUTABLE = EXCLUSIVE_LOCK | OBJECT_MAP | FAST_DIFF | JOURNALING  # may be switched on and off by a user
MUTABLE_INTERNAL = NON_PRIMARY | DIRTY_CACHE  # switched by the library itself
DISABLE_ONLY = DEEP_FLATTEN
INTERNAL = OPERATIONS | MIGRATING  # follow other state; nobody sets them directly
SINGLE_CLIENT = EXCLUSIVE_LOCK | OBJECT_MAP | FAST_DIFF | JOURNALING
IMPLICIT = STRIPINGV2 | DATA_POOL | OPERATIONS | MIGRATING | NON_PRIMARY | DIRTY_CACHE  # never asked for by name

NAMES = {
    LAYERING: "layering",
    STRIPINGV2: "striping",
    EXCLUSIVE_LOCK: "exclusive-lock",
    OBJECT_MAP: "object-map",
    FAST_DIFF: "fast-diff",
    DEEP_FLATTEN: "deep-flatten",
    JOURNALING: "journaling",
    DATA_POOL: "data-pool",
    OPERATIONS: "operations",
    MIGRATING: "migrating",
    NON_PRIMARY: "non-primary",
    DIRTY_CACHE: "dirty-cache",
}
BITS = {name: bit for bit, name in NAMES.items()}

OP_CLONE_PARENT = 1
OP_CLONE_CHILD = 2
OP_GROUP = 4
OP_SNAP_TRASH = 8
OP_ALL = 15
OP_NAMES = {
    OP_CLONE_PARENT: "clone-parent",
    OP_CLONE_CHILD: "clone-child",
    OP_GROUP: "group",
    OP_SNAP_TRASH: "snap-trash",
}

FLAG_OBJECT_MAP_INVALID = 1
FLAG_FAST_DIFF_INVALID = 2
FLAG_NAMES = {FLAG_OBJECT_MAP_INVALID: "object map invalid", FLAG_FAST_DIFF_INVALID: "fast diff invalid"}


def names(mask: int, table: dict[int, str] = NAMES) -> list[str]:
    """Names of the known bits, lowest first."""
    return [name for bit, name in table.items() if mask & bit]


def parse(words: Iterable[str]) -> int:
    """Feature names to a mask. ValueError for a word that is none."""
    mask = 0
    for word in words:
        if word not in BITS:
            raise ValueError(f"unknown image feature {word!r}; one of {', '.join(BITS)}")
        mask |= BITS[word]
    return mask


def required(mask: int) -> int:
    """`mask` and what its features need: object-map needs exclusive-lock, fast-diff and object-map come together."""
    if mask & (OBJECT_MAP | FAST_DIFF):
        mask |= OBJECT_MAP | EXCLUSIVE_LOCK
    if mask & JOURNALING:
        mask |= EXCLUSIVE_LOCK
    return mask


def missing(mask: int) -> str | None:
    """Why a combination cannot exist, or None."""
    if mask & FAST_DIFF and not mask & OBJECT_MAP:
        return "fast-diff needs object-map"
    if mask & OBJECT_MAP and not mask & EXCLUSIVE_LOCK:
        return "object-map needs exclusive-lock"
    if mask & JOURNALING and not mask & EXCLUSIVE_LOCK:
        return "journaling needs exclusive-lock"
    return None


def incompatible(mask: int, read_only: bool) -> int:
    """The bits a client must know to open the image."""
    return mask & (INCOMPATIBLE if read_only else RW_INCOMPATIBLE)

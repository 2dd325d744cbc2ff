"""The options of RBD that an open image honours, from wherever they are set: image, else pool, else program or cluster,
else Ceph's default. They are read when the image is opened, and again when its header changes, which setting an option
of the image does; those of `options.py` that are not here are without effect.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping

from librbd_py.format import names
from librbd_py.format.values import dataclass
from librbd_py.store.api import ObjectContext, Store

from . import cls
from .objects import ignoring
from .options import OPTIONS

PREFIX = "conf_"
Lookup = Callable[[str], str]  # the program's and the cluster's value of an option; empty: not set

_UNITS = {"": 1, "B": 1, **{unit: 1 << 10 * (place + 1) for place, unit in enumerate("KMGTPE")}}
QOS = tuple(f"rbd_qos_{kind}{what}" for kind in ("", "read_", "write_") for what in ("iops", "bps"))


def number(value: str) -> int:
    """A count or a size with a unit (K, Ki, M, ...), as Ceph reads them; 0 for what is none."""
    text = value.strip()
    digits = text.rstrip("KMGTPEiB")
    unit = text[len(digits) :].removesuffix("i")
    try:
        return int(float(digits)) * _UNITS[unit]
    except (ValueError, KeyError, OverflowError):
        return 0


def switch(value: str) -> bool:
    return value.strip().lower() not in ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class Settings:
    """What an open image does by them. Seconds, bytes, counts."""

    atime_interval: int = 60  # 0: the access time is never set
    mtime_interval: int = 60
    discard_granularity: int = 65536  # a power of two; 0: discards are exact
    management_ops: int = 10  # objects at a time
    quiesce_attempts: int = 10  # notifies before a watcher that does not say that it stands still is given up
    limits: tuple[tuple[int, int], ...] = ((0, 0),) * 6  # rate, what may come at once; in the order of QOS


DEFAULTS = Settings()
# what of OF_IMAGES is honoured; the rest is kept and shown for others
HONOURED = frozenset(
    (
        "rbd_atime_update_interval",
        "rbd_mtime_update_interval",
        "rbd_discard_granularity_bytes",
        "rbd_skip_partial_discard",
        "rbd_concurrent_management_ops",
        "rbd_quiesce_notification_attempts",
        *(f"{name}_{what}" for name in QOS for what in ("limit", "burst", "burst_seconds")),
    )
)
# when an image is removed (rbd/pool.py)
HONOURED_AT_REMOVAL = frozenset(
    (
        "rbd_move_parent_to_trash_on_remove",
        "rbd_move_to_trash_on_remove",
        "rbd_move_to_trash_on_remove_expire_seconds",
    )
)
# of those that only pools have
HONOURED_OF_POOLS = frozenset(
    f"rbd_default_{name}" for name in ("clone_format", "data_pool", "features", "order", "stripe_count", "stripe_unit")
)


def _limit(values: Mapping[str, str], name: str) -> tuple[int, int]:
    rate, burst = number(values[f"{name}_limit"]), number(values[f"{name}_burst"])
    if burst and burst < rate:
        burst = 0  # librbd refuses such a burst
    return rate, (burst or rate) * max(number(values[f"{name}_burst_seconds"]), 1) if rate else 0


def resolve(of_image: Mapping[str, str], of_pool: Mapping[str, str], lookup: Lookup | None) -> Settings:
    """From metadata, whose keys are `conf_` and the option."""
    values = {}
    for name in HONOURED:
        key = PREFIX + name
        values[name] = of_image.get(key) or of_pool.get(key) or (lookup(name) if lookup else "") or OPTIONS[name]
    grain = number(values["rbd_discard_granularity_bytes"]) if switch(values["rbd_skip_partial_discard"]) else 0
    return Settings(
        atime_interval=number(values["rbd_atime_update_interval"]),
        mtime_interval=number(values["rbd_mtime_update_interval"]),
        discard_granularity=1 << min(grain.bit_length() - 1, 25) if grain else 0,
        management_ops=min(max(number(values["rbd_concurrent_management_ops"]), 1), 64),
        quiesce_attempts=min(max(number(values["rbd_quiesce_notification_attempts"]), 1), 1000),
        limits=tuple(_limit(values, name) for name in QOS),
    )


def read(ctx: ObjectContext, oid: str, lookup: Lookup | None) -> Settings:
    """Of the image whose header object this is. What its pool says lies in the pool's default namespace."""
    root = ctx.store.open(ctx.pool_id) if ctx.namespace else ctx
    with ignoring(errno.ENOENT, errno.EPERM):
        return resolve(_overrides(ctx, oid), _overrides(root, names.INFO), lookup)
    return resolve(_overrides(ctx, oid), {}, lookup)


def _overrides(ctx: ObjectContext, oid: str) -> dict[str, str]:
    rows = cls.metadata(ctx, oid)
    return {key: value.decode(errors="surrogateescape") for key, value in rows.items() if key.startswith(PREFIX)}


def of_store(store: Store) -> Lookup | None:
    """Where the cluster's own configuration is asked; None: the store has none."""
    connection = getattr(store, "connection", None)
    if connection is None:
        return None

    def lookup(name: str) -> str:
        try:
            return str(connection.conf_get(name))
        except OSError:
            return ""

    return lookup


def is_honoured(name: str) -> bool:
    """Whether setting the option changes what this library does."""
    return name in HONOURED | HONOURED_AT_REMOVAL | HONOURED_OF_POOLS

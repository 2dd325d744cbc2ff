"""`rbdpy perf image ...`: a module of Ceph's manager counts what the cluster serves; nobody counts on a folder."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from librbd_py.cli.arguments import FORMAT, POOL
from librbd_py.cli.failure import Failure, code_of, reason
from librbd_py.cli.output import Rows, Section, Table, size_text
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session, Spec, failures

PERIOD = 5.0  # seconds between two looks, as the module counts
METRICS = ("write_ops", "read_ops", "write_bytes", "read_bytes", "write_latency", "read_latency")
_HEADINGS = ("WR", "RD", "WR_BYTES", "RD_BYTES", "WR_LAT", "RD_LAT")
_CLEAR = "\x1b[H\x1b[2J"


@verb(
    "perf image iostat",
    "Display image IO statistics.",
    *POOL,
    "iterations",
    "sort-by",
    *FORMAT,
    spec=("pool-spec",),
)
def iostat(session: Session) -> None:
    spec = _where(session)
    times = session.option("iterations")
    if session.layout() != "plain":
        if times is not None:
            raise Failure("rbd: specifing iterations is not valid with formatted output", 22)
        rows = _waited(session, spec)
        shown = [
            Section("image", {"pool": pool, "pool_namespace": space, "image": image, **counts})
            for pool, space, image, counts in rows
        ]
        session.show(Rows("images", shown))
        return
    rows = _waited(session, spec)
    while True:
        print(_table(rows), flush=True)
        if times is not None:
            times -= 1
            if times <= 0:
                return
        time.sleep(PERIOD)
        rows = _counts(session, spec)


@verb("perf image iotop", "Display a top-like IO monitor.", *POOL, spec=("pool-spec",))
def iotop(session: Session) -> None:
    """Until it is interrupted."""
    spec = _where(session)
    rows = _waited(session, spec)
    while True:
        print((_CLEAR if sys.stdout.isatty() else "") + _table(rows), flush=True)
        time.sleep(PERIOD)
        rows = _counts(session, spec)


Row = tuple[str, str, str, dict[str, Any]]  # pool, namespace, image, what was counted


def _where(session: Session) -> Spec:
    from librbd_py.store.rados import RadosStore

    spec = session.pool_spec()
    if not isinstance(session.cluster.store, RadosStore):
        raise Failure(
            "rbd: images are counted by the manager of a Ceph cluster; rbdpyd counts what it serves itself "
            "(QMP: query-blockstats)",
            95,
        )
    return spec


def _waited(session: Session, spec: Spec) -> list[Row]:
    """The module begins to count when it is asked."""
    rows = _counts(session, spec)
    if not rows:
        session.say("rbd: waiting for initial image stats\n")
    while not rows:
        time.sleep(1)
        rows = _counts(session, spec)
    return rows


def _counts(session: Session, spec: Spec) -> list[Row]:
    pool = spec.pool + (f"/{spec.namespace}" if spec.namespace else "")
    sort = str(session.option("sort-by") or "write_ops").replace("-", "_")
    words = {"prefix": "rbd perf image stats", "pool_spec": pool, "sort_by": sort, "format": "json"}
    try:
        code, out, status = session.cluster.mgr_command(json.dumps(words), b"")
    except failures() as error:
        raise Failure(f"rbd: mgr command failed: {reason(error)}", code_of(error)) from None
    if code < 0:
        raise Failure(f"rbd: {words['prefix']} failed: {reason(-code)}: {status}", -code)
    return read_counts(out)


def read_counts(text: bytes | str) -> list[Row]:
    """What the module answers. Failure (22): something else."""
    try:
        found = json.loads(text)
        names, rows = found["stat_descriptors"], []
        for entry in found["stats"]:
            for image, values in entry.items():
                number, _, name = image.partition("/")
                pool, _, space = found["pool_descriptors"][number].partition("/")
                by_name = dict(zip(names, values, strict=True))
                counts = {key: by_name[key] if "latency" in key else int(by_name[key]) for key in METRICS}
                rows.append((pool, space, name, counts))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Failure("rbd: error decoding statistics", 22) from None
    return rows


def _table(rows: list[Row]) -> str:
    columns = [(f"{heading} ", "right") for heading in _HEADINGS]
    table = Table(("NAME", "left"), *columns, headings_as_cells=True)
    for pool, space, image, counts in rows:
        where = "/".join(part for part in (pool, space, image) if part)
        table.add(where, *(f"{shown(key, counts[key])} " for key in METRICS))
    return table.text()


def shown(metric: str, value: float) -> str:
    """As `rbd` prints it: 7.29k/s, 28 MiB/s, 1.25 ms."""
    if metric.endswith("bytes"):
        return f"{size_text(int(value))}/s"
    if metric.endswith("ops"):
        return f"{_thousands(int(value))}/s"
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.2f} ns"


def _thousands(count: int) -> str:
    index = 0
    while index < 6 and count >= 1000 ** (index + 1):
        index += 1
    unit = 1000**index
    return (
        f"{count // unit}{' kMGTPE'[index].strip()}"
        if count % unit == 0
        else f"{count / unit:.2f}{'kMGTPE'[index - 1]}"
    )

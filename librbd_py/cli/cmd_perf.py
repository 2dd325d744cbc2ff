"""`rbdpy perf image ...`: a module of Ceph's manager counts what the cluster serves; nobody counts on a folder."""

from __future__ import annotations

from librbd_py.cli.arguments import FORMAT, POOL
from librbd_py.cli.failure import Failure
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session


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
    session.pool_spec()
    if session.layout() != "plain" and session.option("iterations") is not None:
        raise Failure("rbd: specifing iterations is not valid with formatted output", 22)
    _unavailable()


@verb("perf image iotop", "Display a top-like IO monitor.", *POOL, spec=("pool-spec",))
def iotop(session: Session) -> None:
    session.pool_spec()
    _unavailable()


def _unavailable() -> None:
    raise Failure(
        "rbd: image statistics are counted by Ceph's manager, which rbdpy does not ask; rbdpyd counts what it serves "
        "itself (QMP: query-blockstats)",
        95,
    )

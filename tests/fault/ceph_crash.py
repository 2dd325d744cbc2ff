"""The operations of image_crash.py, killed between any two operations of librados on a real cluster, and what is found
afterwards. A server as that one: it never connects itself, so its children may.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from librbd_py import rbd
from librbd_py.format import names
from librbd_py.store import rados
from librbd_py.store.api import ListWatchers, ObjectContext
from librbd_py.store.check import pools
from librbd_py.store.rados.context import RadosContext
from tests.fault.image_crash import OPERATIONS, Fuse, Server, follow_advice, fuse_data, serve, survey_of, there

__all__ = ["OPERATIONS", "Server"]


@contextmanager
def opened(conf: str, pool: str) -> Iterator[ObjectContext]:
    with rados.connect(rados.parse_url(f"ceph:{conf}?rbd_default_clone_format=2")) as store:
        yield store.open(pool)


def prepare(name: str, conf: str, pool: str) -> object:
    with opened(conf, pool) as io:
        OPERATIONS[name].prepare(io)
    return None


def fuse_context(fuse: Fuse) -> None:
    def fused(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: RadosContext, *args: Any, **named: Any) -> Any:
            fuse.burn()
            return plain(self, *args, **named)

        return call

    for method in ("write", "snap_create", "snap_remove", "notify"):
        setattr(RadosContext, method, fused(getattr(RadosContext, method)))


def run(name: str, conf: str, pool: str, at: int) -> object:
    """The operation, with a fuse; the number of steps when it came through."""
    with opened(conf, pool) as io:
        fuse = Fuse(at)
        fuse_data(fuse)
        fuse_context(fuse)
        OPERATIONS[name].run(io)
        return fuse.count


def survey(conf: str, pool: str) -> dict[str, Any]:
    with opened(conf, pool) as io:
        settled(io)
        return survey_of(io)


def findings(io: ObjectContext) -> list[str]:
    """Of the pool; others of the cluster are other tests'."""
    report = pools.check(io.store, snapshots=True)
    return [str(finding) for finding in report if in_pool(finding.where, io)]


def settled(io: ObjectContext) -> list[str]:
    """When OSDs have dropped what they kept for snapshots, which they do in their own time."""
    deadline = time.monotonic() + 20
    while any("keeps data for" in row for row in findings(io)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return findings(io)


def in_pool(where: str, io: ObjectContext) -> bool:
    """Objects are named without their pool: those of another are not there."""
    if where.startswith("pool "):
        return where.startswith((f"pool {io.pool_id},", f"pool {io.pool_id}/"))
    return where in set(io.objects())


def fence(conf: str, pool: str) -> None:
    """Whoever watches an image of the pool: as long as a dead client's watch has not run out nobody can remove one."""
    with opened(conf, pool) as io:
        for oid in [oid for oid in io.objects() if oid.startswith(names.HEADER_PREFIX)]:
            with suppress(FileNotFoundError):
                for watcher in io.read(oid, [ListWatchers()])[0]:
                    io.store.blocklist_add(watcher.address)


def again(name: str, io: ObjectContext) -> str:
    try:
        OPERATIONS[name].run(io)
    except (OSError, rbd.Error) as failure:
        return repr(failure)
    return "done"


def resume(name: str, conf: str, pool: str) -> dict[str, Any]:
    """As in image_crash.py."""
    found: dict[str, Any] = {}
    with opened(conf, pool) as io:
        found["again"] = again(name, io)
        if "ImageBusy" in found["again"]:
            fence(conf, pool)  # what waiting for the dead client's watch to run out comes to
            found["again"] = again(name, io)
        found["check"] = findings(io)
        if found["check"]:
            pools.check(io.store, repair=True, snapshots=True)
            follow_advice(io)
        found["check at the end"] = settled(io)
        found["end"] = survey_of(io)
    return found


def advised(conf: str, pool: str) -> None:
    with opened(conf, pool) as io:
        for end in (rbd.RBD().migration_commit, rbd.RBD().migration_abort):
            for name in ("moved", "disk"):
                with suppress(rbd.Error):
                    end(io, name)
        follow_advice(io)


def leftovers(conf: str, pool: str) -> dict[str, Any]:
    """What is there, and what the check says of it, when somebody has removed all that can be listed."""
    with opened(conf, pool) as io:
        return {"check": findings(io), "objects": sorted(oid for oid in io.objects() if there(io, oid))}


CALLS: dict[str, Callable[..., object]] = {
    each.__name__: each for each in (prepare, run, survey, fence, resume, advised, leftovers)
}

if __name__ == "__main__":
    serve(CALLS)

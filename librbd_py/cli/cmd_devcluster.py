"""`rbdpy devcluster`: a scratch Ceph cluster on this machine, to try things and throw them away."""

from __future__ import annotations

import argparse
from pathlib import Path

from librbd_py import devcluster
from librbd_py.cli.output import Rows, Section, Table
from librbd_py.cli.registry import command, with_format
from librbd_py.cli.session import Failure, Session, code_of
from librbd_py.devcluster.cluster import default_folder


def with_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", help=f"folder of the cluster [default: {default_folder()}]")


def with_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--osds", type=int, default=1, help="how many OSDs [default: 1]")
    parser.add_argument("--auth", choices=("none", "cephx"), default="none", help="authentication [default: none]")
    parser.add_argument(
        "--objectstore",
        choices=("memstore", "bluestore"),
        default="memstore",
        help="where OSDs keep data: in memory, or in a sparse file each [default: memstore]",
    )
    parser.add_argument("--size", type=int, default=0, help="copies of each object [default: one per OSD, up to 3]")
    parser.add_argument("--mgr", action="store_true", help="start a manager too: quotas and statistics need it")
    parser.add_argument("--s3", action="store_true", help="start an S3 gateway (radosgw) with a user too; with cephx")
    parser.add_argument("--new-pool", action="append", metavar="NAME", help="pool to make; may repeat [default: rbd]")


def _cluster(session: Session) -> devcluster.DevCluster:
    return devcluster.DevCluster(Path(session.options.dir) if session.options.dir else default_folder())


def _failed(verb: str, error: OSError) -> Failure:
    return Failure(f"rbd: devcluster {verb}: {error.strerror or error}", code_of(error))


@command("devcluster start", "Start a scratch Ceph cluster on this machine's loopback.", with_dir, with_cluster)
def start(session: Session) -> None:
    given = session.options
    cluster = _cluster(session)
    try:
        options = devcluster.Options(
            osds=given.osds,
            auth="cephx" if given.s3 else given.auth,
            objectstore=given.objectstore,
            size=given.size,
            mgr=given.mgr,
            pools=tuple(given.new_pool or ("rbd",)),
        )
        cluster.start(options)
        access = cluster.start_s3() if given.s3 else None
    except OSError as error:
        raise _failed("start", error) from None
    print(f"--store {cluster.url}")
    for name, value in access.environment.items() if access else ():
        print(f"export {name}={value}")


@command("devcluster stop", "Stop the scratch Ceph cluster and remove all it held.", with_dir)
def stop(session: Session) -> None:
    cluster = _cluster(session)
    try:
        found = cluster.stop()
    except OSError as error:
        raise _failed("stop", error) from None
    if not found:
        raise Failure(f"rbd: devcluster stop: no scratch cluster in {cluster.folder}", 2)


@command("devcluster status", "Show the daemons of the scratch Ceph cluster.", with_dir, with_format)
def status(session: Session) -> None:
    try:
        found = _cluster(session).status()
    except OSError as error:
        raise _failed("status", error) from None
    daemons = Rows("daemons", [Section("daemon", {"name": n, "state": s}) for n, s in found.daemons.items()])
    if not session.plain:
        session.show(Section("devcluster", {"store": found.url, "daemons": daemons}))
        return
    table = Table(("DAEMON", "left"), ("STATE", "left"))
    for name, state in found.daemons.items():
        table.add(name, state)
    print(f"{table.text()}--store {found.url}")

"""`rbdpy export`: an image to a file as `rbd export`, or served over NBD or vhost-user-blk until interrupted."""

from __future__ import annotations

import argparse
import json
from typing import Any

from librbd_py.cli.cmd_data import export_file, with_path
from librbd_py.cli.registry import command, with_image, with_progress, with_snap
from librbd_py.cli.session import Failure, Session


def with_serving(parser: argparse.ArgumentParser) -> None:
    serve = parser.add_argument_group("serving instead of copying")
    serve.add_argument("--nbd", metavar="SOCKET|HOST:PORT", help="serve over NBD on a Unix socket or TCP address")
    serve.add_argument("--vhost-user", metavar="SOCKET", help="serve over vhost-user-blk on a Unix socket")
    serve.add_argument("--read-only", action="store_true", help="serve read-only (a snapshot always is)")
    serve.add_argument("--queues", type=int, default=1, help="vhost-user: queues offered [default: 1]")
    serve.add_argument("--name", help="NBD: export name [default: the image's]")
    serve.add_argument("--qmp", metavar="SOCKET", help="also answer QMP there")
    serve.add_argument("--pidfile", metavar="FILE", help="written when the image is served")


@command(
    "export",
    "Export image to file, or serve it over NBD or vhost-user-blk.",
    with_image,
    with_snap,
    with_path,
    with_progress,
    with_serving,
    specs=("source-image-or-snap-spec", "path-name"),
)
def export(session: Session) -> None:
    options = session.options
    if not options.nbd and not options.vhost_user:
        export_file(session)
        return
    spec = session.spec(snap="may")
    if len(options.specs) > (0 if options.image else 1):
        raise Failure("rbd: a path is not used with --nbd or --vhost-user", 22)
    read_only = options.read_only or bool(spec.snap)
    node: dict[str, Any] = {"driver": "rbd", "node-name": "image", "pool": spec.pool, "image": spec.image}
    node |= {"namespace": spec.namespace, "read-only": read_only}
    if spec.snap:
        node["snapshot"] = spec.snap
    argv = ["--blockdev", json.dumps(node)]
    if options.store:
        argv += ["--store", options.store]
    if options.nbd:
        argv += ["--nbd-server", json.dumps({"addr": nbd_address(options.nbd)})]
        export = {"type": "nbd", "id": "nbd", "node-name": "image", "name": options.name or spec.image}
        argv += ["--export", json.dumps(export | {"writable": not read_only})]
    if options.vhost_user:
        export = {"type": "vhost-user-blk", "id": "vhost-user", "node-name": "image"}
        export |= {"addr": {"type": "unix", "path": options.vhost_user}, "num-queues": options.queues}
        argv += ["--export", json.dumps(export | {"writable": not read_only})]
    for option in ("qmp", "pidfile"):
        if getattr(options, option):
            argv += [f"--{option}", getattr(options, option)]
    from qemu_glue import daemon  # only here: the other commands need no daemon

    session.close()
    status = daemon.main(argv)
    if status:
        raise Failure("", status)


def nbd_address(text: str) -> dict[str, Any]:
    """A path with a slash is a Unix socket; else HOST:PORT, :PORT or PORT (loopback)."""
    if "/" in text:
        return {"type": "unix", "data": {"path": text}}
    host, _, port = text.rpartition(":")
    return {"type": "inet", "data": {"host": host.strip("[]") or "127.0.0.1", "port": port}}

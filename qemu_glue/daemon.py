"""`rbdpyd`: serves any number of RBD images over vhost-user-blk and NBD and speaks QMP on its control socket.

    rbdpyd --store embedded:/var/lib/rbdpy --qmp /run/rbdpy/rbdpyd.sock [--state FILE]
           [--host [--run DIR] [--pools POOL,...] [--user NAME] [--group NAME]]
           [--blockdev KEY=VALUE,...|JSON]... [--nbd-server KEY=VALUE,...|JSON] [--export KEY=VALUE,...|JSON]...

--blockdev, --nbd-server and --export take what qemu-storage-daemon's options take. With --state the daemon remembers
what is served; started again after a crash it serves the same on the same sockets, and QEMU reconnects. With --host it
is the host service: it owns the sockets of VMs and images, and opens an image when a QEMU connects.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qemu_glue import sockets
from qemu_glue.commands import Service
from qemu_glue.former import Former
from qemu_glue.host.access import qemu_user
from qemu_glue.host.service import HostService
from qemu_glue.libvirt.domain import RUN
from qemu_glue.qmp_server import Handler, QMPServer
from qemu_glue.qmp_wire import QMPError
from qemu_glue.state import Journal

log = logging.getLogger("rbdpyd")

THREADS = 64  # that open and close images at once: a hundred VMs come at the same time after a restart
LOCK_PATIENCE = 5.0  # seconds that a predecessor may take to be gone


def parse_option(text: str) -> dict[str, Any]:
    """QEMU's KEY=VALUE,... (dots nest, doubled commas are commas, on/off and digits keep their type where the
    command wants it: see `typed`) or a JSON object. QMPError when it is neither."""
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise QMPError(f"not JSON: {error}") from None
        if not isinstance(value, dict):
            raise QMPError("a JSON object is wanted")
        return value
    result: dict[str, Any] = {}
    for item in text.replace(",,", "\0").split(","):
        key, separator, raw = item.replace("\0", ",").partition("=")
        if not separator:
            if result:
                raise QMPError(f"'{item}' is not KEY=VALUE")
            key, raw = "type", key  # the implied first key of --export
        place = result
        *outer, last = key.split(".")
        for part in outer:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise QMPError(f"'{key}' is given twice in different shapes")
        place[last] = typed(last, raw)
    return result


BOOLEANS = {"writable", "read-only", "auto-read-only", "writethrough", "fixed-iothread", "direct", "no-flush"}
NUMBERS = {"num-queues", "logical-block-size", "queue-size", "max-connections"}


def typed(key: str, raw: str) -> Any:
    """The value with the type its key has in QMP. QMPError when it cannot have it."""
    if key in BOOLEANS:
        if raw not in ("on", "off", "yes", "no", "true", "false"):
            raise QMPError(f"Parameter '{key}' expects 'on' or 'off'")
        return raw in ("on", "yes", "true")
    if key in NUMBERS:
        try:
            return int(raw, 0)
        except ValueError:
            raise QMPError(f"Parameter '{key}' expects a number") from None
    return raw


def nbd_address(option: dict[str, Any]) -> dict[str, Any]:
    """qemu-storage-daemon's flat addr.type=unix,addr.path=... -> nbd-server-start's {type, data}."""
    address = option.get("addr")
    if isinstance(address, dict) and "data" not in address:
        data = {key: value for key, value in address.items() if key != "type"}
        return {**option, "addr": {"type": address.get("type"), "data": data}}
    return option


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="rbdpyd", description="Serves RBD images over vhost-user-blk and NBD; QMP on its control socket."
    )
    parser.add_argument("--store", help="embedded:/path or a plain path; default $RBDPY_STORE or /var/lib/rbdpy")
    parser.add_argument("--qmp", metavar="PATH", help="Unix socket of the QMP control connection (mode 0600)")
    parser.add_argument(
        "--state", metavar="FILE", type=Path, help="remember here what is served; serve it again on start"
    )
    parser.add_argument("--blockdev", metavar="OPTIONS", action="append", default=[], help="as blockdev-add")
    parser.add_argument("--nbd-server", metavar="OPTIONS", action="append", default=[], help="as nbd-server-start")
    parser.add_argument("--export", metavar="OPTIONS", action="append", default=[], help="as block-export-add")
    host = parser.add_argument_group("host service")
    host.add_argument("--host", action="store_true", help="serve VMs: the rbd-vm-* and rbd-image-socket commands")
    host.add_argument("--run", default=RUN, help=f"folder of the sockets [default: {RUN}]")
    host.add_argument("--pools", default="", help="POOL,...: their images have sockets all the time, to attach them by")
    host.add_argument("--user", help="QEMU's user [default: of libvirt's qemu.conf, or of this system's libvirt]")
    host.add_argument("--libvirt", metavar="URI", help="resume its guests whose NBD disks were away with the service")
    host.add_argument("--group", help="QEMU's group, which the sockets get")
    parser.add_argument(
        "--pidfile", metavar="FILE", type=Path, help="written when everything is served, removed at the end"
    )
    parser.add_argument("--verbose", "-v", action="count", default=0, help="log more (twice: debug)")
    return parser.parse_args(argv)


def raise_file_limit() -> None:
    """An image takes a few file descriptors; a thousand images are a normal daemon."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def serve(options: argparse.Namespace) -> int:
    loop = asyncio.get_running_loop()
    server: QMPServer | None = None

    def emit(name: str, data: dict[str, Any]) -> None:
        if server:
            server.emit(name, data)

    state = Journal(options.state, LOCK_PATIENCE if options.host else 0.0) if options.state else None
    service = Service(options.store, emit, state)
    host: HostService | None = None
    former = Former(state)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.quit.set)
    listener: socket.socket | None = None
    try:
        handlers = service.handlers()
        if options.host:
            loop.set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="rbdpyd"))
            allowed = qemu_user(options.user, options.group)
            host = HostService(options.store, emit, state, former, options.run, allowed, service.nodes)
            handlers |= host.handlers()
            # First of all: QEMU tries once a second, and its whole machine waits for a back end that accepted it.
            host.restore()
            host.accept(tuple(pool for pool in options.pools.split(",") if pool), options.libvirt)
            # Hooks must not wait for what else was served: its store may be out of reach.
            server, listener = await monitor(options.qmp, handlers)
        await service.restore()
        for name, texts in (
            ("blockdev-add", options.blockdev),
            ("nbd-server-start", options.nbd_server),
            ("block-export-add", options.export),
        ):
            for text in texts:
                option = parse_option(text)
                await handlers[name](nbd_address(option) if name == "nbd-server-start" else option)
        if server is None:
            server, listener = await monitor(options.qmp, handlers)
        if options.pidfile:
            options.pidfile.write_text(f"{os.getpid()}\n")
        log.info("serving")
        notify_ready()
        await service.quit.wait()
        return 0
    finally:
        if host:
            await host.close()
        await service.close()
        if host:
            former.left()
        if server:
            await server.close()
        if state:
            state.close()
        if listener:
            sockets.remove(options.qmp)
        if options.pidfile:
            options.pidfile.unlink(missing_ok=True)


async def monitor(path: str | None, handlers: Mapping[str, Handler]) -> tuple[QMPServer, socket.socket | None]:
    """A QMP server, listening where that is wanted."""
    server = QMPServer(handlers)
    if not path:
        return server, None
    listener = sockets.listen_unix(path, mode=0o600)
    await server.listen(listener)
    return server, listener


def notify_ready() -> None:
    """systemd's readiness protocol (Type=notify): READY=1 on the socket named by NOTIFY_SOCKET."""
    where = os.environ.get("NOTIFY_SOCKET")
    if where:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(b"READY=1", "\0" + where[1:] if where.startswith("@") else where)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    level = {0: logging.WARNING, 1: logging.INFO}.get(options.verbose, logging.DEBUG)
    logging.basicConfig(level=level, format="rbdpyd: %(levelname)s: %(message)s")
    raise_file_limit()
    try:
        return asyncio.run(serve(options))
    except (QMPError, OSError) as error:
        print(f"rbdpyd: {error.strerror if isinstance(error, OSError) and error.strerror else error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

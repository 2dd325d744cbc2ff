"""Exports of the C data plane as Python objects: vhost-user-blk devices and NBD servers.

C owns the sockets' traffic; here are listening sockets, lifetime and facts. Source: native/ffi/api_export.h.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from typing import Any

from librbd_py.native import check, ffi, lib
from qemu_glue import sockets

MAX_CONNECTIONS = 256


def start_reactors(count: int = 0) -> None:
    """Starts the reactor threads (0 = one per core). Idempotent; before the first export."""
    check(lib.rbdn_runtime_start(count), "cannot start the reactors")


@dataclass(frozen=True)
class ExportStats:
    clients: int
    accepted: int
    broken: int
    resubmitted: int
    resumed: int
    dirty_pages: int
    switchover: int  # the one that waits for go_on() now; 0: none
    rings: int  # running now


class Export:
    """One export of one image. States: serving -> stopping -> stopped -> freed. stop() starts the way down; the
    event "stopped" tells that free() is allowed. `handle` of the image must outlive it."""

    def __init__(self, handle: Any, path: str | None = None) -> None:
        self._handle = handle
        self._path = path  # of the listening socket, when this export owns it

    def stats(self) -> ExportStats:
        raw = ffi.new("rbdn_export_stats *")
        check(lib.rbdn_export_stats_get(self._handle, raw), "export statistics")
        counts = (raw.clients, raw.accepted, raw.broken, raw.resubmitted, raw.resumed, raw.dirty_pages)
        return ExportStats(*counts, raw.switchover, raw.rings)

    def serve(self, sock: socket.socket) -> None:
        """Serves a connected Unix stream socket, at once or when the front end before has left. The export has a
        descriptor of its own afterwards. EINVAL: this export is not vhost-user; EAGAIN: too many wait; ESHUTDOWN."""
        check(lib.rbdn_vhost_serve(self._handle, os.dup(sock.fileno())), "cannot serve the connection")

    def go_on(self, switchover: int) -> bool:
        """Answers the front end that waits in a switch-over (the value of its event). False: nobody waits in it now."""
        code: int = lib.rbdn_export_go_on(self._handle, switchover)
        if code == -errno.ESTALE:
            return False
        check(code, "cannot end a switch-over")
        return True

    def stop(self, hard: bool) -> None:
        """No new clients; `hard` drops those present. Removes the socket. Idempotent."""
        if self._path:
            sockets.remove(self._path)
            self._path = None
        check(lib.rbdn_export_stop(self._handle, hard), "cannot stop the export")

    def free(self) -> None:
        """After "stopped"; EBUSY before."""
        check(lib.rbdn_export_free(self._handle), "cannot free the export")
        self._handle = None


def vhost_user_blk(
    export_id: int,
    image: Any,
    path: str | None,
    *,
    writable: bool,
    num_queues: int = 1,
    queue_size: int = 256,
    serial: str = "",
    block_size: int = 512,
    whole_memory: bool = False,
    mode: int = 0o660,
    group: int = -1,
) -> Export:
    """Serves `image` (a rbdn_image *) on a new Unix socket; path None: only sockets that Export.serve() brings. OSError
    when the socket or the export cannot be made. `whole_memory`: for guests that may be suspended while this process is
    replaced; they have 8 regions of memory at most (api_export.h)."""
    config = ffi.new("rbdn_vhost_config *")
    config.num_queues = num_queues
    config.queue_size_max = queue_size
    config.read_only = not writable
    config.write_cache = 1
    config.serial = serial.encode()[:20]
    config.logical_block_size = block_size
    config.whole_memory = whole_memory
    error = ffi.new("int *")
    if path is None:
        handle = lib.rbdn_vhost_start(export_id, image, -1, config, error)
    else:
        with sockets.listen_unix(path, mode, group) as sock:  # the export dups it
            handle = lib.rbdn_vhost_start(export_id, image, sock.fileno(), config, error)
    if not handle:
        if path is not None:
            sockets.remove(path)
        check(error[0], "cannot start the vhost-user-blk export")
    return Export(handle, path)


class NBDServer:
    """One NBD server: listening sockets and a table of exports by name."""

    def __init__(self, max_connections: int = MAX_CONNECTIONS) -> None:
        error = ffi.new("int *")
        self._handle = lib.rbdn_nbd_server_new(max_connections, error)
        self._path: str | None = None
        self.address = ""  # nbd+unix:///?socket=... or nbd://host:port
        if not self._handle:
            check(error[0], "cannot make an NBD server")

    def listen_unix(self, path: str, mode: int = 0o660, group: int = -1) -> None:
        with sockets.listen_unix(path, mode, group) as sock:
            check(lib.rbdn_nbd_listen(self._handle, sock.fileno()), f"cannot serve NBD on {path}")
        self._path = path
        self.address = f"nbd+unix:///?socket={path}"

    def listen_inet(self, host: str, port: int) -> None:
        """TCP. Port 0 lets the system choose; `address` then tells."""
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
            sock.listen(64)
            check(lib.rbdn_nbd_listen(self._handle, sock.fileno()), f"cannot serve NBD on {host}:{port}")
            bound = sock.getsockname()
        shown = f"[{bound[0]}]" if family == socket.AF_INET6 else bound[0]
        self.address = f"nbd://{shown}:{bound[1]}"

    def serve(self, sock: socket.socket) -> None:
        """Takes over one connected socket."""
        check(lib.rbdn_nbd_serve(self._handle, os.dup(sock.fileno())), "cannot serve the connection")

    def export(
        self, export_id: int, image: Any, name: str, *, writable: bool, description: str | None = None
    ) -> Export:
        """EEXIST when the name is taken."""
        config = ffi.new("rbdn_nbd_config *")
        config.read_only = not writable
        text = ffi.new("char[]", description.encode()) if description is not None else ffi.NULL
        config.description = text
        error = ffi.new("int *")
        handle = lib.rbdn_nbd_export(self._handle, export_id, image, name.encode(), config, error)
        if not handle:
            check(error[0], f"cannot export {name!r} over NBD")
        return Export(handle)

    def stop(self) -> None:
        """Closes sockets and clients; every export must have been stopped and freed."""
        if self._path:
            sockets.remove(self._path)
        check(lib.rbdn_nbd_server_stop(self._handle), "cannot stop the NBD server")
        self._handle = None

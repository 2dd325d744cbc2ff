"""A listening socket of one disk: accepts who may connect, within limits, and hands the sockets on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from qemu_glue import sockets
from qemu_glue.host.access import Allowed
from qemu_glue.host.peer import Peer, peer_of
from qemu_glue.libvirt.domain import ServedDisk

ACCEPTED_AT_ONCE = 16  # then others get their turn on the loop
CONNECTIONS_MAX = 16  # of one socket that wait to be served
SILENT_SECONDS = 10.0  # how long a vhost-user front end may say nothing before its image is opened
PAUSE_SECONDS = 1.0  # after accept failed, for want of descriptors most likely

log = logging.getLogger(__name__)


class Total(Protocol):
    """What all endpoints of a service share: how many sockets may be open at once."""

    connections: int
    connections_max: int


class Endpoint:
    """`handler(endpoint, socket, peer)` runs in a task for each accepted socket; it owns socket and peer. States:
    listening -> closed."""

    def __init__(
        self,
        path: str,
        disk: ServedDisk,
        vm: str,
        allowed: Allowed,
        total: Total,
        handler: Callable[[Endpoint, socket.socket, Peer], Awaitable[None]],
        silent: Callable[[Endpoint, int, Callable[[], bool]], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """Listens at once. `vm`: the uuid it belongs to, empty for an image's. OSError as `sockets.listen_unix`."""
        self.path = path
        self.disk = disk
        self.vm = vm
        self._allowed = allowed
        self._total = total
        self._handler = handler
        self._silent = silent  # runs beside a VM's connection that has nothing to say yet, and asks whether that is so
        self._beside: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._told = 0.0
        self._pause: asyncio.TimerHandle | None = None
        self._sock: socket.socket | None = sockets.listen_unix(path, 0o660, allowed.gid)
        self._sock.setblocking(False)
        self._reading = False

    def start(self) -> None:
        """Accepts from now on; until then those who connect wait."""
        if self._sock is not None and not self._reading:
            self._reading = True
            self._loop.add_reader(self._sock, self._accept)

    def close(self) -> None:
        """Stops listening and removes the socket. Connections stay."""
        if self._pause is not None:
            self._pause.cancel()
        if self._sock is not None:
            if self._reading:
                self._loop.remove_reader(self._sock)
            self._sock.close()
            self._sock = None
            sockets.remove(self.path)

    def _accept(self) -> None:
        assert self._sock is not None
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.ECONNABORTED, errno.EINTR):
                    self._stop_for_a_moment(error)
                    return
                continue
            self._came(sock)

    def _stop_for_a_moment(self, error: OSError) -> None:
        log.error("%s: accept: %s", self.path, error.strerror)
        self._loop.remove_reader(self._sock)  # type: ignore[arg-type]
        self._reading = False
        self._pause = self._loop.call_later(PAUSE_SECONDS, self.start)

    def _came(self, sock: socket.socket) -> None:
        refused = ""
        peer: Peer | None = None
        if len(self._tasks) >= CONNECTIONS_MAX:
            refused = f"{CONNECTIONS_MAX} connections are open"
        elif self._total.connections >= self._total.connections_max:
            refused = f"{self._total.connections_max} connections are open on this host"
        else:
            try:
                peer = peer_of(sock)
                if not self._allowed.admits(peer.uid):
                    refused = f"uid {peer.uid} (process {peer.pid}) is neither QEMU's user nor root"
            except OSError as error:
                refused = str(error.strerror)
        if refused or peer is None:
            sock.close()
            if peer is not None:
                peer.close()
            if self._loop.time() - self._told > 1.0:  # a flood must not fill the log
                self._told = self._loop.time()
                log.warning("%s: connection refused: %s", self.path, refused)
            return
        self._total.connections += 1
        task = self._loop.create_task(self._serve(sock, peer))
        self._tasks.add(task)
        task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._total.connections -= 1

    async def _serve(self, sock: socket.socket, peer: Peer) -> None:
        try:
            with sock, contextlib.closing(peer):
                if self.disk.transport == "vhost-user" and not await self._speaks(sock, peer):
                    return
                await self._handler(self, sock, peer)
        except Exception:  # a defect of ours must not take the service and its guests down
            log.exception("%s: connection of process %d", self.path, peer.pid)

    async def _speaks(self, sock: socket.socket, peer: Peer) -> bool:
        """Waits for the first message, which stays in the socket. An image is opened for nobody else.

        A QEMU that was here before the service, and connects again while its VM is still to come, says nothing before
        the VM runs, however long that takes: were it sent away it might have no connection just then."""
        ready: asyncio.Future[None] = self._loop.create_future()

        def readable() -> None:
            if not ready.done():
                ready.set_result(None)

        sock.setblocking(False)
        self._loop.add_reader(sock, readable)
        waits = bool(self.vm) and peer.elder
        if waits and self._silent is not None:
            task = self._loop.create_task(self._silent(self, peer.pid, lambda: not ready.done()))
            self._beside.add(task)
            task.add_done_callback(self._beside.discard)
        try:
            await asyncio.wait_for(ready, None if waits else SILENT_SECONDS)
            return bool(sock.recv(1, socket.MSG_PEEK))
        except (TimeoutError, OSError):
            return False
        finally:
            self._loop.remove_reader(sock)

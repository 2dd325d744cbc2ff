"""One QEMU on one disk: an open image of its own, with a watch and a lock of its own, and what serves it.

States: opening -> serving -> closing -> lingering -> closed; a failed opening goes to closed. The image is opened when
QEMU connects and closed when its connection is gone and its requests are done. Several sockets of one process share an
attachment: QEMU that comes again meets the same image, and NBD clients with several connections are promised one.

A VM that moved away leaves an offered lock behind until its next host takes it. To unlock it would let others in
between, so the image stays open that long (lingering), unless the VM comes back here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from librbd_py.image.locks import watchers
from qemu_glue import events
from qemu_glue.exports import Export, NBDServer, start_reactors, vhost_user_blk
from qemu_glue.handoff import HandOff, State
from qemu_glue.host.peer import Identity, Peer
from qemu_glue.libvirt.domain import ServedDisk
from qemu_glue.nodes import Node

OPEN_SECONDS = 60.0  # how long a front end is kept waiting for its image
UNUSED_SECONDS = 15.0  # an image that was opened and that nobody uses; longer than an NBD handshake may take
LINGER_SECONDS = 3600.0  # a VM that is kept suspended where it went takes its lock when it is resumed
LINGER_LOOK_SECONDS = 0.05
ALONE_SECONDS = 2.0  # between looks whether anybody else has the image open
DRAIN_SECONDS = 60.0  # after which the log says that a request is stuck
NBD_CONNECTIONS_MAX = 32  # of one process
QUEUES = 64  # offered to every guest; it uses as many as its device has

# Openings and closings, which hang while a store does: nothing else of the service may wait behind them.
_threads = ThreadPoolExecutor(256, thread_name_prefix="rbdpyd-disk")

log = logging.getLogger(__name__)


class Attachment:
    """Made in the opening state. `number`, `number` + 1: native ids of its exports, never used twice."""

    def __init__(
        self,
        disk: ServedDisk,
        path: str,
        vm: str,
        peer: Peer,
        number: int,
        open_node: Callable[[], Node],
        emit: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.disk = disk
        self.path = path
        self.vm = vm  # the uuid whose socket it is; empty: an image's
        self.pid = peer.pid
        self.identity = Identity(vm, peer.identity.name, peer.identity.incoming) if vm else peer.identity
        self.elder = peer.elder
        self.number = number
        self.state = "opening"
        self.node: Node | None = None
        self.closed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._emit = emit
        self._hand_off: HandOff | None = None
        self._wanted_here = asyncio.Event()  # ends lingering
        self._exports: list[tuple[int, Export]] = []
        self._server: NBDServer | None = None
        self._clients: dict[int, int] = {}
        self._stopped: dict[int, asyncio.Event] = {}
        self._unused: asyncio.TimerHandle | None = None
        self._opening = self._loop.create_task(self._open(open_node))
        self._closing: asyncio.Task[None] | None = None

    # --- the way up

    async def serve(self, sock: socket.socket) -> None:
        """Takes the socket over when the image is open. TimeoutError: that takes longer than OPEN_SECONDS; another
        OSError: it cannot be opened, or the attachment is closing."""
        await asyncio.wait_for(asyncio.shield(self._opening), OPEN_SECONDS)
        if self.state != "serving":
            raise OSError(errno.ESHUTDOWN, "the last connection is just being closed")
        if self._server is not None:
            self._server.serve(sock)
        else:
            self._exports[0][1].serve(sock)
        sock.close()

    async def _open(self, open_node: Callable[[], Node]) -> None:
        try:
            self.node = await self._loop.run_in_executor(_threads, open_node)
            try:
                await asyncio.to_thread(self._export, self.node)
                await self._prepare_moving(self.node)
            except BaseException:
                await self._end()
                raise
        except BaseException:
            self.state = "closed"
            self.closed.set()
            raise
        self.state = "serving"
        self._wait_for_use()

    def _export(self, node: Node) -> None:
        start_reactors()
        writable = not node.read_only
        if self.disk.transport == "vhost-user":
            self._follow(self.number)
            serial = node.image_name.encode(errors="replace")[:20].decode(errors="ignore")
            export = vhost_user_blk(
                self.number, node.native, None,
                writable=writable, num_queues=QUEUES, serial=serial, whole_memory=True,
            )  # fmt: skip
            self._exports.append((self.number, export))
            return
        self._server = NBDServer(NBD_CONNECTIONS_MAX)
        for offset, name in enumerate(("", self.disk.target or self.disk.image)):
            self._follow(self.number + offset)
            export = self._server.export(self.number + offset, node.native, name, writable=writable)
            self._exports.append((self.number + offset, export))

    async def _prepare_moving(self, node: Node) -> None:
        """A VM that comes from another host waits here for its lock. Over NBD nothing tells when it runs: its first
        write asks for the lock."""
        who = self.identity
        about = {"VM": who.name, "VM uuid": who.uuid, "disk": self.disk.target, "QEMU": str(self.pid)}
        node.handle.describe = {name: value for name, value in about.items() if value}
        if self._server is None and not node.read_only:
            self._hand_off = HandOff(node.handle, self._exports[0][1], self.identity.key, self._emit, node.name)
            if self.identity.incoming:
                await self._hand_off.stand_by(sure=not self.elder)
            elif self.elder:
                await self._hand_off.look_around()
            self._hand_off.start()

    def _follow(self, number: int) -> None:
        self._stopped[number] = asyncio.Event()
        self._clients[number] = 0
        events.follow(number, self._loop, lambda what, value: self._happened(number, what, value))

    # --- what happens

    def _happened(self, number: int, what: str, value: int) -> None:
        if what == "stopped":
            self._stopped[number].set()
        elif what in ("connected", "disconnected"):
            self._clients[number] = value
            if what == "disconnected" and not any(self._clients.values()) and self.state == "serving":
                self.close()
        elif what == "broken":
            log.warning("%s: process %d broke the protocol (queue %d)", self.path, self.pid, value)
        elif what == "stale":
            log.warning(f"%s: {events.STALE}", self.path, value)
        elif self._hand_off is not None:
            self._hand_off.happened(what, value)

    def _wait_for_use(self) -> None:
        if self.state == "serving" and not any(self._clients.values()):
            if self._unused is not None:
                self.close()
                return
            self._unused = self._loop.call_later(UNUSED_SECONDS, self._wait_for_use)

    # --- the way down

    def close(self) -> None:
        """Starts the way down: clients are dropped, requests in flight end, then the image is closed. Idempotent; wait
        for `closed`."""
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())

    async def _close(self) -> None:
        await asyncio.wait({self._opening})
        if self.state == "closed":
            return
        self.state = "closing"
        if self._unused is not None:
            self._unused.cancel()
        try:
            await self._end()
        except Exception:  # what cannot be closed must not keep others from it
            log.exception("%s: closing the image", self.path)
        finally:
            self.state = "closed"
            self.closed.set()

    async def _end(self) -> None:
        for number, export in self._exports:
            export.stop(hard=True)
            while not self._stopped[number].is_set():
                try:
                    await asyncio.wait_for(self._stopped[number].wait(), DRAIN_SECONDS)
                except TimeoutError:
                    log.error("%s: requests in flight do not end; the store does not answer", self.path)
            export.free()
        self._exports.clear()
        for number in self._stopped:
            events.forget(number)
        if self._hand_off is not None:
            await self._hand_off.end()
        if self._server is not None:
            await asyncio.to_thread(self._server.stop)
            self._server = None
        if self.node is not None:
            if self.node.handle.handing_over:
                await self._linger(self.node)
            await self._loop.run_in_executor(_threads, self.node.close)

    async def _linger(self, node: Node) -> None:
        self.state = "lingering"
        end = self._loop.time() + LINGER_SECONDS
        look, alone = self._loop.time() + ALONE_SECONDS, 0
        while node.handle.handing_over and self._loop.time() < end:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted_here.wait(), LINGER_LOOK_SECONDS)
                return
            if self._loop.time() > look:
                look = self._loop.time() + ALONE_SECONDS
                alone = alone + 1 if await asyncio.to_thread(_is_alone, node) else 0
                if alone == 2:
                    log.warning("%s: nobody is there any more to take the lock that was offered", self.path)
                    return

    def stop_lingering(self) -> None:
        """The VM comes back, or the service ends: an offer that nobody took is withdrawn."""
        self._wanted_here.set()

    def force(self) -> bool:
        """An operator's word for a disk whose requests wait because the lock was refused. False: they do not."""
        return self._hand_off is not None and self._hand_off.force()

    def describe(self) -> dict[str, Any]:
        node = self.node if self.state == "serving" else None
        return {
            "target": self.disk.target,
            "image": self.disk.spec,
            "transport": self.disk.transport,
            "path": self.path,
            "pid": self.pid,
            "state": self.state,
            "node-name": node.name if node is not None else "",
            "clients": sum(self._clients.values()),
            "lock-owner": node is not None and node.handle.is_lock_owner,
            "hand-off": self._hand_off.state.value if self._hand_off is not None else "",
            "refused": self._hand_off.reason if self._hand_off and self._hand_off.state is State.REFUSED else "",
            "read-only": node is not None and node.read_only,
        }


def _is_alone(node: Node) -> bool:
    """No other client watches the image: whoever was to take the lock is gone."""
    try:
        return len(watchers(node.handle)) < 2
    except OSError:
        return False  # the store is away

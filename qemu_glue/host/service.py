"""The host service: which VMs this host runs or is about to run, the sockets of their disks, and who is connected.

A VM is known from `rbd-vm-prepare` (libvirt's hook, or a program) until it is released and its QEMU is dead. Its
sockets listen all that time. What QEMU opens, and when it ends, the connections tell; the verbs only make and remove
sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
import stat
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from librbd_py.image.handle import ImageHandle
from librbd_py.store import default_url
from qemu_glue.arguments import check
from qemu_glue.former import Former
from qemu_glue.host import shapes
from qemu_glue.host.access import Allowed, check_reachable
from qemu_glue.host.attachment import OPEN_SECONDS, Attachment
from qemu_glue.host.deaf import wake
from qemu_glue.host.endpoint import Endpoint
from qemu_glue.host.in_use import in_use
from qemu_glue.host.names import image_socket
from qemu_glue.host.peer import Peer, vms_running
from qemu_glue.host.resume import resume
from qemu_glue.host.scanner import Scanner
from qemu_glue.libvirt.domain import TRANSPORTS, ServedDisk, socket_path
from qemu_glue.nodes import STORES, Node
from qemu_glue.qmp_wire import QMPError
from qemu_glue.state import Journal

PREPARE_SECONDS = 4.0  # the hook waits 5
SWEEP_SECONDS = 30.0  # between looks for VMs that are gone without a word
GRACE_SECONDS = 120.0  # from `prepare` until there must be a QEMU
ANNOUNCED_SECONDS = 60.0  # from a migration's announcement to its `prepare`, which libvirt calls next
LATE_MAX = 16  # looks at images that were given up and hang on, each with a thread
VMS_MAX = 4096
ATTACHMENTS_MAX = 8  # processes that have one disk open: two hosts on one machine in a migration, a backup, ...
CONNECTIONS_MAX = 8192
AGAIN_SECONDS = 0.5  # between attempts to open an image for a QEMU that waits
HOPELESS = (errno.ENOENT, errno.ENOSYS, errno.EROFS, errno.EACCES, errno.EPERM)

log = logging.getLogger(__name__)

Emit = Callable[[str, dict[str, Any]], None]


@dataclass
class VM:
    """States: prepared -> started -> released; a released one goes when its QEMU is dead."""

    uuid: str
    name: str
    disks: list[ServedDisk]
    incoming: bool
    since: float  # time of the loop
    state: str = "prepared"
    endpoints: dict[str, Endpoint] = field(default_factory=dict)  # by target


class HostService:
    """`store_url`: for disks that name no store. `run`: folder of the sockets. The caller calls restore() first and
    close() last; all runs on one event loop."""

    connections_max = CONNECTIONS_MAX

    def __init__(
        self,
        store_url: str | None,
        emit: Emit,
        journal: Journal | None,
        former: Former,
        run: str,
        allowed: Allowed,
        nodes: dict[str, Node],
    ) -> None:
        self.vms: dict[str, VM] = {}
        self.images: dict[str, Endpoint] = {}  # image sockets by path
        self._announced: dict[str, float] = {}  # VMs whose migration was announced -> until when that is believed
        self._asked_for: set[str] = set()  # those that rbd-image-socket made; the others come and go with the images
        self.attachments: dict[tuple[str, int], Attachment] = {}  # by path and pid
        self.connections = 0
        self.allowed = allowed
        self.run = run
        self.store_url = store_url or default_url()
        self._emit = emit
        self._journal = journal
        self._former = former
        self._nodes = nodes
        self._next = 1 << 32  # native ids of exports; those of block-export-add begin at 1
        self._names = 0
        self._lock = asyncio.Lock()  # one verb changes VMs at a time
        self._loop = asyncio.get_running_loop()
        self._tasks: list[asyncio.Task[None]] = []
        self._late: set[asyncio.Task[None]] = set()  # looks at images that a store does not answer
        self._ends: set[asyncio.Task[None]] = set()
        self._accepting = False
        self._libvirt: str | None = None
        self._ended = False

    def handlers(self) -> dict[str, Callable[[dict[str, Any]], Coroutine[Any, Any, Any]]]:
        return {
            "rbd-vm-incoming": self.vm_incoming,
            "rbd-vm-prepare": self.vm_prepare,
            "rbd-vm-started": self.vm_started,
            "rbd-vm-stopped": self.vm_stopped,
            "rbd-vm-release": self.vm_release,
            "rbd-vm-reconnect": self.vm_reconnect,
            "rbd-vm-query": self.vm_query,
            "rbd-vm-force": self.vm_force,
            "rbd-image-socket": self.image_socket,
        }

    # --- verbs

    async def vm_incoming(self, arguments: dict[str, Any]) -> None:
        """The `prepare` that follows is for a VM that comes by a migration and runs elsewhere until then."""
        uuid = shapes.uuid_in(check(arguments, shapes.VM)["uuid"])
        now = self._loop.time()
        self._announced = {known: until for known, until in self._announced.items() if until > now}
        if len(self._announced) >= VMS_MAX:
            raise QMPError(f"{VMS_MAX} VMs are announced already")
        self._announced[uuid] = now + ANNOUNCED_SECONDS

    async def vm_prepare(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answers when every disk's image can be read and every socket listens where QEMU's user reaches it. A VM that
        does not come by a migration is refused what another VM has in use."""
        said = check(arguments, shapes.PREPARE)
        uuid, disks = shapes.uuid_in(said["uuid"]), shapes.disks_in(said["disks"])
        paths = shapes.paths_in(said["sockets"])
        announced = self._announced.pop(uuid, 0.0) > self._loop.time()
        incoming = said["incoming"] or announced or self._still_comes(self.vms.get(uuid))
        # Before the lock: a store that hangs keeps no other VM waiting.
        await self._look_at(disks, None if incoming else uuid)
        async with self._lock:
            if uuid not in self.vms and len(self.vms) >= VMS_MAX:
                raise QMPError(f"{VMS_MAX} VMs are known already")
            for path in paths:
                if path not in self.images:
                    raise QMPError(f"{path} is no socket of an image that is there")
            vm = self._listen(uuid, said["name"], disks, incoming)
            try:
                await self._remember(vm)
            except OSError:
                self._drop(vm)
                raise
            return {"sockets": {target: endpoint.path for target, endpoint in vm.endpoints.items()}}

    async def vm_started(self, arguments: dict[str, Any]) -> None:
        vm = self.vms.get(shapes.uuid_in(check(arguments, shapes.VM)["uuid"]))
        if vm is not None:
            vm.state = "started"

    async def vm_stopped(self, arguments: dict[str, Any]) -> None:
        """QEMU has ended; its connections have told so already. The VM stays until `release`."""
        vm = self.vms.get(shapes.uuid_in(check(arguments, shapes.VM)["uuid"]))
        if vm is not None:
            vm.state = "stopped"

    async def vm_release(self, arguments: dict[str, Any]) -> None:
        """Also called after a refused `prepare`, for a VM that may run here: a live QEMU keeps its disks."""
        uuid = shapes.uuid_in(check(arguments, shapes.VM)["uuid"])
        async with self._lock:
            vm = self.vms.get(uuid)
            if vm is not None:
                vm.state = "released"
                if not await self._lives(vm):
                    await self._forget(vm)

    async def vm_reconnect(self, arguments: dict[str, Any]) -> None:
        """libvirtd came back and found the VM running. With `disks`, a VM that is not known becomes known."""
        said = check(arguments, shapes.RECONNECT)
        uuid = shapes.uuid_in(said["uuid"])
        disks = shapes.disks_in(said["disks"]) if said["disks"] is not None else None
        async with self._lock:
            vm = self.vms.get(uuid)
            if vm is None and disks:
                vm = self._listen(uuid, said["name"], disks, incoming=False)
                await self._remember(vm)
            if vm is not None:
                vm.state = "started"

    async def vm_query(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        said = check(arguments, shapes.QUERY)
        wanted = shapes.uuid_in(said["uuid"]) if said["uuid"] is not None else None
        shown = [self._describe(vm) for vm in self.vms.values() if wanted in (None, vm.uuid)]
        # Guests whose disks are images' sockets alone are known by what their QEMU says of itself.
        strangers: dict[str, list[Attachment]] = {}
        for attachment in self.attachments.values():
            uuid = attachment.identity.uuid
            if uuid not in self.vms and wanted in (None, uuid):
                strangers.setdefault(uuid, []).append(attachment)
        for uuid, its in strangers.items():
            disks = [attachment.describe() for attachment in its]
            shown.append({"uuid": uuid, "name": its[0].identity.name, "state": "unknown", "disks": disks})
        return shown

    async def vm_force(self, arguments: dict[str, Any]) -> None:
        """An operator's word for a VM that was refused the lock of its disks, because a stranger had owned it: it has
        them, and what it had asked for is done. RBD_HANDOFF_TAKEN tells when. QMPError: none of its disks waits."""
        uuid = shapes.uuid_in(check(arguments, shapes.VM)["uuid"])
        forced = [each.force() for each in self.attachments.values() if each.identity.uuid == uuid]
        if not any(forced):
            raise QMPError("no disk of that VM waits for a lock that was refused")

    async def image_socket(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The socket of an image of the service's own store, for a disk that is attached without a hook."""
        said = check(arguments, shapes.IMAGE_SOCKET)
        disk = shapes.disk_in({**said, "target": "vda"})
        try:
            await self._look_at([disk])
        except QMPError as error:
            raise QMPError(str(error).removeprefix(f"disk {disk.target}: ")) from None
        async with self._lock:
            endpoint = self.listen_image(disk.transport, disk.pool, disk.namespace, disk.image)
            self._asked_for.add(endpoint.path)
            if self._journal is not None:
                command = {"execute": "rbd-image-socket", "arguments": arguments}
                await asyncio.to_thread(self._journal.remember, f"image {endpoint.path}", command)
            return {"path": endpoint.path}

    # --- sockets

    def listen_image(self, transport: str, pool: str, namespace: str, image: str) -> Endpoint:
        """The image's socket, made when it is not there. OSError."""
        path = image_socket(self.run, transport, pool, namespace, image)
        endpoint = self.images.get(path)
        if endpoint is None:
            self._folder(os.path.dirname(path))
            disk = ServedDisk("", transport, pool, image, namespace)
            endpoint = self._endpoint(path, disk, "")
            self.images[path] = endpoint
        return endpoint

    def drop_image(self, path: str) -> None:
        """Who is connected stays so."""
        self.images.pop(path).close()

    def _listen(self, uuid: str, name: str, disks: list[ServedDisk], incoming: bool) -> VM:
        """The VM with a socket for every disk; on OSError everything is as it was."""
        old = self.vms.get(uuid)
        vm = VM(uuid, name, disks, incoming or self._still_comes(old), self._loop.time())
        made: list[Endpoint] = []
        kept = dict(old.endpoints) if old else {}
        try:
            self._folder(f"{self.run}/{uuid}")
            for disk in disks:
                path = socket_path(uuid, disk.target, self.run)
                there = kept.get(disk.target)
                if there is not None:
                    vm.endpoints[disk.target] = there
                else:
                    vm.endpoints[disk.target] = self._endpoint(path, disk, uuid)
                    made.append(vm.endpoints[disk.target])
                check_reachable(path, self.allowed)
        except OSError:
            for endpoint in made:
                endpoint.close()
            if old is None:
                self._remove_folder(uuid)
            raise
        for disk in disks:
            vm.endpoints[disk.target].disk = disk  # for who connects from now on
        for target, endpoint in kept.items():
            if target not in vm.endpoints:
                endpoint.close()
        self.vms[uuid] = vm
        return vm

    def _still_comes(self, vm: VM | None) -> bool:
        """Whether `prepare` belongs to the migration that the hook announced just before."""
        return vm is not None and vm.incoming and vm.state == "prepared"

    def _endpoint(self, path: str, disk: ServedDisk, vm: str) -> Endpoint:
        endpoint = Endpoint(path, disk, vm, self.allowed, self, self._connected, self._silent)
        if self._accepting:
            endpoint.start()
        return endpoint

    async def _silent(self, endpoint: Endpoint, pid: int, silent: Callable[[], bool]) -> None:
        if self._libvirt:
            await wake(self._libvirt, endpoint.vm, pid, endpoint.path, silent)

    def _folder(self, path: str) -> None:
        """Below `run`: entered by QEMU's group, changed by nobody else."""
        made = Path(self.run)
        for part in Path(path).relative_to(self.run).parts:
            made = made / part
            with contextlib.suppress(FileExistsError):
                os.mkdir(made, 0o700)
                os.chown(made, -1, self.allowed.gid)
                os.chmod(made, 0o750)
            if not stat.S_ISDIR(os.lstat(made).st_mode):
                raise OSError(errno.ENOTDIR, f"{made} is no folder")

    def _remove_folder(self, uuid: str) -> None:
        with contextlib.suppress(OSError):
            os.rmdir(f"{self.run}/{uuid}")

    def _drop(self, vm: VM) -> None:
        for endpoint in vm.endpoints.values():
            endpoint.close()
        self.vms.pop(vm.uuid, None)
        self._remove_folder(vm.uuid)

    # --- images

    async def _look_at(self, disks: Iterable[ServedDisk], starts: str | None = None) -> None:
        """Every image is there and can be read, and no other VM uses it when VM `starts` is to start: a refusal now is
        a sentence, one when QEMU connects would make it try for ever. QMPError."""
        if len(self._late) >= LATE_MAX:
            raise QMPError(f"the store does not answer: {len(self._late)} looks at images are not done yet")
        looks = {disk.target: asyncio.create_task(asyncio.to_thread(self._look, disk, starts)) for disk in disks}
        if not looks:
            return
        _, waiting = await asyncio.wait(looks.values(), timeout=PREPARE_SECONDS)
        for target, task in looks.items():
            if task in waiting:
                self._late |= waiting
                for late in looks.values():
                    late.add_done_callback(self._looked_late)
                raise QMPError(f"disk {target}: the store does not answer within {PREPARE_SECONDS:g} seconds")
        for target, task in looks.items():
            failure = task.exception()
            if failure is not None:
                for other in looks.values():
                    other.add_done_callback(self._looked_late)
                why = failure.strerror if isinstance(failure, OSError) and failure.strerror else failure
                raise QMPError(f"disk {target}: {why}")

    def _looked_late(self, task: asyncio.Task[None]) -> None:
        """A look whose answer nobody waits for any more."""
        self._late.discard(task)
        if not task.cancelled():
            task.exception()

    def _look(self, disk: ServedDisk, starts: str | None) -> None:
        url = disk.store or self.store_url
        store = STORES.take(url)
        try:
            context = store.open(disk.pool, disk.namespace)
            snapshot = disk.snapshot or None
            with ImageHandle.open(context, disk.image, snapshot=snapshot, read_only=True) as handle:
                writes = starts is not None and snapshot is None and not disk.read_only
                used = in_use(handle, starts) if writes and starts is not None else None
            if used is not None:
                raise OSError(errno.EBUSY, used)
        except OSError as error:
            if error.errno == errno.ESHUTDOWN:
                STORES.shut_out(store)
            colon = "" if error.errno == errno.EBUSY else ":"
            raise OSError(error.errno, f"image {disk.spec}{colon} {error.strerror or error}") from None
        finally:
            STORES.give_back(url, store)

    # --- connections

    async def _connected(self, endpoint: Endpoint, sock: socket.socket, peer: Peer) -> None:
        """Has one accepted socket served, or gives it up."""
        key = (endpoint.path, peer.pid or id(sock))
        attachment = await self._served(endpoint, sock, peer, key)
        if attachment is not None:
            self._emit("RBD_DISK_CONNECTED", self._event(attachment))

    async def _until_closed(self, key: tuple[str, int], attachment: Attachment, pidfd: int) -> None:
        """Whatever ends it, also an opening that nobody waited for. Owns the pidfd."""
        try:
            with _watching(self._loop, pidfd, attachment.close):
                await attachment.closed.wait()
        finally:
            if pidfd >= 0:
                os.close(pidfd)
        if self.attachments.get(key) is attachment:
            del self.attachments[key]
        if attachment.node is not None:
            self._nodes.pop(attachment.node.name, None)
            self._emit("RBD_DISK_DISCONNECTED", self._event(attachment))
        await self._maybe_gone(attachment.vm)

    async def _served(
        self, endpoint: Endpoint, sock: socket.socket, peer: Peer, key: tuple[str, int]
    ) -> Attachment | None:
        """The attachment that took the socket over. While the image cannot be opened it is tried again, because QEMU
        7.2 never comes back to a back end that closed the connection before it answered. None: it never can, or nobody
        waits any more."""
        end = self._loop.time() + OPEN_SECONDS
        told = ""
        while not self._ended:
            await self._make_room(endpoint, key)
            attachment = self.attachments.get(key)
            if attachment is None:
                if sum(path == endpoint.path for path, _ in self.attachments) >= ATTACHMENTS_MAX:
                    log.warning("%s: %d processes have it open: no more", endpoint.path, ATTACHMENTS_MAX)
                    return None
                attachment = self.attachments[key] = self._attach(endpoint, peer)
                pidfd = os.dup(peer.pidfd) if peer.pidfd >= 0 else -1
                task = self._loop.create_task(self._until_closed(key, attachment, pidfd))
                self._ends.add(task)
                task.add_done_callback(self._ends.discard)
            try:
                await attachment.serve(sock)
                return attachment
            except OSError as error:
                if self.attachments.get(key) is attachment and attachment.state == "closed":
                    del self.attachments[key]
                why = "opening it takes its time" if isinstance(error, TimeoutError) else str(error.strerror or error)
                if why != told:
                    told = why
                    self._refused(endpoint, attachment, why)
                if error.errno in HOPELESS or self._loop.time() > end or _hung_up(sock):
                    return None
            await asyncio.sleep(AGAIN_SECONDS)
        return None

    async def _make_room(self, endpoint: Endpoint, key: tuple[str, int]) -> None:
        """Requests of this QEMU's last connection end first; an offer that nobody took is withdrawn, its VM is back."""
        for other in list(self.attachments.values()):
            if other.state == "lingering" and other.path == endpoint.path:
                other.stop_lingering()
                await other.closed.wait()
        while (old := self.attachments.get(key)) is not None and old.state in ("closing", "closed"):
            await old.closed.wait()
            if self.attachments.get(key) is old:
                del self.attachments[key]

    def _attach(self, endpoint: Endpoint, peer: Peer) -> Attachment:
        number, self._next = self._next, self._next + 2
        self._names += 1
        opening = partial(self._open, endpoint.disk, f"host{self._names}")
        return Attachment(endpoint.disk, endpoint.path, endpoint.vm, peer, number, opening, self._emit)

    def _open(self, disk: ServedDisk, name: str) -> Node:
        """Runs in a thread."""
        arguments = {
            "node-name": name,
            "pool": disk.pool,
            "namespace": disk.namespace,
            "image": disk.image,
            "snapshot": disk.snapshot or None,
            "conf": disk.store or None,
            "user": None,
            "read-only": disk.read_only,
            "cache": {"direct": True},
        }
        node = Node.open(arguments, self.store_url, self._former)
        self._loop.call_soon_threadsafe(self._nodes.__setitem__, name, node)
        return node

    def _refused(self, endpoint: Endpoint, attachment: Attachment, why: str) -> None:
        log.warning("%s: process %d is not served: %s", endpoint.path, attachment.pid, why)
        self._emit("RBD_DISK_REFUSED", {**self._event(attachment), "reason": why})

    def _event(self, attachment: Attachment) -> dict[str, Any]:
        identity = attachment.identity
        return {
            "uuid": identity.uuid,
            "name": identity.name,
            "target": attachment.disk.target,
            "image": attachment.disk.spec,
            "path": attachment.path,
            "pid": attachment.pid,
        }

    # --- VMs that are gone

    async def _lives(self, vm: VM) -> bool:
        """Whether a QEMU of this VM runs here: one that is connected, or one that comes again after a restart."""
        if any(attachment.vm == vm.uuid for attachment in self.attachments.values()):
            return True
        return vm.uuid in await asyncio.to_thread(vms_running)

    async def _maybe_gone(self, uuid: str) -> None:
        """After a connection's end."""
        vm = self.vms.get(uuid)
        if vm is not None and vm.state == "released":
            async with self._lock:
                if self.vms.get(uuid) is vm and vm.state == "released" and not await self._lives(vm):
                    await self._forget(vm)

    async def _sweep(self) -> None:
        """VMs whose end nobody told of: the hook came while the service was down, or `prepare` led to nothing."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            async with self._lock:
                running = await asyncio.to_thread(vms_running)
                connected = {attachment.vm for attachment in self.attachments.values()}
                for vm in list(self.vms.values()):
                    old = self._loop.time() - vm.since > GRACE_SECONDS or vm.state == "released"
                    if old and vm.uuid not in running and vm.uuid not in connected:
                        log.info("VM %s (%s) is gone", vm.uuid, vm.name)
                        await self._forget(vm)

    async def _forget(self, vm: VM) -> None:
        """Under the lock."""
        self._drop(vm)
        if self._journal is not None:
            await asyncio.to_thread(self._journal.forget, f"vm {vm.uuid}")

    async def _remember(self, vm: VM) -> None:
        if self._journal is not None:
            arguments = {"uuid": vm.uuid, "name": vm.name, "disks": [shapes.disk_out(disk) for disk in vm.disks]}
            command = {"execute": "rbd-vm-prepare", "arguments": arguments}
            await asyncio.to_thread(self._journal.remember, f"vm {vm.uuid}", command)

    # --- start and end

    def restore(self) -> None:
        """Listens on every socket that the journal knows. Who connects waits until accept()."""
        for key, command in list(self._journal.commands.items()) if self._journal is not None else ():
            try:
                if key.startswith("vm "):
                    said = check(command["arguments"], shapes.PREPARE)
                    self._listen(shapes.uuid_in(said["uuid"]), said["name"], shapes.disks_in(said["disks"]), False)
                elif key.startswith("image "):
                    said = check(command["arguments"], shapes.IMAGE_SOCKET)
                    path = self.listen_image(said["transport"], said["pool"], said["namespace"], said["image"]).path
                    self._asked_for.add(path)
            except (QMPError, OSError) as error:
                log.error("restore: %s: %s", key, error)

    def accept(self, pools: tuple[str, ...] = (), libvirt: str | None = None) -> None:
        """Serves who connects, from now on. `pools`: those of the service's own store whose images have sockets.
        `libvirt`: the URI of who can resume guests."""
        self._accepting = True
        self._libvirt = libvirt
        for endpoint in [*self.images.values(), *(e for vm in self.vms.values() for e in vm.endpoints.values())]:
            endpoint.start()
        self._tasks.append(self._loop.create_task(self._sweep()))
        before = {vm.uuid for vm in self.vms.values() if any(disk.transport == "nbd" for disk in vm.disks)}
        if before and libvirt:
            self._tasks.append(self._loop.create_task(resume(libvirt, before, self._all_back)))
        if pools:
            scanner = Scanner(self.store_url, pools, self.images_are)
            self._tasks.append(self._loop.create_task(scanner.run()))

    def _all_back(self, uuid: str) -> bool:
        """Whether every NBD disk of the VM is connected; also when the VM is gone."""
        vm = self.vms.get(uuid)
        wanted = {disk.target for disk in vm.disks if disk.transport == "nbd"} if vm is not None else set()
        its = (a for a in self.attachments.values() if a.vm == uuid and a.describe()["clients"])
        return wanted <= {attachment.disk.target for attachment in its}

    def images_are(self, names: set[tuple[str, str]]) -> None:
        """(pool, image) of all that shall have sockets; others lose theirs, but for those that were asked for."""
        wanted = set(self._asked_for)
        for pool, image in sorted(names):
            for transport in TRANSPORTS:
                try:
                    wanted.add(self.listen_image(transport, pool, "", image).path)
                except OSError as error:
                    log.warning("image %s/%s has no %s socket: %s", pool, image, transport, error)
        for path in self.images.keys() - wanted:
            self.drop_image(path)

    async def close(self) -> None:
        """Stops listening, drops everybody once their requests are done, closes all images. What is remembered stays,
        so that the next daemon serves the same."""
        self._ended = True
        for task in self._tasks:
            task.cancel()
        endpoints = [*self.images.values(), *(e for vm in self.vms.values() for e in vm.endpoints.values())]
        for endpoint in endpoints:
            endpoint.close()
        attachments = list(self.attachments.values())
        for attachment in attachments:
            attachment.stop_lingering()
            attachment.close()
        for attachment in attachments:
            await attachment.closed.wait()
        if self._ends:
            await asyncio.wait(self._ends)

    def _describe(self, vm: VM) -> dict[str, Any]:
        disks = []
        for disk in vm.disks:
            its = [a for a in self.attachments.values() if a.vm == vm.uuid and a.disk.target == disk.target]
            if its:
                disks += [attachment.describe() for attachment in its]
            else:
                path = vm.endpoints[disk.target].path
                shown = {"target": disk.target, "image": disk.spec, "transport": disk.transport, "path": path}
                disks.append({**shown, "state": "waiting", "clients": 0})
        # Those that were attached by an image's socket.
        disks += [a.describe() for a in self.attachments.values() if not a.vm and a.identity.uuid == vm.uuid]
        return {"uuid": vm.uuid, "name": vm.name, "state": vm.state, "incoming": vm.incoming, "disks": disks}


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


@contextlib.contextmanager
def _watching(loop: asyncio.AbstractEventLoop, pidfd: int, dead: Callable[[], None]) -> Any:
    """Calls `dead` when the process ends. An end of the connection says the same, unless a child of it lives on."""
    if pidfd < 0:
        yield
        return

    def ended() -> None:
        loop.remove_reader(pidfd)
        dead()

    loop.add_reader(pidfd, ended)
    try:
        yield
    finally:
        loop.remove_reader(pidfd)

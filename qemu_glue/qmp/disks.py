"""Disks of a running machine: attach, detach, resize.

A disk called NAME is the device NAME with, behind it, either the chardev `NAME-chardev` (vhost-user) or the block
nodes `NAME-node` (the one the guest's device is on) and `NAME-nbd0`, `NAME-nbd1`, ... (a connection to an NBD
server). Two nodes, because QEMU cannot change the size of an NBD connection: a new one is put below the first.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from qemu_glue.qmp.connection import Connection
from qemu_glue.qmp.errors import CommandFailed, Late, MachineError
from qemu_glue.qmp.steps import Steps

SOCKET_SECONDS = 5.0  # until the chardev of a new disk is connected
UNPLUG_SECONDS = 20.0  # for the guest to give a disk back
NBD_WAIT = 30  # seconds a guest's requests wait for an NBD server that went away; then they fail
RELEASE_SECONDS = 5.0  # until QEMU lets go of what was behind the device
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,19}")
I440FX = (0x8086, 0x1237)  # its bus takes devices at run time; q35's root bus does not

Resizer = Callable[[int], Awaitable[object]]


@dataclass(frozen=True)
class DiskSpec:
    """A disk to attach. `kind` "vhost-user" (`path`: the export's socket) or "nbd" (`path`: the server's Unix socket,
    `export` its name). `bus`: the id of a free root port; empty: one is looked for."""

    name: str
    kind: str
    path: str
    export: str = ""
    queues: int = 1
    bus: str = ""

    def checked(self) -> None:
        check_name(self.name)
        if self.kind not in ("vhost-user", "nbd"):
            raise MachineError(errno.EINVAL, f"there is no disk kind {self.kind!r}")
        if not 1 <= self.queues <= 64:
            raise MachineError(errno.EINVAL, "a disk has 1 to 64 queues")


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise MachineError(errno.EINVAL, f"{name!r} cannot be the name of a disk")


def nbd_node(name: str, path: str, export: str, reconnect: int = NBD_WAIT) -> dict[str, Any]:
    """blockdev-add's arguments for one connection."""
    return {
        "driver": "nbd",
        "node-name": name,
        "server": {"type": "unix", "path": path},
        "export": export,
        "discard": "unmap",
        "cache": {"direct": True},
        "reconnect-delay": reconnect,
    }


def raw_node(name: str, below: str) -> dict[str, Any]:
    """blockdev-add's arguments for the node that the device is on."""
    return {"driver": "raw", "node-name": name, "file": below, "discard": "unmap", "cache": {"direct": True}}


async def free_port(qmp: Connection) -> str | None:
    """The id of a root port without a device; None when the machine takes devices on its own bus. ENOSPC when all are
    taken."""
    ports: list[tuple[str, bool]] = []
    open_bus = False
    for bus in await qmp.execute("query-pci"):
        for device in bus.get("devices", []):
            what = device.get("id", {})
            open_bus |= (what.get("vendor"), what.get("device")) == I440FX
            if "pci_bridge" in device and device.get("qdev_id"):
                ports.append((str(device["qdev_id"]), not device["pci_bridge"].get("devices")))
    for port, free in ports:
        if free:
            return port
    if open_bus:
        return None
    raise MachineError(
        errno.ENOSPC,
        f"the machine has no free root port for one more disk ({len(ports)} are taken): give it some when it starts"
        " (-device pcie-root-port,id=NAME,chassis=N)",
    )


async def attach(qmp: Connection, spec: DiskSpec) -> None:
    """The guest gets the disk. MachineError: EINVAL, EEXIST (the name is taken), ENOSPC (no free root port),
    ECONNREFUSED (nobody serves `path`), or what QEMU says. Nothing is left behind but what the error names."""
    spec.checked()
    if spec.name in await devices(qmp):
        raise MachineError(errno.EEXIST, f"the machine has a device {spec.name} already")
    bus = spec.bus or await free_port(qmp)
    device: dict[str, Any] = {"id": spec.name, "num-queues": spec.queues}
    if bus:
        device["bus"] = bus
    async with Steps() as steps:
        if spec.kind == "vhost-user":
            chardev = f"{spec.name}-chardev"
            await steps.run(f"chardev {chardev}", _chardev(qmp, chardev, spec), lambda: _drop_chardev(qmp, chardev))
            await steps.run("connection", _connected(qmp, chardev, spec.path))
            device |= {"driver": "vhost-user-blk-pci", "chardev": chardev}
        else:
            node, wire = f"{spec.name}-node", f"{spec.name}-nbd0"
            add = qmp.execute("blockdev-add", nbd_node(wire, spec.path, spec.export))
            await steps.run(f"node {wire}", add, lambda: _drop_node(qmp, wire))
            above = qmp.execute("blockdev-add", raw_node(node, wire))
            await steps.run(f"node {node}", above, lambda: _drop_node(qmp, node))
            device |= {"driver": "virtio-blk-pci", "drive": node}
        await steps.run(f"device {spec.name}", qmp.execute("device_add", device), lambda: _unplug_again(qmp, spec.name))


async def _chardev(qmp: Connection, name: str, spec: DiskSpec) -> None:
    data = {"addr": {"type": "unix", "data": {"path": spec.path}}, "server": False, "reconnect": 1}
    limit = asyncio.get_running_loop().time() + RELEASE_SECONDS
    while True:
        try:
            await qmp.execute("chardev-add", {"id": name, "backend": {"type": "socket", "data": data}})
            return
        except CommandFailed as error:
            # One of that name was removed while it was connecting: QEMU ends it when the attempt ends.
            if "duplicate yank" not in error.description or asyncio.get_running_loop().time() > limit:
                raise
        await asyncio.sleep(0.05)


async def _connected(qmp: Connection, name: str, path: str) -> None:
    """A device on a chardev that is not connected would stop QEMU, guest and all, until somebody listens."""
    loop = asyncio.get_running_loop()
    limit = loop.time() + SOCKET_SECONDS
    while True:
        for row in await qmp.execute("query-chardev"):
            if row.get("label") == name and not str(row.get("filename", "")).startswith("disconnected:"):
                return
        if loop.time() > limit:
            raise MachineError(errno.ECONNREFUSED, f"QEMU cannot connect to {path}: nobody serves a disk there")
        await asyncio.sleep(0.02)


async def _unplug_again(qmp: Connection, name: str) -> None:
    with qmp.listen("DEVICE_DELETED") as deleted:
        try:
            await qmp.execute("device_del", {"id": name})
        except CommandFailed as error:
            if error.error_class == "DeviceNotFound":
                return
            raise
        await deleted.until(lambda event: event.data.get("device") == name, UNPLUG_SECONDS)


async def _drop_chardev(qmp: Connection, name: str) -> None:
    """Removes a chardev; nothing when it is gone. QEMU may still hold it for a moment."""

    async def present() -> bool:
        return any(row.get("label") == name for row in await qmp.execute("query-chardev"))

    await _dropped(present, lambda: qmp.execute("chardev-remove", {"id": name}))


async def _drop_node(qmp: Connection, name: str) -> None:
    async def present() -> bool:
        return name in await nodes(qmp)

    await _dropped(present, lambda: qmp.execute("blockdev-del", {"node-name": name}))


async def _dropped(present: Callable[[], Awaitable[bool]], drop: Callable[[], Awaitable[object]]) -> None:
    limit = asyncio.get_running_loop().time() + RELEASE_SECONDS
    while await present():
        try:
            await drop()
            return
        except CommandFailed:
            if asyncio.get_running_loop().time() > limit:
                raise
        await asyncio.sleep(0.05)


async def devices(qmp: Connection) -> list[str]:
    """Ids of the devices that were given one."""
    rows = await qmp.execute("qom-list", {"path": "/machine/peripheral"})
    return [str(row.get("name")) for row in rows if str(row.get("type", "")).startswith("child<")]


async def nodes(qmp: Connection) -> dict[str, dict[str, Any]]:
    """Block nodes by name."""
    rows = await qmp.execute("query-named-block-nodes", {"flat": True})
    return {str(row.get("node-name")): row for row in rows}


async def _property(qmp: Connection, device: str, name: str) -> str:
    try:
        return str(await qmp.execute("qom-get", {"path": f"/machine/peripheral/{device}", "property": name}))
    except CommandFailed:
        return ""


async def backend(qmp: Connection, name: str) -> tuple[str, str]:
    """What is behind the device: ("chardev", its id) or ("node", the block node's name). ENODEV; EINVAL when it is no
    disk."""
    if name not in await devices(qmp):
        raise MachineError(errno.ENODEV, f"the machine has no disk {name}")
    if chardev := await _property(qmp, name, "chardev"):
        return "chardev", chardev
    if drive := await _property(qmp, name, "drive"):
        return "node", drive
    if name not in await devices(qmp):  # the guest gave it back just now
        raise MachineError(errno.ENODEV, f"the machine has no disk {name}")
    raise MachineError(errno.EINVAL, f"the device {name} is no disk")


async def detach(qmp: Connection, name: str, deadline: float = UNPLUG_SECONDS) -> None:
    """Takes the disk from the guest, which must agree. MachineError: ENODEV; EBUSY: the guest refused, or did not
    answer within `deadline` seconds (it is still starting, or has no hot-plug): the disk is still there and in use,
    and the guest may still give it back: call again, which waits and removes what is left. An interrupted detach is
    finished by the same call."""
    check_name(name)
    try:
        kind, behind = await backend(qmp, name)
    except MachineError as error:
        if error.errno != errno.ENODEV or not await _leftovers(qmp, name):
            raise
    else:
        await _unplug(qmp, name, deadline)
        if kind == "chardev":
            await _drop_chardev(qmp, behind)
        else:
            await _drop_node(qmp, behind)
    await _drop_chardev(qmp, f"{name}-chardev")
    await _drop_node(qmp, f"{name}-node")
    for node in await _wires(qmp, name):
        await _drop_node(qmp, node)


async def _wires(qmp: Connection, name: str) -> dict[str, dict[str, Any]]:
    """The connections to an NBD server that are there for the disk, the oldest first."""
    found = {
        node: row for node, row in (await nodes(qmp)).items() if re.fullmatch(re.escape(name) + r"-nbd\d{1,6}", node)
    }
    return dict(sorted(found.items(), key=lambda item: int(item[0].rpartition("nbd")[2])))


async def _leftovers(qmp: Connection, name: str) -> bool:
    chardevs = [str(row.get("label")) for row in await qmp.execute("query-chardev")]
    ours = re.compile(re.escape(name) + r"-(chardev|node|nbd\d+)")
    return any(ours.fullmatch(label) for label in [*chardevs, *await nodes(qmp)])


async def _unplug(qmp: Connection, name: str, deadline: float) -> None:
    refused = "DEVICE_UNPLUG_GUEST_ERROR"
    with qmp.listen("DEVICE_DELETED", refused) as events:
        try:
            await qmp.execute("device_del", {"id": name})
        except CommandFailed as error:
            if error.error_class == "DeviceNotFound":  # the guest gave it back just now
                return
            if "in the process of unplug" not in error.description:
                raise
        try:
            event = await events.until(lambda event: event.data.get("device") == name, deadline)
        except Late:
            failure = MachineError(errno.EBUSY, f"the guest did not give back the disk {name} within {deadline:g} s")
            failure.left = [f"the disk {name}, in use; the guest may still give it back"]
            raise failure from None
    if event.name == refused:
        failure = MachineError(errno.EBUSY, f"the guest refuses to give back the disk {name}")
        failure.left = [f"the disk {name}, in use"]
        raise failure


async def resize(qmp: Connection, name: str, size: int, change: Resizer) -> None:
    """`change(size)` resizes the image; then the guest sees it. vhost-user: the export tells the guest by itself.
    NBD: the disk must have been attached by attach() (or by `rbdpy vm`): the new size comes with a new connection,
    which takes the place of the old one between two requests.
    MachineError: ENODEV, EINVAL; ENOTSUP: an NBD disk without a node above it (libvirt's), which sees the new size
    when it is attached again. When QEMU's side fails the image has the new size (named in `left`) and the guest keeps
    what it saw: call again."""
    kind, node = await backend(qmp, name)
    if size <= 0 or size % 512:
        raise MachineError(errno.EINVAL, f"{size} bytes are no size of a disk")
    if kind == "chardev":
        await change(size)
        return
    wires = await _wires(qmp, name)
    old = next(reversed(wires), "")
    row = (await nodes(qmp)).get(node, {})
    server = _server(wires[old]) if old else None
    if row.get("drv") != "raw" or server is None:
        raise MachineError(
            errno.ENOTSUP,
            f"QEMU cannot change the size of the NBD disk {name} while it is attached: detach it and attach it again",
        )
    await change(size)
    new = f"{name}-nbd{int(old.rpartition('nbd')[2]) + 1}"
    try:
        async with Steps() as steps:
            add = qmp.execute("blockdev-add", nbd_node(new, *server))
            await steps.run(f"node {new}", add, lambda: _drop_node(qmp, new))
            await steps.run(f"node {node} on {new}", _reopen(qmp, node, new), lambda: _reopen(qmp, node, old))
            await steps.run("size", qmp.execute("block_resize", {"node-name": node, "size": size}))
    except MachineError as error:
        error.left.append(f"the image has {size} bytes; the guest sees the size it saw before")
        raise
    for wire in wires:
        await _drop_node(qmp, wire)


def _server(row: dict[str, Any]) -> tuple[str, str] | None:
    """(socket, export) of a node's NBD server, from what QEMU says of it: nbd+unix:///EXPORT?socket=PATH."""
    found = re.fullmatch(r"nbd\+unix://(?:/(.*))?\?socket=(.*)", str(row.get("file", "")))
    return (found[2], found[1] or "") if found else None


async def _reopen(qmp: Connection, node: str, file: str) -> None:
    await qmp.execute("blockdev-reopen", {"options": [raw_node(node, file)]})

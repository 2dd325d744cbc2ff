"""The daemon's QMP commands: block nodes on RBD images, exports of them, an NBD server.

Commands and shapes are qemu-storage-daemon's where it has the command, so that `qmp-shell` and scripts for it work.
One command changes the daemon at a time (the lock of `Service`); queries do not wait.
"""

from __future__ import annotations

import asyncio
import grp
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from librbd_py.control.handoff import ANYBODY
from qemu_glue import shapes
from qemu_glue.arguments import check
from qemu_glue.exports import NBDServer, start_reactors, vhost_user_blk
from qemu_glue.handoff import HandOff
from qemu_glue.io_errors import ErrorEvents
from qemu_glue.nodes import Node
from qemu_glue.qmp_server import PACKAGE, VERSION
from qemu_glue.qmp_wire import QMPError
from qemu_glue.served import ServedExport
from qemu_glue.state import Journal

HOSTS = ("vm ", "image ", "client ")  # keys of what the host service remembers for itself

log = logging.getLogger(__name__)

Emit = Callable[[str, dict[str, Any]], None]


class Service:
    """Nodes, exports and the NBD server of one daemon. `emit` sends a QMP event; `state` remembers what is
    served, so that a daemon started again after a crash serves the same; None: nothing is remembered. The caller closes
    it."""

    def __init__(self, store_url: str | None, emit: Emit, state: Journal | None = None) -> None:
        self.store_url = store_url
        self.emit = emit
        self.nodes: dict[str, Node] = {}
        self.exports: dict[str, ServedExport] = {}
        self.nbd: NBDServer | None = None
        self.quit = asyncio.Event()
        self._errors = ErrorEvents(emit, asyncio.get_running_loop())
        self._state = state
        self._restoring = False
        self._lock = asyncio.Lock()
        self._next_id = 1

    def handlers(self) -> dict[str, Callable[[dict[str, Any]], Coroutine[Any, Any, Any]]]:
        return {
            "blockdev-add": self.blockdev_add,
            "blockdev-del": self.blockdev_del,
            "block-export-add": self.block_export_add,
            "block-export-del": self.block_export_del,
            "block_resize": self.block_resize,
            "block_set_io_throttle": self.block_set_io_throttle,
            "nbd-server-start": self.nbd_server_start,
            "nbd-server-stop": self.nbd_server_stop,
            "query-block-exports": self.query_block_exports,
            "query-named-block-nodes": self.query_named_block_nodes,
            "query-block": self.query_block,
            "query-blockstats": self.query_blockstats,
            "query-version": self.query_version,
            "query-status": self.query_status,
            "x-rbd-throttle": self.throttle,
            "quit": self.quit_command,
        }

    # --- nodes

    async def blockdev_add(self, arguments: dict[str, Any]) -> None:
        driver = arguments.get("driver")
        if driver != "rbd":
            raise QMPError("Parameter 'driver' is missing" if driver is None else f"Unknown driver '{driver}'")
        checked = check(arguments, shapes.BLOCKDEV_RBD)
        name = checked["node-name"]
        if not name or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in name) or not name[0].isalpha():
            raise QMPError(f"Invalid node-name: '{name}'")
        async with self._lock:
            if name in self.nodes:
                raise QMPError(f"Duplicate nodes with node-name='{name}'")
            node = await asyncio.to_thread(Node.open, checked, self.store_url)
            try:
                await self._remember(f"node {name}", "blockdev-add", arguments)
            except OSError:
                await asyncio.to_thread(node.close)
                raise
            node.on_error(partial(self._errors.report, name))
            self.nodes[name] = node

    async def blockdev_del(self, arguments: dict[str, Any]) -> None:
        name = check(arguments, shapes.NODE_ONLY)["node-name"]
        async with self._lock:
            node = self._node(name)
            if any(export.node is node for export in self.exports.values()):
                raise QMPError(f"Node '{name}' is busy: node is used as block export")
            await asyncio.to_thread(node.close)
            del self.nodes[name]
            self._errors.forget(name)
            await self._forget(f"node {name}")

    async def block_resize(self, arguments: dict[str, Any]) -> None:
        checked = check(arguments, shapes.BLOCK_RESIZE)
        name = checked["node-name"] or checked["device"]
        if name is None:
            raise QMPError("Either 'node-name' or 'device' must be given")
        async with self._lock:
            await asyncio.to_thread(self._node(name).resize, checked["size"])

    async def throttle(self, arguments: dict[str, Any]) -> None:
        """Limits one node; 0 lifts a limit."""
        checked = check(arguments, shapes.THROTTLE)
        async with self._lock:
            self._node(checked["node-name"]).throttle(checked["iops"], checked["bps"])

    async def block_set_io_throttle(self, arguments: dict[str, Any]) -> None:
        """As x-rbd-throttle, with QEMU's arguments: `id` (or `device`) is the node's name, as query-block says."""
        checked = check(arguments, shapes.IO_THROTTLE)
        name = checked.pop("id") or checked["device"]
        del checked["device"]
        if name is None:
            raise QMPError("Need exactly one of 'device' and 'id'")
        bps, iops = checked.pop("bps"), checked.pop("iops")
        if refused := [key for key, value in checked.items() if value]:
            raise QMPError(f"Parameter '{refused[0]}' must be 0: only totals (bps, iops) can be limited")
        async with self._lock:
            self._node(name).throttle(iops, bps)

    def _node(self, name: str) -> Node:
        node = self.nodes.get(name)
        if node is None:
            raise QMPError(f"Cannot find device='' nor node-name='{name}'")
        return node

    # --- exports

    async def nbd_server_start(self, arguments: dict[str, Any]) -> None:
        checked = check(arguments, shapes.NBD_SERVER_START)
        if checked["tls-creds"] or checked["tls-authz"]:
            raise QMPError("TLS is not supported by this NBD server")
        address = checked["addr"]
        kind = address.get("type")
        shape = shapes.SOCKET_ADDRESS.get(kind) if isinstance(kind, str) else None
        if shape is None:
            raise QMPError(f"Parameter 'addr.type' does not accept value '{kind}'")
        data = check(address, shape, "addr.")["data"]
        async with self._lock:
            if self.nbd:
                raise QMPError("NBD server already running")
            start_reactors()
            server = NBDServer(checked["max-connections"] or 1 << 16)
            try:
                if kind == "unix":
                    server.listen_unix(data["path"])
                else:
                    server.listen_inet(data["host"], _port(data["port"]))
                await self._remember("nbd server", "nbd-server-start", arguments)
            except OSError:
                server.stop()
                raise
            self.nbd = server

    async def nbd_server_stop(self, arguments: dict[str, Any]) -> None:
        check(arguments, shapes.NOTHING)
        async with self._lock:
            if self.nbd is None:
                raise QMPError("NBD server not running")
            for export in [e for e in self.exports.values() if e.type == "nbd"]:
                await self._end(export, hard=True)
            await asyncio.to_thread(self.nbd.stop)
            self.nbd = None
            await self._forget("nbd server")

    async def block_export_add(self, arguments: dict[str, Any]) -> None:
        kind = arguments.get("type")
        shape = shapes.EXPORTS.get(kind) if isinstance(kind, str) else None
        if shape is None:
            raise QMPError(
                "Parameter 'type' is missing" if kind is None else f"Parameter 'type' does not accept value '{kind}'"
            )
        checked = check(arguments, shape)
        async with self._lock:
            if checked["id"] in self.exports:
                raise QMPError(f"Block export id '{checked['id']}' is already in use")
            node = self._node(checked["node-name"])
            if checked["writable"] and node.read_only:
                raise QMPError(f"Block node is read-only: '{node.name}'")
            if not checked["vm"] or not all("!" <= c <= "~" for c in checked["vm"]):
                raise QMPError("Parameter 'vm' must be printable ASCII without blanks")
            export = await asyncio.to_thread(self._start, checked, node)
            try:
                # What is served again after a crash is no longer coming: its VM runs, here or elsewhere.
                if checked["incoming"] and export.hand_off is not None and not self._restoring:
                    await export.hand_off.stand_by()
                elif self._restoring and export.hand_off is not None:
                    await export.hand_off.look_around()
            except OSError:
                export.follow(asyncio.get_running_loop())
                await export.end(hard=True)
                raise
            export.follow(asyncio.get_running_loop())
            try:
                await self._remember(f"export {export.id}", "block-export-add", arguments)
            except OSError:
                await export.end(hard=True)
                raise
            self.exports[export.id] = export

    def _start(self, checked: dict[str, Any], node: Node) -> ServedExport:
        start_reactors()
        number, self._next_id = self._next_id, self._next_id + 1
        if checked["type"] == "nbd":
            if self.nbd is None:
                raise QMPError("NBD server not running")
            if checked["bitmaps"] or checked["allocation-depth"]:
                raise QMPError("bitmaps and allocation-depth are not supported by this NBD server")
            name = node.name if checked["name"] is None else checked["name"]
            native = self.nbd.export(
                number, node.native, name, writable=checked["writable"], description=checked["description"]
            )
        else:
            depth = checked["queue-size"]
            if depth & (depth - 1):
                raise QMPError("Parameter 'queue-size' must be a power of two")
            native = vhost_user_blk(
                number,
                node.native,
                checked["addr"]["path"],
                writable=checked["writable"],
                num_queues=checked["num-queues"],
                queue_size=depth,
                serial=checked["serial"] or node.image_name[:20],
                block_size=checked["logical-block-size"],
                mode=checked["socket-mode"],
                group=_group(checked["socket-group"]),
            )
        hand_off = None
        taken = any(export.node is node and export.hand_off is not None for export in self.exports.values())
        if checked["type"] != "nbd" and checked["writable"] and not taken:
            if checked["vm"] != ANYBODY:
                node.handle.describe = {**node.handle.describe, "VM": checked["vm"]}
            hand_off = HandOff(node.handle, native, checked["vm"], self.emit, checked["id"], incoming=None)
        return ServedExport(checked["id"], checked["type"], node, number, native, hand_off)

    async def block_export_del(self, arguments: dict[str, Any]) -> None:
        checked = check(arguments, shapes.EXPORT_DEL)
        async with self._lock:
            export = self.exports.get(checked["id"])
            if export is None:
                raise QMPError(f"Export '{checked['id']}' is not found")
            if checked["mode"] == "safe" and export.native.stats().clients:
                raise QMPError(f"export '{export.id}' still in use")
            await self._end(export, hard=True)

    async def _end(self, export: ServedExport, hard: bool) -> None:
        await export.end(hard)
        del self.exports[export.id]
        await self._forget(f"export {export.id}")
        self.emit("BLOCK_EXPORT_DELETED", {"id": export.id})

    # --- queries

    async def query_block_exports(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        check(arguments, shapes.NOTHING)
        return [export.describe() for export in self.exports.values()]

    async def query_named_block_nodes(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        check(arguments, shapes.QUERY_NAMED_NODES)
        return [node.describe() for node in self.nodes.values()]

    async def query_block(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """What `info block` needs: one entry per node, as QEMU cannot offer it for vhost-user disks."""
        check(arguments, shapes.NOTHING)
        return [
            {
                "device": "",
                "qdev": node.name,
                "type": "unknown",
                "removable": False,
                "locked": False,
                "io-status": "ok",
                "inserted": node.describe(),
            }
            for node in self.nodes.values()
        ]

    async def query_blockstats(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        check(arguments, shapes.QUERY_BLOCKSTATS)
        return [node.blockstats() for node in self.nodes.values()]

    async def query_version(self, arguments: dict[str, Any]) -> dict[str, Any]:
        check(arguments, shapes.NOTHING)
        return {"qemu": dict(zip(("major", "minor", "micro"), VERSION, strict=True)), "package": PACKAGE}

    async def query_status(self, arguments: dict[str, Any]) -> dict[str, Any]:
        check(arguments, shapes.NOTHING)
        return {"running": True, "singlestep": False, "status": "running"}

    # --- end, state

    async def quit_command(self, arguments: dict[str, Any]) -> None:
        check(arguments, shapes.NOTHING)
        self.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        asyncio.get_running_loop().call_soon(self.quit.set)

    async def close(self) -> None:
        """Ends exports (clients are dropped), the NBD server and nodes. What is remembered stays: only commands change
        it, so that a daemon that is stopped for an upgrade serves the same when it comes back."""
        async with self._lock:
            self._state = None
            for export in list(self.exports.values()):
                await self._end(export, hard=True)
            if self.nbd:
                await asyncio.to_thread(self.nbd.stop)
                self.nbd = None
            for node in self.nodes.values():
                await asyncio.to_thread(node.close)
            self.nodes.clear()

    async def _remember(self, key: str, name: str, arguments: dict[str, Any]) -> None:
        if self._state and not self._restoring:
            await asyncio.to_thread(self._state.remember, key, {"execute": name, "arguments": arguments})

    async def _forget(self, key: str) -> None:
        if self._state:
            await asyncio.to_thread(self._state.forget, key)

    async def restore(self) -> None:
        """Runs the remembered commands. What fails is logged and tried again by the next start: a cluster may be out of
        reach for a while. Only what an image needs that is gone is forgotten."""
        if self._state is None:
            return
        handlers = self.handlers()
        self._restoring = True
        try:
            for key, command in list(self._state.commands.items()):
                if key.startswith(HOSTS):
                    continue
                try:
                    await handlers[command["execute"]](command["arguments"])
                except (QMPError, OSError, KeyError) as error:
                    log.error("restore: %s %s: %s", command["execute"], command["arguments"], error)
                    if isinstance(error, FileNotFoundError) and key.startswith("node "):
                        await self._forget_node(key)
        finally:
            self._restoring = False

    async def _forget_node(self, key: str) -> None:
        assert self._state
        name = self._state.commands[key]["arguments"].get("node-name")
        for other, command in list(self._state.commands.items()):
            if other == key or (other.startswith("export ") and command["arguments"].get("node-name") == name):
                await self._forget(other)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise QMPError(f"Parameter 'addr.data.port' does not accept value '{text}'")
    return int(text)


def _group(name: str | None) -> int:
    if name is None:
        return -1
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise QMPError(f"There is no group '{name}'") from None

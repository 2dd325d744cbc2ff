"""What tests of `qemu_glue.qmp` share: a machine with a monitor, disks for it, and monitors that fail at a command."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from qemu_glue.client import Daemon
from qemu_glue.guest import Disk, Guest
from qemu_glue.qmp import Connection, DiskSpec, Late, Machine
from tests.vm.rig import Rig

DEADLINE = 60.0


class FailingConnection(Connection):
    """Fails command number `at` (from 0): before it is sent, or after it was done (`late`)."""

    at = -1
    late = False
    count = 0
    log: list[str]

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None, *, deadline: float = 20.0) -> Any:
        number, self.count = self.count, self.count + 1
        self.log.append(command)
        if number == self.at and not self.late:
            raise Late(f"{command}: fault")
        result = await super().execute(command, arguments, deadline=deadline)
        if number == self.at:
            raise Late(f"{command}: fault behind it")
        return result

    def arm(self, at: int, late: bool = False) -> None:
        self.at, self.late, self.count, self.log = at, late, 0, []


async def says(guest: Guest, text: str, after: int = 0) -> int:
    """Waits for `text` on the console behind `after`; where it ends."""
    assert await asyncio.to_thread(guest.wait_for, text, DEADLINE, None, after), guest.console[-3000:]
    return guest.console.index(text, after) + len(text)


async def export(daemon: Daemon, rig: Rig, image: str, kind: str) -> DiskSpec:
    """Serves rbd/<image> (made by the caller) and says how a machine gets it as the disk <image>."""
    await daemon.execute("blockdev-add", {"driver": "rbd", "node-name": image, "pool": "rbd", "image": image})
    common = {"id": image, "node-name": image, "writable": True}
    if kind == "nbd":
        path = rig.socket("nbd.sock")
        running = await daemon.execute("query-block-exports")
        if not any(row["type"] == "nbd" for row in running):
            await daemon.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
        await daemon.execute("block-export-add", {**common, "type": "nbd", "name": image})
        return DiskSpec(image, "nbd", path, export=image)
    path = rig.socket(f"{image}.sock")
    await daemon.execute(
        "block-export-add", {**common, "type": "vhost-user-blk", "addr": {"type": "unix", "path": path}}
    )
    return DiskSpec(image, "vhost-user", path)


@asynccontextmanager
async def machine(rig: Rig, root: Disk, mode: str, **more: Any) -> AsyncIterator[tuple[Machine, Guest]]:
    """A booted guest and its monitor (a FailingConnection that fails nothing)."""
    path = rig.folder / "qmp.sock"
    with rig.guest(root, f"rbdpy.mode={mode}", qmp=path, **more) as guest:
        await says(guest, "GUEST-UP")
        connection = await FailingConnection.open(path)
        connection.arm(-1)
        try:
            yield Machine(connection), guest
        finally:
            await connection.close()

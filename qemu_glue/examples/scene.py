"""What the examples share: a store in a temporary folder, images in it, a service and a small guest that boots from
one."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from librbd_py import rados, rbd
from qemu_glue.accel import accelerator
from qemu_glue.client import Daemon
from qemu_glue.guest import Disk, Guest
from qemu_glue.qmp import Connection, DiskSpec, ImageRef, Machine
from vm_images.cache import cache_dir
from vm_images.initramfs import agent_initramfs, initramfs
from vm_images.kernel import kernel

MIB = 1 << 20
BOOT_SECONDS = 120.0


@dataclass
class Scene:
    folder: Path
    store: str
    daemon: Daemon
    accel: str

    def create(self, name: str, size: int = 64 * MIB) -> ImageRef:
        """A new image."""
        with rados.Rados(conf={"rbdpy_store": self.store}) as cluster, cluster.open_ioctx("rbd") as ioctx:
            rbd.RBD().create(ioctx, name, size)
        return ImageRef(name, store=self.store)

    async def export(self, image: ImageRef, number: int = 1) -> DiskSpec:
        """Serves the image over vhost-user-blk; how a machine gets it."""
        nodes = await self.daemon.execute("query-named-block-nodes")
        if not any(node["node-name"] == image.image for node in nodes):
            node = {"driver": "rbd", "node-name": image.image, "pool": image.pool, "image": image.image}
            await self.daemon.execute("blockdev-add", node)
        path = str(self.folder / f"{image.image}{number}.sock")
        export: dict[str, Any] = {"id": f"{image.image}{number}", "node-name": image.image, "writable": True}
        export |= {"type": "vhost-user-blk", "addr": {"type": "unix", "path": path}}
        await self.daemon.execute("block-export-add", export)
        return DiskSpec(image.image, "vhost-user", path)

    @asynccontextmanager
    async def guest(
        self, disks: list[DiskSpec], append: str, name: str = "guest", agent: bool = False, incoming: bool = False
    ) -> AsyncIterator[tuple[Machine, Guest]]:
        """A guest with these disks and its monitor. It is waited for unless it is `incoming`."""
        chosen = kernel()
        qmp, port = self.folder / f"{name}.qmp", self.folder / f"{name}.agent"
        with Guest(
            [Disk(disk.kind, disk.path) for disk in disks],
            self.accel,
            memory_mib=160,
            qmp=qmp,
            agent=port if agent else None,
            kernel=chosen.vmlinuz,
            initrd=agent_initramfs(chosen) if agent else initramfs(chosen),
            append=append,
            ports=2,
            extra=["-incoming", "defer"] if incoming else [],
        ) as guest:
            connection = await Connection.open_new(qmp, lambda: guest.status(0) is None, BOOT_SECONDS)
            async with Machine(connection, str(port)) as machine:
                if not incoming:
                    await says(guest, "GUEST-UP")
                yield machine, guest


async def says(guest: Guest, text: str, after: int = 0) -> None:
    """Waits until the guest prints it."""
    if not await asyncio.to_thread(guest.wait_for, text, BOOT_SECONDS, None, after):
        raise TimeoutError(f"the guest did not say {text!r}:\n{guest.console[-1000:]}")


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="rbdpy-") as name:
        folder, chosen = Path(name), kernel()
        accel, _ = accelerator(chosen.vmlinuz, initramfs(chosen), cache_dir())
        store = f"embedded:{folder / 'store'}"
        async with Daemon(folder, store) as daemon:
            yield Scene(folder, store, daemon, accel)

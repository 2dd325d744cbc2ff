"""Guests on images of an embedded store, served by a real daemon."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from librbd_py import rados, rbd
from qemu_glue.client import Daemon
from qemu_glue.guest import Disk, Guest
from vm_images.kernel import Kernel

MIB = 1 << 20


@dataclass
class Rig:
    """A folder with a store, and what boots on it."""

    folder: Path
    url: str
    kernel: Kernel
    initrd: Path
    accel: str

    def create(self, name: str, size: int, pool: str = "rbd") -> None:
        with self.cluster() as cluster, cluster.open_ioctx(pool) as ioctx:
            rbd.RBD().create(ioctx, name, size)

    def cluster(self) -> rados.Rados:
        return rados.Rados(conf={"rbdpy_store": self.url})

    def daemon(self) -> Daemon:
        return Daemon(self.folder, self.url)

    def guest(self, disk: Disk, append: str, **more: Any) -> Guest:
        """Boots the kernel directly; raw data begins at byte 0 of the disk."""
        append = f"rbdpy.start=0 {append}"
        return Guest([disk], self.accel, kernel=self.kernel.vmlinuz, initrd=self.initrd, append=append, **more)

    def socket(self, name: str) -> str:
        return str(self.folder / name)


async def serve(daemon: Daemon, image: str, kind: str, path: str, queues: int = 1) -> Disk:
    """Exports rbd/<image> and returns the disk a guest uses."""
    await daemon.execute("blockdev-add", {"driver": "rbd", "node-name": image, "pool": "rbd", "image": image})
    export: dict[str, Any] = {"id": f"{image}-{kind}", "node-name": image, "writable": True}
    if kind == "nbd":
        await daemon.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
        await daemon.execute("block-export-add", {**export, "type": "nbd", "name": image})
        return Disk("nbd", path, export=image, reconnect=30)
    address = {"type": "unix", "path": path}
    more = {"type": "vhost-user-blk", "addr": address, "num-queues": queues}
    await daemon.execute("block-export-add", {**export, **more})
    return Disk("vhost-user", path, queues=queues)

"""The guest's whole userland as an initramfs: busybox, modules for virtio-blk, programs of ours and the init script."""

from __future__ import annotations

import gzip
import stat
from pathlib import Path

from vm_images.cache import cached, key
from vm_images.kernel import Kernel, run

GUEST = Path(__file__).resolve().parent / "guest"
BUSYBOX = Path("/bin/busybox")
MODULES = (
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "drivers/acpi/button",
    "drivers/input/evdev",
)
AGENT_MODULES = (*MODULES, "drivers/char/virtio_console")
KRBD_MODULES = (
    *MODULES,
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "arch/x86/crypto/crc32c-intel",
    "lib/libcrc32c",
    "net/dns_resolver/dns_resolver",
    "net/ceph/libceph",
    "drivers/block/rbd",
)


def newc(entries: list[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive in the kernel's `newc` format of (name, st_mode, content), all owned by root at time 0."""
    out = bytearray()
    for number, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        raw = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (number, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(raw), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + raw
        out += b"\0" * (-len(out) % 4) + content
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


def program(name: str) -> Path:
    """A program of the guest, compiled statically."""
    source = GUEST / f"{name}.c"

    def build(target: Path) -> None:
        run("gcc", "-std=gnu11", "-O2", "-static", "-pthread", "-o", target, source)

    return cached(f"{name}-{key(source.read_bytes())}", build)


def initramfs(kernel: Kernel) -> Path:
    """gzip'ed archive; equal inputs give equal bytes."""
    return _archive(kernel, "init", MODULES, ("blkstamp", "ledger"))


def agent_initramfs(kernel: Kernel) -> Path:
    """As `initramfs`, with a guest agent (guest/agent.c) for rbdpy.mode=twins."""
    return _archive(kernel, "init", AGENT_MODULES, ("blkstamp", "agent"))


def krbd_initramfs(kernel: Kernel) -> Path:
    """As `initramfs`, for a guest that maps images itself (guest/krbd)."""
    return _archive(kernel, "krbd", KRBD_MODULES)


def _archive(kernel: Kernel, script: str, modules: tuple[str, ...], programs: tuple[str, ...] = ("blkstamp",)) -> Path:
    compiled = {name: program(name).read_bytes() for name in programs}
    init = GUEST / script

    def build(target: Path) -> None:
        folder, executable, plain = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o755, stat.S_IFREG | 0o644
        names = ("bin", "dev", "modules", "proc", "sys", "tmp")
        order = " ".join(Path(module).name for module in modules)
        entries: list[tuple[str, int, bytes]] = [(name, folder, b"") for name in names]
        entries += [(f"bin/{name}", executable, content) for name, content in compiled.items()]
        entries += [
            ("bin/busybox", executable, BUSYBOX.read_bytes()),
            ("init", executable, init.read_bytes()),
            ("modules/order", plain, order.encode()),
        ]
        for module in modules:
            entries.append((f"modules/{Path(module).name}.ko", plain, (kernel.modules / f"{module}.ko").read_bytes()))
        target.write_bytes(gzip.compress(newc(entries), compresslevel=9, mtime=0))

    name = key(kernel.version, *compiled.values(), init.read_bytes(), BUSYBOX.read_bytes(), *modules)
    return cached(f"initramfs-{name}.gz", build)

"""Domains for the hosts: XML with disks of QEMU's own rbd driver, and as `rbdpy libvirt convert` makes it."""

from __future__ import annotations

import re
import uuid
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from librbd_py import rados, rbd
from librbd_py.image import ownership
from librbd_py.image.handle import ImageHandle
from librbd_py.store import connect
from tests.libvirt import ledger
from tests.libvirt.hosts import Host, wait_for
from vm_images.initramfs import initramfs
from vm_images.kernel import kernel

MIB = 1 << 20
BOOT_SECONDS = 60.0
ROOT_PORTS = 6
EMULATOR = Path(__file__).with_name("emulator")

XML = """<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid>
 <memory unit='MiB'>192</memory><vcpu current='1'>2</vcpu>
 <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
  <cmdline>console=ttyS0 quiet panic=1 no_timer_check rbdpy.start=0 {append}</cmdline></os>
 <features><acpi/></features><cpu mode='custom' match='exact'><model>qemu64</model></cpu>
 <on_reboot>restart</on_reboot>
 <devices><emulator>{emulator}</emulator>
  <controller type='pci' model='pcie-root'/>{ports}
  <controller type='usb' model='none'/><memballoon model='none'/><video><model type='none'/></video>
  {disks}
  <serial type='file'><source path='{console}' append='on'/><target port='0'/></serial></devices></domain>
"""


def rbd_disk(image: str, target: str, conf: str = "") -> str:
    """As a user of QEMU's driver has it."""
    config = f"<config file='{conf}'/>" if conf else ""
    return (
        f"<disk type='network' device='disk'><driver name='qemu' type='raw' cache='none'/>"
        f"<source protocol='rbd' name='rbd/{image}'>{config}</source><target dev='{target}' bus='virtio'/></disk>"
    )


def removed(ioctx: rados.Ioctx, image: str) -> bool:
    """False: a watch is left, which on Ceph outlives its client for a while."""
    try:
        rbd.RBD().remove(ioctx, image)
    except rbd.ImageBusy:
        return False
    return True


@dataclass
class Domain:
    """A VM that may run on any of the hosts. `store` is a URL that means the same on all of them."""

    name: str
    store: str
    folder: Path
    append: str = ""  # empty: the guest keeps a ledger of its writes
    transport: str = "vhost-user"
    images: tuple[str, ...] = ()
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))

    def __post_init__(self) -> None:
        self.images = self.images or (f"{self.name}-disk",)
        self.writer = ledger.Writer(zlib.crc32(self.images[0].encode()), int(self.uuid[:8], 16))
        self.writes = not self.append
        self.append = self.append or self.writer.append
        self.console_file = self.folder / f"{self.name}.console"
        with rados.Rados(conf={"rbdpy_store": self.store}) as cluster, cluster.open_ioctx("rbd") as ioctx:
            for image in self.images:
                rbd.RBD().create(ioctx, image, 64 * MIB)

    def xml(self) -> str:
        chosen = kernel()
        ports = "<controller type='pci' model='pcie-root-port'/>" * ROOT_PORTS
        conf = self.store.removeprefix("ceph:") if self.store.startswith("ceph:") else ""
        disks = "".join(rbd_disk(image, f"vd{chr(97 + at)}", conf) for at, image in enumerate(self.images))
        return XML.format(
            emulator=EMULATOR,
            name=self.name,
            uuid=self.uuid,
            kernel=chosen.vmlinuz,
            initrd=initramfs(chosen),
            append=self.append,
            ports=ports,
            disks=disks,
            console=self.console_file,
        )

    def define(self, host: Host) -> None:
        """Converted on the host; on an embedded store the service's own store takes the place of the cluster."""
        plain = host.folder / f"{self.name}.xml"
        plain.write_text(self.xml())
        text = host.rbdpy("libvirt", "convert", plain, "--transport", self.transport)
        if not self.store.startswith("ceph:"):
            text = re.sub(r'(<rbdpy:disk [^>]*) store="ceph"', r"\1", text)
        plain.write_text(text)
        host.virsh("define", plain)

    def remove(self) -> None:
        """Its images; it must not run any more."""
        with rados.Rados(conf={"rbdpy_store": self.store}) as cluster, cluster.open_ioctx("rbd") as ioctx:
            for image in self.images:
                wait_for(lambda image=image: removed(ioctx, image), f"{image} to be left by the dead")
        self.console_file.unlink(missing_ok=True)

    # --- what is seen of it

    @property
    def console(self) -> str:
        return self.console_file.read_text(errors="replace") if self.console_file.exists() else ""

    def wait_for_console(self, text: str, after: int = 0, seconds: float = BOOT_SECONDS) -> int:
        """Where in the console it was found, behind `after`."""
        wait_for(lambda: text in self.console[after:], f"{text!r} on the console of {self.name}", seconds)
        return self.console.index(text, after) + len(text)

    def wait_for_progress(self, ticks: int = 2, seconds: float = BOOT_SECONDS) -> None:
        """The guest's load goes on from here, and without an error so far."""
        at = len(self.console)
        wait_for(lambda: self.console.count("STAMP-TICK", at) >= ticks, f"the load of {self.name} to go on", seconds)
        self.check_console()

    def check_console(self) -> None:
        for bad in ("STAMP-ERROR", "GUEST-FAILED", "GUEST-CHECK failed", "I/O error"):
            assert bad not in self.console, self.console[-3000:]

    def content(self) -> bytes:
        """The blocks of the guest's ledger, as another client reads them."""
        return ledger.content(self.store, self.images[0], self.writer)

    def judge(self, before: bytes | None = None, ended: int = 0) -> ledger.Verdict:
        """Of its writes so far; the VM must not run, nor have lost the end of its console."""
        return ledger.judge(self.writer, self.console, self.content(), before, ended)

    def holder(self, image: str | None = None) -> str | None:
        """The name of the host whose client owns the image's lock; None: it is free."""
        found = self.ownership(image)
        owner = found.owner
        if owner is None:
            return None
        return owner.answer.host if owner.answer is not None else f"client.{owner.address}"

    def ownership(self, image: str | None = None) -> ownership.Ownership:
        store = connect(self.store)
        try:
            with ImageHandle.open(store.open("rbd"), image or self.images[0], read_only=True) as handle:
                return ownership.look(handle)
        finally:
            store.close()

    def hosts_that_watch(self) -> set[str]:
        found = self.ownership()
        answers = [who.answer for who in found.others] + ([found.owner.answer] if found.owner else [])
        return {answer.host for answer in answers if answer is not None}

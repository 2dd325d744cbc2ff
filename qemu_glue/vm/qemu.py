"""QEMU's command line for a VM, and starting it so that it outlives the command."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

from librbd_py.devcluster.processes import Daemon
from qemu_glue.accel import QEMU, accelerator, cpu_of, cpus_of, memory_of
from qemu_glue.guest import AGENT_PORT, comma
from qemu_glue.qmp import Machine, MachineError
from qemu_glue.qmp.connection import Connection
from qemu_glue.qmp.disks import nbd_node, raw_node
from qemu_glue.vm.folder import Folder, environment
from qemu_glue.vm.spec import VMSpec

START_SECONDS = 30.0  # until QEMU answers; it connects its disks first
INSTALL = f"{QEMU} is not installed: on Debian  apt-get install --no-install-recommends qemu-system-x86 seabios"


def program() -> str:
    """The path of QEMU ($RBDPY_QEMU: another one). MachineError ENOENT says what to install."""
    found = shutil.which(os.environ.get("RBDPY_QEMU") or QEMU)
    if found is None:
        raise MachineError(errno.ENOENT, INSTALL)
    return found


def choose_accelerator(wanted: str) -> tuple[str, str]:
    """("kvm" | "tcg", a sentence why). `wanted`: "auto" finds out by running a small guest, where one can be built."""
    if wanted != "auto":
        return wanted, "as asked"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg", "no KVM: /dev/kvm is missing or may not be opened; the guest runs without it, ten times slower"
    from vm_images.cache import cache_dir
    from vm_images.initramfs import initramfs
    from vm_images.kernel import BuildError, kernel

    try:
        chosen = kernel()
        return accelerator(chosen.vmlinuz, initramfs(chosen), cache_dir())
    except (BuildError, OSError) as error:
        return "kvm", f"/dev/kvm is there; it was not tried with a guest ({str(error).splitlines()[0]})"


def command(spec: VMSpec, place: Path, sockets: dict[str, str], incoming: bool) -> list[str]:
    """`sockets`: the disks', by target. It starts stopped."""
    words = [program(), "-name", f"guest={comma(spec.name)}", "-uuid", spec.uuid, "-S"]
    words += ["-accel", spec.accel, "-machine", f"{spec.machine},memory-backend=ram", "-cpu", cpu_of(spec.accel)]
    memory = memory_of(spec.memory, spec.accel)
    words += ["-m", memory, "-smp", cpus_of(spec.cpus, spec.accel)]
    words += ["-object", f"memory-backend-memfd,id=ram,size={memory},share=on"]
    words += ["-display", "none", "-nodefaults", "-no-user-config"]
    for name in ("control", "qmp"):
        words += ["-qmp", f"unix:{comma(str(place / name))}.sock,server=on,wait=off"]
    words += ["-chardev", f"socket,id=serial,path={comma(str(place / 'serial.sock'))},server=on,wait=off"]
    words += ["-serial", "chardev:serial"]
    words += ["-chardev", f"socket,id=agent,path={comma(str(place / 'agent.sock'))},server=on,wait=off"]
    words += ["-device", "virtio-serial-pci", "-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"]
    for number, target in enumerate(spec.targets()):
        path = sockets[target]
        boot = f",bootindex={number + 1}"
        if spec.transport == "nbd":
            words += ["-blockdev", json.dumps(nbd_node(f"{target}-nbd0", path, ""))]
            words += ["-blockdev", json.dumps(raw_node(f"{target}-node", f"{target}-nbd0"))]
            words += ["-device", f"virtio-blk-pci,id={target},drive={target}-node{boot}"]
        else:
            words += ["-chardev", f"socket,id={target}-chardev,path={comma(path)},reconnect=1"]
            words += ["-device", f"vhost-user-blk-pci,id={target},chardev={target}-chardev{boot}"]
    if spec.net == "user":
        words += ["-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,romfile="]
    for number in range(spec.ports):
        words += ["-device", f"pcie-root-port,id=port{number},chassis={number + 1}"]
    for option, value in (("-kernel", spec.kernel), ("-initrd", spec.initrd), ("-append", spec.append)):
        if value:
            words += [option, value]
    return [*words, "-incoming", "defer"] if incoming else words


async def start(folder: Folder, number: int, argv: list[str]) -> Machine:
    """Starts generation `number` and connects to it; it stands still. MachineError with QEMU's own words, and no
    process."""
    process = folder.qemu(number)
    process.spawn(argv, environment())
    try:
        qmp = await Connection.open_new(folder.monitor(number), lambda: process.state != "absent", START_SECONDS)
    except MachineError as error:
        process.kill()
        raise MachineError(error.errno or errno.EIO, why(process, str(error.strerror))) from None
    return Machine(qmp, str(folder.generation(number) / "agent.sock"))


async def versioned(machine: Machine, wanted: str) -> str:
    """The machine type that `wanted` is another name of in this QEMU: a newer QEMU that takes the VM must make the
    same."""
    for row in await machine.execute("query-machines"):
        if row.get("alias") == wanted:
            return str(row.get("name"))
    return wanted


def why(process: Daemon, otherwise: str) -> str:
    """QEMU's last words as a sentence a user can do something with."""
    said = process.tail()
    last = next((line for line in reversed(said.splitlines()) if "qemu-system" in line), "")
    text = last.partition(": ")[2] or last or otherwise
    if "Cannot allocate memory" in said or "cannot set up guest memory" in said:
        return f"there is not enough memory for the guest (--memory): {text}"
    if any(word in said.lower() for word in ("failed to initialize kvm", "could not access kvm", "kvm_", "/kvm.c")):
        return f"KVM does not work here (--accel tcg does without): {text}"
    if "could not load PC BIOS" in said or "failed to find romfile" in said:
        return f"QEMU's firmware is not installed (Debian: seabios, ipxe-qemu): {text}"
    return f"QEMU did not start: {text}"


def memory_left() -> int:
    """MiB that can be had without swapping; 0: not known."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    return 0

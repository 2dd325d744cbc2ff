"""What a VM is made of, as values: written into its record, sent to the host it migrates to, and read again with
suspicion."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass, field
from typing import Any

from qemu_glue.qmp import MachineError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,35}")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TRANSPORTS = ("vhost-user", "nbd")
ACCELERATORS = ("kvm", "tcg")
MAX_DISKS = 16
MIB_MIN, MIB_MAX = 32, 1 << 22
CPUS_MAX = 255
TEXT_MAX = 4096


def _refuse(what: str) -> MachineError:
    return MachineError(errno.EINVAL, what)


@dataclass(frozen=True)
class DiskImage:
    """pool/[namespace/]image. `queues`: of the disk."""

    image: str
    pool: str = "rbd"
    namespace: str = ""
    snapshot: str = ""

    def __str__(self) -> str:
        base = "/".join(part for part in (self.pool, self.namespace, self.image) if part)
        return f"{base}@{self.snapshot}" if self.snapshot else base


@dataclass(frozen=True)
class VMSpec:
    """MachineError EINVAL when a part of it cannot be."""

    name: str
    uuid: str
    store: str  # URL
    disks: tuple[DiskImage, ...]
    transport: str = "vhost-user"
    memory: int = 1024  # MiB
    cpus: int = 1
    net: str = "user"  # or "none"
    accel: str = "tcg"
    kernel: str = ""
    initrd: str = ""
    append: str = ""
    ports: int = 4  # free root ports for disks to come
    machine: str = "q35"

    def __post_init__(self) -> None:
        check_name(self.name)
        texts = (self.store, self.kernel, self.initrd, self.append)
        if not all(isinstance(t, str) and len(t) <= TEXT_MAX and "\0" not in t for t in texts):
            raise _refuse("a path or option is too long")
        if not UUID.fullmatch(self.uuid) or self.net not in ("user", "none") or self.accel not in ACCELERATORS:
            raise _refuse("the VM's uuid, network or accelerator is not valid")
        if self.transport not in TRANSPORTS:
            raise _refuse(f"there is no transport {self.transport!r}")
        if not re.fullmatch(r"[a-z0-9.-]{1,40}", self.machine):
            raise _refuse("the machine type is not valid")
        numbers = (
            (self.memory, MIB_MIN, MIB_MAX, "MiB of memory"),
            (self.cpus, 1, CPUS_MAX, "CPUs"),
            (self.ports, 0, 16, "free ports"),
            (len(self.disks), 1, MAX_DISKS, "disks"),
        )
        for value, low, high, what in numbers:
            if type(value) is not int or not low <= value <= high:
                raise _refuse(f"a VM has {low} to {high} {what}")
        for disk in self.disks:
            for text in (disk.image, disk.pool, disk.namespace, disk.snapshot):
                if not isinstance(text, str) or len(text) > 255 or any(c in text for c in "/@\0"):
                    raise _refuse(f"{text!r} is no name of an image")
            if not disk.image or not disk.pool:
                raise _refuse("an image needs a name")

    def targets(self) -> dict[str, DiskImage]:
        """By the name the guest's kernel gives: vda, vdb, ..."""
        return {f"vd{chr(ord('a') + number)}": disk for number, disk in enumerate(self.disks)}

    def to_dict(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "disks"}
        return found | {"disks": [vars(disk) for disk in self.disks]}

    @classmethod
    def from_dict(cls, value: Any) -> VMSpec:
        """MachineError EINVAL for what is none."""
        try:
            disks = tuple(DiskImage(**disk) for disk in value["disks"])
            return cls(**{**value, "disks": disks})
        except (TypeError, KeyError, AttributeError) as error:
            raise _refuse(f"this describes no VM: {error!s:.200}") from None


def check_name(name: str) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _refuse(f"{name!r} cannot be the name of a VM: letters, digits, '.', '_' and '-', at most 36")


@dataclass
class Status:
    """What `rbdpy vm ls` says of one VM."""

    name: str
    state: str  # QEMU's run state, or "dead", "starting", "migrating", "stopping"
    detail: str = ""
    pid: int = 0
    seconds: float = 0.0  # since its QEMU was started
    spec: VMSpec | None = None
    folder: str = ""
    sockets: dict[str, str] = field(default_factory=dict)

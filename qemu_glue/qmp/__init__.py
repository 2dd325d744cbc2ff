"""Scripting a machine over QMP: disks, migration, snapshots, events. `Machine` is for asyncio, `blocking.Machine` for
everything else."""

from qemu_glue.qmp.connection import Connection, Event, Listener
from qemu_glue.qmp.disks import DiskSpec
from qemu_glue.qmp.errors import CommandFailed, Disconnected, Late, MachineError
from qemu_glue.qmp.images import GroupRef, ImageRef
from qemu_glue.qmp.machine import Machine
from qemu_glue.qmp.migration import Migrated, MigrationFailed
from qemu_glue.qmp.snapshot import Quiesce, Taken
from qemu_glue.qmp.steps import Steps

__all__ = [
    "CommandFailed",
    "Connection",
    "Disconnected",
    "DiskSpec",
    "Event",
    "GroupRef",
    "ImageRef",
    "Late",
    "Listener",
    "Machine",
    "MachineError",
    "Migrated",
    "MigrationFailed",
    "Quiesce",
    "Steps",
    "Taken",
]

"""Virtual machines without libvirt: `rbdpy vm` and the library behind it. `Machines` is where to begin."""

from qemu_glue.vm.machines import Machines
from qemu_glue.vm.spec import DiskImage, VMSpec

__all__ = ["DiskImage", "Machines", "VMSpec"]

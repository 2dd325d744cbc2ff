"""Whether an image is anybody's already. A guest takes the lock of its disk with its first write, and a living owner
gives it up when asked: two guests would then write one file system in turns."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from librbd_py.format.who import Answer
from librbd_py.image import ownership
from librbd_py.image.ownership import Outcome
from qemu_glue.qmp import ImageRef, MachineError
from qemu_glue.vm.spec import DiskImage, VMSpec

BUSY = (Outcome.ASKED, Outcome.REFUSED, Outcome.SILENT, Outcome.BY_HAND, Outcome.OFFERED)


def check_free(store: str, disk: DiskImage) -> None:
    """Blocks. EBUSY: a living client owns the image's lock, or serves it to a VM; ENOENT and the store's errors."""
    try:
        opened = ImageRef(disk.image, disk.pool, disk.namespace, store).open()
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise MachineError(errno.ENOENT, f"there is no image {disk} in {store}") from None
        raise MachineError(error.errno or errno.EIO, f"cannot open the image {disk}: {error.strerror}") from None
    try:
        found = ownership.look(opened.handle)
    finally:
        opened.close()
    if disk.snapshot:
        return
    if found.outcome in BUSY and found.owner is not None:
        answer = found.owner.answer
        raise MachineError(
            errno.EBUSY,
            f"the image {disk} is in use: {found.owner.client} at {found.owner.address} owns its lock"
            f"{f' for {vm_of(answer)}' if vm_of(answer) else ''} (`rbdpy lock why {disk}` says more)",
        )
    for other in found.others:
        if vm := vm_of(other.answer):
            raise MachineError(errno.EBUSY, f"the image {disk} is in use: {other.address} serves it to {vm}")


def vm_of(answer: Answer | None) -> str:
    """The VM that a client serves the image to, as far as it says."""
    return answer.about.get("VM", "") if answer else ""


def check_others(spec: VMSpec, others: Iterable[VMSpec]) -> None:
    """EBUSY: another VM of this runtime folder has one of the images."""
    mine = {(spec.store, str(disk)) for disk in spec.disks if not disk.snapshot}
    for other in others:
        for disk in other.disks:
            if other.name != spec.name and (other.store, str(disk)) in mine:
                raise MachineError(errno.EBUSY, f"the image {disk} is the VM {other.name}'s")

"""The service of one VM: an rbdpyd of its own, in the VM's folder, that opens the images and serves them to its
QEMUs."""

from __future__ import annotations

import errno
import os

from qemu_glue.qmp import CommandFailed, Connection, MachineError
from qemu_glue.vm.folder import Folder, environment, python
from qemu_glue.vm.spec import VMSpec

START_SECONDS = 30.0
STOP_SECONDS = 30.0
OPEN_SECONDS = 60.0  # for a cluster to answer


class Service:
    """States: absent <-> running. It remembers what it serves: start() after its death serves the same on the same
    sockets."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._place = folder.service_place
        self._socket = self._place / "rbdpyd.sock"
        self.process = folder.service()

    async def start(self, spec: VMSpec) -> None:
        """Returns when it answers. MachineError with its last words."""
        if self.process.state != "absent":
            return
        self._place.mkdir(mode=0o700, exist_ok=True)
        options = ["--store", spec.store, "--qmp", str(self._socket), "--state", str(self._place / "state"), "-v"]
        options += ["--host", "--run", str(self._place), "--user", f"+{os.getuid()}", "--group", f"+{os.getgid()}"]
        self.process.spawn(python("qemu_glue.daemon", *options), environment())
        try:
            qmp = await Connection.open_new(self._socket, lambda: self.process.state != "absent", START_SECONDS)
        except MachineError as error:
            self.process.kill()
            lines = self.process.tail().splitlines() or [str(error.strerror)]
            raise MachineError(error.errno or errno.EIO, f"rbdpyd did not start: {lines[-1]}") from None
        await qmp.close()

    async def serve(self, spec: VMSpec, incoming: bool) -> dict[str, str]:
        """Makes sure that the images can be read and their sockets listen; by target. Each QEMU that connects has the
        images open for itself, so a VM can go from one to another. `incoming`: for one that waits for the VM. The
        store's errors."""
        disks = [
            {
                "target": target,
                "transport": spec.transport,
                "pool": disk.pool,
                "namespace": disk.namespace,
                "image": disk.image,
                "snapshot": disk.snapshot,
                "read-only": bool(disk.snapshot),
            }
            for target, disk in spec.targets().items()
        ]
        arguments = {"uuid": spec.uuid, "name": spec.name, "incoming": incoming, "disks": disks}
        async with await Connection.open(self._socket) as qmp:
            try:
                answer = await qmp.execute("rbd-vm-prepare", arguments, deadline=OPEN_SECONDS)
            except CommandFailed as error:
                raise MachineError(errno.EIO, error.description) from None
        return {str(target): str(path) for target, path in answer["sockets"].items()}

    async def started(self, spec: VMSpec) -> None:
        async with await Connection.open(self._socket) as qmp:
            await qmp.execute("rbd-vm-started", {"uuid": spec.uuid})

    async def stop(self) -> None:
        """The images' watches and locks are given up. Killed when it does not go."""
        if self.process.state == "absent":
            return
        try:
            qmp = await Connection.open(self._socket)
            try:
                await qmp.execute("quit")
            finally:
                await qmp.close()
            self.process.wait_for_state("absent", STOP_SECONDS)
        except OSError:
            self.process.kill()
        self.process.reap()

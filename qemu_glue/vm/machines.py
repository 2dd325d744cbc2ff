"""VMs of one runtime folder: boot, list, stop. Every command may be killed at any moment: what it leaves the next one
cleans up."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from librbd_py.devcluster.processes import Daemon, started_at
from qemu_glue.qmp import Machine, MachineError, Steps
from qemu_glue.qmp.steps import uncancelled
from qemu_glue.vm import console, qemu, usage
from qemu_glue.vm.folder import Folder, Record, default_run, folders
from qemu_glue.vm.service import Service
from qemu_glue.vm.spec import Status, VMSpec

ANSWER_SECONDS = 2.0  # for a monitor that is asked in passing
STOP_SECONDS = 60.0  # for a guest to shut down
QUIT_SECONDS = 10.0
KILL_SECONDS = 10.0

Say = Callable[[str], None]


def silent(text: str) -> None:
    """For callers that want no words."""


class Machines:
    """`run`: the runtime folder. Failures are MachineErrors, with a sentence; what each command leaves is said at
    it."""

    def __init__(self, run: Path | None = None) -> None:
        self.run = run or default_run()

    def folder(self, name: str) -> Folder:
        """MachineError ENOENT."""
        folder = Folder(self.run, name)
        if not folder.exists:
            raise MachineError(errno.ENOENT, f"there is no VM {name} in {self.run}")
        return folder

    def specs(self) -> list[VMSpec]:
        """Of every VM with a readable record."""
        found = []
        for folder in folders(self.run):
            try:
                record = folder.read()
            except MachineError:
                continue
            if record is not None:
                found.append(record.spec)
        return found

    async def boot(self, spec: VMSpec, say: Say = silent) -> None:
        """Starts the VM, its service and its console; they stay when this program ends. EEXIST: a VM of that name;
        EBUSY: an image is in use; ENOMEM; ENOENT: no image, no QEMU; what QEMU says. After a failure nothing is left,
        and a kill of this program leaves what ls() and stop() remove."""
        qemu.program()
        left = qemu.memory_left()
        if left and spec.memory > left:
            raise MachineError(errno.ENOMEM, f"the guest wants {spec.memory} MiB, this machine has {left} MiB to spare")
        folder = Folder(self.run, spec.name)
        folder.make()
        with folder.locked():
            if folder.read() is not None:
                status = await self.status(folder)
                if status.state != "dead":
                    raise MachineError(errno.EEXIST, f"there is a VM {spec.name}: it is {status.state}")
                say(f"the VM {spec.name} of before is dead: cleaning up")
                await self.clear(folder)
                folder.make()
            async with Steps() as steps:
                await steps.run("folder", _done(), lambda: asyncio.to_thread(folder.remove))
                usage.check_others(spec, self.specs())
                for disk in spec.disks:
                    await asyncio.to_thread(usage.check_free, spec.store, disk)
                folder.write(Record(spec, "starting", 1))
                machine = await self.launch(folder, spec, 1, steps, incoming=False)
                try:
                    await steps.run(
                        "console", asyncio.to_thread(console.start, folder), lambda: _kill(folder.console())
                    )
                    await console.ready(folder)  # first, so that nothing the guest says is lost
                    await self.await_serial(folder, 1)
                    spec = replace(spec, machine=await qemu.versioned(machine, spec.machine))
                    await Service(folder).started(spec)
                    await machine.resume()
                finally:
                    await machine.close()
                folder.write(Record(spec, "running", 1))
            say(f"{spec.name} runs: pid {_pid(folder.qemu(1))}, {spec.accel}, {spec.memory} MiB")

    async def launch(self, folder: Folder, spec: VMSpec, number: int, steps: Steps, *, incoming: bool) -> Machine:
        """Service, sockets and QEMU of generation `number`, which stands still. The connection is the caller's."""
        service = Service(folder)
        fresh = service.process.state == "absent"
        await steps.run("service", service.start(spec), service.stop if fresh else None)
        sockets = await service.serve(spec, incoming)
        place = folder.generation(number)
        place.mkdir(mode=0o700, exist_ok=True)
        argv = qemu.command(spec, place, sockets, incoming)
        return await steps.run("QEMU", qemu.start(folder, number, argv), lambda: _kill(folder.qemu(number)))

    async def await_serial(self, folder: Folder, number: int) -> None:
        """Until the relay is connected to the serial line: QEMU drops what nobody reads."""
        machine = await Machine.connect(folder.generation(number) / "qmp.sock")
        try:
            limit = asyncio.get_running_loop().time() + console.START_SECONDS
            while True:
                rows = await machine.execute("query-chardev")
                names = {row["label"]: str(row.get("filename", "")) for row in rows}
                if not names.get("serial", "").startswith("disconnected:"):
                    return
                if asyncio.get_running_loop().time() > limit:
                    raise MachineError(errno.ETIMEDOUT, "the console did not come up")
                console.look_again(folder)
                await asyncio.sleep(0.02)
        finally:
            await machine.close()

    @staticmethod
    def pid(folder: Folder, number: int) -> int:
        return _pid(folder.qemu(number))

    # --- list

    async def list(self) -> list[Status]:
        """Every VM. One whose QEMU died is in the list as "dead", with its last words, and its remains are removed;
        so are those of commands that were killed."""
        return list(await asyncio.gather(*(self._listed(folder) for folder in folders(self.run))))

    async def _listed(self, folder: Folder) -> Status:
        try:
            with folder.locked():
                status = await self.status(folder)
                if status.state == "dead":
                    await self.clear(folder)
                return status
        except MachineError as error:
            if error.errno != errno.EBUSY:
                return Status(folder.name, "dead", str(error))
        record = folder.read()
        status = Status(folder.name, record.state if record else "starting", "a command is at work")
        if record:
            self._fill(status, folder, record)
        return status

    async def status(self, folder: Folder) -> Status:
        """With the folder locked: what a command left half done is ended first."""
        try:
            record = folder.read()
        except MachineError as error:
            return Status(folder.name, "dead", str(error.strerror))
        if record is None:
            return Status(folder.name, "dead", "it was never started")
        if record.state in ("starting", "receiving", "stopping"):
            return Status(folder.name, "dead", f"a command was killed while it was {record.state}", spec=record.spec)
        if record.state == "migrating":
            from qemu_glue.vm.migrate import recover

            record = await recover(folder, record)
        process = folder.qemu(record.generation)
        status = Status(folder.name, "dead", spec=record.spec)
        if process.state == "absent":
            status.detail = process.tail(200).replace("\n", " ") or "QEMU ended"
            return status
        self._fill(status, folder, record)
        status.state, status.detail = "unknown", ""
        if folder.service().state == "absent":
            await Service(folder).start(record.spec)  # its guest waits for it
        try:
            async with await Machine.connect(folder.monitor(record.generation), deadline=ANSWER_SECONDS) as machine:
                status.state = await machine.status()
        except MachineError as error:
            if process.state == "absent":
                status.state = "dead"
            status.detail = str(error.strerror)
        if status.state == "shutdown":
            status.state, status.detail = "dead", "the guest has shut down"
        return status

    @staticmethod
    def _fill(status: Status, folder: Folder, record: Record) -> None:
        status.spec, status.folder = record.spec, str(folder.path)
        process = folder.qemu(record.generation)
        status.pid, status.seconds = _pid(process), _age(process)
        place = folder.generation(record.generation)
        status.sockets = {name: str(place / f"{name}.sock") for name in ("qmp", "agent")}
        status.sockets["console"] = str(folder.path / "console.sock")

    # --- end

    async def stop(self, name: str, *, force: bool = False, timeout: float = STOP_SECONDS, say: Say = silent) -> None:
        """Ends the VM and removes what it had here; its images stay. The guest is asked (power button) and has
        `timeout` seconds; then, or with `force` at once, its QEMU ends as if the plug was pulled. Dead VMs and
        remains are cleaned up. ENOENT: no such VM; EBUSY."""
        folder = self.folder(name)
        with folder.locked():
            status = await self.status(folder)
            record = None if status.state == "dead" else folder.read()
            if record is None:
                say(f"{name} was dead already" + (f": {status.detail}" if status.detail else ""))
            else:
                folder.write(Record(record.spec, "stopping", record.generation))
                await self._end(folder, record, status.state == "running" and not force, timeout, say)
            await self.clear(folder)

    async def _end(self, folder: Folder, record: Record, ask: bool, timeout: float, say: Say) -> None:
        process = folder.qemu(record.generation)
        try:
            async with await Machine.connect(folder.monitor(record.generation)) as machine:
                if ask:
                    try:
                        await machine.power_down(timeout)
                        say(f"{folder.name} has shut down")
                    except MachineError as error:
                        if error.errno == errno.ETIMEDOUT:
                            say(f"{folder.name} did not shut down within {timeout:g} s: its QEMU is ended")
                if not machine.qmp.closed and process.state != "absent":
                    await machine.quit(QUIT_SECONDS)
        except MachineError as error:
            if process.state != "absent":
                say(f"QEMU is killed: {error.strerror}")

    async def clear(self, folder: Folder) -> None:
        """Every process of the VM, and its folder. The image's locks are given up by the service, when it can."""
        for place in folder.path.glob("[0-9]*"):
            if place.name.isdigit():
                await _kill(folder.qemu(int(place.name)))
        await uncancelled(Service(folder).stop())
        await _kill(folder.console())
        await asyncio.to_thread(folder.remove)


async def _done() -> None:
    """A step that is done already."""


async def _kill(process: Daemon) -> None:
    await asyncio.to_thread(process.kill, KILL_SECONDS)


def _pid(process: Daemon) -> int:
    record = process.record()
    return record[0] if record else 0


def _age(process: Daemon) -> float:
    """Seconds since its start."""
    record = process.record()
    found = started_at(record[0]) if record else None
    if found is None:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - found[0] / os.sysconf("SC_CLK_TCK"))

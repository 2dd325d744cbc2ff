"""A VM moves: to another QEMU on this host, or to another host (`remote`). At every moment it is on exactly one
side."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from dataclasses import replace
from pathlib import Path

from qemu_glue.qmp import Connection, Machine, MachineError, Steps, migration
from qemu_glue.qmp.migration import OVER, Migrated
from qemu_glue.vm import console, remote
from qemu_glue.vm.folder import Folder, Record
from qemu_glue.vm.machines import KILL_SECONDS, QUIT_SECONDS, Machines, Say, _kill, silent

CANCEL_SECONDS = 15.0


async def migrate(machines: Machines, name: str, to: str = "", say: Say = silent) -> Migrated:
    """`to`: "" (another QEMU here: an upgrade), the runtime folder of another host on this machine, "unix:PATH" or
    "tcp:HOST:PORT" where `rbdpy vm receive --listen` waits, or the name of a host for ssh. Images must be in the same
    store there. MachineError: the VM is where it was and runs, unless the error says otherwise
    (`MigrationFailed.side`). Done: it runs there, nothing of it is here."""
    folder = machines.folder(name)
    with folder.locked():
        status = await machines.status(folder)
        record = folder.read()
        if status.state == "dead" or record is None:
            raise MachineError(errno.ESRCH, f"the VM {name} is dead{f': {status.detail}' if status.detail else ''}")
        try:
            if to:
                moved = await _away(machines, folder, record, to, say)
            else:
                moved = await _here(machines, folder, record, say)
        finally:
            now = folder.read() if folder.exists else None
            if now is not None and now.state == "migrating":
                folder.write(replace(now, state="running", next=0, to=""))
    return moved


async def _here(machines: Machines, folder: Folder, record: Record, say: Say) -> Migrated:
    old, new = record.generation, record.generation + 1
    folder.write(replace(record, state="migrating", next=new))
    async with await Machine.connect(folder.monitor(old)) as source, Steps() as steps:
        destination = await machines.launch(folder, record.spec, new, steps, incoming=True)

        def over() -> None:
            folder.write(replace(record, generation=new))
            steps.keep()

        try:
            await console.ready(folder)
            await steps.run("console", machines.await_serial(folder, new))
            result = await migration.migrate(
                source.qmp,
                destination.qmp,
                f"unix:{folder.generation(new)}/migrate.sock",
                destination_dead=lambda: _kill(folder.qemu(new)),
                moved=over,
            )
        finally:
            await destination.close()
        console.look_again(folder)
        await _quit(source, folder, old)
    say(f"{folder.name} runs in a new QEMU, pid {machines.pid(folder, new)}")
    return result


async def _away(machines: Machines, folder: Folder, record: Record, to: str, say: Say) -> Migrated:
    folder.write(replace(record, state="migrating", to=to))
    gone = False
    async with await Machine.connect(folder.monitor(record.generation)) as source:
        far = await remote.reach(to, folder)
        try:
            uri = await far.prepare(record.spec)

            def over() -> None:
                nonlocal gone
                gone = True

            result = await migration.migrate(source.qmp, far, uri, moved=over)
            await far.commit()
        finally:
            await far.close()
            if gone:  # also when this command is cancelled now
                folder.write(replace(record, state="stopping"))
        await _quit(source, folder, record.generation)
    await machines.clear(folder)
    say(f"{folder.name} runs on {to}")
    return result


async def _quit(machine: Machine, folder: Folder, number: int) -> None:
    """Ends a QEMU that has given its machine away."""
    with contextlib.suppress(MachineError):
        await machine.quit(QUIT_SECONDS)
    await asyncio.to_thread(folder.qemu(number).kill, KILL_SECONDS)


async def recover(folder: Folder, record: Record) -> Record:
    """After a command was killed during a migration: the VM is where it is, the other side goes. The record as it is
    now, saved."""
    source = folder.qemu(record.generation)
    if record.next:
        if await _runs(folder, record.next):
            await _kill(source)
            now = replace(record, state="running", generation=record.next, next=0)
        else:
            await _kill(folder.qemu(record.next))
            now = replace(record, state="running", next=0)
            await _resume(folder.monitor(record.generation), True)
    else:
        now = replace(record, state="running", to="")
        there = Folder(Path(record.to), folder.name) if record.to.startswith("/") else None
        if there is not None and await _arrived(there):
            await _kill(source)
            now = replace(now, state="stopping")
        else:
            await _resume(folder.monitor(record.generation), there is not None)
    folder.write(now)
    console.look_again(folder)
    return now


async def _arrived(there: Folder) -> bool:
    """Whether the VM has arrived in another runtime folder. Waits for the command there, which gives up when this
    side is gone."""
    limit = asyncio.get_running_loop().time() + CANCEL_SECONDS
    while there.exists and asyncio.get_running_loop().time() < limit:
        record = there.read()
        if record is not None and record.state != "receiving":
            return there.qemu(record.generation).state != "absent"
        with contextlib.suppress(MachineError):
            with there.locked():
                return False
        await asyncio.sleep(0.1)
    return False


async def _runs(folder: Folder, number: int) -> bool:
    try:
        async with await Machine.connect(folder.monitor(number)) as machine:
            return await machine.status() == "running"
    except MachineError:
        return False


async def _resume(monitor: Path, certain: bool) -> None:
    """The source goes on, as far as it is `certain` that nobody else has the machine. Nothing when it is dead."""
    with contextlib.suppress(MachineError):
        async with await Connection.open(monitor) as qmp:
            limit = asyncio.get_running_loop().time() + CANCEL_SECONDS
            while True:
                state = str((await qmp.execute("query-migrate")).get("status", "none"))
                if state in (*OVER, "none") or asyncio.get_running_loop().time() > limit:
                    break
                await qmp.execute("migrate_cancel")
                await asyncio.sleep(0.02)
            running = (await qmp.execute("query-status")).get("running")
            if not running and (certain or state != "completed"):
                await qmp.execute("cont")

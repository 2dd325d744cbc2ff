"""A running machine (one QEMU) and what can be done with it from beside: `Machine`, and `blocking.Machine` for programs
without asyncio."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from qemu_glue.qmp import disks, migration, snapshot
from qemu_glue.qmp.connection import COMMAND_SECONDS, CONNECT_SECONDS, Address, Connection, Event
from qemu_glue.qmp.disks import DiskSpec, Resizer
from qemu_glue.qmp.errors import MachineError
from qemu_glue.qmp.images import GroupRef, ImageRef
from qemu_glue.qmp.migration import Hook, Migrated
from qemu_glue.qmp.snapshot import Quiesce, Taken


class Machine:
    """`async with await Machine.connect(PATH) as machine`. States: connected -> closed; the machine goes on when its
    connection is closed. Every failure is a MachineError (an OSError) with a sentence, and `left` says what could not
    be undone. Calls may run side by side, except for one that changes the same disk."""

    def __init__(self, qmp: Connection, agent: str | None = None) -> None:
        """`agent`: the socket of the host's end of the guest agent's virtio-serial port."""
        self.qmp = qmp
        self.agent = agent

    @classmethod
    async def connect(
        cls, address: Address, *, agent: str | Path | None = None, deadline: float = CONNECT_SECONDS
    ) -> Machine:
        """`address`: the socket's path or (host, port). ENOENT, ECONNREFUSED: no such machine; EBUSY: another program
        is connected."""
        return cls(await Connection.open(address, deadline), str(agent) if agent is not None else None)

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, deadline: float = COMMAND_SECONDS
    ) -> Any:
        """Any QMP command. CommandFailed, Late, Disconnected."""
        return await self.qmp.execute(command, arguments, deadline=deadline)

    # --- the machine

    async def status(self) -> str:
        """QEMU's RunState: "running", "paused", "inmigrate", "postmigrate", "shutdown", ..."""
        return str((await self.execute("query-status")).get("status", ""))[:64]

    async def pause(self) -> None:
        await self.execute("stop")

    async def resume(self) -> None:
        await self.execute("cont")

    async def power_down(self, deadline: float) -> None:
        """Presses the power button and waits until the guest has shut down. ETIMEDOUT: it runs on."""
        with self.qmp.listen("SHUTDOWN") as events:
            await self.execute("system_powerdown")
            await events.next(deadline)

    async def quit(self, deadline: float = 10.0) -> None:
        """Ends QEMU at once, as pulling the plug. ETIMEDOUT: it did not end."""
        with self.qmp.listen() as events:
            try:
                await self.execute("quit")
            except OSError:
                if not self.qmp.closed:
                    raise
            try:
                await events.until(lambda event: False, deadline)
            except OSError as error:
                if error.errno == errno.ETIMEDOUT:
                    raise MachineError(errno.ETIMEDOUT, f"QEMU did not quit within {deadline:g} s") from None

    # --- disks

    async def attach(self, disk: DiskSpec) -> None:
        """See `disks.attach`: the disk is there whole, or not at all."""
        await disks.attach(self.qmp, disk)

    async def detach(self, name: str, deadline: float = disks.UNPLUG_SECONDS) -> None:
        """See `disks.detach`: the guest must agree; EBUSY leaves the disk where it is."""
        await disks.detach(self.qmp, name, deadline)

    async def resize(self, name: str, size: int, image: ImageRef | Resizer) -> None:
        """See `disks.resize`: the image and what the guest sees. `size`: bytes."""
        await disks.resize(self.qmp, name, size, image.resize if isinstance(image, ImageRef) else image)

    async def disks(self) -> list[str]:
        """Names of the disks that were given one."""
        found: list[str] = []
        for name in await disks.devices(self.qmp):
            try:
                await disks.backend(self.qmp, name)
            except MachineError as error:
                if error.errno not in (errno.EINVAL, errno.ENODEV):
                    raise
            else:
                found.append(name)
        return found

    async def snapshot(
        self,
        name: str,
        images: Sequence[ImageRef | GroupRef],
        quiesce: Quiesce = Quiesce.AGENT,
        limit: float = snapshot.LIMIT_SECONDS,
    ) -> Taken:
        """See `snapshot.snapshot`: all images at one moment, or none; the guest is let go in any case."""
        return await snapshot.snapshot(self.qmp, name, images, quiesce, self.agent, limit)

    async def migrate(
        self,
        destination: Machine,
        uri: str,
        *,
        deadline: float = migration.MIGRATE_SECONDS,
        at_switchover: Hook | None = None,
        bandwidth: int | None = None,
        downtime: float | None = None,
        destination_dead: Hook | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Migrated:
        """See `migration.migrate`: afterwards the machine is on exactly one side."""
        return await migration.migrate(
            self.qmp,
            destination.qmp,
            uri,
            deadline=deadline,
            at_switchover=at_switchover,
            bandwidth=bandwidth,
            downtime=downtime,
            destination_dead=destination_dead,
            progress=progress,
        )

    # --- events

    async def wait_event(
        self, *names: str, deadline: float, wanted: Callable[[Event], bool] = lambda event: True
    ) -> Event:
        """The next event of one of these names that `wanted` says yes to. Late after `deadline` seconds."""
        with self.qmp.listen(*names) as events:
            return await events.until(wanted, deadline)

    def events(self, *names: str) -> AsyncIterator[Event]:
        """Events for as long as the connection lives."""
        return self.qmp.events(*names)

    async def close(self) -> None:
        await self.qmp.close()

    async def __aenter__(self) -> Machine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await asyncio.shield(self.close())

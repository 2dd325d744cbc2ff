"""A snapshot of all disks of a machine at one moment.

`Quiesce.AGENT`: the guest's file systems are frozen meanwhile (its agent does it); `Quiesce.STOP`: the machine stands
still for the moment, and what the disks hold is what a power failure would leave; `Quiesce.NONE`: the same of each
disk, but of different moments.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from qemu_glue.qmp.agent import Agent
from qemu_glue.qmp.connection import Connection
from qemu_glue.qmp.errors import MachineError
from qemu_glue.qmp.images import GroupRef, ImageRef, Opened, OpenedGroup
from qemu_glue.qmp.steps import Steps, uncancelled

LIMIT_SECONDS = 10.0  # how long a guest may stand still
MAX_LIMIT = 60.0
THAW_SECONDS = 5.0  # for one attempt to let it go again
LATE_SECONDS = 10.0  # for a snapshot that was too late to end, so that it can be removed


class Quiesce(Enum):
    AGENT = "agent"
    STOP = "stop"
    NONE = "none"


@dataclass(frozen=True)
class Taken:
    name: str
    images: tuple[str, ...]
    still: float  # seconds the guest stood still or was frozen
    frozen: int  # file systems


async def snapshot(
    qmp: Connection | None,
    name: str,
    images: Sequence[ImageRef | GroupRef],
    quiesce: Quiesce,
    agent: str | None = None,
    limit: float = LIMIT_SECONDS,
) -> Taken:
    """Snapshot `name` of every image and group, or of none. `agent`: the socket of the guest agent's port. Whatever
    happens, the guest is let go after `limit` seconds at the latest, plus THAW_SECONDS for it to do so; what is not
    done then is undone. EEXIST: an image has such a snapshot; ENOTCONN: no agent (choose another way to quiesce);
    ETIMEDOUT; the store's errors. An agent that does not thaw is named in `left`."""
    if not images or not name or len(name) > 255 or "@" in name or "/" in name:
        raise MachineError(errno.EINVAL, "a snapshot needs a name (without @ and /) and at least one image")
    if not 0 < limit <= MAX_LIMIT:
        raise MachineError(errno.EINVAL, f"a guest may stand still for at most {MAX_LIMIT:g} s")
    opened: list[Opened | OpenedGroup] = []
    try:
        for image in images:  # before the guest is stopped: opening may take its time
            opened.append(await uncancelled(asyncio.to_thread(image.open)))
        for one in opened:
            if one.has_snapshot(name):
                raise MachineError(errno.EEXIST, f"{one.image} has a snapshot {name} already")
        async with Steps() as steps:
            frozen, still = await _still(qmp, quiesce, agent, limit, lambda: _all(steps, name, opened))
        return Taken(name, tuple(str(image) for image in images), still, frozen)
    finally:
        for one in opened:
            await uncancelled(asyncio.to_thread(one.close))


async def _all(steps: Steps, name: str, opened: list[Opened | OpenedGroup]) -> None:
    tasks = [asyncio.ensure_future(asyncio.to_thread(one.create, name)) for one in opened]

    def undo(one: Opened | OpenedGroup, task: asyncio.Future[None]) -> Callable[[], Awaitable[None]]:
        async def remove() -> None:
            await asyncio.wait([task], timeout=LATE_SECONDS)
            if not task.done():
                raise MachineError(errno.ETIMEDOUT, f"the snapshot {name} of {one.image} may still come to be")
            if not task.cancelled() and task.exception() is None:
                await asyncio.to_thread(one.remove, name)

        return remove

    for one, task in zip(opened, tasks, strict=True):
        # shielded: a thread cannot be stopped, and whether it made the snapshot must be known to remove it
        await steps.run(f"snapshot {name} of {one.image}", _registered(), undo(one, task))
    for one, task in zip(opened, tasks, strict=True):
        try:
            await asyncio.shield(task)
        except OSError as error:
            if isinstance(error, MachineError):
                raise
            raise MachineError(error.errno or errno.EIO, f"snapshot {name} of {one.image}: {error.strerror}") from None


async def _registered() -> None:
    """The step itself runs already."""


async def _still(
    qmp: Connection | None, quiesce: Quiesce, socket: str | None, limit: float, work: Callable[[], Awaitable[None]]
) -> tuple[int, float]:
    """Runs `work` while the guest is quiet. (file systems frozen, seconds)"""
    if quiesce is Quiesce.AGENT:
        return await _frozen(socket, limit, work)
    begin = time.monotonic()
    if quiesce is Quiesce.NONE:
        await _limited(work, limit)
        return 0, 0.0
    if qmp is None:
        raise MachineError(errno.EINVAL, "stopping the machine needs its monitor")
    status = await qmp.execute("query-status")
    if status.get("running") is not True:
        await _limited(work, limit)
        return 0, 0.0
    try:
        await qmp.execute("stop", deadline=limit)
        await _limited(work, limit)
    finally:
        await uncancelled(
            _let_go(lambda: qmp.execute("cont", deadline=THAW_SECONDS), "the machine stands still (`cont`)")
        )
    return 0, time.monotonic() - begin


async def _frozen(socket: str | None, limit: float, work: Callable[[], Awaitable[None]]) -> tuple[int, float]:
    if socket is None:
        raise MachineError(errno.ENOTCONN, "the machine has no port for a guest agent")
    agent = await Agent.open(socket)
    path, thawed = socket, False

    async def thaw() -> None:
        """A new connection, because a freeze that was cut off leaves an answer on the old one."""
        await agent.close()
        again = await Agent.open(path, THAW_SECONDS)
        try:
            await again.thaw(THAW_SECONDS)
        finally:
            await again.close()

    begin = time.monotonic()
    try:
        count = await agent.freeze(limit)
        begin = time.monotonic()
        await _limited(work, limit)
        if not await agent.frozen(THAW_SECONDS):
            raise MachineError(errno.ESTALE, "the guest thawed its file systems before the snapshots were complete")
        await agent.thaw(THAW_SECONDS)
        thawed = True
        return count, time.monotonic() - begin
    finally:
        if not thawed:
            await uncancelled(_let_go(thaw, "the guest's file systems may be frozen (guest-fsfreeze-thaw)"))
        await agent.close()


async def _let_go(action: Callable[[], Awaitable[object]], left: str) -> None:
    """Three attempts; each bounds itself."""
    failure: Exception | None = None
    for _ in range(3):
        try:
            await action()
            return
        except OSError as error:
            failure = error
    stuck = MachineError(errno.EIO, f"{left}: {failure}")
    stuck.left.append(left)
    raise stuck


async def _limited(work: Callable[[], Awaitable[None]], limit: float) -> None:
    try:
        async with asyncio.timeout(limit):
            await work()
    except TimeoutError:
        raise MachineError(errno.ETIMEDOUT, f"the snapshots were not made within {limit:g} s") from None

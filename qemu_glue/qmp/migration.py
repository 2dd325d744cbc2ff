"""Live migration between two QEMUs, driven so that the machine runs on exactly one of them, whatever fails.

The destination is started with `-incoming defer` and told not to run by itself. So there is one place where the
machine changes sides: `cont` on the destination, after the source has said that it is stopped for good. Before it,
the source is what is gone back to; after it, never. The disks' lock follows by itself: the services see QEMU stop and
start the rings.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from qemu_glue.qmp.connection import Connection, Listener, Monitor
from qemu_glue.qmp.errors import CommandFailed, Disconnected, Late, MachineError, printable
from qemu_glue.qmp.steps import uncancelled

SETUP_SECONDS = 20.0
MIGRATE_SECONDS = 600.0
SWITCH_SECONDS = 30.0  # from the moment the source stands still to the end
CANCEL_SECONDS = 15.0
OVER = ("completed", "failed", "cancelled")
CAPABILITIES_SOURCE = ("events", "pause-before-switchover")
CAPABILITIES_DESTINATION = ("events", "late-block-activate")
RUNNING_ON = ("source", "destination", "neither")

Hook = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Migrated:
    """What a migration took, in seconds; `downtime` is QEMU's figure."""

    seconds: float
    downtime: float
    transferred: int  # bytes of memory


class MigrationFailed(MachineError):
    """`side`: where the machine is now, "source" or "destination"; "neither" when that cannot be known (see `left`)."""

    def __init__(self, code: int, text: str, side: str) -> None:
        super().__init__(code, text)
        self.side = side


async def migrate(
    source: Connection,
    destination: Monitor,
    uri: str,
    *,
    deadline: float = MIGRATE_SECONDS,
    at_switchover: Hook | None = None,
    bandwidth: int | None = None,
    downtime: float | None = None,
    destination_dead: Hook | None = None,
    progress: Callable[[int, int], None] | None = None,
    moved: Callable[[], object] | None = None,
) -> Migrated:
    """Moves the machine. `uri`: where the destination listens and the source connects ("unix:PATH", "tcp:HOST:PORT").
    `at_switchover` runs while the source stands still and may take SWITCH_SECONDS. `bandwidth`: bytes a second;
    `downtime`: seconds aimed at. `destination_dead` proves that the destination's QEMU is gone (kills it and waits):
    with it, a destination that is lost at the last moment leaves the machine on the source instead of on neither side.

    Done: the machine runs on the destination (stands still, when it stood still before); the source is stopped for
    good and the caller ends it. MigrationFailed: `side` says where the machine is; on "source" it runs as before and
    the next migration can begin with a new destination (this one is useless then: quit it). A cancellation is a
    failure in this sense: the migration is cancelled, or, when the machine has changed sides already, completed; then
    CancelledError goes on."""
    begin = time.monotonic()
    limit = begin + deadline
    running = bool((await source.execute("query-status")).get("running"))
    try:
        await _prepare(source, destination, uri, bandwidth, downtime)
    except MachineError as error:
        raise MigrationFailed(
            error.errno or errno.EIO, f"the migration did not begin: {error.strerror}", "source"
        ) from error
    with source.listen("MIGRATION") as events:
        try:
            try:
                await source.execute("migrate", {"uri": uri})
                await _to_switchover(source, destination, events, limit, progress)
                if at_switchover:
                    async with asyncio.timeout(SWITCH_SECONDS):
                        await at_switchover()
                await source.execute("migrate-continue", {"state": "pre-switchover"})
                await _status(events, ("completed",), SWITCH_SECONDS)
                await _arrived(destination)
            except BaseException as error:
                await uncancelled(_back(source, error, running))
                raise  # cancelled
            info = await source.execute("query-migrate")
            await uncancelled(_over(source, destination, destination_dead, running, moved))
        finally:
            await _reset(source)
    ram = info.get("ram", {})
    return Migrated(
        time.monotonic() - begin, _number(info.get("downtime")) / 1000, int(_number(ram.get("transferred")))
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


async def _prepare(
    source: Connection, destination: Monitor, uri: str, bandwidth: int | None, downtime: float | None
) -> None:
    status = (await destination.execute("query-status")).get("status")
    if status != "inmigrate":
        raise MachineError(errno.EINVAL, f"the destination does not wait for a machine (it is {printable(status)})")
    await destination.execute("stop")  # while it waits: do not run by yourself when all has come
    await _capabilities(destination, CAPABILITIES_DESTINATION, True)
    await destination.execute("migrate-incoming", {"uri": uri})
    await _capabilities(source, CAPABILITIES_SOURCE, True)
    parameters: dict[str, int] = {}
    if bandwidth is not None:
        parameters["max-bandwidth"] = bandwidth
    if downtime is not None:
        parameters["downtime-limit"] = int(downtime * 1000)
    if parameters:
        await source.execute("migrate-set-parameters", parameters)


async def _capabilities(qmp: Monitor, names: tuple[str, ...], on: bool) -> None:
    wanted = [{"capability": name, "state": on} for name in names]
    await qmp.execute("migrate-set-capabilities", {"capabilities": wanted})


async def _reset(source: Connection) -> None:
    """Switch-overs that nobody continues would hang: the capability is this driver's alone."""
    try:
        await uncancelled(_capabilities(source, ("pause-before-switchover",), False))
    except MachineError:
        pass  # gone, or completed: nothing to go back to


async def _to_switchover(
    source: Connection,
    destination: Monitor,
    events: Listener,
    limit: float,
    progress: Callable[[int, int], None] | None,
) -> None:
    while True:
        left = limit - time.monotonic()
        if left <= 0:
            raise Late("the migration did not converge in time")
        if destination.closed:
            raise Disconnected("the destination's QEMU ended")
        try:
            await _status(events, ("pre-switchover",), min(left, 0.5))
            return
        except Late:
            if progress:
                ram = (await source.execute("query-migrate")).get("ram", {})
                total = int(_number(ram.get("total")))
                progress(total - int(_number(ram.get("remaining"))), total)


async def _status(events: Listener, wanted: tuple[str, ...], deadline: float) -> str:
    event = await events.until(lambda event: event.data.get("status") in (*wanted, *OVER), deadline)
    status = str(event.data.get("status"))
    if status not in wanted:
        raise MachineError(errno.EIO, f"QEMU says that the migration {printable(status)}")
    return status


async def _arrived(destination: Monitor) -> None:
    """The source is done; the destination says so too, or is lost."""
    limit = time.monotonic() + SWITCH_SECONDS
    while True:
        status = str((await destination.execute("query-status")).get("status"))
        if status in ("paused", "running", "prelaunch", "postmigrate"):
            return
        if status != "inmigrate" or time.monotonic() > limit:
            raise MachineError(errno.EIO, f"the destination did not take the machine (it is {printable(status)})")
        await asyncio.sleep(0.002)


async def _over(
    source: Connection,
    destination: Monitor,
    dead: Hook | None,
    running: bool,
    moved: Callable[[], object] | None,
) -> None:
    """The machine changes sides. The source still has all of it, stopped, until the destination runs."""
    try:
        if running:
            await destination.execute("cont", deadline=SWITCH_SECONDS)
        if moved:
            moved()
    except CommandFailed as error:  # refused, so it does not run there
        await _resume(source, error)
    except MachineError as error:
        await _lost(source, error, dead)


async def _back(
    source: Connection,
    error: BaseException,
    running: bool,
) -> None:
    """After a failure before the destination was told to run: the source goes on. Raises MigrationFailed, nothing for
    a cancellation."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else printable(error) or "it was cancelled"
    code = error.errno if isinstance(error, OSError) and error.errno else errno.ECANCELED
    limit = time.monotonic() + CANCEL_SECONDS
    while True:
        if source.closed:
            raise MigrationFailed(code, f"the source's QEMU ended during the migration: {text}", "neither") from error
        try:
            await _go_on(source, running)
            break
        except MachineError as second:
            if time.monotonic() < limit:
                await asyncio.sleep(0.05)
                continue
            failure = MigrationFailed(
                code, f"the migration failed ({text}), and the source did not go on: {second}", "neither"
            )
            failure.left = ["the machine, standing still on the source"]
            raise failure from error
    if isinstance(error, asyncio.CancelledError):
        return
    reason = str((await _info(source)).get("error-desc", ""))
    more = f": {printable(reason)}" if reason and reason not in text else ""
    raise MigrationFailed(
        code, f"the migration failed, the machine is on the source: {text}{more}", "source"
    ) from error


async def _info(qmp: Connection) -> dict[str, Any]:
    try:
        answer = await qmp.execute("query-migrate")
    except MachineError:
        return {}
    return answer if isinstance(answer, dict) else {}


async def _go_on(source: Connection, running: bool) -> None:
    """Ends the migration and, when it ran before, lets the source run."""
    limit = time.monotonic() + CANCEL_SECONDS
    while str((await source.execute("query-migrate")).get("status", "none")) not in (*OVER, "none"):
        if time.monotonic() > limit:
            raise Late("the migration could not be cancelled")
        await source.execute("migrate_cancel")
        await asyncio.sleep(0.02)
    if running and (await source.execute("query-status")).get("running") is not True:
        await source.execute("cont")


async def _resume(source: Connection, error: MachineError) -> None:
    await source.execute("cont")
    raise MigrationFailed(
        error.errno or errno.EIO,
        f"the destination did not start, the machine is on the source: {error.strerror}",
        "source",
    ) from error


async def _lost(source: Connection, error: MachineError, dead: Hook | None) -> None:
    """`cont` was sent and not answered. Only a proof that the destination is gone allows to go on here."""
    if dead is not None:
        try:
            await dead()
            await _resume(source, error)
        except MigrationFailed:
            raise
        except OSError as second:
            error.left.append(printable(second))
    failure = MigrationFailed(
        error.errno or errno.EIO,
        f"the destination was lost when it was told to run: {error.strerror}. The machine may run there and stands"
        " still here: make sure that the destination's QEMU is gone, then `cont` here",
        "neither",
    )
    failure.left = [*error.left, "the machine, standing still on the source"]
    raise failure from error

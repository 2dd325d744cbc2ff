"""One connection to a QMP monitor (QEMU's or rbdpyd's) on qemu.qmp, with deadlines and bounds on everything.

What the monitor says is not trusted: messages are limited to MAX_MESSAGE bytes, events that nobody takes to
MAX_EVENTS of each listener, and a command that is not answered ends with its deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate
from qemu.qmp.events import EventListener

from qemu_glue.qmp.errors import CommandFailed, Disconnected, Late, MachineError, printable

MAX_MESSAGE = 4 << 20  # bytes; the longest answer of QEMU 7.2 (query-qmp-schema) has 0.3 MiB
MAX_EVENTS = 1024  # not yet taken, per listener; the oldest are dropped and counted
CONNECT_SECONDS = 5.0
COMMAND_SECONDS = 20.0

Address = str | Path | tuple[str, int]
_numbers = itertools.count()


@dataclass(frozen=True)
class Event:
    name: str
    data: dict[str, Any]
    seconds: float  # the sender's clock


class Monitor(Protocol):
    """What a migration needs of the far end's monitor, which may be reached in another way."""

    @property
    def closed(self) -> bool: ...

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, deadline: float = ...
    ) -> Any: ...


class Listener:
    """Events from the moment listen() was called. `lost` counts those dropped because nobody took them."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.lost = 0
        self._queue: deque[Event] = deque()
        self._changed = asyncio.Event()
        self._ended = False

    def put(self, event: Event) -> None:
        if self.names and event.name not in self.names:
            return
        if len(self._queue) >= MAX_EVENTS:
            self._queue.popleft()
            self.lost += 1
        self._queue.append(event)
        self._changed.set()

    def end(self) -> None:
        self._ended = True
        self._changed.set()

    async def next(self, deadline: float | None) -> Event:
        """The next event. Late after `deadline` seconds; Disconnected when there can be no more."""
        try:
            async with asyncio.timeout(deadline):
                while not self._queue:
                    if self._ended:
                        raise Disconnected("the monitor's connection ended")
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            wanted = ", ".join(sorted(self.names)) or "any event"
            raise Late(f"no {wanted} within {deadline:g} s") from None
        return self._queue.popleft()

    async def until(self, wanted: Callable[[Event], bool], deadline: float | None) -> Event:
        """The first event that `wanted` says yes to; those before it are dropped. As next()."""
        try:
            async with asyncio.timeout(deadline):
                while True:
                    event = await self.next(None)
                    if wanted(event):
                        return event
        except TimeoutError:
            what = ", ".join(sorted(self.names)) or "event"
            raise Late(f"no {what} as wanted within {deadline:g} s") from None


class _Tap(EventListener):
    def __init__(self, deliver: Callable[[Event], None]) -> None:
        super().__init__()
        self._deliver = deliver

    async def put(self, event: Any) -> None:
        name, data, stamp = event.get("event"), event.get("data", {}), event.get("timestamp", {})
        if not isinstance(name, str) or not isinstance(data, dict):
            return
        seconds = 0.0
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            seconds = float(stamp.get("seconds", 0)) + float(stamp.get("microseconds", 0)) / 1e6
        self._deliver(Event(name, data, seconds))


class Connection:
    """States: open -> closed (by close(), or because the other side went: `closed` tells, waiting calls end with
    Disconnected). A monitor talks to one client at a time, so a second connection is not answered until the first is
    closed."""

    def __init__(self, client: Any, address: Address) -> None:
        self._client = client
        self.address = address
        self._listeners: list[Listener] = []
        self._closing = False
        self.closed = False
        client.events.event_filter = lambda event: False  # else it keeps every event for ever
        client.register_listener(_Tap(self._deliver))
        self._watcher = asyncio.create_task(self._watch())

    @classmethod
    async def open(cls, address: Address, deadline: float = CONNECT_SECONDS) -> Self:
        """Connects and negotiates. MachineError: ENOENT or ECONNREFUSED when nobody listens, EBUSY when the monitor
        is taken (nothing within `deadline` seconds), EPROTO when it speaks no QMP. Nothing is left."""
        client = QMPClient(f"rbdpy-{next(_numbers)}", MAX_MESSAGE)
        client.logger.disabled = True
        where = str(address) if isinstance(address, Path) else address
        try:
            async with asyncio.timeout(deadline):
                await client.connect(where)
        except TimeoutError:
            raise MachineError(
                errno.EBUSY, f"the monitor {address} does not answer: another program may be connected to it"
            ) from None
        except ConnectError as error:
            cause = error.exc
            code = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EPROTO
            text = cause.strerror if isinstance(cause, OSError) and cause.strerror else printable(cause)
            raise MachineError(code, f"cannot connect to the monitor {address}: {text}") from None
        return cls(client, address)

    @classmethod
    async def open_new(cls, address: Address, alive: Callable[[], bool], deadline: float) -> Self:
        """As open(), for a monitor that is only starting. ECHILD when `alive` says that it will not."""
        limit = asyncio.get_running_loop().time() + deadline
        while True:
            try:
                return await cls.open(address)
            except MachineError as error:
                if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                    raise
                if not alive():
                    raise MachineError(errno.ECHILD, f"the process that should serve {address} ended") from None
                if asyncio.get_running_loop().time() > limit:
                    raise
            await asyncio.sleep(0.02)

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, deadline: float = COMMAND_SECONDS
    ) -> Any:
        """The command's answer. CommandFailed (refused), Late, Disconnected."""
        if self.closed:
            raise Disconnected(f"{command}: the connection to {self.address} is closed")
        try:
            async with asyncio.timeout(deadline):
                return await self._client.execute(command, arguments)
        except TimeoutError:
            raise Late(f"{command}: no answer within {deadline:g} s") from None
        except ExecuteError as error:
            raise CommandFailed(command, str(error.error_class)[:64], str(error)) from None
        except (ExecInterruptedError, QMPError, OSError, EOFError) as error:
            raise Disconnected(f"{command}: the connection to {self.address} ended ({printable(error)})") from None

    @contextlib.contextmanager
    def listen(self, *names: str) -> Iterator[Listener]:
        """Events of these names (all, when none is given) that arrive inside the block."""
        listener = Listener(frozenset(names))
        if self.closed:
            listener.end()
        self._listeners.append(listener)
        try:
            yield listener
        finally:
            self._listeners.remove(listener)

    async def events(self, *names: str) -> AsyncIterator[Event]:
        """Events for as long as the connection lives."""
        with self.listen(*names) as listener:
            with contextlib.suppress(Disconnected):
                while True:
                    yield await listener.next(None)

    async def close(self) -> None:
        """Idempotent; the machine goes on."""
        self._closing = True
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._client.disconnect(), CONNECT_SECONDS)
        self._watcher.cancel()
        await asyncio.gather(self._watcher, return_exceptions=True)
        self._end()

    def _deliver(self, event: Event) -> None:
        for listener in self._listeners:
            listener.put(event)

    def _end(self) -> None:
        self.closed = True
        for listener in self._listeners:
            listener.end()

    async def _watch(self) -> None:
        while self._client.runstate == Runstate.RUNNING:
            await self._client.runstate_changed()
        if not self._closing:
            self._end()
            with contextlib.suppress(Exception, asyncio.TimeoutError):
                await asyncio.wait_for(self._client.disconnect(), CONNECT_SECONDS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await self.close()

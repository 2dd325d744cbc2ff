"""QMP monitors: accepts clients on a Unix socket and runs their commands one after another.

The commands themselves are in `commands.py`; this module knows only how to call them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from qemu_glue import qmp_wire
from qemu_glue.qmp_wire import Command, QMPError

log = logging.getLogger(__name__)

Handler = Callable[[dict[str, Any]], Awaitable[Any]]
VERSION = (7, 2, 0)  # the QMP dialect spoken: QEMU 7.2's
PACKAGE = "rbdpyd"
MAX_CLIENTS = 32
MAX_UNSENT = 4 << 20  # bytes a client may leave unread before it is dropped


class Monitor:
    """One connected client. States: negotiating (only qmp_capabilities) -> commands -> closed."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.ready = False

    def send(self, data: bytes) -> None:
        transport = self.writer.transport
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() > MAX_UNSENT:
            log.warning("a QMP client does not read its answers: dropped")
            transport.abort()
            return
        self.writer.write(data)


class QMPServer:
    """`handlers`: command name -> coroutine function taking the arguments. A handler raises QMPError, or OSError whose
    sentence becomes the description."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = handlers
        self._monitors: set[Monitor] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []

    async def listen(self, sock: Any) -> None:
        """`sock`: a bound, listening Unix socket; it belongs to the server from now on."""
        self._servers.append(await asyncio.start_unix_server(self._client, sock=sock, limit=1 << 16))

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Sends an event to every client that finished its negotiation."""
        message = qmp_wire.event(name, data)
        for monitor in list(self._monitors):
            if monitor.ready:
                monitor.send(message)

    async def close(self) -> None:
        """Stops listening, lets answers already written go out, drops the clients."""
        for server in self._servers:
            server.close()
        for monitor in list(self._monitors):
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(monitor.writer.drain(), 1.0)
            monitor.writer.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        monitor = Monitor(writer)
        try:
            if len(self._monitors) >= MAX_CLIENTS:
                return
            self._monitors.add(monitor)
            await self._talk(reader, monitor)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._monitors.discard(monitor)
            self._tasks.discard(task)
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, monitor: Monitor) -> None:
        splitter = qmp_wire.Splitter()
        monitor.send(qmp_wire.greeting(VERSION, PACKAGE))
        while data := await reader.read(1 << 16):
            for message in splitter.feed(data):
                monitor.send(await self._answer(monitor, message))
                await monitor.writer.drain()
            if splitter.overflow:
                monitor.send(qmp_wire.failure(QMPError(f"a message is limited to {qmp_wire.MAX_MESSAGE} bytes")))
                return

    async def _answer(self, monitor: Monitor, message: bytes) -> bytes:
        try:
            command = qmp_wire.parse(message)
        except QMPError as error:
            return qmp_wire.failure(error, *qmp_wire.message_id(message))
        try:
            return qmp_wire.success(command, await self._run(monitor, command))
        except QMPError as error:
            return qmp_wire.failure(error, command.id, command.has_id)
        except OSError as error:
            return qmp_wire.failure(QMPError(error.strerror or str(error)), command.id, command.has_id)
        except Exception as error:  # a defect of ours must not take the daemon and its guests down
            log.exception("QMP command %s", command.name)
            return qmp_wire.failure(QMPError(f"internal error: {error!r}"), command.id, command.has_id)

    async def _run(self, monitor: Monitor, command: Command) -> Any:
        if not monitor.ready:
            if command.name != "qmp_capabilities":
                raise QMPError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
            if enable := command.arguments.get("enable"):
                raise QMPError(f"Capability {enable[0] if isinstance(enable, list) else enable!r} not available")
            monitor.ready = True
            return {}
        if command.name == "query-commands":
            return [{"name": name} for name in sorted([*self._handlers, "qmp_capabilities", "query-commands"])]
        handler = self._handlers.get(command.name)
        if handler is None:
            raise QMPError(f"The command {command.name} has not been found", "CommandNotFound")
        return await handler(command.arguments)

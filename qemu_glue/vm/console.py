"""The serial console of a VM: a relay that any number of terminals may join, and the terminal's end of it.

The relay is a process beside QEMU (`python -m qemu_glue.vm.console FOLDER`): it keeps the last HISTORY bytes for who
joins, logs, follows the machine when it gets a new QEMU on this host, and ends with it: then it also ends the VM's
service, so that a guest that shuts down leaves no lock behind. If it is killed the VM goes on, and the next `rbdpy vm
console` starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections import deque
from pathlib import Path

from qemu_glue import sockets
from qemu_glue.qmp import MachineError
from qemu_glue.vm.folder import Folder, environment, python
from qemu_glue.vm.service import Service

HISTORY = 64 << 10  # bytes
LOG_LIMIT = 4 << 20  # bytes of console.log; what was before goes to console.log.1
UNSENT = 1 << 20  # bytes that a terminal may leave unread before it is dropped
TERMINALS = 16
ESCAPE = 0x1D  # Ctrl-]
LOOK_SECONDS = 0.2  # between looks for a QEMU to connect to
START_SECONDS = 10.0


class Relay:
    """One event loop; ends when the machine has no QEMU any more."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._terminals: set[asyncio.StreamWriter] = set()
        self._history: deque[bytes] = deque()
        self._kept = 0
        self._serials: dict[int, asyncio.StreamWriter] = {}  # by generation
        self._tasks: set[asyncio.Task[None]] = set()
        self._look = asyncio.Event()

    async def run(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._look.set)
        listener = sockets.listen_unix(str(self._folder.path / "console.sock"), 0o600)
        server = await asyncio.start_unix_server(self._terminal, sock=listener)
        try:
            await self._follow()
        finally:
            server.close()
            for writer in list(self._terminals):
                with contextlib.suppress(OSError, asyncio.TimeoutError):
                    await asyncio.wait_for(writer.drain(), 1.0)
                writer.close()
            sockets.remove(str(self._folder.path / "console.sock"))

    async def _follow(self) -> None:
        """Connects to each QEMU of the VM; returns when the last is gone."""
        while True:
            self._look.clear()
            record = self._folder.read() if self._folder.exists else None
            if record is None:
                return
            wanted = [number for number in (record.generation, record.next) if number]
            alive = [number for number in wanted if self._folder.qemu(number).state != "absent"]
            if not alive and not self._serials and record.state != "starting":
                break
            for number in alive:
                if number not in self._serials:
                    with contextlib.suppress(OSError):
                        await self._connect(number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), LOOK_SECONDS if len(alive) > len(self._serials) else 1.0)
        with contextlib.suppress(MachineError):
            with self._folder.locked():  # else a command is at work, and ends the service itself
                await Service(self._folder).stop()

    async def _connect(self, number: int) -> None:
        reader, writer = await asyncio.open_unix_connection(str(self._folder.generation(number) / "serial.sock"))
        self._serials[number] = writer
        task = asyncio.create_task(self._read(number, reader))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, number: int, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 14):
                self._show(data)
        self._serials.pop(number).close()
        self._look.set()

    def _show(self, data: bytes) -> None:
        self._history.append(data)
        self._kept += len(data)
        while self._kept > HISTORY:
            self._kept -= len(self._history.popleft())
        log = self._folder.path / "console.log"
        with contextlib.suppress(OSError):  # a full disk must not end the console
            with log.open("ab") as file:
                file.write(data)
                full = file.tell() > LOG_LIMIT
            if full:
                os.replace(log, log.with_name("console.log.1"))
        for writer in list(self._terminals):
            if writer.transport.get_write_buffer_size() > UNSENT:
                writer.transport.abort()
            else:
                writer.write(data)

    async def _terminal(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._terminals) >= TERMINALS:
            writer.close()
            return
        self._terminals.add(writer)
        try:
            writer.write(b"".join(self._history))
            while data := await reader.read(4096):
                record = self._folder.read()
                serial = self._serials.get(record.generation) if record else None
                if serial is not None:
                    serial.write(data)
                    await serial.drain()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._terminals.discard(writer)
            writer.close()


def start(folder: Folder) -> None:
    """Starts the relay unless it runs; join() waits for it."""
    process = folder.console()
    if process.state != "absent":
        return
    process.spawn(python("qemu_glue.vm.console", str(folder.path)), environment())


def look_again(folder: Folder) -> None:
    """Tells the relay that the VM's record has changed."""
    folder.console().send(signal.SIGUSR1)


async def join(folder: Folder) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the console; starts the relay when it was killed. ENOENT, ECONNREFUSED: the VM has no QEMU any
    more."""
    start(folder)
    limit = asyncio.get_running_loop().time() + START_SECONDS
    while True:
        try:
            return await asyncio.open_unix_connection(str(folder.path / "console.sock"))
        except OSError:
            if asyncio.get_running_loop().time() > limit or folder.console().state == "absent":
                raise
        await asyncio.sleep(0.02)


async def ready(folder: Folder) -> None:
    """The relay runs, takes terminals and can be told of changes."""
    _, writer = await join(folder)
    writer.close()


async def attach(folder: Folder) -> bool:
    """This terminal becomes the console until Ctrl-] (True) or the machine's end (False). Without a terminal standard
    input goes to the guest, and its end does not end the console."""
    reader, writer = await join(folder)
    loop = asyncio.get_running_loop()
    stdin, left = sys.stdin.fileno(), asyncio.Event()
    before = termios.tcgetattr(stdin) if os.isatty(stdin) else None

    def typed() -> None:
        data = os.read(stdin, 4096)
        if not data:
            loop.remove_reader(stdin)
            return
        escape = data.find(ESCAPE) if before else -1
        if escape >= 0:
            data = data[:escape]
            left.set()
        writer.write(data)

    ended = asyncio.create_task(_copy(reader))
    try:
        if before:
            tty.setraw(stdin)
        with contextlib.suppress(PermissionError):  # a file: epoll does not take it, and it is read at once
            loop.add_reader(stdin, typed)
        leaving = asyncio.create_task(left.wait())
        await asyncio.wait((ended, leaving), return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        return left.is_set()
    finally:
        loop.remove_reader(stdin)
        ended.cancel()
        await asyncio.gather(ended, return_exceptions=True)
        if before:
            termios.tcsetattr(stdin, termios.TCSADRAIN, before)
        writer.close()


async def _copy(reader: asyncio.StreamReader) -> None:
    while data := await reader.read(1 << 14):
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(sys.stdout.fileno(), view) :]
            except BlockingIOError:  # a terminal's standard input and output share their flags
                select.select([], [sys.stdout], [], 1.0)


def main() -> int:
    path = Path(sys.argv[1])
    asyncio.run(Relay(Folder(path.parent, path.name)).run())
    return 0


if __name__ == "__main__":
    sys.exit(main())

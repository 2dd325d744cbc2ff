"""The two ends of a migration to another host: messages, a line of JSON each, over a pipe (ssh, a child process) or a
socket.

source: {"receive": 1, "spec": {...}}           destination: {"ready": URI} once its QEMU waits there
source: {"execute": COMMAND, "arguments": ...}  destination: {"return": ...}; COMMAND is one of ALLOWED
source: {"commit": true}                        destination: {"return": true}, the VM is here to stay; so it is after
"cont" Errors: {"error": {"class": ..., "desc": ...}}. When the source goes before the commit, everything here is
taken back. Whoever reaches the socket can start VMs: a Unix socket is for this user alone, TCP is for a network one
trusts.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qemu_glue import sockets
from qemu_glue.qmp import CommandFailed, Disconnected, Late, Machine, MachineError, Steps
from qemu_glue.qmp.connection import COMMAND_SECONDS
from qemu_glue.qmp.errors import printable
from qemu_glue.vm import console
from qemu_glue.vm.folder import Folder, Record, environment, python
from qemu_glue.vm.machines import Machines, Say, _done, silent
from qemu_glue.vm.spec import VMSpec

LINE = 1 << 16
PREPARE_SECONDS = 90.0  # to open the images there and start QEMU
ALLOWED = ("query-status", "stop", "cont", "migrate-set-capabilities", "migrate-incoming")
FORWARD_SECONDS = 20.0


class Far:
    """The other host's side as the source sees it; a `Monitor` of its QEMU. States: open -> closed."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        folder: Folder,
        process: asyncio.subprocess.Process | None = None,
        ssh: list[str] | None = None,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._folder = folder
        self._process = process
        self._ssh = ssh
        self._forward: asyncio.subprocess.Process | None = None
        self._asking = asyncio.Lock()
        self.closed = False

    async def prepare(self, spec: VMSpec) -> str:
        """The VM's QEMU waits there; where to send it (a URI of this host). What went wrong there, with its errno."""
        answer = await self._ask({"receive": 1, "spec": spec.to_dict()}, "receive", PREPARE_SECONDS)
        uri = str(answer)
        if not self._ssh:
            return uri
        local = self._folder.path / "forward.sock"
        local.unlink(missing_ok=True)
        words = [*self._ssh[:-1], "-N", "-o", "ExitOnForwardFailure=yes", "-L", f"{local}:{uri.removeprefix('unix:')}"]
        self._forward = await asyncio.create_subprocess_exec(*words, self._ssh[-1], stdin=asyncio.subprocess.DEVNULL)
        limit = asyncio.get_running_loop().time() + FORWARD_SECONDS
        while not os.path.lexists(local):
            if self._forward.returncode is not None or asyncio.get_running_loop().time() > limit:
                raise MachineError(errno.ECONNREFUSED, "ssh does not forward the migration's connection")
            await asyncio.sleep(0.05)
        return f"unix:{local}"

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, deadline: float = COMMAND_SECONDS
    ) -> Any:
        """As Connection.execute."""
        if command == "migrate-incoming":
            arguments = {}  # it knows where it listens
        return await self._ask({"execute": command, "arguments": dict(arguments or {})}, command, deadline)

    async def commit(self) -> None:
        await self._ask({"commit": True}, "commit", COMMAND_SECONDS)

    async def _ask(self, message: dict[str, Any], what: str, deadline: float) -> Any:
        async with self._asking:
            if self.closed:
                raise Disconnected(f"{what}: the other host is gone")
            try:
                async with asyncio.timeout(deadline):
                    self._writer.write(json.dumps(message).encode() + b"\n")
                    await self._writer.drain()
                    answer = await read(self._reader)
            except TimeoutError:
                self.closed = True  # an answer that comes late would be taken for the next one's
                raise Late(f"{what}: the other host gave no answer within {deadline:g} s") from None
            except (OSError, EOFError) as error:
                self.closed = True
                said = ""
                if self._process and self._process.stderr:
                    with contextlib.suppress(OSError, TimeoutError):
                        said = (await asyncio.wait_for(self._process.stderr.read(2000), 2.0)).decode(errors="replace")
                text = said.strip().splitlines()[-1] if said.strip() else str(error) or "it ended"
                raise Disconnected(f"{what}: the other host: {printable(text)}") from None
        if "error" in answer:
            failure = answer["error"] if isinstance(answer["error"], dict) else {}
            code = failure.get("errno")
            if isinstance(code, int) and code in errno.errorcode:
                raise MachineError(code, printable(failure.get("desc", "?")))
            raise CommandFailed(what, printable(failure.get("class", "")), printable(failure.get("desc", "?")))
        return answer.get("return", answer.get("ready"))

    async def close(self) -> None:
        self.closed = True
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        for process in (self._forward, self._process):
            if process is None or process.returncode is not None:
                continue
            if process is self._forward:
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), FORWARD_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()


async def reach(to: str, folder: Folder) -> Far:
    """Connects to the other side (see `migrate.migrate`). MachineError when there is none."""
    try:
        if to.startswith("unix:"):
            return Far(*await asyncio.open_unix_connection(to[5:], limit=LINE), folder)
        if to.startswith("tcp:"):
            host, _, port = to[4:].rpartition(":")
            return Far(*await asyncio.open_connection(host.strip("[]"), int(port), limit=LINE), folder)
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else "no valid address"
        raise MachineError(getattr(error, "errno", None) or errno.EINVAL, f"cannot reach {to}: {text}") from None
    ssh: list[str] | None = None
    if "/" in to:
        words, more = python("librbd_py.cli.main", "vm", "receive"), {"RBDPY_RUN": str(Path(to).absolute())}
    else:
        if to.startswith("-"):
            raise MachineError(errno.EINVAL, f"{to!r} is no name of a host")
        ssh = [*shlex.split(os.environ.get("RBDPY_SSH", "ssh")), to]
        words, more = [*ssh, "rbdpy", "vm", "receive"], {}
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            *words, stdin=pipe, stdout=pipe, stderr=pipe, limit=LINE, env=environment() | more
        )
    except OSError as error:
        raise MachineError(error.errno or errno.EIO, f"{words[0]}: {error.strerror}") from None
    assert process.stdout and process.stdin
    return Far(process.stdout, process.stdin, folder, process, ssh)


async def read(reader: asyncio.StreamReader) -> dict[str, Any]:
    """One message. EOFError; OSError EPROTO."""
    try:
        line = await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError:
        raise EOFError("the connection ended") from None
    except asyncio.LimitOverrunError:
        raise MachineError(errno.EPROTO, "a message is too long") from None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise MachineError(errno.EPROTO, "what came is no message")
    return value


# --- the destination


async def receive(
    machines: Machines,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    store: str | None = None,
    host: str = "",
    say: Say = silent,
) -> str | None:
    """Takes in one VM; its name, None when it did not come (then nothing is left). `store`: the images are there,
    instead of where they are for the sender. `host`: the address of this host that memory is sent to over TCP; empty:
    a Unix socket."""

    async def answer(value: dict[str, Any]) -> None:
        writer.write(json.dumps(value).encode() + b"\n")
        await writer.drain()

    try:
        message = await read(reader)
        if message.get("receive") != 1:
            raise MachineError(errno.EPROTO, "another version of rbdpy asks")
        spec = VMSpec.from_dict(message.get("spec"))
        if store:
            spec = replace(spec, store=store)
        folder = Folder(machines.run, spec.name)
        folder.make()
        with folder.locked():
            if folder.read() is not None:
                if (await machines.status(folder)).state != "dead":
                    raise MachineError(errno.EEXIST, f"there is a VM {spec.name} in {machines.run}")
                await machines.clear(folder)
                folder.make()
            return await _take(machines, folder, spec, reader, answer, host, say)
    except EOFError:
        return None
    except MachineError as error:
        with contextlib.suppress(OSError):
            await answer({"error": {"errno": error.errno, "desc": str(error)}})
        raise


async def _take(
    machines: Machines,
    folder: Folder,
    spec: VMSpec,
    reader: asyncio.StreamReader,
    answer: Any,
    host: str,
    say: Say,
) -> str | None:
    async with Steps() as steps:
        folder.write(Record(spec, "receiving", 1))
        await steps.run("folder", _done(), lambda: machines.clear(folder))
        machine = await machines.launch(folder, spec, 1, steps, incoming=True)
        try:
            await console.ready(folder)
            await machines.await_serial(folder, 1)
            uri = f"tcp:{host}:{_free_port(host)}" if host else f"unix:{folder.generation(1)}/migrate.sock"
            await answer({"ready": uri})
            while True:
                message = await read(reader)
                if message.get("commit") is True:
                    folder.write(Record(spec, "running", 1))
                    steps.keep()
                    await answer({"return": True})
                    break
                await _run(machine, folder, spec, message, uri, steps, answer)
        except EOFError:
            if (record := folder.read()) is None or record.state == "receiving":
                raise
        finally:
            await machine.close()
    say(f"{spec.name} runs here")
    return spec.name


async def _run(
    machine: Machine, folder: Folder, spec: VMSpec, message: dict[str, Any], uri: str, steps: Steps, answer: Any
) -> None:
    command, arguments = message.get("execute"), message.get("arguments", {})
    if command not in ALLOWED or not isinstance(arguments, dict):
        raise MachineError(errno.EPROTO, f"{printable(command)} is not for other hosts")
    if command == "migrate-incoming":
        arguments = {"uri": uri}
    try:
        result = await machine.execute(str(command), arguments)
    except CommandFailed as error:
        await answer({"error": {"class": error.error_class, "desc": error.description}})
        return
    if command == "cont":
        folder.write(Record(spec, "running", 1))
        steps.keep()
    await answer({"return": result})


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.bind((host.strip("[]"), 0))
        return int(sock.getsockname()[1])


async def receive_stdio(machines: Machines, store: str | None, say: Say) -> str | None:
    """Over standard input and output, for ssh."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LINE)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sys.stdout.buffer)
    return await receive(machines, reader, asyncio.StreamWriter(transport, protocol, None, loop), store, "", say)


async def receive_at(machines: Machines, address: str, store: str | None, say: Say) -> str | None:
    """Waits for one sender at "unix:PATH" or "tcp:HOST:PORT"."""
    first: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
        asyncio.get_running_loop().create_future()
    )

    async def came(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if first.done():
            writer.close()
        else:
            first.set_result((reader, writer))

    host = ""
    if address.startswith("unix:"):
        listener = sockets.listen_unix(address[5:], 0o600)
        server = await asyncio.start_unix_server(came, sock=listener, limit=LINE)
    elif address.startswith("tcp:") and address[4:].rpartition(":")[2].isdigit():
        host, _, port = address[4:].rpartition(":")
        server = await asyncio.start_server(came, host.strip("[]"), int(port), limit=LINE)
    else:
        raise MachineError(errno.EINVAL, f"{address!r} is neither unix:PATH nor tcp:HOST:PORT")
    say(f"waiting for a VM at {address}")
    try:
        reader, writer = await first
    finally:
        server.close()
        if not host:
            sockets.remove(address[5:])
    try:
        return await receive(machines, reader, writer, store, host, say)
    finally:
        writer.close()

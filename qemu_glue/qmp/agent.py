"""The guest agent, over the host's end of its virtio-serial port: freeze and thaw the guest's file systems.

Protocol: QEMU's qga/qapi-schema.json; one client at a time, lines of JSON. The guest is not trusted: a line is limited,
answers are numbers and words of a fixed set, every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import secrets
from typing import Any

from qemu_glue.qmp.errors import CommandFailed, Disconnected, MachineError, printable

MAX_LINE = 1 << 16
SYNC_SECONDS = 3.0  # for an agent to say that it is there


class Agent:
    """States: open -> closed. Made by `open`, which makes sure that somebody answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, path: str, deadline: float = SYNC_SECONDS) -> Agent:
        """`path`: the chardev's socket. MachineError ENOTCONN: no agent runs in the guest; ENOENT, ECONNREFUSED: no
        such port."""
        try:
            async with asyncio.timeout(deadline):
                reader, writer = await asyncio.open_unix_connection(path, limit=MAX_LINE)
        except TimeoutError:
            raise MachineError(errno.EBUSY, f"the guest agent's socket {path} is in use") from None
        except OSError as error:
            raise MachineError(error.errno or errno.EIO, f"{path}: {error.strerror}") from None
        agent = cls(reader, writer)
        try:
            await agent._sync(deadline)
        except BaseException:
            await agent.close()
            raise
        return agent

    async def _sync(self, deadline: float) -> None:
        """Drops what is left of an earlier client's talk: a number of our own comes back behind a byte 0xFF."""
        number = secrets.randbelow(1 << 30)
        message = json.dumps({"execute": "guest-sync-delimited", "arguments": {"id": number}})
        try:
            async with asyncio.timeout(deadline):
                self._writer.write(b"\xff" + message.encode() + b"\n")
                await self._writer.drain()
                while True:
                    await self._skip_to_delimiter()
                    if self._parse(await self._line()) == {"return": number}:
                        return
        except TimeoutError:
            raise MachineError(errno.ENOTCONN, f"no guest agent answered within {deadline:g} s") from None

    async def _skip_to_delimiter(self) -> None:
        while True:
            byte = await self._reader.read(1)
            if not byte:
                raise Disconnected("the guest agent's port was closed")
            if byte == b"\xff":
                return

    async def execute(self, command: str, deadline: float) -> Any:
        """CommandFailed; MachineError ETIMEDOUT; Disconnected."""
        try:
            async with asyncio.timeout(deadline):
                self._writer.write(json.dumps({"execute": command}).encode() + b"\n")
                await self._writer.drain()
                answer = self._parse(await self._line())
        except TimeoutError:
            raise MachineError(
                errno.ETIMEDOUT, f"{command}: the guest agent gave no answer in {deadline:g} s"
            ) from None
        except OSError as error:
            if isinstance(error, MachineError):
                raise
            raise Disconnected(f"{command}: the guest agent's port was closed") from None
        if "return" in answer:
            return answer["return"]
        failure = answer.get("error")
        failure = failure if isinstance(failure, dict) else {}
        raise CommandFailed(command, printable(failure.get("class", "")), printable(failure.get("desc", "?")))

    async def freeze(self, deadline: float) -> int:
        """The number of file systems that are frozen now, at least 1. EOPNOTSUPP when the guest has none to freeze."""
        count = await self.execute("guest-fsfreeze-freeze", deadline)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise MachineError(errno.EOPNOTSUPP, "the guest agent froze no file system")
        return count

    async def frozen(self, deadline: float) -> bool:
        return bool(await self.execute("guest-fsfreeze-status", deadline) == "frozen")

    async def thaw(self, deadline: float) -> int:
        count = await self.execute("guest-fsfreeze-thaw", deadline)
        return count if isinstance(count, int) else 0

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _line(self) -> bytes:
        try:
            line = await self._reader.readuntil(b"\n")
        except asyncio.LimitOverrunError:
            raise MachineError(errno.EPROTO, "the guest agent's answer is too long") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise Disconnected("the guest agent's port was closed") from None
        return line.lstrip(b"\xff")

    @staticmethod
    def _parse(line: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            raise MachineError(errno.EPROTO, "the guest agent's answer is no JSON") from None
        if not isinstance(answer, dict):
            raise MachineError(errno.EPROTO, "the guest agent's answer is no object")
        return answer

"""The QMP wire as a server sees it: bytes -> commands, results -> bytes. No I/O.

Source: QEMU's docs/interop/qmp-spec. Messages are JSON objects one after another; clients end them with a newline but
the specification does not ask for one, so the end is found by counting braces. Everything here comes from outside:
a message is bounded in bytes and depth, and what is not a command gets an error, never an exception.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

MAX_MESSAGE = 1 << 20  # bytes of one command
MAX_DEPTH = 64
ERROR_CLASSES = ("GenericError", "CommandNotFound", "DeviceNotActive", "DeviceNotFound", "KVMMissingCap")


class QMPError(Exception):
    """A command failed; `error_class` is one of ERROR_CLASSES."""

    def __init__(self, description: str, error_class: str = "GenericError") -> None:
        super().__init__(description)
        self.error_class = error_class


@dataclass(frozen=True)
class Command:
    name: str
    arguments: dict[str, Any]
    id: Any  # anything the client sent, echoed
    has_id: bool


class Splitter:
    """Cuts a byte stream into JSON objects. feed() raises QMPError on what can never become one: the caller then
    answers with it and, as QEMU does, goes on with the next line; `overflow` says that the connection must end."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.overflow = False

    def feed(self, data: bytes) -> list[bytes]:
        self._buffer += data
        messages: list[bytes] = []
        while (end := self._scan()) is not None:
            message = bytes(self._buffer[:end]).strip()
            del self._buffer[:end]
            self._scanned = 0
            if message:
                messages.append(message)
        if len(self._buffer) > MAX_MESSAGE:
            self.overflow = True
            self._buffer.clear()
        return messages

    def _scan(self) -> int | None:
        """Index behind the next complete object (or line of garbage), None when more bytes are needed."""
        buffer = self._buffer
        for at in range(self._scanned, len(buffer)):
            byte = buffer[at]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif byte == 0x5C:  # backslash
                    self._escaped = True
                elif byte == 0x22:
                    self._in_string = False
                continue
            if byte == 0x22 and self._depth:
                self._in_string = True
            elif byte in b"{[":
                self._depth += 1
            elif byte in b"}]":
                self._depth = max(0, self._depth - 1)
                if not self._depth:
                    return at + 1
            elif byte == 0x0A and not self._depth:
                return at + 1
        self._scanned = len(buffer)
        return None


def parse(message: bytes) -> Command:
    """One message -> Command. QMPError with QEMU's wording when it is not one."""
    if _depth(message) > MAX_DEPTH:
        raise QMPError("JSON parse error, nesting too deep")
    try:
        value = json.loads(message)
    except (ValueError, RecursionError):
        raise QMPError("JSON parse error, invalid keyword or syntax") from None
    if not isinstance(value, dict):
        raise QMPError("QMP input must be a JSON object")
    for key in value:
        if key not in ("execute", "exec-oob", "arguments", "id"):
            raise QMPError(f"QMP input member '{key}' is unexpected")
    name = value.get("execute", value.get("exec-oob"))
    if name is None:
        raise QMPError("QMP input lacks member 'execute'")
    if not isinstance(name, str):
        raise QMPError("QMP input member 'execute' must be a string")
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        raise QMPError("QMP input member 'arguments' must be an object")
    return Command(name, arguments, value.get("id"), "id" in value)


def _depth(message: bytes) -> int:
    deepest = depth = 0
    for byte in message:  # counts braces in strings too: an over-estimate is harmless here
        if byte in b"{[":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"}]":
            depth -= 1
    return deepest


def message_id(message: bytes) -> tuple[Any, bool]:
    """The id of a message that parse() refused, when it can be read: errors echo it too."""
    if _depth(message) <= MAX_DEPTH:
        try:
            value = json.loads(message)
        except (ValueError, RecursionError):
            return None, False
        if isinstance(value, dict) and "id" in value:
            return value["id"], True
    return None, False


def encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(", ", ": ")).encode() + b"\r\n"


def greeting(version: tuple[int, int, int], package: str) -> bytes:
    major, minor, micro = version
    qemu = {"major": major, "minor": minor, "micro": micro}
    return encode({"QMP": {"version": {"qemu": qemu, "package": package}, "capabilities": []}})


def success(command: Command, result: Any) -> bytes:
    answer: dict[str, Any] = {"return": {} if result is None else result}
    if command.has_id:
        answer["id"] = command.id
    return encode(answer)


def failure(error: QMPError, identifier: Any = None, has_id: bool = False) -> bytes:
    answer: dict[str, Any] = {"error": {"class": error.error_class, "desc": str(error)}}
    if has_id:
        answer["id"] = identifier
    return encode(answer)


def event(name: str, data: dict[str, Any]) -> bytes:
    now = time.time_ns() // 1000
    stamp = {"seconds": now // 1_000_000, "microseconds": now % 1_000_000}
    return encode({"timestamp": stamp, "event": name, "data": data})

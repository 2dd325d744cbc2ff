"""One QMP command to the host service, blocking and with a deadline. Standard library only: a hook has no time to
spare."""

from __future__ import annotations

import errno
import json
import socket
import time
from typing import Any

ANSWER_MAX = 16 << 20  # bytes


class ServiceError(OSError):
    """The service refused: its sentence."""

    def __init__(self, sentence: str) -> None:
        super().__init__(errno.EPROTO, sentence)


def ask(path: str, command: str, arguments: dict[str, Any], seconds: float) -> Any:
    """What the command returns. ServiceError: refused; TimeoutError; ConnectionRefusedError, FileNotFoundError: nobody
    serves; another OSError: the connection broke."""
    end = time.monotonic() + seconds
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(seconds)
        sock.connect(path)
        lines = _Lines(sock, end)
        if "QMP" not in lines.next():
            raise OSError(errno.EPROTO, f"{path} does not speak QMP")
        for number, (name, data) in enumerate((("qmp_capabilities", {}), (command, arguments))):
            sock.sendall(json.dumps({"execute": name, "arguments": data, "id": number}).encode() + b"\n")
            answer = lines.next()
            while "event" in answer:
                answer = lines.next()
            if "error" in answer:
                raise ServiceError(str(answer["error"].get("desc", answer["error"])))
        return answer.get("return")


class _Lines:
    def __init__(self, sock: socket.socket, end: float) -> None:
        self._sock = sock
        self._end = end
        self._rest = b""

    def next(self) -> dict[str, Any]:
        while b"\n" not in self._rest:
            left = self._end - time.monotonic()
            if left <= 0:
                raise TimeoutError(errno.ETIMEDOUT, "no answer in time")
            self._sock.settimeout(left)
            data = self._sock.recv(1 << 16)
            if not data:
                raise OSError(errno.ECONNRESET, "the service closed the connection")
            self._rest += data
            if len(self._rest) > ANSWER_MAX:
                raise OSError(errno.EMSGSIZE, f"an answer of more than {ANSWER_MAX} bytes")
        line, _, self._rest = self._rest.partition(b"\n")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise OSError(errno.EPROTO, "no QMP answer")
        return answer

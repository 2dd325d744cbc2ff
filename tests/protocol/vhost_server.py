"""Runs an export in a process of its own, for front ends to test.

Two servers speak the same commands: `serve.py` (the package, as users run it) and `tests/native/vhost_server.c` (the
transport over an image in memory, built with the sanitizers). The second knows the commands that need its insides.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

CONNECTED, DISCONNECTED, BROKEN, STOPPED = 3, 4, 5, 6  # native/engine/event.h


@dataclass
class Stats:
    clients: int
    accepted: int
    broken: int
    resubmitted: int
    dirty_pages: int
    submitted: int
    fua: int


class Server:
    """`argv` is started with the socket's path in it; commands go to its stdin."""

    def __init__(self, argv: list[str], path: Path) -> None:
        self.path = path
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line == "ready\n", line

    def do(self, command: str) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(command + "\n")
        answer = self.process.stdout.readline()
        assert answer.endswith("\n"), f"the server died: {command}"
        return answer.strip()

    def ok(self, command: str) -> None:
        assert self.do(command) == "ok"

    def stats(self) -> Stats:
        return Stats(*map(int, self.do("stats").split()))

    def events(self) -> list[tuple[int, int]]:
        return [(int(kind), int(value)) for kind, _, value in (e.partition(":") for e in self.do("events").split())]

    def fds(self) -> list[str]:
        """What the server has open; eventfds and sockets by kind, so that leaks show and numbers do not matter."""
        base = f"/proc/{self.process.pid}/fd"
        out = []
        for name in os.listdir(base):
            try:
                target = os.readlink(f"{base}/{name}")
            except FileNotFoundError:
                continue
            out.append(target.partition("[")[0] if target.startswith(("socket:", "pipe:")) else target)
        return sorted(out)

    def maps(self) -> int:
        """Mappings of files that front ends passed."""
        with open(f"/proc/{self.process.pid}/maps") as f:
            return sum("memfd:" in line for line in f)

    def kill(self) -> None:
        self.process.kill()
        self.close(0)

    def close(self, expect: int | None = None) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        try:
            code = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.process.stdout.close()
        if expect is None:
            assert code == 0, f"exit status {code}"

"""Processes that use an embedded store, driven line by line."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEADLINE = 30.0  # seconds; reached only when something is broken

PRELUDE = """
import errno, os, signal, sys, threading, time
from librbd_py.store.api import *
from librbd_py.store.embedded import EmbeddedStore
path = sys.argv[1]
def say(*words): print(*words, flush=True)
def hear(): return sys.stdin.readline().strip()
"""


class Worker:
    """Runs `program` (Python) with `path` set, `say()` and `hear()` to talk to the test."""

    def __init__(self, path: Path, program: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + program, str(path), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._held = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def hear(self, seconds: float = DEADLINE) -> str:
        """The next line it says."""
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        while b"\n" not in self._held:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))
            assert ready, f"worker said nothing for {seconds} s"
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data, f"worker ended with {self.process.wait()}"
            self._held += data
        line, _, self._held = self._held.partition(b"\n")
        return line.decode()

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")

    def kill(self) -> None:
        """-9, and waits until it is gone."""
        self.process.kill()
        self.process.wait(DEADLINE)

    def stop(self) -> None:
        """SIGSTOP, and waits until every thread stands still."""
        os.kill(self.pid, signal.SIGSTOP)
        end = time.monotonic() + DEADLINE
        while any(self._state(task) not in "Tt" for task in Path(f"/proc/{self.pid}/task").iterdir()):
            assert time.monotonic() < end
            time.sleep(0.001)

    def _state(self, task: Path) -> str:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def finish(self) -> None:
        """Waits for a good end."""
        assert self.process.wait(DEADLINE) == 0

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


class Workers:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._all: list[Worker] = []

    def start(self, program: str, *arguments: str) -> Worker:
        self._all.append(Worker(self.path, program, *arguments))
        return self._all[-1]

    def close(self) -> None:
        for worker in self._all:
            worker.close()


@contextmanager
def workers(path: Path) -> Iterator[Workers]:
    made = Workers(path)
    try:
        yield made
    finally:
        made.close()

"""Builds and drives tests/native/nbd_fake_server.c: the NBD server over an image in memory."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    *sorted((ROOT / "native/transport").glob("nbd*.c")),
    ROOT / "native/transport/export.c",
    *(ROOT / f"native/engine/{name}.c" for name in ("reactor", "pool", "timer", "event")),
    ROOT / "tests/native/nbd_fake_server.c",
]
FLAGS = {
    "plain": ["-O2"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "tsan": ["-O1", "-fsanitize=thread", "-Wno-tsan"],
}
MODE = os.environ.get("NBD_TEST_MODE", "plain")
MEMORY_FACTOR = {"plain": 1, "asan": 3, "tsan": 8}[MODE]  # what the sanitizer adds to every byte
EVENT_EXPORT_DISCONNECTED, EVENT_EXPORT_BROKEN, EVENT_EXPORT_STOPPED = 4, 5, 6


def build(mode: str) -> Path:
    """Path of the program, built when older than its sources."""
    folder = ROOT / "build/native" / f"nbd-{mode}"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "nbd_fake_server"
    headers = [*(ROOT / "native").glob("*/*.h"), *(ROOT / "tests/native").glob("*.h")]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in [*SOURCES, *headers])
        if not program.exists() or program.stat().st_mtime < newest:
            temporary = folder / "new"
            subprocess.run(
                [
                    "cc",
                    "-std=gnu11",
                    "-g",
                    "-Wall",
                    "-Wextra",
                    "-Wno-unused-parameter",
                    "-pthread",
                    *FLAGS[mode],
                    f"-I{ROOT}/native",
                    f"-I{ROOT}/tests/native",
                    *map(str, SOURCES),
                    "-o",
                    str(temporary),
                ],
                check=True,
                timeout=300,
            )
            temporary.rename(program)
    return program


class FakeServer:
    """A running server; every method waits for its answer. Errors of the C functions come back as negative numbers."""

    def __init__(self, folder: Path, *, size: int = 16 << 20, reactors: int = 2, max_connections: int = 64) -> None:
        self.socket = folder / "nbd.sock"
        self.size = size
        self.process = subprocess.Popen(
            [build(MODE), self.socket, str(size), str(reactors), str(max_connections)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "ASAN_OPTIONS": "detect_leaks=1"},
        )
        self.ended = False
        assert self._answer() == [0]

    def _answer(self) -> list[int]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"the server died: {self.process.wait()}"
        return [int(word) for word in line.split()]

    def ask(self, line: str) -> list[int]:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def do(self, line: str) -> int:
        return self.ask(line)[0]

    def export(self, number: int, name: str = "", *, read_only: bool = False, description: str = "") -> int:
        return self.do(f"export {number} {int(read_only)} '{name}' '{description}'")

    def clients(self, number: int = 1) -> int:
        return self.ask(f"stats {number}")[1]

    def broken(self, number: int = 1) -> int:
        return self.ask(f"stats {number}")[3]

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def rss(self) -> int:
        """Anonymous memory in bytes."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no RssAnon")

    def end(self) -> None:
        """Stops exports that were not stopped, then the server; the process must end cleanly (leaks included)."""
        if self.ended:
            return
        self.ended = True
        if self.process.poll() is None:
            self.do("hold 0")
            for number in range(16):
                if self.do(f"stop {number} 1") == 0:
                    self.do(f"event {EVENT_EXPORT_STOPPED} {number}")
                    self.do(f"free {number}")
            assert self.do("end") == 0
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        status = self.process.wait(timeout=20)
        self.process.stdout.close()
        assert status == 0

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

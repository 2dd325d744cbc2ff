"""Runs an export in a process of its own, for front ends to test.

Two servers speak the same commands: `serve_vhost.py` (the package, as users run it) and `vhost_server.c` (the
transport over an image in memory, built with the sanitizers). The second knows the commands that need its insides.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

SOURCES = [
    *sorted((ROOT / "native/transport").glob("v*.c")),
    *(ROOT / f"native/transport/{name}.c" for name in ("export", "guest_memory")),
    *(ROOT / f"native/engine/{name}.c" for name in ("reactor", "pool", "timer", "event")),
    ROOT / "native/store/guard.c",
    ROOT / "tests/native/vhost_server.c",
]
FLAGS = {
    "plain": ["-O2"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "tsan": ["-O1", "-fsanitize=thread", "-Wno-tsan"],
}
CONNECTED, DISCONNECTED, BROKEN, STOPPED, SWITCHOVER, RINGS = 3, 4, 5, 6, 9, 10  # native/engine/event.h


def build(mode: str) -> Path:
    """Path of vhost_server.c's program, built when older than its sources. mode: plain, asan, tsan."""
    folder = ROOT / "build/native" / f"vhost-{mode}"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "vhost_server"
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


def fake_server(folder: Path, *modes: str, size: int = 64 << 20, queues: int = 4) -> Server:
    """vhost_server.c under AddressSanitizer; VHOST_TEST_MODE chooses another build."""
    path = folder / "vhost.sock"
    program = build(os.environ.get("VHOST_TEST_MODE", "asan"))
    return Server([str(program), str(path), str(size), str(queues), *modes], path)


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 10.0) -> None:
    """Polls: for states of another process that announces nothing."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.002)


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

    def quiet(self, fds: list[str]) -> None:
        """Waits until no client is left and nothing but `fds` is open and nothing of a client's mapped."""
        wait_until(lambda: self.stats().clients == 0, "no client")
        wait_until(lambda: self.fds() == fds, "no descriptor left over")
        assert self.maps() == 0

    def maps(self) -> int:
        """Mappings of files that front ends passed."""
        with open(f"/proc/{self.process.pid}/maps") as f:
            return sum("memfd:" in line and "memfd:image" not in line for line in f)

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


def real_server(folder: Path, store: str = "null", size: int = 64 << 20, queues: int = 4) -> Server:
    """serve_vhost.py: the package as installed."""
    path = folder / "vhost.sock"
    return Server([sys.executable, str(HERE / "serve_vhost.py"), str(path), store, str(size), f"queues={queues}"], path)

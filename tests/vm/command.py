"""`rbdpy vm` as a user types it, on a runtime folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_glue.vm.folder import Folder
from tests.vm.rig import Rig

DEADLINE = 90.0


class Host:
    """A runtime folder and the command line on it."""

    def __init__(self, rig: Rig, run: Path) -> None:
        self.rig, self.run = rig, run

    def __call__(self, *words: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "RBDPY_RUN": str(self.run), "RBDPY_STORE": self.rig.url, **more}
        done = subprocess.run(
            [sys.executable, "-m", "librbd_py.cli.main", "vm", *words],
            capture_output=True, text=True, timeout=DEADLINE, env=environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def boot(
        self, image: str, *more: str, mode: str = "rbdpy.mode=idle", code: int = 0
    ) -> subprocess.CompletedProcess[str]:
        words = ["--kernel", str(self.rig.kernel.vmlinuz), "--initrd", str(self.rig.initrd), "--accel", self.rig.accel]
        append = f"console=ttyS0 quiet panic=1 no_timer_check rbdpy.start=0 {mode}"
        return self("boot", image, *words, "--append", append, "--memory", "160", "--net", "none", *more, code=code)

    def states(self) -> dict[str, str]:
        return {row["name"]: row["state"] for row in json.loads(self("ls", "--format", "json").stdout)}

    def console(self, name: str) -> bytes:
        log = self.run / name / "console.log"
        return log.read_bytes() if log.exists() else b""

    def ticks(self, name: str, what: bytes = b"GUEST-TICK") -> None:
        """The guest writes to its console now."""
        before = len(self.console(name))
        limit = time.monotonic() + DEADLINE
        while what not in self.console(name)[before:]:
            assert time.monotonic() < limit, self.console(name).decode(errors="replace") or "no console.log"
            time.sleep(0.05)

    def processes(self) -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                except OSError:
                    continue
                if f"{self.run}/" in line:
                    found.append(line)
        return found

    def clean(self) -> None:
        """Ends what a failed test left."""
        for folder in self.run.glob("*"):
            if (folder / "vm.json").exists():
                place = Folder(self.run, folder.name)
                for process in (place.service(), place.console(), *(place.qemu(n) for n in (1, 2, 3))):
                    process.kill()


@pytest.fixture
def host(rig: Rig) -> Iterator[Host]:
    base = Path(tempfile.mkdtemp(prefix="rv", dir="/tmp"))  # short: sockets live there
    made = Host(rig, base / "a")
    try:
        yield made
    finally:
        for run in base.iterdir():
            Host(rig, run).clean()
        shutil.rmtree(base, ignore_errors=True)

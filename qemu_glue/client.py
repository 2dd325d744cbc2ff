"""A daemon of one's own: starts `rbdpyd`, talks QMP to it with qemu.qmp, and ends it."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient

START_DEADLINE = 30.0  # seconds until the daemon answers
STOP_DEADLINE = 30.0


class DaemonError(OSError):
    """The daemon did not start or ended; the text quotes its log."""


class Daemon:
    """`async with Daemon(folder, store) as daemon`. Socket, log and state file live in `folder`. States: new -> running
    -> stopped; kill() and start() may follow each other as often as wanted, and a restarted daemon serves what the
    one before it served."""

    def __init__(
        self, folder: Path, store: str, arguments: tuple[str, ...] = (), program: tuple[str, ...] | None = None
    ) -> None:
        """`program`: what to run instead of the daemon of this installation."""
        self.folder = folder
        self.log = folder / "rbdpyd.log"
        self.socket = folder / "rbdpyd.sock"
        self._command = [*(program or (sys.executable, "-m", "qemu_glue.daemon"))]
        self._command += ["--store", store, "--qmp", str(self.socket)]
        self._command += ["--state", str(folder / "rbdpyd.json"), "-v", *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: QMPClient | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Returns when the daemon serves and answers. DaemonError with its log otherwise."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        limit = asyncio.get_running_loop().time() + START_DEADLINE
        while True:
            client = QMPClient("rbdpyd")
            client.logger.disabled = True  # a refused connection is no news here
            try:
                await client.connect(str(self.socket))
                self._qmp = client
                return
            except Exception:  # qemu.qmp wraps what went wrong in several classes
                late = asyncio.get_running_loop().time() > limit
                if late or self._process.poll() is not None:
                    self.kill()
                    raise DaemonError(f"rbdpyd did not start:\n{self._tail()}") from None
            await asyncio.sleep(0.05)

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """The command's result. qemu.qmp.ExecuteError when the daemon refuses it."""
        assert self._qmp is not None
        return await self._qmp.execute(command, arguments)

    async def event(self, name: str, timeout: float) -> dict[str, Any]:
        """The data of the next event of that name; those before it are dropped. TimeoutError after `timeout` s."""
        assert self._qmp is not None
        events = self._qmp.events

        async def wait() -> dict[str, Any]:
            while True:
                message = await events.get()
                data = message.get("data", {})
                if message["event"] == name and isinstance(data, dict):
                    return data

        return await asyncio.wait_for(wait(), timeout)

    def kill(self) -> None:
        """SIGKILL, as a crash. The connection is dropped."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    async def stop(self) -> int:
        """Asks the daemon to quit and waits. Its exit status; killed after STOP_DEADLINE seconds."""
        assert self._process is not None
        if self._process.poll() is None and self._qmp is not None:
            with contextlib.suppress(Exception):
                await self._qmp.execute("quit")
        if self._qmp is not None:
            with contextlib.suppress(Exception):
                await self._qmp.disconnect()
            self._qmp = None
        try:
            return await asyncio.to_thread(self._process.wait, STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.returncode

    async def disconnect(self) -> None:
        """Forgets the connection, after kill()."""
        if self._qmp is not None:
            with contextlib.suppress(Exception):
                await self._qmp.disconnect()
            self._qmp = None

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    async def __aenter__(self) -> Daemon:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

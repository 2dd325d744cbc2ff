"""Processes that outlive the one that started them, found again by pid and start time.

Nothing foreign is ever signalled.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path

MAX_PID = 1 << 22  # Linux's limit


def started_at(pid: int) -> tuple[int, str] | None:
    """(clock ticks from boot to its start, state letter); None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    rest = text[text.rindex(b")") + 2 :].split()  # the name before it may hold anything
    return int(rest[19]), rest[0].decode()


class Daemon:
    """One process with its record in `file`. States: absent <-> running <-> frozen; a zombie is absent."""

    def __init__(self, name: str, file: Path, output: Path) -> None:
        self.name = name
        self.file = file
        self.output = output  # what it prints

    def spawn(self, argv: list[str], environment: dict[str, str]) -> None:
        """In a session of its own, so that Ctrl-C is not for it. Its record exists when this returns or raises."""
        output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output, 2),
        ]
        every = signal.valid_signals()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, every)
        try:
            pid = os.posix_spawn(
                argv[0],
                argv,
                environment,
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE,),
            )
            found = started_at(pid)
            self.file.write_text(f"{pid} {found[0] if found else 0}\n")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(output)

    def record(self) -> tuple[int, int] | None:
        """(pid, start time) of the last one spawned."""
        try:
            pid, started = map(int, self.file.read_text().split())
        except (FileNotFoundError, ValueError):
            return None
        return (pid, started) if 0 < pid <= MAX_PID else None

    def _handle(self) -> int | None:
        """A pidfd of the living process; None when it is gone."""
        record = self.record()
        if record is None:
            return None
        pid, started = record
        try:
            handle = os.pidfd_open(pid)
        except OSError:
            return None
        # Looked at after it was opened: if the pid is still ours now, the handle is of it.
        found = started_at(pid)
        if found is not None and found[0] == started and found[1] not in "ZX":
            return handle
        os.close(handle)
        return None

    @property
    def state(self) -> str:
        """`running`, `frozen` or `absent`."""
        record = self.record()
        found = started_at(record[0]) if record else None
        if record is None or found is None or found[0] != record[1] or found[1] in "ZX":
            return "absent"
        return "frozen" if found[1] in "Tt" else "running"

    def send(self, number: signal.Signals) -> bool:
        """False when there is nobody."""
        handle = self._handle()
        if handle is None:
            return False
        try:
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True

    def kill(self, seconds: float = 30.0) -> bool:
        """SIGKILL; returns when it is gone. False when nobody was there. TimeoutError."""
        handle = self._handle()
        if handle is None:
            return False
        try:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            if not poll.poll(seconds * 1000):
                raise TimeoutError(errno.ETIMEDOUT, f"{self.name} did not end {seconds:.0f} s after SIGKILL")
        finally:
            os.close(handle)
        self.reap()
        return True

    def reap(self) -> None:
        """So that no zombie stays when it is a child of this process."""
        record = self.record()
        if record is not None:
            with suppress(ChildProcessError):
                os.waitpid(record[0], os.WNOHANG)

    def wait_for_state(self, state: str, seconds: float = 10.0) -> None:
        """TimeoutError."""
        end = time.monotonic() + seconds
        while self.state != state:
            if time.monotonic() > end:
                raise TimeoutError(errno.ETIMEDOUT, f"{self.name} is {self.state}, not {state}")
            time.sleep(0.005)

    def tail(self, size: int = 1500) -> str:
        """The end of what it printed."""
        try:
            return self.output.read_text(errors="replace")[-size:].strip()
        except FileNotFoundError:
            return ""

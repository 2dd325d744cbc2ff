"""The service anew, under running guests: what runs ends in order, what is installed now takes its place."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from qemu_glue.host.ask import ask
from qemu_glue.host.config import Config
from qemu_glue.host.setup import SYSTEMD

END_SECONDS = 90.0  # for requests in flight, as the unit's TimeoutStopSec
START_SECONDS = 30.0
BACK_SECONDS = 30.0  # until every QEMU has come again
ASK_SECONDS = 5.0
SO_PEERPIDFD = 77
LOOK = 0.02


def upgrade(config: Config, say: Callable[[str], None]) -> None:
    """OSError: what is installed does not start (nothing was touched then), or the service does not come back."""
    tried = subprocess.run([sys.executable, "-c", "import qemu_glue.daemon"], capture_output=True, text=True)
    if tried.returncode:
        raise OSError(errno.ENOEXEC, f"what is installed does not start: {tried.stderr.strip().splitlines()[-1]}")
    before = served(config)
    begin = time.monotonic()
    if os.path.isdir(SYSTEMD):
        subprocess.run(["systemctl", "restart", "rbdpyd.service"], check=True, timeout=END_SECONDS + START_SECONDS)
    else:
        _end(config)
        with open(f"{config.state}/rbdpyd.log", "ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", "librbd_py.cli.main", "host", "serve"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
            )
    _wait(lambda: _answers(config), START_SECONDS, "the new service does not answer")
    say(f"the service is back after {time.monotonic() - begin:.1f} s")
    if before:
        _wait(lambda: before <= served(config), BACK_SECONDS, "not every guest's disk is back: see  rbdpy host status")
        say(f"{len(before)} disk{'s' * (len(before) > 1)} of guests after {time.monotonic() - begin:.1f} s")


def served(config: Config) -> set[tuple[str, int]]:
    """(path, pid of QEMU) of every disk that is connected. Empty when nobody serves."""
    try:
        vms: list[dict[str, Any]] = ask(config.qmp, "rbd-vm-query", {}, ASK_SECONDS)
    except (FileNotFoundError, ConnectionRefusedError):
        return set()
    return {(d["path"], d["pid"]) for vm in vms for d in vm["disks"] if d["clients"]}


def _answers(config: Config) -> bool:
    try:
        ask(config.qmp, "query-status", {}, ASK_SECONDS)
    except OSError:
        return False
    return True


def _end(config: Config) -> None:
    """Asks the service to quit and waits for its process."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(config.qmp)
        except (FileNotFoundError, ConnectionRefusedError):
            return
        pidfd = _pidfd(sock)
    try:
        with contextlib.suppress(ConnectionResetError):
            ask(config.qmp, "quit", {}, ASK_SECONDS)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(END_SECONDS * 1000):
            raise TimeoutError(errno.ETIMEDOUT, f"the service does not end within {END_SECONDS:g} seconds")
    finally:
        os.close(pidfd)


def _pidfd(sock: socket.socket) -> int:
    with contextlib.suppress(OSError):
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return os.pidfd_open(int.from_bytes(credentials[:4], sys.byteorder))


def _wait(holds: Callable[[], bool], seconds: float, late: str) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(errno.ETIMEDOUT, late)
        time.sleep(LOOK)

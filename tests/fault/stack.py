"""The whole stack for tests of faults: a store with images, `rbdpyd` serving them over NBD, the CLI."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbd_client import Client

from librbd_py import rados, rbd
from qemu_glue.client import Daemon

RBDPY = (sys.executable, "-m", "librbd_py.cli.main")
DEADLINE = 60.0  # seconds of a command; reached only when something hangs


def rbdpy(store: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the CLI on the store in that folder."""
    argv = [*RBDPY, "--store", f"embedded:{store}", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE)


def check_store(store: Path) -> str:
    """What `rbdpy store check` prints; fails when it finds an error."""
    done = rbdpy(store, "store", "check")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextlib.contextmanager
def pool(store: Path) -> Iterator[rados.Ioctx]:
    """The library on the store, in this process."""
    with (
        rados.Rados(conf={"rbdpy_store": f"embedded:{store}"}) as cluster,
        cluster.open_ioctx("rbd") as ioctx,
    ):
        yield ioctx


def create(store: Path, name: str, size: int, **more: Any) -> None:
    with pool(store) as ioctx:
        rbd.RBD().create(ioctx, name, size, **more)


class Stack:
    """A daemon with its state file; kill() and start() as often as wanted."""

    def __init__(self, folder: Path, store: Path | str, program: tuple[str, ...] | None = None) -> None:
        """`store`: an embedded store's folder, or a URL. `program`: what to run instead of the daemon."""
        self.folder = folder
        self.socket = folder / "nbd.sock"
        self.daemon = Daemon(folder, store if isinstance(store, str) else f"embedded:{store}", program=program)
        self._runner = asyncio.Runner()
        self._clients: list[Client] = []

    def start(self) -> None:
        self._runner.run(self.daemon.start())

    def qmp(self, command: str, **arguments: Any) -> Any:
        names = {key.replace("_", "-"): value for key, value in arguments.items()}
        return self._runner.run(self.daemon.execute(command, names))

    def event(self, name: str, timeout: float = 20) -> dict[str, Any]:
        """The data of the next event of that name."""
        return self._runner.run(self.daemon.event(name, timeout))

    def serve(self, *images: str) -> None:
        """Each image as an NBD export of its name on one socket."""
        self.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(self.socket)}})
        for image in images:
            self.qmp("blockdev-add", driver="rbd", node_name=image, pool="rbd", image=image)
            self.qmp("block-export-add", type="nbd", id=image, node_name=image, name=image, writable=True)

    def client(self, image: str, timeout: float = 20) -> Client:
        client = Client(self.socket, timeout=timeout)
        self._clients.append(client)
        return client.negotiate(image.encode())

    def drop_clients(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()

    def kill(self) -> None:
        self.daemon.kill()
        self._runner.run(self.daemon.disconnect())

    def stop(self) -> int:
        return self._runner.run(self.daemon.stop())

    def close(self) -> None:
        self.drop_clients()
        try:
            self._runner.run(self.daemon.stop())
        finally:
            self.daemon.kill()
            self._runner.close()


@contextlib.contextmanager
def stack(folder: Path, store: Path | str) -> Iterator[Stack]:
    made = Stack(folder, store)
    try:
        made.start()
        yield made
    finally:
        made.close()

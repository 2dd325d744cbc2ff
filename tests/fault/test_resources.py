"""A daemon without memory or files answers with errors, lives, and is as before when it gets them again."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nbd_client import FLUSH, READ, TRIM, WRITE, WRITE_ZEROES, Closed
from qemu.qmp import ExecuteError
from stack import Stack, create
from vhost_frontend import IOERR, OK, T_DISCARD, T_FLUSH, T_IN, T_OUT, Gone, frontend

MIB = 1 << 20
HERE = Path(__file__).parent
DAEMON = (sys.executable, "-m", "qemu_glue.daemon")
FILES = 96  # a limit that the daemon itself fits in
RELIEF_SECONDS = 1.5
ALLOCATIONS = 400  # of the scenario at most: ends a sweep that never gets through


def add_exports(s: Stack, name: str) -> None:
    s.qmp("blockdev-add", driver="rbd", node_name=name, pool="rbd", image=name)
    s.qmp("block-export-add", type="nbd", id=name, node_name=name, name=name, writable=True)
    address = {"type": "unix", "path": str(s.folder / f"{name}.vhost")}
    s.qmp("block-export-add", type="vhost-user-blk", id=f"{name}-v", node_name=name, writable=True, addr=address)


def remove_exports(s: Stack, name: str) -> None:
    """Whatever there is of them."""
    for export in s.qmp("query-block-exports"):
        if export["node-name"] == name:
            s.qmp("block-export-del", id=export["id"], mode="hard")
    if any(node["node-name"] == name for node in s.qmp("query-named-block-nodes")):
        s.qmp("blockdev-del", node_name=name)


class Scarcity:
    """The switch of alloc_fail.c."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(16))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 16)

    def begin(self, countdown: int) -> None:
        self._map[0:16] = struct.pack("<qq", countdown, 0)

    def end(self) -> int:
        """-> how many allocations failed"""
        self._map[0:8] = bytes(8)
        return int(struct.unpack("<q", self._map[8:16])[0])


@pytest.fixture
def scarce(tmp_path: Path) -> Iterator[tuple[Stack, Scarcity]]:
    library, switch = tmp_path / "alloc_fail.so", tmp_path / "switch"
    command = ["cc", "-O1", "-shared", "-fPIC", "-fno-builtin", str(HERE / "alloc_fail.c"), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    scarcity = Scarcity(switch)
    for name in ("disk", "other"):
        create(tmp_path / "store", name, 16 * MIB)
    program = ("env", f"LD_PRELOAD={library}", f"ALLOC_FAIL={switch}", *DAEMON)
    s = Stack(tmp_path, tmp_path / "store", program)
    with contextlib.closing(s):
        s.start()
        s.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(s.socket)}})
        add_exports(s, "disk")
        yield s, scarcity
        assert s.stop() == 0, s.daemon.log.read_text()


def nbd_scenario(s: Stack) -> None:
    with contextlib.suppress(Closed, ConnectionError, AssertionError):  # that is the client's for an option refused
        client = s.client("disk", timeout=20)
        for command, data in ((WRITE, b"n" * 70_000), (READ, b""), (TRIM, b""), (WRITE_ZEROES, b""), (FLUSH, b"")):
            client.call(command, 0, 0 if command == FLUSH else 70_000, data=data)
    s.drop_clients()


def vhost_scenario(s: Stack) -> None:
    with contextlib.suppress(Gone, ConnectionError), frontend(s.folder / "disk.vhost", queues=1) as guest:
        for kind, want, data in (
            (T_OUT, 0, b"v" * 4096),
            (T_IN, 4096, b""),
            (T_DISCARD, 0, struct.pack("<QII", 0, 16384, 0)),
            (T_OUT, 0, b"v" * 512),
            (T_FLUSH, 0, b""),
        ):
            assert guest.request(kind, 0, data=data, want=want)[0] in (OK, IOERR)


def qmp_scenario(s: Stack) -> None:
    with contextlib.suppress(ExecuteError):
        add_exports(s, "other")


@pytest.mark.parametrize("mode", [1, -1], ids=["one fails", "all from one on fail"])
@pytest.mark.parametrize("scenario", [nbd_scenario, vhost_scenario, qmp_scenario], ids=["nbd", "vhost", "qmp"])
def test_no_memory(scarce: tuple[Stack, Scarcity], scenario: Any, mode: int) -> None:
    s, scarcity = scarce
    failed = 0
    for number in range(1, ALLOCATIONS):
        scarcity.begin(mode * number)
        relief = threading.Timer(RELIEF_SECONDS, scarcity.end)  # requests may wait for memory, as long as it takes
        relief.start()
        scenario(s)
        relief.cancel()
        reached = scarcity.end()
        remove_exports(s, "other")
        failed += reached
        if not reached:
            break
    else:
        raise AssertionError("the scenario does not end")
    assert failed > 0
    client = s.client("disk")
    assert client.call(WRITE, 0, MIB, data=b"a" * MIB).error == 0
    assert client.read(0, MIB) == b"a" * MIB
    with frontend(s.folder / "disk.vhost") as guest:
        assert guest.read(0, 4096) == b"a" * 4096
    add_exports(s, "other")
    assert s.client("other").read(0, 4096) == bytes(4096)


def test_no_files(tmp_path: Path) -> None:
    for number in range(40):
        create(tmp_path / "store", f"disk{number}", 4 * MIB)
    s = Stack(tmp_path, tmp_path / "store", ("prlimit", f"--nofile={FILES}:{FILES}", *DAEMON))
    with contextlib.closing(s):
        s.start()
        s.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(s.socket)}})
        add_exports(s, "disk0")
        good = s.client("disk0")
        assert good.call(WRITE, 0, 4096, data=b"g" * 4096).error == 0
        # too many clients: those too many wait, the others do not
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(FILES)]
        connected = 0
        with contextlib.suppress(BlockingIOError):  # the backlog is full, too
            for client in waiting:
                client.connect(str(s.socket))
                connected += 1
        assert connected > FILES / 2
        assert good.read(0, 4096) == b"g" * 4096
        for client in waiting:
            client.close()
        late = s.client("disk0")
        assert late.read(0, 4096) == b"g" * 4096
        # too many images: a clear error, and nothing left over of it
        served = 1
        with pytest.raises(ExecuteError, match=r"Too many open files|unable to open database"):
            for served in range(1, 40):
                add_exports(s, f"disk{served}")
        assert good.read(0, 4096) == b"g" * 4096
        for number in range(1, served + 1):
            remove_exports(s, f"disk{number}")
        before = len(os.listdir(f"/proc/{s.daemon.pid}/fd"))
        for number in range(1, served - 1):
            add_exports(s, f"disk{number}")
            remove_exports(s, f"disk{number}")
        assert len(os.listdir(f"/proc/{s.daemon.pid}/fd")) <= before + 2
        with frontend(s.folder / "disk0.vhost") as guest:
            assert guest.read(0, 4096) == b"g" * 4096
        assert s.stop() == 0, s.daemon.log.read_text()

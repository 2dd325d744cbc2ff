"""Errors of the store reach the guest as errors of its protocol and the operator as BLOCK_IO_ERROR."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stack import Stack, create, pool
from vhost_frontend import IOERR, OK, T_FLUSH, T_IN, T_OUT, frontend

from librbd_py import rbd
from qemu_glue.io_errors import ErrorEvents

MIB = 1 << 20
HERE = Path(__file__).parent
LIBNBD = "/usr/bin/python3"  # Debian's python3-libnbd is for this one
Serve = Callable[[str], Stack]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """A daemon with faults as told, its image "disk" over NBD and vhost-user."""
    store = tmp_path / "store"
    create(store, "disk", 16 * MIB)
    with pool(store) as ioctx, rbd.Image(ioctx, "disk") as image:
        image.write(b"d" * MIB, 0)
    with contextlib.ExitStack() as stack:

        def start(spec: str) -> Stack:
            program = (sys.executable, str(HERE / "faulty_daemon.py"), spec)
            made = Stack(tmp_path, store, program)
            stack.callback(made.close)
            made.start()
            made.serve("disk")
            address = {"type": "unix", "path": str(tmp_path / "vhost")}
            made.qmp("block-export-add", type="vhost-user-blk", id="v", node_name="disk", writable=True, addr=address)
            return made

        yield start


def wanted(operation: str, code: int) -> dict[str, Any]:
    return {
        "qom-path": "",
        "device": "",
        "node-name": "disk",
        "operation": operation,
        "action": "report",
        "nospace": code == errno.ENOSPC,
        "reason": os.strerror(code),
    }


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_guest_of_vhost_user(serve: Serve, code: int) -> None:
    daemon = serve(f"write:nth=2:errno={code}")
    with frontend(daemon.folder / "vhost") as guest:
        assert [guest.request(T_OUT, n, data=b"w" * 512)[0] for n in range(3)] == [OK, IOERR, OK]
        assert daemon.event("BLOCK_IO_ERROR") == wanted("write", code)
        assert guest.read(0, 512) == b"w" * 512
        assert guest.read(1, 512) == b"d" * 512


def test_a_failed_read_and_a_failed_flush(serve: Serve) -> None:
    daemon = serve("read:nth=1:errno=5;flush:nth=1:errno=28")
    with frontend(daemon.folder / "vhost") as guest:
        assert guest.request(T_IN, 0, want=512)[0] == IOERR
        assert daemon.event("BLOCK_IO_ERROR") == wanted("read", errno.EIO)
        assert guest.write(0, b"w" * 512) == OK
        assert guest.request(T_FLUSH)[0] == IOERR
        assert daemon.event("BLOCK_IO_ERROR") == wanted("write", errno.ENOSPC)


CLIENT = """
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
for name, arguments in (("pwrite", (b"w" * 4096, 0)), ("pread", (4096, 0)), ("zero", (65536, 131072)), ("flush", ())):
    try:
        getattr(h, name)(*arguments)
        print(name, 0)
    except nbd.Error as error:
        print(name, error.errnum)
h.shutdown()
"""


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        (errno.EIO, errno.EIO),
        (errno.ENOSPC, errno.ENOSPC),
        (errno.EDQUOT, errno.ENOSPC),
        (errno.ENOMEM, errno.ENOMEM),
        (errno.EROFS, errno.EPERM),
        (errno.ENOLINK, errno.EIO),  # has no number in NBD
    ],
)
def test_a_client_of_nbd(serve: Serve, code: int, seen: int) -> None:
    """libnbd is told what NBD has a number for."""
    daemon = serve(f"any:errno={code}")
    uri = f"nbd+unix:///disk?socket={daemon.socket}"
    done = subprocess.run([LIBNBD, "-c", CLIENT, uri], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    results = dict(line.split() for line in done.stdout.splitlines())
    assert results["pwrite"] == results["pread"] == str(seen), results
    assert results["zero"] == str(seen), results
    events = [daemon.event("BLOCK_IO_ERROR") for _ in range(2)]
    assert sorted(event["operation"] for event in events) == ["read", "write"]
    assert {event["reason"] for event in events} == {os.strerror(code)}


class Loop:
    """A loop whose time the test moves."""

    def __init__(self) -> None:
        self.later: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = []

    def call_soon_threadsafe(self, what: Callable[..., None], *arguments: Any) -> None:
        what(*arguments)

    def call_later(self, seconds: float, what: Callable[..., None], *arguments: Any) -> None:
        self.later.append((seconds, what, arguments))

    def second(self) -> None:
        due, self.later = self.later, []
        for seconds, what, arguments in due:
            assert seconds == 1.0
            what(*arguments)


def test_at_most_one_event_a_second() -> None:
    sent: list[tuple[str, str, str]] = []
    loop = Loop()
    errors = ErrorEvents(
        lambda name, data: sent.append((data["node-name"], data["operation"], data["reason"])),
        loop,  # type: ignore[arg-type]
    )
    eio, full = os.strerror(errno.EIO), os.strerror(errno.ENOSPC)
    for code in (errno.EIO, errno.EIO, errno.ENOSPC):
        errors.report("a", False, code)
    errors.report("a", True, errno.EIO)
    errors.report("b", False, errno.EIO)
    assert sent == [("a", "write", eio), ("a", "read", eio), ("b", "write", eio)]
    loop.second()
    assert sent[3:] == [("a", "write", full)]
    errors.report("a", False, errno.EIO)
    errors.report("b", False, errno.EIO)
    assert sent[4:] == [("b", "write", eio)]
    errors.forget("a")
    loop.second()
    assert sent[5:] == []
    errors.report("a", False, errno.EIO)
    assert sent[5:] == [("a", "write", eio)]
    loop.second()
    loop.second()
    assert not loop.later
    assert sent[6:] == []

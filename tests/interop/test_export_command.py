"""`rbdpy export --nbd` and `--vhost-user`: served by one command, used by the tools people have, ended by a signal."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nbd_client import EPERM, READ_ONLY, WRITE, Client
from stack import DEADLINE, RBDPY, check_store, pool, rbdpy
from vhost_frontend import F_RO, IOERR, OK, T_OUT, frontend

from librbd_py import rbd

MIB = 1 << 20
SIZE = 24 * MIB


def run(*argv: str | Path) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


class Exporter:
    """The command while it serves."""

    def __init__(self, store: Path, *arguments: str | Path) -> None:
        self.pidfile = store.parent / f"pid{time.monotonic_ns()}"
        argv = [*RBDPY, "--store", f"embedded:{store}", "export", *map(str, arguments), "--pidfile", str(self.pidfile)]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_served(self) -> None:
        end = time.monotonic() + DEADLINE
        while not (self.pidfile.exists() and self.pidfile.read_text()):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, "not served"
            time.sleep(0.01)
        assert int(self.pidfile.read_text()) == self.process.pid

    def end(self, number: int = signal.SIGTERM, says: str = "") -> None:
        """Must end well, leave no pid file, and say nothing (or, besides `says`, nothing)."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=DEADLINE)
        assert (self.process.returncode, out) == (0, ""), err
        assert says in err and len(err.splitlines()) == bool(says), err
        assert not self.pidfile.exists()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@contextmanager
def exported(store: Path, *arguments: str | Path) -> Iterator[Exporter]:
    exporter = Exporter(store, *arguments)
    try:
        exporter.wait_served()
        yield exporter
    finally:
        exporter.close()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    with pool(folder) as ioctx:
        rbd.RBD().create(ioctx, "disk", SIZE)
        with rbd.Image(ioctx, "disk") as image:
            image.write(b"old" * 1000, MIB)
            image.create_snap("before")
            image.write(b"new" * 1000, MIB)
    return folder


def uri(socket: Path, name: str = "disk") -> str:
    return f"nbd+unix:///{name}?socket={socket}"


def test_nbd_tools_read_and_write(store: Path, tmp_path: Path) -> None:
    socket, copy, source = tmp_path / "nbd.sock", tmp_path / "copy.qcow2", tmp_path / "source.raw"
    with exported(store, "disk", "--nbd", socket) as exporter:
        (shown,) = json.loads(run("nbdinfo", "--json", uri(socket)))["exports"]
        assert shown["export-size"] == SIZE and not shown["is_read_only"]
        assert json.loads(run("qemu-img", "info", "--output=json", uri(socket)))["virtual-size"] == SIZE
        run(
            "qemu-io",
            "-f",
            "raw",
            uri(socket),
            "-c",
            "write -P 0xa5 4093 70001",
            "-c",
            "write -z 8M 4M",
            "-c",
            "discard 16M 4M",
            "-c",
            "write -f -P 0x5a 20M 64k",
            "-c",
            "flush",
            "-c",
            "read -P 0xa5 4093 70001",
            "-c",
            "read -P 0 8M 4M",
            "-c",
            "read -P 0x5a 20M 64k",
        )
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri(socket), copy)
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri(socket), copy)
        with source.open("wb") as file:
            file.truncate(SIZE)
            for at, size in [(0, 100_000), (5 * MIB + 512, 9 * MIB), (SIZE - 300, 300)]:
                file.seek(at)
                file.write(random.Random(at).randbytes(size))
        run("nbdcopy", "--flush", source, uri(socket))
        run("nbdcopy", uri(socket), tmp_path / "out.raw")
        assert (tmp_path / "out.raw").read_bytes() == source.read_bytes()
        exporter.end()
    assert not socket.exists()
    with pool(store) as ioctx, rbd.Image(ioctx, "disk") as image:
        assert image.read(0, SIZE) == source.read_bytes()
    assert check_store(store) == "no findings\n"


def test_fio_verifies_what_it_wrote(store: Path, tmp_path: Path) -> None:
    socket = tmp_path / "nbd.sock"
    with exported(store, "disk", "--nbd", socket) as exporter:
        run(
            "fio",
            "--name=verify",
            "--ioengine=nbd",
            f"--uri={uri(socket)}",
            "--rw=randwrite",
            "--bsrange=512-64k",
            "--size=8M",
            "--iodepth=16",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--randseed=7",
            f"--aux-path={tmp_path}",
            "--verify_state_save=0",
        )
        exporter.end(signal.SIGINT)
    assert check_store(store) == "no findings\n"


def test_vhost_user_reads_writes_and_ends(store: Path, tmp_path: Path) -> None:
    socket = tmp_path / "vu.sock"
    with exported(store, "disk", "--vhost-user", socket, "--queues", "2") as exporter:
        with frontend(socket) as guest:
            assert guest.read(MIB // 512, 512) == (b"new" * 1000)[:512]
            assert guest.write(8, b"g" * 4096) == OK
            assert guest.read(8, 4096) == b"g" * 4096
        exporter.end()
    assert not socket.exists()
    with pool(store) as ioctx, rbd.Image(ioctx, "disk") as image:
        assert image.read(4096, 4096) == b"g" * 4096


def test_both_servers_show_one_image(store: Path, tmp_path: Path) -> None:
    nbd, vhost = tmp_path / "nbd.sock", tmp_path / "vu.sock"
    with exported(store, "disk", "--nbd", nbd, "--vhost-user", vhost) as exporter:
        with frontend(vhost) as guest, Client(nbd) as client:
            client.negotiate(b"disk")
            assert guest.write(0, b"v" * 512) == OK
            assert client.read(0, 512) == b"v" * 512
            client.write(512, b"n" * 512)
            assert guest.read(1, 512) == b"n" * 512
            exporter.end()  # with both clients connected
    assert not nbd.exists() and not vhost.exists()


@pytest.mark.parametrize("arguments", [("disk@before",), ("disk", "--read-only")], ids=["snapshot", "option"])
def test_read_only(store: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    nbd, vhost = tmp_path / "nbd.sock", tmp_path / "vu.sock"
    content = b"old" * 1000 if "@" in arguments[0] else b"new" * 1000
    with exported(store, *arguments, "--nbd", nbd, "--vhost-user", vhost) as exporter:
        with frontend(vhost) as guest, Client(nbd) as client:
            assert client.negotiate(b"disk").flags & READ_ONLY
            assert client.read(MIB, 3000) == content
            assert client.call(WRITE, 0, 4, data=b"oops").error == EPERM
            assert guest.features >> F_RO & 1
            assert guest.read(MIB // 512, 512) == content[:512]
            assert guest.request(T_OUT, 0, data=b"o" * 512)[0] == IOERR
        exporter.end()


def test_a_second_exporter_gets_the_lock_and_the_first_gets_it_back(store: Path, tmp_path: Path) -> None:
    """Both serve; who writes has the lock, and nothing written is lost or seen late."""
    one, two = tmp_path / "one.sock", tmp_path / "two.sock"
    with exported(store, "disk", "--nbd", one) as first, exported(store, "disk", "--nbd", two) as second:
        with Client(one) as a, Client(two) as b:
            a.negotiate(b"disk")
            b.negotiate(b"disk")
            for turn in range(3):
                a.write(0, b"a%d" % turn)
                assert b.read(0, 2) == b"a%d" % turn
                b.write(0, b"b%d" % turn)
                b.write(4096, b"b%d" % turn)
                assert a.read(0, 2) == a.read(4096, 2) == b"b%d" % turn
        second.end()
        with Client(one) as a:
            a.negotiate(b"disk").write(0, b"end")
        first.end()
    assert check_store(store) == "no findings\n"


def test_a_socket_in_use_is_refused_and_left_alone(store: Path, tmp_path: Path) -> None:
    socket = tmp_path / "nbd.sock"
    with exported(store, "disk", "--nbd", socket) as first:
        done = rbdpy(store, "export", "disk", "--nbd", str(socket))
        assert done.returncode != 0 and str(socket) in done.stderr, done
        with Client(socket) as client:
            assert client.negotiate(b"disk").size == SIZE
        first.end()


def test_a_killed_exporter_is_replaced_at_once(store: Path, tmp_path: Path) -> None:
    """Its lock is broken and its socket taken over."""
    socket = tmp_path / "nbd.sock"
    with exported(store, "disk", "--nbd", socket) as first:
        with Client(socket) as client:
            client.negotiate(b"disk").write(0, b"x" * 4096)
            first.process.kill()
            first.process.wait()
        with exported(store, "disk", "--nbd", socket) as second, Client(socket, timeout=5) as client:
            client.negotiate(b"disk").write(4096, b"y" * 4096)
            assert client.read(0, 8192) == b"x" * 4096 + b"y" * 4096
            second.end(says="fencing the dead lock owner")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("nope", "--nbd", "{}/s"), 1, "error opening image rbd/nope"),
        (("disk@nope", "--nbd", "{}/s"), 1, "'nope'"),
        (("disk", "file", "--nbd", "{}/s"), errno.EINVAL, "a path is not used"),
        (("disk", "--nbd", "{}/missing/s"), 1, "missing/s"),
        (("disk", "--vhost-user", "{}/s", "--queues", "0"), 1, "num-queues"),
    ],
)
def test_what_cannot_be_served_is_said(
    store: Path, tmp_path: Path, arguments: tuple[str, ...], status: int, says: str
) -> None:
    done = rbdpy(store, "export", *(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == status, done
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["store"]

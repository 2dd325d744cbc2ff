"""The NBD server on the real engine, used by the clients people have: libnbd's tools, QEMU's, fio."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_client import ESHUTDOWN, READ, WRITE, Client
from vhost_server import Server

HERE = Path(__file__).parent
MIB = 1 << 20
SIZE = 64 * MIB


def run(*argv: str | Path) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


class Served:
    def __init__(self, folder: Path) -> None:
        self.socket = folder / "nbd.sock"
        self.layout = folder / "layout"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self.server = self.start()

    def start(self) -> Server:
        argv = [sys.executable, str(HERE / "serve.py"), "nbd", str(self.socket), str(self.layout), str(SIZE)]
        return Server(argv, self.socket)

    def restart(self) -> None:
        self.server.close()
        self.server = self.start()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """64 MiB of a layout in a folder, by the package's own engine."""
    s = Served(tmp_path)
    try:
        yield s
        s.server.close()
    finally:
        s.server.process.kill()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A raw image with data, holes inside objects and whole objects missing."""
    rng = random.Random(5)
    path = tmp_path / "source.raw"
    with path.open("wb") as f:
        f.truncate(SIZE)
        for at, size in [(0, 3 * MIB), (5 * MIB + 4096, 8192), (20 * MIB - 512, 1024), (SIZE - 300, 300)]:
            f.seek(at)
            f.write(rng.randbytes(size))
    return path


def data_ranges(served: Served) -> list[tuple[int, int]]:
    extents = json.loads(run("nbdinfo", "--map", "--json", served.uri))
    assert sum(e["length"] for e in extents) == SIZE
    return [(e["offset"], e["length"]) for e in extents if e["type"] == 0]


def test_nbdinfo_tells_what_the_server_can(served: Served) -> None:
    (export,) = json.loads(run("nbdinfo", "--json", served.uri))["exports"]
    assert export["export-size"] == SIZE and export["description"] == "a layout" and not export["is_read_only"]
    for what in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export[f"can_{what}"] is True, what
    assert export["contexts"] == ["base:allocation"]
    assert [e["export-name"] for e in json.loads(run("nbdinfo", "--list", "--json", served.uri))["exports"]] == [""]
    assert run("nbdinfo", "--size", served.uri).strip() == str(SIZE)
    for what in ("write", "connect", "multi-conn", "flush"):
        run("nbdinfo", "--can", what, served.uri)
    assert subprocess.run(["nbdinfo", "--is", "read-only", served.uri], timeout=20).returncode == 2


def test_nbdcopy_both_ways_keeps_bytes_and_holes(served: Served, source: Path, tmp_path: Path) -> None:
    assert data_ranges(served) == []
    run("nbdcopy", "--flush", source, served.uri)
    ranges = data_ranges(served)
    assert ranges and sum(length for _, length in ranges) < 16 * MIB, "absent objects are holes"
    copy = tmp_path / "copy.raw"
    run("nbdcopy", served.uri, copy)
    run("cmp", source, copy)
    served.restart()
    again = tmp_path / "again.raw"
    run("nbdcopy", "--connections=4", served.uri, again)
    run("cmp", source, again)


def test_qemu_img_converts_compares_and_maps(served: Served, source: Path, tmp_path: Path) -> None:
    assert json.loads(run("qemu-img", "info", "--output=json", served.uri))["virtual-size"] == SIZE
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-W", source, served.uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, served.uri)
    qcow = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", served.uri, qcow)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, qcow)
    mapped = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", served.uri))
    assert sum(e["length"] for e in mapped) == SIZE
    assert any(e["zero"] for e in mapped) and any(e["data"] for e in mapped)


def test_qemu_io_writes_zeroes_and_discards(served: Served) -> None:
    commands = [
        "write -P 7 1M 128k",
        "read -P 7 1M 128k",
        "write -f -P 8 512 1024",
        "read -P 8 512 1024",
        "write -z 1M 64k",
        "read -P 0 1M 64k",
        "write -z -u 1088k 64k",
        "read -P 0 1088k 64k",
        "discard 0 4M",
        "read 512 1024",
        "flush",
    ]
    argv = ["qemu-io", "-f", "raw"]
    for command in commands:
        argv += ["-c", command]
    assert "failed" not in run(*argv, served.uri)


def test_fio_verifies_what_it_wrote(served: Served, tmp_path: Path) -> None:
    for name, options in {
        "mixed": ["--rw=randrw", "--bs=512-256k", "--iodepth=16", "--io_size=32m"],
        "synced": ["--rw=randwrite", "--bs=4k", "--iodepth=4", "--fsync=16", "--io_size=2m"],
    }.items():
        run(
            "fio",
            f"--name={name}",
            "--ioengine=nbd",
            f"--uri={served.uri}",
            "--size=32m",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            f"--output={tmp_path / name}",
            *options,
        )


def test_libnbd_with_its_checks_off_gets_the_errors_of_the_specification(served: Served) -> None:
    assert run("/usr/bin/python3", HERE / "nbd_libnbd_errors.py", served.uri).strip() == "14"


def test_resize_reaches_new_clients_and_old_connections(served: Served) -> None:
    with Client(served.socket).negotiate() as c:
        served.server.ok(f"resize {SIZE + 8 * MIB}")
        c.write(SIZE + MIB, b"grown")
        assert c.read(SIZE + MIB, 5) == b"grown"
        assert run("nbdinfo", "--size", served.uri).strip() == str(SIZE + 8 * MIB)
        served.server.ok(f"resize {4 * MIB}")
        assert c.call(READ, 4 * MIB, 1).error
        assert c.call(WRITE, 4 * MIB, 1, data=b"x").error


def test_fence_answers_eshutdown(served: Served) -> None:
    with Client(served.socket).negotiate() as c:
        c.write(0, b"before")
        served.server.ok("fence")
        assert c.call(WRITE, 0, 5, data=b"after").error == ESHUTDOWN


def test_killed_client_costs_nothing(served: Served, source: Path) -> None:
    copy = subprocess.Popen(["nbdcopy", source, served.uri])
    try:
        with Client(served.socket).negotiate() as c:
            while c.read(0, 1) == b"\0" and copy.poll() is None:
                pass
            copy.kill()
            copy.wait()
            assert c.call(3).error == 0
    finally:
        copy.kill()
        copy.wait()


def test_server_killed_and_started_again_serves_what_was_flushed(served: Served) -> None:
    rng = random.Random(6)
    blocks = {at: rng.randbytes(8192) for at in range(0, SIZE, 3 * MIB)}
    with Client(served.socket).negotiate() as c:
        for at, data in blocks.items():
            c.write(at, data)
        assert not c.call(3).error
        served.server.kill()
    served.server = served.start()
    with Client(served.socket).negotiate() as c:
        for at, data in blocks.items():
            assert c.read(at, len(data)) == data


def test_raw_load_client_runs_against_the_server(served: Served, tmp_path: Path) -> None:
    program = tmp_path / "rawnbd"
    root = HERE.parents[1]
    run("cc", "-O1", "-pthread", "-Wall", "-Werror", f"-I{root}/native", root / "native/bench/rawnbd.c", "-o", program)
    for options in (
        ["read", "32", "4096", "0.1"],
        ["write", "8", "65536", "0.1"],
        ["read", "1", "512", "0.1", "", "1", "simple"],
        ["read", "4", "4096", "0.1", "", "3"],
    ):
        result = json.loads(run(program, served.socket, *options))
        assert result["requests"] > 10 and 0 < result["p50_us"] <= result["p99_us"]

"""Migrations that real rbd begins and we go on with, and the other way round, on one cluster."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from librbd_py import rados, rbd
from librbd_py.cli.main import main

MIB = 1 << 20
SIZE = 10 * MIB
DEADLINE = 60

Run = Callable[..., str]


@pytest.fixture
def theirs(ceph_conf: str) -> Run:
    def run(*words: str) -> str:
        done = subprocess.run(["rbd", "--conf", ceph_conf, *words], capture_output=True, text=True, timeout=DEADLINE)
        assert done.returncode == 0, f"rbd {words}: {done.stderr}"
        return done.stdout

    return run


@pytest.fixture
def ours(ceph_conf: str, capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> str:
        capfd.readouterr()
        code = main(["--conf", ceph_conf, *words])
        out, err = capfd.readouterr()
        assert code == 0, f"rbdpy {words}: {err}"
        return out

    return run


def make(conf: str, pool: str, snapshots: bool) -> None:
    """Image `a`, its content different in each of its snapshots."""
    some = random.Random(7)
    with rados.Rados(conffile=conf) as cluster, cluster.open_ioctx(pool) as io:
        rbd.RBD().create(io, "a", SIZE, order=21)
        with rbd.Image(io, "a") as image:
            for turn in range(3):
                for _ in range(4):
                    image.write(some.randbytes(50_000), some.randrange(SIZE - 50_000))
                if snapshots and turn < 2:
                    image.create_snap(f"s{turn}")


def exported(run: Run, spec: str, folder: Path) -> bytes:
    path = folder / "exported"
    path.unlink(missing_ok=True)
    run("export", "--no-progress", spec, str(path))
    return path.read_bytes()


@pytest.mark.parametrize("begins", ["rbd", "rbdpy"])
@pytest.mark.parametrize("snapshots", [False, True])
def test_one_begins_and_the_other_ends(
    snapshots: bool, begins: str, ceph_conf: str, ceph_pool: str, theirs: Run, ours: Run, tmp_path: Path
) -> None:
    first, second = (theirs, ours) if begins == "rbd" else (ours, theirs)
    make(ceph_conf, ceph_pool, snapshots)
    snaps = ["@s0", "@s1"] if snapshots else []
    before = {at: exported(theirs, f"{ceph_pool}/a{at}", tmp_path) for at in ("", *snaps)}
    first("migration", "prepare", f"{ceph_pool}/a", f"{ceph_pool}/b", "--object-size", "4M")
    assert {at: exported(ours, f"{ceph_pool}/b{at}", tmp_path) for at in ("", *snaps)} == before
    assert exported(theirs, f"{ceph_pool}/b", tmp_path) == before[""]
    assert json.loads(ours("migration", "status", f"{ceph_pool}/b", "--format", "json"))["state"] == "prepared"
    # Each writes a little: what the other reads shows what came over with it.
    head = bytearray(before[""])
    with rados.Rados(conffile=ceph_conf) as cluster, cluster.open_ioctx(ceph_pool) as io:
        with rbd.Image(io, "b") as image:
            image.write(b"ours", 3 * MIB)
    head[3 * MIB : 3 * MIB + 4] = b"ours"
    wrote = ("--io-type", "write", "--io-size", "4K", "--io-total", "4K", "--io-pattern", "seq", "--io-threads", "1")
    theirs("bench", f"{ceph_pool}/b", *wrote)
    head[:4096] = exported(theirs, f"{ceph_pool}/b", tmp_path)[:4096]
    wanted = {**before, "": bytes(head)}
    for run in (ours, theirs):
        assert exported(run, f"{ceph_pool}/b", tmp_path) == bytes(head)
    second("migration", "execute", "--no-progress", f"{ceph_pool}/b")
    for run in (ours, theirs):
        assert {at: exported(run, f"{ceph_pool}/b{at}", tmp_path) for at in wanted} == wanted
    first("migration", "commit", "--no-progress", f"{ceph_pool}/b")
    for run in (ours, theirs):
        assert {at: exported(run, f"{ceph_pool}/b{at}", tmp_path) for at in wanted} == wanted
    theirs("object-map", "check", "--no-progress", f"{ceph_pool}/b")
    assert "object map invalid" not in theirs("info", f"{ceph_pool}/b")
    assert theirs("trash", "ls", "--all", ceph_pool) == ""


@pytest.mark.parametrize("begins", ["rbd", "rbdpy"])
def test_one_begins_and_the_other_aborts(
    begins: str, ceph_conf: str, ceph_pool: str, theirs: Run, ours: Run, tmp_path: Path
) -> None:
    first, second = (theirs, ours) if begins == "rbd" else (ours, theirs)
    make(ceph_conf, ceph_pool, True)
    before = {at: exported(theirs, f"{ceph_pool}/a{at}", tmp_path) for at in ("", "@s0", "@s1")}
    first("migration", "prepare", f"{ceph_pool}/a", f"{ceph_pool}/b")
    with rados.Rados(conffile=ceph_conf) as cluster, cluster.open_ioctx(ceph_pool) as io:
        with rbd.Image(io, "b") as image:
            image.write(b"ours", 3 * MIB)
    second("migration", "abort", "--no-progress", f"{ceph_pool}/b")
    head = bytearray(before[""])
    head[3 * MIB : 3 * MIB + 4] = b"ours"
    wanted = {**before, "": bytes(head)}
    for run in (ours, theirs):
        assert {at: exported(run, f"{ceph_pool}/a{at}", tmp_path) for at in wanted} == wanted
    assert theirs("ls", ceph_pool) == "a\n"


@pytest.mark.parametrize("begins", ["rbd", "rbdpy"])
def test_one_begins_an_import_and_the_other_ends_it(
    begins: str, ceph_pool: str, theirs: Run, ours: Run, tmp_path: Path
) -> None:
    first, second = (theirs, ours) if begins == "rbd" else (ours, theirs)
    file = tmp_path / "raw"
    file.write_bytes(bytes(3 * MIB) + random.Random(1).randbytes(2 * MIB) + bytes(4 * MIB))
    spec = json.dumps({"type": "raw", "stream": {"type": "file", "file_path": str(file)}})
    first("migration", "prepare", "--import-only", "--source-spec", spec, f"{ceph_pool}/b")
    for run in (ours, theirs):
        assert exported(run, f"{ceph_pool}/b", tmp_path) == file.read_bytes()
    second("migration", "execute", "--no-progress", f"{ceph_pool}/b")
    first("migration", "commit", "--no-progress", f"{ceph_pool}/b")
    for run in (ours, theirs):
        assert exported(run, f"{ceph_pool}/b", tmp_path) == file.read_bytes()

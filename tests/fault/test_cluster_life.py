"""Scratch clusters begin and end as they should, whoever starts them and however their owner ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stack import DEADLINE, RBDPY

from librbd_py.devcluster import DevCluster, Options, scratch
from librbd_py.devcluster.admin import Admin

NOBODY = 65534
OWNER = """
import sys, time
from pathlib import Path
from librbd_py.devcluster import Options, scratch
with scratch(Options(), Path(sys.argv[1])) as cluster:
    print(cluster.folder, flush=True)
    time.sleep(1000)
"""
DIES = 'case "$*" in *--mkfs*) ;; *) echo no more; exit 1;; esac'
UNPRIVILEGED = """
import os, sys
from pathlib import Path
from librbd_py.devcluster import DevCluster, Options, admin
os.setgroups([])
os.setgid(int(sys.argv[2])), os.setuid(int(sys.argv[2]))
cluster = DevCluster(Path(sys.argv[1]))
cluster.start(Options(osds=2, auth="cephx"))
for name in cluster.options().daemons:
    print(os.stat(f"/proc/{cluster.daemon(name).record()[0]}").st_uid)
cluster.stop()
"""


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name, for sockets."""
    with tempfile.TemporaryDirectory(prefix="rbdpy-t-") as name:
        yield Path(name)


def gone(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def processes_of(folder: Path) -> list[str]:
    """Command lines that name the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in text:
            found.append(text)
    return found


def test_a_life_on_the_command_line(short: Path) -> None:
    folder = short / "c"

    def rbdpy(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*RBDPY, *arguments], capture_output=True, text=True, timeout=DEADLINE)

    started = rbdpy("devcluster", "start", "--dir", str(folder), "--osds", "2", "--auth", "cephx", "--new-pool", "mine")
    try:
        assert started.returncode == 0, started.stderr
        word, store = started.stdout.split()
        assert word == "--store" and store == f"ceph:{folder}/ceph.conf"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "keyring").stat().st_mode) == 0o600
        assert rbdpy("--store", store, "create", "mine/image", "--size", "1M").returncode == 0
        assert rbdpy("--store", store, "ls", "mine").stdout == "image\n"
        shown = json.loads(rbdpy("devcluster", "status", "--dir", str(folder), "--format", "json").stdout)
        assert shown["store"] == store
        assert {row["name"]: row["state"] for row in shown["daemons"]} == dict.fromkeys(
            ("mon.a", "osd.0", "osd.1"), "running"
        )
        again = rbdpy("devcluster", "start", "--dir", str(folder))
        assert again.returncode == 17 and "runs" in again.stderr
        assert len(processes_of(folder)) == 3
    finally:
        stopped = rbdpy("devcluster", "stop", "--dir", str(folder))
    assert stopped.returncode == 0
    assert not folder.exists() and processes_of(folder) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_nothing_stays_when_the_owner_is_killed(short: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(short)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        assert DevCluster(folder).status().running
        assert len(processes_of(folder)) == 3  # with the guard
        owner.send_signal(number)
        owner.wait(DEADLINE)
        gone(folder.exists)
        gone(lambda: bool(processes_of(folder)))


def test_a_run_of_pytest_that_is_interrupted_leaves_nothing(short: Path) -> None:
    shutil.copy(Path(__file__).parents[1] / "conftest.py", short)
    (short / "test_it.py").write_text(
        "import os, signal\n"
        "def test_it(ceph_cluster):\n"
        "    open('where', 'w').write(str(ceph_cluster.folder))\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(short)]
    done = subprocess.run(command, cwd=short, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 2, done.stdout
    folder = Path((short / "where").read_text())
    assert not folder.exists() and processes_of(folder) == []


@pytest.mark.skipif("os.getuid() != 0")
def test_root_is_not_needed(short: Path) -> None:
    folder = short / "c"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    os.chmod(short, 0o755)
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, str(folder), str(NOBODY)], capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.stdout.split() == [str(NOBODY)] * 3, done.stderr
    assert processes_of(folder) == []


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo no disk; exit 3", r"osd\.0 could not be made: no disk"), (DIES, r"osd\.0 ended: no more")],
    ids=["when it is made", "when it runs"],
)
def test_a_daemon_that_ends_is_told_with_what_it_said(
    short: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    fake = short / "ceph-osd"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{short}:{os.environ['PATH']}")
    made = DevCluster(short / "c")
    with pytest.raises(OSError, match=said):
        made.start()
    assert processes_of(made.folder) == []
    assert made.stop() and not made.folder.exists()


def test_ports_taken_by_another_are_chosen_anew(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from librbd_py.devcluster import ports

    with scratch(Options(), short) as first:
        taken = next(line for line in Path(first.conf).read_text().splitlines() if line.startswith("mon host"))
        v2 = int(taken.split(":")[2].split(",")[0])
        answers = [((v2, v2 + 1), range(v2 + 8, v2 + 160)), ports.choose("127.0.0.1")]
        monkeypatch.setattr(ports, "choose", lambda address: answers.pop(0))
        with scratch(Options(), short) as second:
            assert answers == []
            with Admin(first.conf) as one, Admin(second.conf) as two:
                assert one.mon("fsid") != two.mon("fsid")


def test_a_folder_of_a_dead_cluster_is_used_again(short: Path) -> None:
    made = DevCluster(short / "c")
    try:
        made.start()
        before = (made.folder / "ceph.conf").read_text()
        for name in ("osd.0", "mon.a"):
            made.faults.kill(name)
        assert not made.status().running
        made.start()
        assert (made.folder / "ceph.conf").read_text() != before
        assert made.status().running
    finally:
        made.stop()
    assert not made.folder.exists()

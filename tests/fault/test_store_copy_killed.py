"""`rbdpy store copy` is killed, or interrupted, in the middle: nothing half made looks like an image, and the same
command begun again ends well."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from librbd_py import rbd
from librbd_py.cli.main import main
from librbd_py.devcluster import DevCluster
from librbd_py.image import cls
from librbd_py.store import connect

SIZE = 12 << 20
ORDER = 16  # many objects: much to be interrupted in


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("copy") / "source")
    with connect(url) as store:
        ctx = store.open("rbd")
        rbd.RBD().create(ctx, "image", SIZE, order=ORDER)
        with rbd.Image(ctx, "image") as image:
            image.write(random.Random(1).randbytes(SIZE), 0)
            image.create_snap("s")
            for offset in range(0, SIZE, 1 << 20):
                image.write(b"changed", offset)
    return url


@pytest.fixture
def ceph(ceph_cluster: DevCluster, ceph_pool: str) -> Iterator[str]:
    yield ceph_cluster.url


def copy(source: str, dest: str, what: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "librbd_py.cli.main", "store", "copy", source, dest, what]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def stop_at(process: subprocess.Popen[bytes], percent: int, how: signal.Signals) -> int:
    """Sends the signal when the progress says so; the exit status."""
    assert process.stderr is not None
    said = b""
    while not any(int(word) >= percent for word in said.replace(b"%", b" ").split() if word.isdigit()):
        some = os.read(process.stderr.fileno(), 4096)
        assert some, f"it ended before {percent} %: {said!r}"
        said += some
    process.send_signal(how)
    with process:
        process.stderr.read()
    return process.returncode


def check_whole(dest: str, what: str) -> None:
    with connect(dest) as store:
        ctx = store.open(what.split("/")[0])
        assert cls.trash_list(ctx) == {}
        with rbd.Image(ctx, "image", snapshot="s", read_only=True) as image:
            assert image.read(0, SIZE) == random.Random(1).randbytes(SIZE)
        with rbd.Image(ctx, "image", read_only=True) as image:
            assert image.read(1 << 20, 9)[:7] == b"changed"


@pytest.mark.parametrize("percent", [2, 30, 55, 90])
def test_killed_into_a_folder(source: str, tmp_path: Path, percent: int) -> None:
    dest = str(tmp_path / "dest")
    assert stop_at(copy(source, dest, "rbd/image"), percent, signal.SIGKILL) == -signal.SIGKILL
    with connect(dest) as store:
        assert rbd.RBD().list(store.open("rbd")) == []
    assert main(["--store", dest, "info", "image"]) == errno.ENOENT
    assert main(["--store", dest, "store", "check"]) == 0
    assert main(["store", "copy", source, dest, "rbd/image", "--no-progress"]) == 0
    check_whole(dest, "rbd/image")
    assert main(["--store", dest, "store", "check"]) == 0


def test_killed_into_ceph(source: str, ceph: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Until the cluster knows that the copying client is dead, somebody is copying."""
    assert stop_at(copy(source, ceph, "rbd/image"), 30, signal.SIGKILL) == -signal.SIGKILL
    with connect(ceph) as store:
        ctx = store.open("rbd")
        assert "image" not in rbd.RBD().list(ctx)
        assert main(["store", "copy", source, ceph, "rbd/image", "--no-progress"]) == errno.EBUSY
        address = re.search(r"by the client at (\S+), or was \d+ s ago", capsys.readouterr().err)
        assert address is not None
        store.blocklist_add(address[1], 60)  # its watch goes at once
        assert main(["store", "copy", source, ceph, "rbd/image", "--no-progress"]) == 0
        check_whole(ceph, "rbd/image")
        with rbd.Image(ctx, "image") as image:
            image.remove_snap("s")
        rbd.RBD().remove(ctx, "image")


@pytest.mark.parametrize("percent", [5, 60])
def test_interrupted(source: str, tmp_path: Path, percent: int) -> None:
    dest = str(tmp_path / "dest")
    assert stop_at(copy(source, dest, "rbd/image"), percent, signal.SIGINT) != 0
    with connect(dest) as store:
        ctx = store.open("rbd")
        assert sorted(ctx.objects()) == ["rbd_info", "rbd_trash"]
        assert cls.trash_list(ctx) == {}

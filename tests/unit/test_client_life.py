"""Files that prove to others on a host that a client has ended, as long as nobody else could have made them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from librbd_py.store.rados import life

FSID, ADDRESS = "0ff5e1d5-0000-4000-8000-000000000000", "10.0.0.1:0/123"
PROGRAM = """
import os, subprocess, sys
from librbd_py.store.rados.life import Life
kept = Life(sys.argv[1], sys.argv[2])
if sys.argv[3] == "fork" and not os.fork():
    sys.stdin.read()
    os._exit(0)
print("ready", flush=True)
sys.stdin.read()
kept.close()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RBDPY_CLIENTS", str(tmp_path / "clients"))
    return tmp_path / "clients"


@contextmanager
def client(address: str = ADDRESS, how: str = "") -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, FSID, address, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_a_killed_client_has_ended_and_a_living_one_has_not() -> None:
    assert not life.ended(FSID, ADDRESS)  # nobody knows of it
    with client() as process:
        assert not life.ended(FSID, ADDRESS)
        process.send_signal(signal.SIGSTOP)
        assert not life.ended(FSID, ADDRESS)
        process.kill()
        process.wait()
        assert life.ended(FSID, ADDRESS)
        assert not life.ended(FSID, "10.0.0.1:0/124") and not life.ended("another", ADDRESS)


def test_a_child_that_was_forked_does_not_hide_the_end() -> None:
    with client(how="fork") as process:
        assert not life.ended(FSID, ADDRESS)
        process.kill()
        process.wait()
        assert life.ended(FSID, ADDRESS)


def test_who_ends_in_order_leaves_nothing(folder: Path) -> None:
    with client() as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0
    assert list(folder.iterdir()) == [] and not life.ended(FSID, ADDRESS)


def test_an_address_that_is_used_again(folder: Path) -> None:
    with client() as process:
        process.kill()
        process.wait()
    again = life.Life(FSID, ADDRESS)
    assert not life.ended(FSID, ADDRESS) and len(list(folder.iterdir())) == 1
    again.close()
    again.close()
    assert list(folder.iterdir()) == []


def test_what_others_could_have_made_proves_nothing(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(mode=0o700)
    forged = folder / f"{FSID}.{ADDRESS}".replace("/", "_")
    forged.touch()
    assert life.ended(FSID, ADDRESS)
    folder.chmod(0o770)
    assert not life.ended(FSID, ADDRESS)
    with pytest.raises(PermissionError):
        life.Life(FSID, ADDRESS)
    folder.chmod(0o700)
    for make in (lambda: forged.symlink_to(tmp_path / "x"), lambda: os.mkfifo(forged), forged.mkdir):
        forged.unlink(missing_ok=True)
        (tmp_path / "x").touch()
        make()
        assert not life.ended(FSID, ADDRESS)


def test_nowhere_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBDPY_CLIENTS", "")
    life.Life(FSID, ADDRESS).close()
    assert not life.ended(FSID, ADDRESS)


def test_files_of_the_long_dead_do_not_pile_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "MANY", 10)
    folder.mkdir(mode=0o700)
    for number in range(30):
        (folder / f"{FSID}.10.0.0.2:0_{number}").touch()
        os.utime(folder / f"{FSID}.10.0.0.2:0_{number}", (number, number))
    with client("10.0.0.3:0/1"):
        made = life.Life(FSID, ADDRESS)
        assert len(list(folder.iterdir())) <= 12
        assert life.ended(FSID, "10.0.0.2:0/29") and not life.ended(FSID, "10.0.0.2:0/1")
        assert not life.ended(FSID, "10.0.0.3:0/1") and (folder / f"{FSID}.10.0.0.3:0_1").exists()
        made.close()

"""The daemon's journal of what it serves (qemu_glue/state.py): replay, torn tails, damage, rewriting, a full disk."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_glue.qmp_wire import QMPError
from qemu_glue.state import SLACK, Journal


def command(number: int) -> dict[str, Any]:
    return {"execute": "blockdev-add", "arguments": {"node-name": f"n{number}", "image": "bilde-ü\n", "driver": "rbd"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rbdpyd.state"


def reopened(path: Path) -> dict[str, dict[str, Any]]:
    journal = Journal(path)
    try:
        return journal.commands
    finally:
        journal.close()


def filled(path: Path, count: int) -> None:
    journal = Journal(path)
    for number in range(count):
        journal.remember(f"node n{number}", command(number))
    journal.close()


def test_what_was_remembered_comes_back_in_order(path: Path) -> None:
    journal = Journal(path)
    for number in (3, 1, 2):
        journal.remember(f"node n{number}", command(number))
    journal.forget("node n1")
    journal.forget("never was there")
    journal.remember("node n1", command(7))
    journal.close()
    assert list(reopened(path).items()) == [(f"node n{k}", command(v)) for k, v in ((3, 3), (2, 2), (1, 7))]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_torn_tail_is_dropped_wherever_it_was_torn(path: Path) -> None:
    filled(path, 3)
    whole = path.read_bytes()
    ends = [i + 1 for i, c in enumerate(whole) if c == ord("\n")]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = sum(end <= size for end in ends)
        assert len(reopened(path)) == kept, size
        filled(path, kept + 1)  # and what comes next is not lost to the rest of a line
        assert len(reopened(path)) == kept + 1, size


def test_a_last_line_of_nonsense_is_a_torn_write(path: Path) -> None:
    filled(path, 2)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert list(reopened(path)) == ["node n0"]


@pytest.mark.parametrize("at", [0, 7, 8, 9, 30])
def test_damage_before_the_end_is_refused_and_left_alone(path: Path, at: int) -> None:
    filled(path, 3)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(QMPError, match="line 1"):
        Journal(path)
    assert path.read_bytes() == data


@pytest.mark.parametrize("content", [b"[]\n[]\n", b"hello", b"{}", b"\0" * 5000, b"\n\n"])
def test_other_files_are_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(QMPError, match="not a state file"):
        Journal(path)
    assert path.read_bytes() == content


def test_one_process_at_a_time(path: Path) -> None:
    journal = Journal(path)
    with pytest.raises(QMPError, match="in use"):
        Journal(path)
    journal.close()
    reopened(path)


def test_the_file_stays_short(path: Path) -> None:
    """As long as what counts, not as long as its history; and a rewrite keeps the lock and the order."""
    journal = Journal(path)
    random.seed(5)
    alive: dict[str, dict[str, Any]] = {}
    for turn in range(4 * SLACK):
        key = f"node n{random.randrange(20)}"
        if key in alive:
            journal.forget(key)
            del alive[key]
        else:
            journal.remember(key, command(turn))
            alive[key] = command(turn)
    with pytest.raises(QMPError, match="in use"):
        Journal(path)
    journal.close()
    assert list(reopened(path).items()) == list(alive.items())
    assert path.read_bytes().count(b"\n") <= SLACK + 2 * 20 + 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_rewrite_that_fails_fails_no_command(path: Path) -> None:
    """It only saves room. Tried again by the next."""
    in_the_way = path.with_name(path.name + ".new")
    in_the_way.mkdir()
    journal = Journal(path)
    for turn in range(SLACK):
        journal.remember("node a", command(turn))
        journal.forget("node a")
    journal.remember("node b", command(1))
    assert path.read_bytes().count(b"\n") == 2 * SLACK + 1
    in_the_way.rmdir()
    journal.forget("node a")
    journal.remember("node a", command(2))
    journal.forget("node a")
    journal.close()
    assert path.read_bytes().count(b"\n") == 1
    assert reopened(path) == {"node b": command(1)}


def test_the_name_of_a_new_file_is_on_the_disk_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    Journal(path).close()
    assert synced == [str(path.parent)]
    filled(path, 2)
    synced.clear()
    Journal(path).close()
    assert synced == []


@contextlib.contextmanager
def little_room(size: int) -> Iterator[None]:
    """Files of this process, pytest's own output included, end at `size` bytes: writes become short, then EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_no_room_is_an_error_and_leaves_whole_records(path: Path) -> None:
    journal = Journal(path)
    kept = 0
    with little_room(400), pytest.raises(OSError):
        for kept in range(100):
            journal.remember(f"node n{kept}", command(kept))
    journal.close()
    assert 0 < kept == len(reopened(path))
    assert path.stat().st_size <= 400
    assert os.path.getsize(path) == sum(len(line) + 1 for line in path.read_bytes().split(b"\n")[:-1])


def opened(path: Path) -> int:
    """Descriptors of this process that are that file."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{name}") == str(path)
    return count


def test_who_waited_for_a_file_that_was_replaced_opens_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "state"
    first = Journal(path)
    first.remember("kept", command(1))
    found: list[Journal] = []
    waiting = threading.Thread(target=lambda: found.append(Journal(path, patience=20.0)))
    old = os.stat(path).st_ino
    waiting.start()
    end = time.monotonic() + 20
    while opened(path) < 2:
        assert time.monotonic() < end, "the second never opened it"
        time.sleep(0.001)
    first._rewrite()
    assert os.stat(path).st_ino != old
    first.remember("later", command(2))
    first.close()
    waiting.join(20)
    (second,) = found
    assert list(second.commands) == ["kept", "later"]
    assert os.fstat(second._fd).st_ino == os.stat(path).st_ino
    second.close()


def test_a_file_that_lost_its_name_is_not_written_over_anothers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state"
    ours = Journal(path)
    os.rename(path, tmp_path / "moved")
    theirs = Journal(path)
    theirs.remember("theirs", command(3))
    for _ in range(SLACK + 2):
        ours.remember("x", command(4))
        ours.forget("x")
    assert "no longer the file of that name" in caplog.text
    theirs.close()
    again = Journal(path)
    assert list(again.commands) == ["theirs"]
    again.close()
    ours.close()

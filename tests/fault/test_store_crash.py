"""The embedded store killed at every step of every kind of change."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from librbd_py.store.api import Create, Read, WriteFull
from librbd_py.store.embedded import EmbeddedStore, check, steps
from tests.fault.store_program import Dump, dump, expected, operations, run_until, verify


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where that exists: a killed process loses nothing that the kernel has, so the disk is not tested."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="rbdpy-crash-", dir=shm if shm.is_dir() else None) as name:
        yield Path(name)


def test_a_kill_at_any_step_leaves_the_state_before_or_after(folder: Path) -> None:
    states = expected(folder / "model")
    assert len({repr(state) for state in states[:-1]}) > 15, "operations that change nothing test nothing"
    stop_at, ended = 0, False
    while not ended:
        stop_at += 1
        path = folder / f"step{stop_at}"
        acknowledged, ended = run_until(path, stop_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        verify(path, acknowledged, states)
    assert stop_at > 40, "the steps are gone"


def test_an_error_at_any_step_leaves_the_state_before_or_after(folder: Path) -> None:
    """The same with a failure instead of a kill: the process goes on and repeats the operation."""
    states = expected(folder / "model")
    seen, fail_at = 0, 0

    def hook(name: str) -> None:
        nonlocal seen
        seen += 1
        if seen == fail_at:
            raise OSError(errno.EIO, f"injected at {name}")

    def look(path: Path) -> Dump | None:
        steps.hook = None
        try:
            return dump(path)
        finally:
            steps.hook = hook

    steps.hook = hook
    try:
        while True:
            fail_at, seen = fail_at + 1, 0
            path = folder / f"step{fail_at}"
            for number, (name, work) in enumerate(operations(path)):
                try:
                    work()
                    continue
                except OSError as error:
                    assert error.errno == errno.EIO
                found = look(path)
                if number > 0:
                    assert found in states[number : number + 2], (name, fail_at)
                if number > 0 and found == states[number]:
                    work()
                    assert look(path) == states[number + 1], (name, fail_at)
                elif number == 0:
                    work()
            if seen < fail_at:
                break
    finally:
        steps.hook = None
    assert fail_at > 40


def test_a_full_disk_changes_nothing_and_the_store_goes_on(tmp_path: Path) -> None:
    """A limit on the database's pages plays the disk."""
    with EmbeddedStore(tmp_path / "store", create=True) as store:
        io = store.open("rbd")
        io.write("o", [WriteFull(b"before")])
        connection = store.db.take()
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")
        store.db.give_back(connection)
        with pytest.raises(OSError) as caught:
            for number in range(100):
                io.write(f"o{number}", [WriteFull(b"x" * 30_000)])
        assert caught.value.errno == errno.ENOSPC
        assert io.read("o", [Read()]) == [b"before"]
        connection = store.db.take()
        connection.execute("PRAGMA max_page_count=1000000")
        store.db.give_back(connection)
        io.write("after", [Create()])
        assert "after" in set(io.objects())
    assert check.check(tmp_path / "store") == []

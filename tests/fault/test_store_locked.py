"""A process that stands still with the database's write lock: who is kept waiting is told which one it is."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from librbd_py.store.embedded import EmbeddedStore, database, unblock
from librbd_py.store.embedded.holders import writer_of

HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode=WAL")
connection.execute("CREATE TABLE IF NOT EXISTS t(x)")
connection.execute("BEGIN IMMEDIATE")
print("holds", flush=True)
sys.stdin.read()
"""


def test_a_stopped_process_that_holds_the_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_MS", 50)
    monkeypatch.setattr(database, "TRIES", 2)
    path = str(tmp_path / "meta.db")
    argv = [sys.executable, "-c", HOLDER, path]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"holds\n"
            assert f"process {holder.pid} (" in writer_of(path)
            assert "stopped" not in writer_of(path)
            holder.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, holder.pid, os.WSTOPPED)
            db = database.Database(path, synchronous="FULL")
            with pytest.raises(OSError, match=rf"process {holder.pid} \(.*\), which is stopped, keeps it") as late:
                with db.write():
                    pass
            assert late.value.errno == errno.ETIMEDOUT
            db.close()
        finally:
            holder.kill()
    assert writer_of(path) == ""
    db = database.Database(path, synchronous="FULL")
    with db.write() as connection:
        connection.execute("INSERT INTO t VALUES (1)")
        assert f"process {os.getpid()} (" in writer_of(path)
    db.close()


def test_no_database_has_no_writer(tmp_path: Path) -> None:
    assert writer_of(str(tmp_path / "none")) == ""


@contextmanager
def kept(store: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A store, and another process in the middle of a transaction."""
    with EmbeddedStore(store, create=True) as made:
        made.pool_create("before")
    argv = [sys.executable, "-c", HOLDER, str(store / "meta.db")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"holds\n"
            yield holder
        finally:
            holder.kill()


def command(store: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "librbd_py.cli.main", "--store", str(store), "store", "unblock", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


def test_a_stopped_holder_is_killed_when_asked_for_and_the_store_goes_on(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with kept(store) as holder:
        stop(holder)
        would = command(store, "--dry-run")
        assert would.returncode == 0, would.stderr
        assert "it would be killed" in would.stdout
        assert holder.poll() is None
        done = command(store)
        assert done.returncode == 0, done.stderr
        first, *_, gone, free = done.stdout.splitlines()
        assert first.startswith(f"process {holder.pid} (") and first.endswith("and is stopped")
        assert gone == "it was killed and is gone"
        assert free.endswith("meta.db is free")
        assert holder.wait(10) == -signal.SIGKILL
    with EmbeddedStore(store) as opened:
        opened.pool_create("after")
        assert {"before", "after"} <= {pool.name for pool in opened.pools()}


def test_a_holder_that_is_not_stopped_is_killed_by_force_only(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with kept(store) as holder:
        refused = command(store)
        assert refused.returncode == 16
        assert f"process {holder.pid} (" in refused.stderr and "--force" in refused.stderr
        assert holder.poll() is None
        assert command(store, "--force").returncode == 0
        assert holder.wait(10) == -signal.SIGKILL


def test_who_gives_the_lock_back_while_it_is_watched_is_left_alone(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with kept(store) as holder:
        steps: list[str] = []

        def say(step: str) -> None:
            steps.append(step)
            if len(steps) == 1:  # it is being watched from here on
                assert holder.stdin is not None
                holder.stdin.close()

        assert unblock.unblock(str(store), say, force=True) is False
        assert "not blocked" in steps[-1] or steps[-1] == "it is gone"
        assert holder.wait(10) == 0


def test_a_store_that_nobody_blocks_has_nobody_to_kill(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with EmbeddedStore(store, create=True) as made:
        made.pool_create("one")
        done = command(store)
    assert done.returncode == 0
    assert done.stdout.startswith("no process that can be seen from here keeps ")
    assert command(tmp_path / "none").returncode == 2

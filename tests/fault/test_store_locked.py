"""A process that stands still with the database's write lock: who is kept waiting is told which one it is."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from librbd_py.store.embedded import database
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

"""A daemon of several disks hangs, and one of its images is taken: it ends whole, and its successor serves on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from nbd_client import WRITE, Closed
from stack import check_store, create, pool, rbdpy, stack

from librbd_py import rbd
from tests.fault.lock_contestant import stand_still

MIB = 1 << 20


def test_fencing_one_image_of_a_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBDPY_WATCH_TIMEOUT", "1")
    store = tmp_path / "store"
    for name in ("wanted", "other"):
        create(store, name, 8 * MIB)
    with stack(tmp_path, store) as s:
        s.serve("wanted", "other")
        for name in ("wanted", "other"):
            s.client(name).write(0, b"before__" * 512)
        shown = json.loads(rbdpy(store, "lock", "why", "wanted", "--format", "json").stdout)
        pid = s.daemon.pid
        assert shown["owner"]["pid"] == pid
        waiting = s.client("wanted")
        stand_still(pid)
        waiting.start(WRITE, 0, 4096, data=b"zombie__" * 512)
        with pool(store) as ioctx, rbd.Image(ioctx, "wanted") as image:
            begun = time.monotonic()
            image.write(b"taken___" * 512, 0)  # as any writer does: asks, waits for its watch to end, fences
            assert time.monotonic() - begun < 30
            with pytest.raises((Closed, ConnectionError)):
                waiting.reply()
            s.kill()  # it is dead; the test's own connections go
            s.start()
            with s.client("other") as client:
                assert client.read(0, 4096) == b"before__" * 512
                client.write(0, b"after___" * 512)  # nobody wanted that one: its lock goes to the successor
            assert image.read(0, 4096) == b"taken___" * 512 and image.is_exclusive_lock_owner()
            with s.client("wanted") as client:
                client.write(4096, b"asked___" * 512)  # it asks for the lock like anybody
                assert client.read(0, 4096) == b"taken___" * 512
            assert not image.is_exclusive_lock_owner()
        assert s.stop() == 0
    assert check_store(store) == "no findings\n"

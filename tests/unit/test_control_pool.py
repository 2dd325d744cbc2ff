"""The thread pool of the control plane."""

from __future__ import annotations

import os
import threading
import time

import pytest

from librbd_py.control import pool as module
from librbd_py.control.pool import ControlPool, control_pool

PATIENCE = 20.0


def test_jobs_run_and_idle_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.01)
    pool = ControlPool(2)
    done = threading.Semaphore(0)
    for _ in range(100):
        pool.submit(done.release)
    for _ in range(100):
        assert done.acquire(timeout=PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while pool.threads:
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)
    pool.submit(done.release)
    assert done.acquire(timeout=PATIENCE)


def test_jobs_that_wait_for_later_jobs_do_not_stop_the_pool() -> None:
    pool = ControlPool(2)
    last = threading.Event()
    ended = threading.Semaphore(0)

    def waits() -> None:
        last.wait(PATIENCE)
        ended.release()

    for _ in range(6):
        pool.submit(waits)
    pool.submit(last.set)
    for _ in range(6):
        assert ended.acquire(timeout=PATIENCE)
    assert last.is_set()
    assert pool.threads <= 8


def test_quick_jobs_never_need_more_than_the_usual_threads() -> None:
    pool = ControlPool(3)
    done = threading.Semaphore(0)
    for _ in range(2000):
        pool.submit(done.release)
    for _ in range(2000):
        assert done.acquire(timeout=PATIENCE)
    assert pool.threads <= 4


def test_a_failing_job_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    pool = ControlPool(1)
    done = threading.Event()
    pool.submit(lambda: [][1])
    pool.submit(done.set)
    assert done.wait(PATIENCE)
    assert "IndexError" in caplog.text


def test_timers_run_in_order_of_time_and_can_be_cancelled() -> None:
    pool = ControlPool(1)
    order: list[str] = []
    done = threading.Event()
    pool.call_later(0.03, lambda: (order.append("last"), done.set())[0])
    pool.call_later(0.02, lambda: order.append("never")).cancel()
    pool.call_later(0.01, lambda: order.append("first"))
    assert done.wait(PATIENCE)
    assert order == ["first", "last"]


def test_a_forked_child_has_a_pool_of_its_own() -> None:
    parent = control_pool()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        done = threading.Event()
        control_pool().submit(done.set)
        os.write(write, b"1" if control_pool() is not parent and done.wait(PATIENCE) else b"0")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 1) == b"1"
    os.close(read)
    os.close(write)
    assert control_pool() is parent

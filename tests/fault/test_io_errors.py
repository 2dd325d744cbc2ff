"""Errors of the store under a vhost-user export: the one request fails, a failed flush is final. Store with faults:
native/store/store_fault.c."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vhost_frontend import IOERR, OK, T_FLUSH, T_IN, T_OUT, frontend
from vhost_server import Server

SERVE = Path(__file__).parents[1] / "protocol/serve_vhost.py"
SIZE = 16 << 20
BLOCK = b"b" * 4096

Serve = Callable[[str], Server]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    started: list[Server] = []

    def start(spec: str) -> Server:
        socket, spec_file = tmp_path / "vu.sock", f"fault,{spec},{tmp_path / 'layout'}"
        started.append(Server([sys.executable, str(SERVE), str(socket), spec_file, str(SIZE)], socket))
        return started[-1]

    yield start
    for server in started:
        server.close()


def test_a_failed_write_fails_alone(serve: Serve) -> None:
    server = serve("write:nth=3:errno=5")
    with frontend(server.path) as guest:
        results = [guest.write(8 * n, bytes([n]) * 4096) for n in range(6)]
        assert results == [OK, OK, IOERR, OK, OK, OK]
        for n in (0, 1, 3, 4, 5):
            assert guest.read(8 * n, 4096) == bytes([n]) * 4096
        assert guest.read(16, 4096) == bytes(4096)
        assert guest.request(T_FLUSH)[0] == OK


def test_a_failed_read_fails_alone(serve: Serve) -> None:
    server = serve("read:nth=2:errno=5")
    with frontend(server.path) as guest:
        assert guest.write(0, BLOCK) == OK
        assert [guest.request(T_IN, 0, want=4096)[0] for _ in range(4)] == [OK, IOERR, OK, OK]
        assert guest.read(0, 4096) == BLOCK


SPECS = ["nth=1:errno=5", "errno=5:pending=1", "errno=5:done"]


@pytest.mark.parametrize("spec", SPECS, ids=["at once", "later", "after it was done"])
def test_after_a_failed_flush_nothing_is_acknowledged(serve: Serve, spec: str) -> None:
    server = serve(f"flush:{spec}")
    with frontend(server.path) as guest:
        assert guest.write(8, BLOCK) == OK
        assert guest.request(T_FLUSH)[0] == IOERR
        for _ in range(3):
            assert guest.request(T_FLUSH)[0] == IOERR
            assert guest.request(T_OUT, 16, data=BLOCK)[0] == IOERR
    with frontend(server.path) as guest:  # a new connection does not help
        assert guest.request(T_FLUSH)[0] == IOERR
        assert guest.request(T_OUT, 16, data=BLOCK)[0] == IOERR


def test_the_gate_waits_for_late_completions_and_holds_new_writes(serve: Serve) -> None:
    server = serve("write:delay_ms=20:pending=1")
    with frontend(server.path) as guest:
        queue = guest.queues[0]
        first = [guest.build(T_OUT, 8 * n, data=BLOCK)[0] for n in range(16)]
        queue.offer(*first)
        queue.kick_now()
        server.ok("block")
        seen = queue.take()  # whatever was admitted has completed
        later = guest.build(T_OUT, 512, data=BLOCK)[0]
        queue.offer(later)
        queue.kick_now()
        assert guest.memory is not None
        server.do("stats")
        assert queue.take() == [], "a write passed the closed gate"
        server.ok("unblock")
        seen += queue.wait(17 - len(seen))
        assert sorted(head for head, _ in seen) == sorted([*first, later])
        assert guest.read(512, 4096) == BLOCK

"""Guests that cut their memory short under I/O harm only themselves: one daemon, a hostile front end, a good one."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from stack import Stack, create, stack
from vhost_frontend import OK, T_IN, T_OUT, frontend

MIB = 1 << 20
PIECE = 64 << 10
DEPTH = 24
ROUNDS = 12


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Stack]:
    store = tmp_path / "store"
    create(store, "good", 16 * MIB)
    create(store, "bad", 16 * MIB)
    with stack(tmp_path, store) as s:
        for name in ("good", "bad"):
            address = {"type": "unix", "path": str(tmp_path / name)}
            s.qmp("blockdev-add", driver="rbd", node_name=name, pool="rbd", image=name)
            s.qmp("block-export-add", type="vhost-user-blk", id=name, node_name=name, writable=True, addr=address)
        yield s
        assert s.stop() == 0, "the daemon died"


@pytest.mark.parametrize("left", [0, 1], ids=["all of it", "all but the rings"])
def test_memory_truncated_under_load(daemon: Stack, left: int) -> None:
    rng = random.Random(left)
    with frontend(daemon.folder / "bad") as guest:  # so that reads come from the page cache and from holes
        for n in range(0, DEPTH, 2):
            assert guest.write(n * PIECE // 512, bytes([n + 1]) * PIECE) == OK
    with frontend(daemon.folder / "good") as good:
        for number in range(ROUNDS):
            assert good.write(number, bytes([number]) * 512) == OK
            with frontend(daemon.folder / "bad") as bad:
                queue = bad.queues[0]
                assert bad.memory and bad.memory.next < MIB
                bad.memory.next = MIB  # rings in the first MiB, data behind
                built = []
                for n in range(DEPTH):
                    kind = rng.choice((T_IN, T_OUT))
                    data = b"d" * PIECE if kind == T_OUT else b""
                    built.append(bad.build(kind, n * PIECE // 512, data=data, want=0 if data else PIECE))
                at_once = rng.randrange(DEPTH)
                queue.offer(*(head for head, _, _ in built[:at_once]))
                queue.kick_now()
                queue.offer(*(head for head, _, _ in built[at_once:]))
                os.ftruncate(bad.memory.fd, left * MIB)
                queue.kick_now()
                assert bad.gone()
            assert good.read(number, 512) == bytes([number]) * 512
    with frontend(daemon.folder / "bad") as guest:
        assert guest.write(0, b"n" * PIECE) == OK
        assert guest.read(0, PIECE) == b"n" * PIECE

"""Asking who holds an image beside Ceph's own librbd: it does not mind, and what it is told from its watch and lock."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from ceph_peer import Peer

from librbd_py import rados, rbd
from librbd_py.cli.main import main
from librbd_py.format import notify as nf
from librbd_py.image import ownership
from librbd_py.image.ownership import Outcome

MIB = 1 << 20
R = rbd.RBD()


@pytest.fixture(scope="module")
def both(ceph_conf: str) -> Iterator[tuple[rados.Ioctx, Peer]]:
    pool = f"why-{os.getpid()}"
    with rados.Rados(conffile=ceph_conf) as cluster:
        cluster.create_pool(pool)
        peer = Peer(ceph_conf, pool, pool)
        peer.call("init")
        with cluster.open_ioctx(pool) as ioctx:
            R.create(ioctx, "a", 16 * MIB)
            yield ioctx, peer
        peer.close()
        cluster.delete_pool(pool)


def test_librbd_owns_the_lock(
    both: tuple[rados.Ioctx, Peer], ceph_conf: str, capsys: pytest.CaptureFixture[str]
) -> None:
    io, peer = both
    peer.ask("open('a').write(b'theirs', 0)")
    with rbd.Image(io, "a") as image:
        found = ownership.look(image.handle)
        assert found.owner is not None and found.owner.watching is not None
        assert found.owner.watching.answered and found.owner.answer is None  # EOPNOTSUPP, as to all it does not know
        assert found.owner.address == peer.ask("program.cluster.get_addrs()")
        assert found.outcome is Outcome.ASKED
        (mine,) = found.others
        assert mine.self and mine.answer is not None and mine.answer.pid == os.getpid()
        (raw,) = [ack for (gid, _), ack in image.handle.ctx.notify(
            image.handle.oid, nf.encode(nf.WhoAreYou())).acks.items() if gid != mine.gid]  # fmt: skip
        assert nf.decode_response(raw) == -errno.EOPNOTSUPP
    name = f"{io.name}/a"
    assert main(["--conf", ceph_conf, "lock", "why", name, "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["owner"]["watch"] == "there" and "program" not in shown["owner"]
    assert main(["--conf", ceph_conf, "lock", "why", name]) == 0
    assert "not a client of rbdpy" in capsys.readouterr().out

    assert main(["--conf", ceph_conf, "lock", "take", name]) == 0  # it is asked, and gives it up
    assert "the lock is free" in capsys.readouterr().out
    assert peer.ask("open('a').is_exclusive_lock_owner()") is False
    for turn in range(3):  # nothing is broken on its side
        assert peer.ask(f"open('a').write(b'again{turn}', 0)") == 6
        assert peer.ask("open('a').is_exclusive_lock_owner()")


def test_librbd_watches_while_we_own(both: tuple[rados.Ioctx, Peer]) -> None:
    io, peer = both
    with rbd.Image(io, "a") as image:
        image.handle.describe = {"vm": "name:web"}
        peer.ask("open('a').size()")
        image.write(b"ours", 0)
        for _ in range(20):
            found = ownership.look(image.handle)
            assert found.owner is not None and found.owner.answer is not None
            assert found.owner.answer.owner and found.owner.answer.about == {"vm": "name:web"}
            (theirs,) = found.others
            assert theirs.answered and theirs.answer is None
        image.resize(20 * MIB)
        assert peer.ask("open('a').size()") == 20 * MIB  # still listens
        peer.ask(f"open('a').resize({16 * MIB})")  # and still asks
        assert image.size() == 16 * MIB
        peer.ask("open('a').write(b'x', 0)")
        waiting: Any = ownership.look(image.handle)
        assert waiting.owner.address == peer.ask("program.cluster.get_addrs()")

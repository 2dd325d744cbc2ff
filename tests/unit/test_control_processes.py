"""The exclusive lock between processes that share an embedded store."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from librbd_py.control import wire
from librbd_py.store import connect
from librbd_py.store.api import Create, Read, WriteFull

HEADER = "rbd_header.1045abc"
CHILD = Path(__file__).with_name("control_child.py")


class Child:
    def __init__(self, url: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), url, HEADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        _, gid, self.address = self.answer().split()
        self.gid = int(gid)

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the child ended"
        return line.strip()

    def send(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def ask(self, command: str) -> str:
        self.send(command)
        return self.answer()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


class World:
    def __init__(self, path: Path) -> None:
        self.url = f"embedded:{path}"
        self.store = connect(self.url)
        if not any(pool.name == "rbd" for pool in self.store.pools()):
            self.store.pool_create("rbd")
        self.ctx = self.store.open("rbd")
        self.ctx.write(HEADER, [Create(True)])
        self.ctx.write("counter", [WriteFull(b"0")])
        self.children: list[Child] = []

    def child(self) -> Child:
        child = Child(self.url)
        self.children.append(child)
        return child

    def owner_gid(self) -> int | None:
        owner = wire.get_lock(self.ctx, HEADER).owner
        return None if owner is None else owner.gid


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "store")
    yield world
    for child in world.children:
        child.end()
    world.store.close()


def test_processes_hand_the_lock_over_in_milliseconds(world: World) -> None:
    one, two = world.child(), world.child()
    laps = []
    for _ in range(10):
        for child in (one, two):
            begin = time.monotonic()
            assert child.ask("acquire 20") == "ok"
            laps.append(time.monotonic() - begin)
            assert world.owner_gid() == child.gid
    assert sorted(laps)[len(laps) // 2] < 0.25
    assert not world.store.blocklist()


def test_processes_that_fight_for_the_lock_lose_no_update(world: World) -> None:
    children = [world.child() for _ in range(3)]
    for child in children:
        child.send("turns 15")
    assert [child.answer() for child in children] == ["ok"] * 3
    turns = [int(child.ask("quit")) for child in children]
    assert [child.process.wait(30) for child in children] == [0] * 3
    assert int(world.ctx.read("counter", [Read()])[0]) == sum(turns)
    assert min(turns) >= 1  # an owner that is not disturbed keeps the lock over several acquires
    assert world.owner_gid() is None
    assert not world.store.blocklist()


def test_the_lock_of_a_killed_process_is_broken_at_once(world: World) -> None:
    one, two = world.child(), world.child()
    assert one.ask("acquire 20") == "ok"
    os.kill(one.process.pid, signal.SIGKILL)
    one.process.wait()
    begin = time.monotonic()
    assert two.ask("acquire 20") == "ok"
    assert time.monotonic() - begin < 5.0
    assert one.address in world.store.blocklist()
    assert world.owner_gid() == two.gid


def test_a_stopped_process_keeps_its_lock(world: World) -> None:
    one, two = world.child(), world.child()
    assert one.ask("acquire 20") == "ok"
    os.kill(one.process.pid, signal.SIGSTOP)
    assert two.ask("acquire 0.3") == str(errno.ETIMEDOUT)
    assert world.owner_gid() == one.gid
    assert not world.store.blocklist()
    os.kill(one.process.pid, signal.SIGCONT)
    assert two.ask("acquire 30") == "ok"
    assert one.ask("owner") == "False"

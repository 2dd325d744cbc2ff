"""Class lock where a clock, damage or the last unlock matter; the rest is in conformance/recorded."""

from __future__ import annotations

import errno

import pytest

from librbd_py.format import lock
from librbd_py.format.encoding import Time
from librbd_py.store import api
from librbd_py.store.memory import MemoryCluster

SECOND = 1_000_000_000


class World:
    """Two clients of a cluster whose clock stands still."""

    def __init__(self) -> None:
        self.now = 1_700_000_000 * SECOND
        cluster = MemoryCluster(clock=lambda: self.now)
        stores = [cluster.connect(), cluster.connect()]
        stores[0].pool_create("rbd")
        self.one, self.two = (store.open("rbd") for store in stores)

    def close(self) -> None:
        self.one.store.close()
        self.two.store.close()


@pytest.fixture
def world() -> World:
    return World()


def take(io: api.ObjectContext, kind: int = 1, seconds: int = 0, flags: int = 0, tag: str = "t") -> None:
    io.exec("o", "lock", "lock", lock.LockRequest("l", kind, "c", tag, "", Time(seconds), flags).encode())


def held(io: api.ObjectContext) -> lock.LockState:
    return lock.LockState.decode(io.exec("o", "lock", "get_info", lock.InfoRequest("l").encode()))


def refused(code: int, io: api.ObjectContext, **words: int) -> None:
    with pytest.raises(OSError) as caught:
        take(io, **words)
    assert caught.value.errno == code


def test_a_lock_with_a_duration_runs_out(world: World) -> None:
    take(world.one, seconds=10)
    (info,) = held(world.two).lockers.values()
    assert info.expiration == Time(1_700_000_010)
    world.now += 10 * SECOND
    refused(errno.EBUSY, world.two)
    world.now += 1
    assert held(world.two).lockers == {}
    take(world.two)
    assert [who.entity.number for who in held(world.one).lockers] == [world.two.store.client.gid]


def test_renewal_prolongs(world: World) -> None:
    take(world.one, seconds=10)
    world.now += 9 * SECOND
    take(world.one, seconds=10, flags=lock.FLAG_MAY_RENEW)
    world.now += 9 * SECOND
    take(world.one, seconds=10, flags=lock.FLAG_MUST_RENEW)
    world.now += 9 * SECOND
    refused(errno.EBUSY, world.two)
    world.now += 2 * SECOND
    refused(errno.ENOENT, world.one, flags=lock.FLAG_MUST_RENEW)


def test_an_expired_lock_no_longer_fences_for_its_owner(world: World) -> None:
    take(world.one, seconds=1)
    guard = api.Exec("lock", "assert_locked", lock.AssertRequest("l", 1, "c", "t").encode())
    world.one.write("o", [guard, api.WriteFull(b"1")])
    world.now += 2 * SECOND
    with pytest.raises(OSError) as caught:
        world.one.write("o", [guard, api.WriteFull(b"2")])
    assert caught.value.errno == errno.EBUSY
    assert world.two.read("o", [api.Read()]) == [b"1"]


def test_an_ephemeral_lock_takes_the_object_with_it(world: World) -> None:
    take(world.one, lock.LOCK_EXCLUSIVE_EPHEMERAL)
    world.one.exec("o", "lock", "unlock", lock.UnlockRequest("l", "c").encode())
    with pytest.raises(FileNotFoundError):
        world.one.stat("o")


def test_a_damaged_lock_is_an_io_error(world: World) -> None:
    world.one.write("o", [api.SetXattr("lock.l", b"\1\1nonsense")])
    refused(errno.EIO, world.one)


@pytest.mark.parametrize("name", ["a\0b", "x" * 200])
def test_names_no_xattr_can_have(world: World, name: str) -> None:
    world.one.write("o", [api.Create()])
    with pytest.raises(OSError) as caught:
        world.one.exec("o", "lock", "lock", lock.LockRequest(name, 1, "c").encode())
    assert caught.value.errno in (errno.EINVAL, errno.ENAMETOOLONG)


def test_a_name_that_is_no_text_is_only_bytes(world: World) -> None:
    request = lock.LockRequest("\udcff", 1, "c").encode()
    world.one.exec("o", "lock", "lock", request)
    names = lock.decode_lock_names(world.two.exec("o", "lock", "list_locks"))
    assert names == ["\udcff"]
    with pytest.raises(OSError) as caught:
        world.two.write("o", [api.SetXattr("\ud800", b"")])
    assert caught.value.errno == errno.EINVAL

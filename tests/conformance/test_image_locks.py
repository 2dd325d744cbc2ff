"""Locks and watchers of images; values seen with librbd 16.2.15."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from image_fixtures import MIB, Cluster, R, cluster, io, refused

from librbd_py import rbd
from librbd_py.format import features as ft
from librbd_py.store.api import ObjectContext

__all__ = ["cluster", "io"]


@pytest.fixture
def pair(cluster: Cluster, io: ObjectContext) -> Iterator[tuple[rbd.Image, rbd.Image]]:
    """One image opened by two clients."""
    R.create(io, "a", 5 * MIB)
    with rbd.Image(io, "a") as mine, rbd.Image(cluster.connect().open("rbd"), "a") as theirs:
        yield mine, theirs


def address(image: rbd.Image) -> str:
    return image.handle.store.client.address


def test_the_first_write_takes_the_lock(pair: tuple[rbd.Image, rbd.Image]) -> None:
    mine, theirs = pair
    assert not mine.is_exclusive_lock_owner() and list(mine.lock_get_owners()) == []
    mine.read(0, 10)
    assert not mine.is_exclusive_lock_owner()
    mine.write(b"x", 0)
    assert mine.is_exclusive_lock_owner()
    assert list(theirs.lock_get_owners()) == [{"mode": 0, "owner": address(mine)}]
    held = mine.list_lockers()
    assert (held["tag"], held["exclusive"]) == ("internal", True)
    ((client, cookie, where),) = held["lockers"]
    assert client == f"client.{mine.handle.store.client.gid}" and where == address(mine)
    watches = {row["id"]: row for row in mine.watchers_list()}
    assert cookie == f"auto {watches[mine.handle.store.client.gid]['cookie']}"
    assert watches[theirs.handle.store.client.gid]["addr"] == address(theirs)


def test_the_lock_moves_to_who_writes(pair: tuple[rbd.Image, rbd.Image]) -> None:
    for turn in range(6):
        writer, reader = pair[turn % 2], pair[1 - turn % 2]
        writer.write(bytes([turn]) * 4096, turn * 4096)
        assert writer.is_exclusive_lock_owner() and not reader.is_exclusive_lock_owner()
        assert reader.read(turn * 4096, 4096) == bytes([turn]) * 4096


def test_two_writers_at_once_lose_nothing(pair: tuple[rbd.Image, rbd.Image]) -> None:
    failures: list[BaseException] = []

    def write(image: rbd.Image, start: int) -> None:
        try:
            for n in range(40):
                image.write(bytes([1 + n]) * 512, start + n * 1024)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=write, args=(image, n * 512)) for n, image in enumerate(pair)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == [] and not any(thread.is_alive() for thread in threads)
    wanted = b"".join(bytes([1 + n]) * 1024 for n in range(40))
    assert pair[0].read(0, len(wanted)) == pair[1].read(0, len(wanted)) == wanted


def test_a_lock_taken_by_hand_stays(pair: tuple[rbd.Image, rbd.Image]) -> None:
    mine, theirs = pair
    theirs.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
    theirs.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
    refused(rbd.OperationNotSupported, 95, theirs.lock_acquire, rbd.RBD_LOCK_MODE_SHARED)
    refused(rbd.ReadOnlyImage, 30, mine.lock_acquire, 0)
    refused(rbd.ReadOnlyImage, 30, mine.write, b"x", 0)
    assert theirs.is_exclusive_lock_owner()
    theirs.lock_release()
    refused(rbd.InvalidArgument, 22, theirs.lock_release)
    assert not theirs.is_exclusive_lock_owner()
    mine.write(b"x", 0)
    refused(rbd.ReadOnlyImage, 30, theirs.write, b"x", 0)  # given up by hand: not taken again by itself
    theirs.lock_acquire(0)
    theirs.write(b"y", 0)
    assert mine.read(0, 1) == b"y"


def test_requests_of_an_export_end_when_the_lock_is_refused(pair: tuple[rbd.Image, rbd.Image]) -> None:
    mine, theirs = pair
    theirs.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
    # Straight to the data path, as the ring of a guest does.
    with pytest.raises(OSError) as caught:
        mine.handle.data.write(0, b"x")
    assert caught.value.errno == 30
    assert mine.read(0, 1) == b"\0"
    theirs.lock_release()
    mine.handle.data.write(0, b"x")
    assert theirs.read(0, 1) == b"x"


def test_changes_are_told_to_who_asked(pair: tuple[rbd.Image, rbd.Image]) -> None:
    mine, theirs = pair
    told = threading.Event()
    number = mine.register_update_watch(told.set)
    theirs.resize(6 * MIB)
    assert told.wait(30) and mine.size() == 6 * MIB
    mine.unregister_update_watch(number)
    refused(rbd.ImageNotFound, 2, mine.unregister_update_watch, number)


def test_without_the_feature_there_is_no_lock(io: ObjectContext) -> None:
    R.create(io, "n", MIB, features=ft.LAYERING)
    with rbd.Image(io, "n") as image:
        image.write(b"x", 0)
        assert not image.is_exclusive_lock_owner()
        for call, args in (
            (image.lock_acquire, (0,)),
            (image.lock_release, ()),
            (image.lock_get_owners, ()),
            (image.lock_break, (0, "x")),
        ):
            refused(rbd.InvalidArgument, 22, call, *args)


def test_advisory_locks(io: ObjectContext) -> None:
    R.create(io, "a", MIB, features=ft.LAYERING)
    with rbd.Image(io, "a") as image:
        me, here = f"client.{io.store.client.gid}", io.store.client.address
        image.lock_exclusive("ck")
        refused(rbd.ImageExists, 17, image.lock_exclusive, "ck")
        refused(rbd.ImageBusy, 16, image.lock_exclusive, "ck2")
        refused(rbd.ImageBusy, 16, image.lock_shared, "ck", "tag")
        assert image.list_lockers() == {"tag": "", "exclusive": True, "lockers": [(me, "ck", here)]}
        refused(rbd.ImageNotFound, 2, image.unlock, "xx")
        image.unlock("ck")
        assert image.list_lockers() == []
        image.lock_shared("ck", "tag")
        image.lock_shared("ck2", "tag")
        refused(rbd.ImageBusy, 16, image.lock_shared, "ck3", "t2")
        assert image.list_lockers() == {
            "tag": "tag",
            "exclusive": False,
            "lockers": [(me, "ck", here), (me, "ck2", here)],
        }
        refused(rbd.InvalidArgument, 22, image.break_lock, "nope", "ck")
        refused(rbd.ImageNotFound, 2, image.break_lock, "client.1", "ck")
        image.unlock("ck")
        image.unlock("ck2")


def test_breaking_a_lock_fences_its_owner(cluster: Cluster, io: ObjectContext) -> None:
    R.create(io, "a", MIB, features=ft.LAYERING)
    store = cluster.connect()
    theirs = rbd.Image(store.open("rbd"), "a")
    theirs.lock_exclusive("ck")
    with rbd.Image(io, "a") as mine:
        mine.break_lock(f"client.{store.client.gid}", "ck")
        assert mine.list_lockers() == []
        refused(rbd.ConnectionShutdown, 108, theirs.metadata_set, "a", "b")
    theirs.close()


def test_a_lock_held_by_hand_stops_automatic_ones(pair: tuple[rbd.Image, rbd.Image]) -> None:
    mine, theirs = pair
    mine.lock_exclusive("manual")
    refused(rbd.ImageBusy, 16, theirs.write, b"x", 0)
    mine.unlock("manual")
    theirs.write(b"x", 0)

"""Who has an image open is asked to stand still before a snapshot."""

from __future__ import annotations

import errno
import threading

import pytest
from image_fixtures import MIB, Cluster, R, cluster, eventually, io, refused

from librbd_py import rbd
from librbd_py.format import notify as nf
from librbd_py.format.notify import AsyncRequestId, ClientId
from librbd_py.image import quiesce
from librbd_py.store.api import ObjectContext

__all__ = ["cluster", "io"]


class Guest:
    def __init__(self, image: rbd.Image) -> None:
        self.events: list[str] = []
        self.snaps: list[int] = []  # how many there were when it was asked
        self.image = image
        self.fails = 0
        self.number = image.quiesce_watch(self.stop, self.go)

    def stop(self) -> None:
        self.events.append("stop")
        self.snaps.append(len(self.image.handle.header.snaps))
        if self.fails:
            raise OSError(self.fails, "it does not want to")

    def go(self) -> None:
        self.events.append("go")


def test_every_watcher_stands_still_while_a_snapshot_is_made(io: ObjectContext, cluster: Cluster) -> None:
    R.create(io, "a", MIB)
    with rbd.Image(io, "a") as image, rbd.Image(cluster.connect().open("rbd"), "a") as elsewhere:
        guests = [Guest(image), Guest(elsewhere)]
        image.create_snap("s1")
        for guest in guests:
            eventually(lambda guest=guest: guest.events == ["stop", "go"])  # type: ignore[misc]
            assert guest.snaps == [0]
        elsewhere.create_snap("s2")  # by the owner, for it
        for guest in guests:
            eventually(lambda guest=guest: guest.events == ["stop", "go"] * 2)  # type: ignore[misc]
        image.create_snap("s3", rbd.RBD_SNAP_CREATE_SKIP_QUIESCE)
        elsewhere.create_snap("s4", rbd.RBD_SNAP_CREATE_SKIP_QUIESCE)
        elsewhere.quiesce_unwatch(guests[1].number)
        refused(rbd.ImageNotFound, 2, elsewhere.quiesce_unwatch, guests[1].number)
        image.create_snap("s5")
        eventually(lambda: guests[0].events == ["stop", "go"] * 3)
        assert guests[1].events == ["stop", "go"] * 2
        refused(rbd.InvalidArgument, 22, image.create_snap, "s6", 8)
    with rbd.Image(io, "a", read_only=True) as image:
        refused(rbd.InvalidArgument, 22, image.quiesce_watch, print, print)


def test_a_watcher_that_refuses_ends_the_snapshot(io: ObjectContext, cluster: Cluster) -> None:
    R.create(io, "a", MIB)
    with rbd.Image(io, "a") as image, rbd.Image(cluster.connect().open("rbd"), "a") as elsewhere:
        willing, refuses = Guest(image), Guest(elsewhere)
        refuses.fails = errno.ENOSPC
        refused(rbd.NoSpace, errno.ENOSPC, image.create_snap, "s")
        eventually(lambda: willing.events == ["stop", "go"])
        assert list(image.list_snaps()) == []
        image.create_snap("s", rbd.RBD_SNAP_CREATE_IGNORE_QUIESCE_ERROR)
        assert [row["name"] for row in image.list_snaps()] == ["s"]
        assert refuses.events == ["stop", "stop"]


def test_who_is_forgotten_goes_on(io: ObjectContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """The maker of a snapshot died after it asked."""
    monkeypatch.setattr(quiesce, "TIMEOUT_SECONDS", 0.05)
    R.create(io, "a", MIB)
    gone = threading.Event()
    with rbd.Image(io, "a") as image:
        image.quiesce_watch(lambda: None, gone.set)
        request = AsyncRequestId(ClientId(4711, 1), 1)
        quiesce._ask(image.handle, request)
        assert gone.wait(30)


def test_how_often_a_watcher_is_asked_is_an_option(io: ObjectContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiesce, "NOTIFY_MS", 1000)  # an OSD counts whole seconds, and takes 30 for none
    R.create(io, "a", MIB)
    asked: list[nf.Quiesce] = []

    def silent(notify_id: int, notifier: int, cookie: int, payload: bytes) -> bytes | None:
        message = nf.decode(payload)
        if isinstance(message, nf.Quiesce):
            asked.append(message)
            return None  # no answer, now or later
        return b""

    with rbd.Image(io, "a") as image:
        image.config_set("rbd_quiesce_notification_attempts", "3")
        watch = io.watch(image.handle.oid, silent)
        with pytest.raises(rbd.OSError) as caught:
            image.create_snap("s1")
        watch.close()
        assert caught.value.errno == errno.ETIMEDOUT
        assert len(asked) == 3
        assert list(image.list_snaps()) == []
        image.create_snap("s1")

"""Maintenance operations on an image whose lock another client owns: the owner does them and stays owner."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from image_fixtures import MIB, Cluster, R, cluster, eventually, io, refused

from librbd_py import rbd
from librbd_py.control import wire
from librbd_py.format import features as ft
from librbd_py.format import notify as nf
from librbd_py.format.header import USER
from librbd_py.image import proxy
from librbd_py.store.api import ObjectContext

__all__ = ["cluster", "io"]

OWNED = b"owner's bytes"
Pair = tuple[rbd.Image, rbd.Image]


@pytest.fixture
def pair(cluster: Cluster, io: ObjectContext) -> Iterator[Pair]:
    """An image: its owner's handle and another client's."""
    R.create(io, "a", 16 * MIB)
    with rbd.Image(io, "a") as owner, rbd.Image(cluster.connect().open("rbd"), "a") as other:
        owner.write(OWNED, 0)
        yield owner, other


def tell(image: rbd.Image, message: nf.Message) -> int | None:
    """A request of a client: what the owner answers."""
    return image.handle.control.ask_owner(message)


def request_id(image: rbd.Image, number: int) -> nf.AsyncRequestId:
    handle = image.handle
    return nf.AsyncRequestId(nf.ClientId(handle.store.client.gid, handle.control.watch_handle), number)


OPERATIONS: dict[str, tuple[Callable[[rbd.Image], Any], Callable[[rbd.Image], bool]]] = {
    "grow": (lambda i: i.resize(32 * MIB), lambda i: i.size() == 32 * MIB),
    "shrink": (lambda i: i.resize(4 * MIB), lambda i: i.size() == 4 * MIB),
    "snap create": (lambda i: i.create_snap("s"), lambda i: [s["name"] for s in i.list_snaps()] == ["s"]),
    "metadata": (lambda i: i.metadata_set("k", "vé"), lambda i: dict(i.metadata_list()) == {"k": "vé"}),
    "rebuild": (lambda i: i.rebuild_object_map(lambda done, total: 0), lambda i: i.flags() == 0),
    "sparsify": (lambda i: i.sparsify(4096), lambda i: i.read(0, len(OWNED)) == OWNED),
    "feature": (
        lambda i: i.update_features(ft.FAST_DIFF | ft.OBJECT_MAP, False),
        lambda i: not i.features() & ft.OBJECT_MAP,
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_owner_does_it_and_keeps_the_lock(pair: Pair, name: str) -> None:
    owner, other = pair
    operation, done = OPERATIONS[name]
    operation(other)
    assert done(other) and done(owner)
    assert owner.is_exclusive_lock_owner() and not other.is_exclusive_lock_owner()
    owner.write(OWNED, 8)
    assert other.read(8, len(OWNED)) == OWNED


def test_snapshots_and_metadata_go_the_same_way(pair: Pair) -> None:
    owner, other = pair
    other.create_snap("s")
    other.metadata_set("k", "v")
    refused(rbd.ImageExists, errno.EEXIST, other.create_snap, "s")
    other.remove_snap("s")
    other.metadata_remove("k")
    assert list(owner.list_snaps()) == [] == list(owner.metadata_list())
    refused(rbd.ImageNotFound, errno.ENOENT, other.remove_snap, "s")
    refused(rbd.InvalidArgument, None, other.resize, 1 * MIB, False)
    assert owner.is_exclusive_lock_owner() and owner.size() == 16 * MIB


def test_an_image_that_is_served_is_renamed_by_its_owner(pair: Pair, io: ObjectContext) -> None:
    owner, other = pair
    R.rename(other.handle.ctx, "a", "b")
    assert R.list(io) == ["b"] and owner.get_name() == "b"
    assert owner.is_exclusive_lock_owner()
    R.rename(io, "b", "c")
    assert R.list(io) == ["c"]


def test_a_clone_is_flattened_by_its_owner_with_progress(pair: Pair, cluster: Cluster, io: ObjectContext) -> None:
    parent = pair[0]
    parent.create_snap("s")
    parent.protect_snap("s")
    R.clone(io, "a", "s", io, "child")
    seen: list[tuple[int, int]] = []
    with rbd.Image(io, "child") as owner, rbd.Image(cluster.connect().open("rbd"), "child") as other:
        owner.write(b"x", 9 * MIB)
        other.flatten(on_progress=lambda done, total: seen.append((done, total)))
        refused(rbd.ImageNotFound, errno.ENOENT, owner.parent_info)
        assert owner.is_exclusive_lock_owner()
        assert owner.read(0, len(OWNED)) == OWNED and owner.read(9 * MIB, 1) == b"x"
    assert all(0 <= done <= total for done, total in seen)


def test_a_request_that_comes_twice_is_done_once(pair: Pair) -> None:
    owner, other = pair
    message = nf.Resize(20 * MIB, request_id(other, 77), True)
    assert tell(other, message) == tell(other, message) == 0
    eventually(lambda: owner.size() == 20 * MIB)
    owner.resize(24 * MIB)
    assert tell(other, message) == 0
    other.metadata_set("after", "it")  # whatever that message started would be over
    assert owner.size() == 24 * MIB


def test_a_result_nobody_heard_is_told_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, other = pair
    monkeypatch.setattr(proxy, "REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(proxy, "LOOK_SECONDS", 0.1)
    heard, lost = other.handle.requests.heard, []

    def deaf_once(message: Any) -> None:
        if isinstance(message, nf.AsyncComplete) and not lost:
            lost.append(message)
        else:
            heard(message)

    monkeypatch.setattr(other.handle.requests, "heard", deaf_once)
    other.create_snap("s")
    assert len(lost) == 1 and len(list(owner.list_snaps())) == 1
    assert owner.is_exclusive_lock_owner()


def test_what_the_owner_does_not_know_is_done_with_its_lock(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, other = pair
    assert tell(other, nf.Unknown(99, b"")) == -errno.EOPNOTSUPP
    monkeypatch.setattr("librbd_py.image.served_ops.OPERATIONS", {})
    owner.handle._served = None
    other.create_snap("s")
    assert other.is_exclusive_lock_owner() and not owner.is_exclusive_lock_owner()


def test_too_many_requests_are_refused_and_the_rest_is_done(pair: Pair) -> None:
    owner, other = pair
    answers = []
    with owner.handle.exclusive():
        for number in range(proxy.RUNNING_MAX + 3):
            answers.append(tell(other, nf.SnapCreate(f"s{number}", USER, request_id(other, number))))
    assert answers == [0] * proxy.RUNNING_MAX + [-errno.EBUSY] * 3
    names = {f"s{number}" for number in range(proxy.RUNNING_MAX)}
    eventually(lambda: {snap["name"] for snap in owner.list_snaps()} == names)


def test_messages_without_an_id_are_answered_when_done(pair: Pair) -> None:
    """As clients before Ceph 16 send them: version 6 has no id."""
    owner, other = pair
    body = nf.encode(nf.SnapProtect("s", USER, nf.AsyncRequestId(nf.ClientId(1, 2), 3)))
    old = bytes([6]) + body[1:2] + (len(body) - 6 - 24).to_bytes(4, "little") + body[6:-24]
    assert nf.decode(old) == nf.SnapProtect("s", USER, None)
    control = other.handle.control
    for code in (-errno.ENOENT, 0):
        reply = control.ctx.notify(control.header_oid, old, 5000)
        assert [wire.result_of(ack) for ack in reply.acks.values() if ack] == [code]
        if code:
            owner.create_snap("s")
    assert owner.is_protected_snap("s")


def test_an_owner_that_goes_meanwhile(pair: Pair) -> None:
    """Half of the operations meet an owner that is just closing: each is done once, by whoever could."""
    owner, other = pair
    ready, failures = threading.Barrier(2), []

    def go() -> None:
        ready.wait()
        try:
            owner.close()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=go)
    thread.start()
    ready.wait()
    for number in range(8):
        other.create_snap(f"s{number}")
    thread.join()
    assert not failures
    assert [snap["name"] for snap in other.list_snaps()] == [f"s{number}" for number in range(8)]

"""Image metadata that no sane program wrote: everything ends, soon, and as an error of ours where it is one."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from librbd_py import rbd
from librbd_py.format import features as ft
from librbd_py.format.header import ParentImageSpec
from librbd_py.image import cls
from librbd_py.image.header import header_oid, id_oid
from librbd_py.store.api import ObjectContext, OmapGetByKeys, OmapGetKeys, OmapRmKeys, OmapSet, Remove, WriteFull
from librbd_py.store.embedded import EmbeddedStore
from librbd_py.store.memory import MemoryCluster

R = rbd.RBD()
SECOND = 1.0
MIB = 1 << 20
FEATURES = ft.LAYERING | ft.EXCLUSIVE_LOCK | ft.OBJECT_MAP | ft.FAST_DIFF | ft.STRIPINGV2


@pytest.fixture(params=["memory", "embedded"])
def io(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectContext]:
    if request.param == "memory":
        client = MemoryCluster().connect()
        client.pool_create("rbd")
        with closing(client):
            yield client.open("rbd")
    else:
        with EmbeddedStore(str(tmp_path / "store"), create=True) as store:
            yield store.open("rbd")


def make(io: ObjectContext, name: str = "disk") -> str:
    """A clone with a snapshot, striped, with an object map. Its id."""
    R.create(io, "base", 4 * MIB, 20, False, ft.LAYERING)
    with rbd.Image(io, "base") as base:
        base.write(b"b" * 100, 0)
        base.create_snap("s")
    R.clone(io, "base", "s", io, name, FEATURES, 20, 65536, 4)
    with rbd.Image(io, name) as image:
        image.write(b"x" * 100, 0)
        image.create_snap("one")
        return str(image.id())


def use(io: ObjectContext, name: str = "disk") -> None:
    for read_only in (True, False):
        with rbd.Image(io, name, read_only=read_only) as image:
            image.stat()
            for snap in list(image.list_snaps()):
                image.is_protected_snap(snap["name"])
            list(image.list_children2())
            image.read(0, min(image.size(), 4096))
            image.diff_iterate(0, min(image.size(), MIB), None, lambda *found: None)
            if not read_only and image.size():
                image.write(b"y", 0)


def ends(call: Callable[..., object], *args: object) -> BaseException | None:
    """What it raised: one of our errors or nothing, within a second."""
    began = time.monotonic()
    found: BaseException | None = None
    try:
        call(*args)
    except (rbd.Error, OSError) as failure:
        found = failure
        assert isinstance(failure, rbd.Error), f"not an error of the module: {failure!r}"
    assert time.monotonic() - began < SECOND
    return found


def values(good: bytes) -> list[bytes | None]:
    """None: the key is missing."""
    wide = b"\xff" * len(good)
    return [
        None,
        b"",
        good[:-1],
        good + b"\0",
        wide,
        bytes(len(good)),
        b"\xff" * 4096,
        struct.pack("<I", 1 << 31) + good,
    ]


def test_any_damaged_value_of_a_header_is_an_error_or_harmless(io: ObjectContext) -> None:
    oid = header_oid(make(io))
    keys = io.read(oid, [OmapGetKeys()])[0][0]
    assert len(keys) > 10
    for key in keys:
        good = io.read(oid, [OmapGetByKeys([key])])[0][key]
        for bad in values(good):
            io.write(oid, [OmapRmKeys([key]) if bad is None else OmapSet({key: bad})])
            found = ends(use, io)
            if key in (b"size", b"order", b"features", b"object_prefix") and bad in (None, b"", good[:-1]):
                assert found is not None, (key, bad)
            io.write(oid, [OmapSet({key: good})])
    use(io)


@pytest.mark.parametrize("order", [0, 11, 26, 64, 255])
def test_an_impossible_object_order_is_refused(io: ObjectContext, order: int) -> None:
    oid = header_oid(make(io))
    io.write(oid, [OmapSet({b"order": bytes([order])})])
    assert isinstance(ends(use, io), rbd.InvalidArgument)


@pytest.mark.parametrize(
    ("unit", "count"), [(0, 4), (65536, 0), (65536, 1 << 63), (3000, 4), (1 << 63, 1), (1 << 21, 2)]
)
def test_impossible_striping_is_refused(io: ObjectContext, unit: int, count: int) -> None:
    oid = header_oid(make(io))
    stripes = {b"stripe_unit": struct.pack("<Q", unit), b"stripe_count": struct.pack("<Q", count)}
    io.write(oid, [OmapSet(stripes)])
    assert isinstance(ends(use, io), rbd.InvalidArgument)


@pytest.mark.parametrize("size", [1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_size_beyond_reason_costs_no_memory(io: ObjectContext, size: int) -> None:
    oid = header_oid(make(io))
    io.write(oid, [OmapSet({b"size": struct.pack("<Q", size)})])
    ends(use, io)


def test_unknown_incompatible_features_are_refused_by_name(io: ObjectContext, monkeypatch: pytest.MonkeyPatch) -> None:
    make(io)
    known = cls.read_header

    def newer(ctx: ObjectContext, oid: str, read_only: bool) -> cls.BaseHeader:
        return replace(known(ctx, oid, read_only), incompatible=1 << 40 | ft.DIRTY_CACHE)

    monkeypatch.setattr(cls, "read_header", newer)
    found = ends(use, io)
    assert isinstance(found, rbd.FunctionNotSupported)
    assert "dirty-cache, 0x10000000000" in str(found)


@pytest.mark.parametrize("missing", ["id", "header", "id is garbage", "id is of nobody"])
def test_half_an_image_cannot_be_opened_and_can_be_removed(io: ObjectContext, missing: str) -> None:
    R.create(io, "half", MIB, 20)
    with rbd.Image(io, "half") as image:
        image_id = image.id()
    match missing:
        case "id":
            io.write(id_oid("half"), [Remove()])
        case "header":
            io.write(header_oid(image_id), [Remove()])
        case "id is garbage":
            io.write(id_oid("half"), [WriteFull(b"\xff" * 100)])
        case _:
            io.write(id_oid("half"), [WriteFull(cls.text("0123456789ab"))])
    assert ends(use, io, "half") is not None
    ends(R.remove, io, "half")
    assert R.list(io) in ([], ["half"])
    if missing == "header":
        assert R.list(io) == []


def tie(io: ObjectContext, name: str, parent: str | None = None) -> str:
    """An image with a snapshot 1, below snapshot 1 of `parent` (an id). Its id."""
    R.create(io, name, MIB, 20, False, ft.LAYERING)
    image_id = cls.get_id(io, id_oid(name))
    if parent is not None:
        attach(io, image_id, parent)
    return image_id


def attach(io: ObjectContext, image_id: str, parent: str) -> None:
    spec = cls.encoded(ParentImageSpec(io.pool_id, "", parent, 1))
    io.write(header_oid(image_id), [cls.call("parent_attach", spec, cls.u64(MIB))])
    snap = cls.text("s") + cls.u64(1) + cls.namespace(cls.fh.USER)
    io.exec(header_oid(image_id), "rbd", "snapshot_add", snap)


def test_parents_in_a_circle_are_refused(io: ObjectContext) -> None:
    first = tie(io, "first")
    second = tie(io, "second", first)
    attach(io, first, second)
    for name in ("first", "second"):
        found = ends(use, io, name)
        assert found is not None and "does not end" in str(found)


def test_an_image_that_is_its_own_parent_is_refused(io: ObjectContext) -> None:
    only = tie(io, "only")
    attach(io, only, only)
    found = ends(use, io, "only")
    assert found is not None and "does not end" in str(found)


def test_a_thousand_parents_are_refused() -> None:
    client = MemoryCluster().connect()
    client.pool_create("rbd")
    with closing(client):
        io = client.open("rbd")
        parent = "none"  # the oldest one's is missing
        for number in range(1000):
            parent = tie(io, f"image{number}", parent)
        found = ends(use, io, "image999")
        assert found is not None and "does not end" in str(found)

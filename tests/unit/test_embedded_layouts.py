"""Data objects and object maps of images: generic operations reach the same files as guests' I/O."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from librbd_py.format import object_map
from librbd_py.native import ffi, lib
from librbd_py.store import layout as native
from librbd_py.store.api import (
    NOSNAP,
    AssertExists,
    Create,
    Exec,
    GetXattrs,
    ListSnaps,
    OmapGetVals,
    OmapSet,
    Read,
    Remove,
    Rollback,
    SetXattr,
    SnapContext,
    SparseRead,
    Truncate,
    Write,
    WriteFull,
    Zero,
)
from librbd_py.store.embedded import EmbeddedStore, check
from librbd_py.store.embedded.context import EmbeddedContext

ORDER = 16
SIZE = 1 << ORDER
HEADER = "rbd_header.abc123"
PREFIX = "rbd_data.abc123"
MAP = "rbd_object_map.abc123"


@contextmanager
def refused(code: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == code, caught.value


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EmbeddedStore]:
    path = tmp_path / "store"
    with EmbeddedStore(path, create=True) as made:
        yield made
    assert [f for f in check.check(path) if f.severity == "error"] == []


@pytest.fixture
def io(store: EmbeddedStore) -> EmbeddedContext:
    return store.open("rbd")


def text(value: str) -> bytes:
    return struct.pack("<I", len(value)) + value.encode()


def create_image(io: EmbeddedContext, prefix: str = PREFIX, header: str = HEADER, order: int = ORDER) -> None:
    data = struct.pack("<QBQ", 100 * SIZE, order, 0) + text(prefix)
    io.write(header, [Create(exclusive=True), Exec("rbd", "create", data)])


def data_object(number: int) -> str:
    return f"{PREFIX}.{number:016x}"


def folders(store: EmbeddedStore) -> list[str]:
    return sorted(p.name for p in Path(store.path, "data").iterdir())


def test_creating_an_image_makes_a_layout_and_removing_its_header_removes_it(
    store: EmbeddedStore, io: EmbeddedContext
) -> None:
    create_image(io)
    assert folders(store) == ["1"]
    io.write(data_object(3), [Write(10, b"hello"), SetXattr("a", b"b")])
    assert io.read(data_object(3), [Read(), GetXattrs()]) == [bytes(10) + b"hello", {"a": b"b"}]
    assert sorted(io.objects()) == sorted([data_object(3), HEADER])
    with store.db.read() as c:
        assert c.execute("SELECT count(*) FROM chunks").fetchone()[0] == 0
    io.write(HEADER, [Remove()])
    assert folders(store) == []
    with refused(errno.ENOENT):
        io.stat(data_object(3))
    create_image(io)
    assert folders(store) == ["2"]  # numbers are never given twice
    with refused(errno.ENOENT):
        io.stat(data_object(3))


def test_random_operations_with_snapshots_match_ordinary_objects(io: EmbeddedContext) -> None:
    """The same program on an object of the layout and on one in SQLite."""
    create_image(io)
    rng = random.Random(5)
    snaps: list[int] = []
    mine, model = data_object(7), "plain"
    limit = SIZE

    def context() -> SnapContext:
        return SnapContext(max(snaps, default=0), tuple(sorted(snaps, reverse=True)))

    for _ in range(250):
        offset = rng.randrange(limit)
        length = rng.randrange(1, limit - offset + 1)
        ops = [
            [Write(offset, rng.randbytes(length))],
            [Zero(offset, length)],
            [Truncate(offset)],
            [WriteFull(rng.randbytes(length))],
            [Create(), Write(offset, b"x"), Zero(0, 4096)],
            [Remove()],
        ][rng.choices(range(6), (8, 3, 2, 2, 2, 1))[0]]
        outcomes = []
        for oid in (mine, model):
            try:
                outcomes.append(io.write(oid, ops, context()))
            except OSError as error:
                outcomes.append(error.errno)
        assert outcomes[0] == outcomes[1]
        if rng.random() < 0.1:
            snaps.append(io.snap_create())
        if snaps and rng.random() < 0.06:
            io.snap_remove(snaps.pop(rng.randrange(len(snaps))))
        if snaps and rng.random() < 0.06:
            snap = rng.choice(snaps)
            for oid in (mine, model):
                io.write(oid, [Rollback(snap)], context())
        for snap in [NOSNAP, *snaps]:
            seen = []
            for oid in (mine, model):
                try:
                    data = io.read(oid, [Read()], snap)[0]
                    extents, sparse = io.read(oid, [SparseRead(0, limit)], snap)[0]
                    assert sparse == b"".join(data[o : o + n] for o, n in extents)
                    seen.append(data)
                except OSError as error:
                    seen.append(error.errno)
            assert seen[0] == seen[1], snap


def test_list_snaps_tells_what_changed(io: EmbeddedContext) -> None:
    create_image(io)
    oid = data_object(0)
    io.write(oid, [Write(0, b"a" * SIZE)])
    first = io.snap_create()
    io.write(oid, [Write(8192, b"b" * 4096)], SnapContext(first, (first,)))
    second = io.snap_create()
    io.write(oid, [Write(0, b"c" * 4096)], SnapContext(second, (second, first)))
    snapset = io.read(oid, [ListSnaps()])[0]
    assert snapset.seq == second
    assert [(c.clone_id, c.snaps, c.size) for c in snapset.clones] == [
        (first, (first,), SIZE),
        (second, (second,), SIZE),
        (NOSNAP, (), SIZE),
    ]
    assert snapset.clones[0].overlap == ((0, 8192), (12288, SIZE - 12288))
    assert snapset.clones[1].overlap == ((4096, SIZE - 4096),)


def test_clones_go_with_their_snapshot_also_when_other_images_have_snapshots(
    store: EmbeddedStore, io: EmbeddedContext
) -> None:
    create_image(io)
    create_image(io, "rbd_data.other", "rbd_header.other")
    io.write(data_object(0), [WriteFull(b"1")])
    io.write(f"rbd_data.other.{0:016x}", [WriteFull(b"1")])
    user = b"\x01\x01\x04\x00\x00\x00" + bytes(4)  # snapshot namespace

    def snapshot(header: str) -> int:
        snap = io.snap_create()
        io.exec(header, "rbd", "snapshot_add", text(f"s{snap}") + struct.pack("<Q", snap) + user)
        return snap

    others = snapshot("rbd_header.other")
    mine = snapshot(HEADER)
    newer = snapshot("rbd_header.other")
    io.write(data_object(0), [WriteFull(b"2")], SnapContext(mine, (mine,)))
    io.write(f"rbd_data.other.{0:016x}", [WriteFull(b"2")], SnapContext(newer, (newer, others)))
    assert io.read(data_object(0), [ListSnaps()])[0].clones[0].snaps == (mine,)
    names = {p.name for p in Path(store.path, "data", "1").iterdir()}
    assert f"clone.{mine}" in names
    io.exec(HEADER, "rbd", "snapshot_remove", struct.pack("<Q", mine))
    io.snap_remove(mine)
    assert {p.name for p in Path(store.path, "data", "1").iterdir()} == {"head.0", "index"}
    other = f"rbd_data.other.{0:016x}"
    assert io.read(other, [ListSnaps()])[0].clones[0].snaps == (others, newer)
    assert io.read(other, [Read()], others) == [b"1"]


def test_native_data_sees_generic_writes_and_the_reverse(store: EmbeddedStore, io: EmbeddedContext) -> None:
    create_image(io)
    io.write(data_object(2), [Write(0, b"generic")])
    native_data = io.native_data(PREFIX, ORDER)
    assert native_data.keeps_object_map
    buffer = ffi.new("char[]", 16)
    assert lib.rbdn_obj_read(native_data.handle, 2, NOSNAP, 0, buffer, 16) == 7
    assert ffi.buffer(buffer)[:7] == b"generic"
    assert lib.rbdn_obj_write(native_data.handle, 5, 3, b"guest", 5, 0, ffi.NULL, 0) == 0
    assert io.read(data_object(5), [Read()]) == [b"\0\0\0guest"]
    with EmbeddedStore(store.path) as second:
        again = second.open("rbd").native_data(PREFIX, ORDER)
        assert again.handle == native_data.handle  # one per process
        again.own(1)
        again.disown()
        again.close()
        again.close()
    assert io.read(data_object(5), [Read()]) == [b"\0\0\0guest"]
    native_data.close()
    with refused(errno.EINVAL):
        io.native_data(PREFIX, ORDER + 1)
    with refused(errno.EINVAL):
        io.native_data("rbd_data.unknown", 11)


def test_objects_written_before_their_image_move_into_its_layout(store: EmbeddedStore, io: EmbeddedContext) -> None:
    """A pool that is restored object by object, in any order."""
    contents = {0: b"zero", 9: b"x" * SIZE, 200: b""}
    states = object_map.encode(bytes([1, 0, 3]))
    for number, data in contents.items():
        io.write(data_object(number), [WriteFull(data), Create(), SetXattr("a", b"%d" % number)])
    io.write(MAP, [WriteFull(states)])
    io.write(HEADER, [OmapSet({b"order": bytes([ORDER])})])
    io.native_data(PREFIX, ORDER).close()
    assert folders(store) == ["1"]
    for number, data in contents.items():
        assert io.read(data_object(number), [Read(), GetXattrs()]) == [data, {"a": b"%d" % number}]
    with store.db.read() as c:
        assert c.execute("SELECT count(*) FROM chunks").fetchone()[0] == 0
    assert io.read(MAP, [Read()]) == [states]
    io.write(HEADER, [Remove()])
    assert folders(store) == [] and list(io.objects()) == [MAP]
    assert io.read(MAP, [Read()]) == [states]
    io.write(MAP, [Remove()])


def test_objects_with_clones_stay_ordinary(store: EmbeddedStore, io: EmbeddedContext) -> None:
    io.write(data_object(0), [WriteFull(b"1")])
    snap = io.snap_create()
    io.write(data_object(0), [WriteFull(b"2")], SnapContext(snap, (snap,)))
    with refused(errno.EOPNOTSUPP):
        io.native_data(PREFIX, ORDER)
    create_image(io)
    assert folders(store) == []
    assert io.read(data_object(0), [Read()], snap) == [b"1"]


def test_the_head_object_map_lives_in_the_index(store: EmbeddedStore, io: EmbeddedContext) -> None:
    create_image(io)
    states = bytes([0] * 10)
    io.write(MAP, [WriteFull(object_map.encode(states)), SetXattr("lock.rbd_lock", b"held")])
    io.write(data_object(4), [Write(0, b"x")])  # as a guest would: nobody touches the map
    io.write(data_object(8), [Write(0, b"x")])
    io.write(data_object(8), [Remove()])
    held = object_map.decode(io.read(MAP, [Read()])[0])
    assert held == bytes([0, 0, 0, 0, 1, 0, 0, 0, 0, 0])
    with store.db.read() as c:
        assert c.execute("SELECT count(*) FROM chunks").fetchone()[0] == 0
    io.write(MAP, [SetXattr("lock.rbd_lock", b"free")])
    assert io.read(MAP, [Read(), GetXattrs()]) == [object_map.encode(held), {"lock.rbd_lock": b"free"}]
    io.exec(MAP, "rbd", "object_map_resize", struct.pack("<QB", 300, 0))
    held = object_map.decode(io.read(MAP, [Read()])[0])
    assert len(held) == 300 and held[4] == 1
    io.exec(MAP, "rbd", "object_map_snap_add")
    assert object_map.decode(io.read(MAP, [Read()])[0])[4] == 3
    io.write(MAP, [Remove()])
    with refused(errno.ENOENT):
        io.stat(MAP)
    io.write(MAP, [Create()])
    assert io.read(MAP, [Read()]) == [b""]


@pytest.mark.parametrize("blob", [b"garbage", object_map.encode(b"\1\1\1")[:-1], object_map.encode(b"\1\1") + b"\0"])
def test_a_map_that_is_none_is_given_back_as_it_came(io: EmbeddedContext, blob: bytes) -> None:
    create_image(io)
    io.write(MAP, [WriteFull(object_map.encode(bytes(5)))])
    io.write(MAP, [WriteFull(blob)])
    assert io.read(MAP, [Read()]) == [blob]
    io.write(MAP, [WriteFull(object_map.encode(bytes(5)))])
    io.write(data_object(1), [Write(0, b"x")])
    assert object_map.decode(io.read(MAP, [Read()])[0]) == bytes([0, 1, 0, 0, 0])


def test_partial_writes_of_a_map_work_on_its_bytes(io: EmbeddedContext) -> None:
    create_image(io)
    before, after = object_map.encode(bytes(8)), object_map.encode(bytes([3, 2, 1, 0, 1, 2, 3, 0]))
    io.write(MAP, [WriteFull(before)])
    at = object_map.DATA_OFFSET
    io.write(MAP, [Write(at, after[at:])])
    assert io.read(MAP, [Read(), SparseRead(at, 2)]) == [after, ([(at, 2)], after[at : at + 2])]
    io.write(MAP, [Truncate(5)])
    assert io.read(MAP, [Read()]) == [after[:5]]


def test_copyup_writes_only_what_is_absent(io: EmbeddedContext) -> None:
    create_image(io)
    io.exec(data_object(0), "rbd", "copyup", b"parent")
    io.exec(data_object(0), "rbd", "copyup", b"PARENT again")
    assert io.read(data_object(0), [Read()]) == [b"parent"]
    snap = io.snap_create()
    io.exec(data_object(1), "rbd", "copyup", b"parent")
    io.write(data_object(1), [Write(0, b"new")], SnapContext(snap, (snap,)))
    assert io.read(data_object(1), [Read()], snap) == [b"parent"]
    assert io.read(data_object(1), [Read()]) == [b"newent"]


def test_nothing_grows_beyond_the_object_size_and_nothing_is_changed_then(io: EmbeddedContext) -> None:
    create_image(io)
    oid = data_object(0)
    io.write(oid, [WriteFull(b"before")])
    for ops in (
        [Write(SIZE - 1, b"xx")],
        [Truncate(SIZE + 1)],
        [WriteFull(b"y"), SetXattr("a", b"b"), Truncate(2 * SIZE)],
    ):
        with refused(errno.EFBIG):
            io.write(oid, ops)
    assert io.read(oid, [Read(), GetXattrs()]) == [b"before", {}]
    with refused(errno.EFBIG):
        io.write(f"{PREFIX}.{'f' * 16}", [Write(0, b"x")])
    with refused(errno.ENOENT):
        io.stat(f"{PREFIX}.{'f' * 16}")


def test_attributes_do_not_outlive_their_data_object(io: EmbeddedContext) -> None:
    create_image(io)
    oid = data_object(0)
    io.write(oid, [Create(), SetXattr("a", b"b"), OmapSet({b"k": b"v"})])
    assert io.stat(oid).size == 0
    native_data = io.native_data(PREFIX, ORDER)
    assert lib.rbdn_obj_remove(native_data.handle, 0, 0, ffi.NULL, 0) == 0  # a guest's discard
    native_data.close()
    with refused(errno.ENOENT):
        io.read(oid, [AssertExists()])
    io.write(oid, [Write(0, b"new")])
    assert io.read(oid, [GetXattrs(), OmapGetVals()]) == [{}, ({}, False)]
    io.write(oid, [Remove(), Create(), SetXattr("c", b"d")])
    assert io.read(oid, [Read(), GetXattrs()]) == [b"", {"c": b"d"}]


def test_an_image_with_its_data_in_another_pool(store: EmbeddedStore) -> None:
    data_pool = store.pool_create("data")
    io, data_io = store.open("rbd", "ns"), store.open("data", "ns")
    prefix = "rbd_data.1.abc123"
    create = struct.pack("<QBQ", SIZE, ORDER, 0x80) + text(prefix) + struct.pack("<q", data_pool)
    io.write(HEADER, [Create(exclusive=True), Exec("rbd", "create", create)])
    data_io.write(f"{prefix}.{0:016x}", [WriteFull(b"far")])
    io.write(MAP, [WriteFull(object_map.encode(bytes(3)))])
    data_io.write(f"{prefix}.{1:016x}", [WriteFull(b"far")])
    assert object_map.decode(io.read(MAP, [Read()])[0]) == bytes([0, 1, 0])
    assert list(io.objects()) != list(data_io.objects()) == [f"{prefix}.{0:016x}", f"{prefix}.{1:016x}"]
    assert store.pool_stats(data_pool).num_objects == 2
    io.write(MAP, [Remove()])
    store.pool_remove("data")
    assert folders(store) == []
    io.write(HEADER, [Remove()])


def test_an_image_order_that_layouts_cannot_have_stays_with_ordinary_objects(
    store: EmbeddedStore, io: EmbeddedContext
) -> None:
    create_image(io, order=26)
    io.write(data_object(0), [WriteFull(b"plain")])
    assert folders(store) == [] and io.read(data_object(0), [Read()]) == [b"plain"]


def test_a_layout_stays_open_while_it_is_flushed(
    store: EmbeddedStore, io: EmbeddedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread removes the image, or opens many others, while a change of metadata makes its data durable."""
    create_image(io)
    io.write(data_object(0), [WriteFull(b"x")])
    flush = native.Layout.flush
    open_then: list[bool] = []

    def removed_meanwhile(layout: native.Layout) -> None:
        store.layouts.forget(1)
        open_then.append(layout.handle != ffi.NULL)
        if open_then[-1]:
            flush(layout)

    monkeypatch.setattr(native.Layout, "flush", removed_meanwhile)
    io.write("other", [WriteFull(b"metadata")])
    assert open_then == [True]
    assert native._open == {}


def test_handles_are_closed_with_the_store(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "s", create=True) as store:
        io = store.open("rbd")
        for number in range(20):
            create_image(io, f"rbd_data.{number}", f"rbd_header.{number}")
            io.write(f"rbd_data.{number}.{0:016x}", [WriteFull(b"x")])
        assert len(native._open) <= 17
    assert native._open == {}

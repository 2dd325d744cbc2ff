"""Operation lists on one object: every op, its errno, atomicity, paging, snapshots."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from store_fixtures import StoreCluster, io, store_cluster

from librbd_py.format.encoding import Encoder
from librbd_py.store import api
from librbd_py.store.api import NOSNAP, ObjectContext, SnapContext

__all__ = ["io", "store_cluster"]

MIB = 1 << 20


def fails(code: int, call: Callable[..., Any], *args: Any, **named: Any) -> None:
    with pytest.raises(OSError) as caught:
        call(*args, **named)
    assert caught.value.errno == code, caught.value


def content(io: ObjectContext, oid: str = "o", snap: int = NOSNAP) -> bytes:
    data: bytes = io.read(oid, [api.Read()], snap)[0]
    return data


def test_a_missing_object_has_nothing_to_read(io: ObjectContext) -> None:
    for op in (api.Read(), api.Stat(), api.GetXattrs(), api.OmapGetVals(), api.ListWatchers(), api.AssertExists()):
        fails(errno.ENOENT, io.read, "o", [op])


@pytest.mark.parametrize(
    "op",
    [
        api.Create(),
        api.Write(0, b""),
        api.Append(b""),
        api.SetXattr("x", b""),
        api.OmapSet({b"k": b"v"}),
        api.OmapSet({}),
        api.SetAllocHint(1, 1),
    ],
)
def test_a_write_makes_the_object(io: ObjectContext, op: Any) -> None:
    io.write("o", [op])
    assert io.stat("o").size == 0


@pytest.mark.parametrize("op", [api.Truncate(10), api.Zero(0, 10), api.WriteSame(0, 0, b"a")])
def test_what_has_no_object_to_work_on_makes_none(io: ObjectContext, op: Any) -> None:
    io.write("o", [op])
    fails(errno.ENOENT, io.stat, "o")


@pytest.mark.parametrize(
    "op", [api.Remove(), api.RmXattr("x"), api.OmapRmKeys([b"k"]), api.OmapClear(), api.OmapRmRange(b"a", b"b")]
)
def test_what_needs_an_object_says_so(io: ObjectContext, op: Any) -> None:
    fails(errno.ENOENT, io.write, "o", [op])


def test_exclusive_creation(io: ObjectContext) -> None:
    io.write("o", [api.Create(exclusive=True)])
    fails(errno.EEXIST, io.write, "o", [api.Create(exclusive=True)])
    io.write("o", [api.Create()])


def test_data_operations(io: ObjectContext) -> None:
    io.write("o", [api.Write(4, b"abcd")])
    assert content(io) == b"\0\0\0\0abcd"
    io.write("o", [api.Append(b"!"), api.Zero(5, 2)])
    assert content(io) == b"\0\0\0\0a\0\0d!"
    io.write("o", [api.Truncate(5), api.Truncate(7)])
    assert content(io) == b"\0\0\0\0a\0\0"
    io.write("o", [api.WriteSame(0, 6, b"xy")])
    assert content(io) == b"xyxyxy\0"
    io.write("o", [api.WriteFull(b"new")])
    assert content(io) == b"new"
    assert io.read("o", [api.Read(1, 1), api.Read(2, 100), api.Read(3, 5), api.Read(100, 5)]) == [b"e", b"w", b"", b""]


def test_zeros_never_extend_and_at_the_end_they_truncate(io: ObjectContext) -> None:
    io.write("o", [api.WriteFull(b"abcdef")])
    io.write("o", [api.Zero(6, 100)])
    assert content(io) == b"abcdef"
    io.write("o", [api.Zero(4, 100)])
    assert content(io) == b"abcd"


@pytest.mark.parametrize(
    ("op", "code"),
    [
        (api.Write(128 * MIB, b"a"), errno.EFBIG),
        (api.Write(128 * MIB - 1, b"ab"), errno.EFBIG),
        (api.Truncate(128 * MIB), errno.EFBIG),
        (api.WriteSame(0, 10, b"abc"), errno.EINVAL),
        (api.SetXattr("a" * 101, b""), errno.ENAMETOOLONG),
        (api.Exec("nope", "x"), errno.EOPNOTSUPP),
        (api.Exec("rbd", "nope"), errno.EOPNOTSUPP),
        (api.Exec("rbd", "create", b"\0"), errno.EINVAL),
        (api.AssertVersion(0), errno.EINVAL),
    ],
)
def test_refused_and_nothing_done(io: ObjectContext, op: Any, code: int) -> None:
    io.write("o", [api.WriteFull(b"kept"), api.OmapSet({b"a": b"1"})])
    fails(code, io.write, "o", [api.WriteFull(b"gone"), api.OmapClear(), api.SetXattr("x", b"y"), op])
    assert io.read("o", [api.Read(), api.GetXattrs(), api.OmapGetVals()]) == [b"kept", {}, ({b"a": b"1"}, False)]


def test_a_failed_list_makes_no_object(io: ObjectContext) -> None:
    fails(errno.EEXIST, io.write, "o", [api.WriteFull(b"x"), api.OmapSet({b"k": b"v"}), api.Create(exclusive=True)])
    fails(errno.ENOENT, io.stat, "o")
    assert list(io.objects()) == []


def test_remove_and_make_again_in_one_list(io: ObjectContext) -> None:
    io.write("o", [api.WriteFull(b"old"), api.SetXattr("x", b"1"), api.OmapSet({b"k": b"v"})])
    io.write("o", [api.Remove(), api.Write(2, b"n")])
    assert io.read("o", [api.Read(), api.GetXattrs(), api.OmapGetVals()]) == [b"\0\0n", {}, ({}, False)]


def test_versions(io: ObjectContext) -> None:
    io.write("o", [api.Create()])
    first = io.read("o", [api.Version()])[0]
    io.write("o", [api.AssertVersion(first), api.WriteFull(b"a")])
    fails(errno.ERANGE, io.write, "o", [api.AssertVersion(first), api.WriteFull(b"b")])
    fails(errno.EOVERFLOW, io.read, "o", [api.AssertVersion(first + 1000)])
    assert content(io) == b"a"


def test_comparing_extents(io: ObjectContext) -> None:
    io.write("o", [api.WriteFull(b"abc")])
    fails(4095 + 1, io.write, "o", [api.CmpExt(1, b"bX"), api.WriteFull(b"no")])
    fails(4095 + 3, io.read, "o", [api.CmpExt(0, b"abc!")])
    io.read("o", [api.CmpExt(2, b"c\0\0"), api.CmpExt(50, b"\0")])
    assert content(io) == b"abc"


def test_comparing_xattrs_and_omap(io: ObjectContext) -> None:
    io.write("o", [api.SetXattr("x", b"m"), api.OmapSet({b"k": b"m"})])
    for value, holds in ((b"m", {"eq", "ge", "le"}), (b"z", {"ne", "gt", "ge"}), (b"a", {"ne", "lt", "le"})):
        for op in ("eq", "ne", "gt", "ge", "lt", "le"):
            if op in holds:
                io.read("o", [api.CmpXattr("x", value, op)])
            else:
                fails(errno.ECANCELED, io.read, "o", [api.CmpXattr("x", value, op)])
    io.write("o", [api.OmapCmp({b"k": (b"a", "gt"), b"none": (b"", "eq")}), api.OmapSet({b"k": b"n"})])
    fails(errno.ECANCELED, io.write, "o", [api.OmapCmp({b"k": (b"m", "eq")}), api.OmapClear()])
    assert io.read("o", [api.OmapGetByKeys([b"k", b"none"])])[0] == {b"k": b"n"}


def test_reads_in_a_write_list_see_the_object_before_it(io: ObjectContext) -> None:
    """An OSD applies its transaction at the end; only existence and size follow the operations."""
    io.write("o", [api.Create()])
    fails(errno.ECANCELED, io.write, "o", [api.SetXattr("x", b"1"), api.CmpXattr("x", b"1")])
    fails(errno.EEXIST, io.write, "p", [api.Write(0, b"1"), api.Create(exclusive=True)])


def test_xattrs(io: ObjectContext) -> None:
    io.write("o", [api.SetXattr("b", b"\0bin"), api.SetXattr("a", b"")])
    assert io.read("o", [api.GetXattr("b")]) == [b"\0bin"]
    assert io.read("o", [api.GetXattrs()])[0] == {"a": b"", "b": b"\0bin"}
    fails(errno.ENODATA, io.read, "o", [api.GetXattr("c")])
    io.write("o", [api.RmXattr("a"), api.RmXattr("never")])
    assert io.read("o", [api.GetXattrs()])[0] == {"b": b"\0bin"}


def test_omap_keys_are_bytes_in_order(io: ObjectContext) -> None:
    values = {b"b": b"2", b"\0\xff": b"0", b"a\0": b"", b"\xff": b"3"}
    io.write("o", [api.OmapSet(values)])
    rows, more = io.read("o", [api.OmapGetVals()])[0]
    assert list(rows.items()) == sorted(values.items()) and not more
    io.write("o", [api.OmapRmRange(b"a", b"b")])
    assert io.read("o", [api.OmapGetKeys()])[0] == ([b"\0\xff", b"b", b"\xff"], False)
    io.write("o", [api.OmapRmKeys([b"b", b"none", b"b"])])
    assert io.read("o", [api.OmapGetKeys()])[0] == ([b"\0\xff", b"\xff"], False)
    io.write("o", [api.OmapClear()])
    assert io.read("o", [api.OmapGetKeys()])[0] == ([], False)


def test_omap_paging(io: ObjectContext) -> None:
    keys = [b"%c%05d" % (prefix, number) for prefix in b"xyz" for number in range(800)]
    io.write("o", [api.OmapSet(dict.fromkeys(keys, b"v"))])
    assert io.read("o", [api.OmapGetVals(max_return=0)])[0] == ({}, True)
    page, more = io.read("o", [api.OmapGetVals()])[0]
    assert len(page) == 1024 and more
    seen: list[bytes] = []
    while True:
        page, more = io.read("o", [api.OmapGetVals(seen[-1] if seen else b"", b"y", 300)])[0]
        seen += page
        if not more:
            break
    assert seen == [key for key in keys if key.startswith(b"y")]
    assert io.read("o", [api.OmapGetVals(b"x00010", b"x0000")])[0] == ({}, False)
    assert io.read("o", [api.OmapGetKeys(b"x00797", 2)])[0] == ([b"x00798", b"x00799"], True)


def test_names_of_objects(io: ObjectContext) -> None:
    for name in ("../../etc/passwd", "a/b", ".", "\n", "ü", "x" * 200, "rbd_data.1.0000000000000000"):
        io.write(name, [api.WriteFull(name.encode())])
        assert content(io, name) == name.encode()
    assert len(list(io.objects())) == 7
    fails(errno.ENAMETOOLONG, io.write, "x" * 2049, [api.Create()])
    fails(errno.EINVAL, io.read, "", [api.Stat()])


# --- snapshots


def context(*ids: int) -> SnapContext:
    return SnapContext(max(ids, default=0), tuple(sorted(ids, reverse=True)))


def test_snapshots_keep_what_was_there(io: ObjectContext) -> None:
    io.write("o", [api.WriteFull(b"one"), api.SetXattr("x", b"1"), api.OmapSet({b"k": b"1"})])
    first = io.snap_create()
    io.write("o", [api.Write(3, b"!"), api.SetXattr("x", b"2"), api.OmapClear()], context(first))
    second = io.snap_create()
    assert second > first
    io.write("o", [api.Remove()], context(first, second))
    fails(errno.ENOENT, io.stat, "o")
    assert content(io, snap=first) == b"one" and content(io, snap=second) == b"one!"
    assert io.read("o", [api.GetXattr("x"), api.OmapGetKeys()], first) == [b"1", ([b"k"], False)]
    io.write("o", [api.WriteFull(b"again")], context(first, second))
    third = io.snap_create()
    assert content(io, snap=third) == b"again"
    assert "o" in set(io.objects())


def test_an_object_made_after_a_snapshot_is_not_in_it(io: ObjectContext) -> None:
    snap = io.snap_create()
    io.write("o", [api.WriteFull(b"new")], context(snap))
    fails(errno.ENOENT, io.read, "o", [api.Read()], snap)


def test_rollback(io: ObjectContext) -> None:
    io.write("o", [api.WriteFull(b"old"), api.OmapSet({b"k": b"1"})])
    snap = io.snap_create()
    io.write("o", [api.WriteFull(b"newer and longer"), api.OmapClear()], context(snap))
    io.write("p", [api.Create()], context(snap))
    io.write("o", [api.Rollback(snap)], context(snap))
    io.write("p", [api.Rollback(snap)], context(snap))
    assert io.read("o", [api.Read(), api.OmapGetKeys()]) == [b"old", ([b"k"], False)]
    fails(errno.ENOENT, io.stat, "p")


def test_list_snaps_tells_clones_and_what_they_share(io: ObjectContext) -> None:
    io.write("o", [api.WriteFull(b"x" * 8192)])
    first, second = io.snap_create(), io.snap_create()
    io.write("o", [api.Write(4096, b"y")], context(first, second))
    third = io.snap_create()
    io.write("o", [api.Truncate(100)], context(first, second, third))
    rows = io.read("o", [api.ListSnaps()])[0].clones
    assert [(row.clone_id, row.snaps, row.size) for row in rows] == [
        (second, (first, second), 8192),
        (third, (third,), 8192),
        (NOSNAP, (), 100),
    ]
    assert rows[0].overlap == ((0, 4096), (4097, 4095))
    assert rows[1].overlap == ((0, 100),)


def test_a_removed_snapshot_cannot_be_read(store_cluster: StoreCluster, io: ObjectContext) -> None:
    io.write("o", [api.WriteFull(b"one")])
    first, second = io.snap_create(), io.snap_create()
    io.write("o", [api.WriteFull(b"two")], context(first, second))
    io.snap_remove(first)
    io.snap_remove(first)
    if store_cluster.kind != "ceph":  # an OSD trims some time later
        fails(errno.ENOENT, io.read, "o", [api.Read()], first)
    assert content(io, snap=second) == b"one"
    io.snap_remove(second)
    assert content(io) == b"two"


def test_a_bad_snap_context_is_refused(io: ObjectContext) -> None:
    fails(errno.EINVAL, io.write, "o", [api.Create()], SnapContext(5, (3, 4)))
    fails(errno.EINVAL, io.write, "o", [api.Create()], SnapContext(2, (3,)))


# --- class methods in lists


def test_class_methods_are_part_of_the_list(io: ObjectContext) -> None:
    create = Encoder().u64(MIB).u8(20).u64(0x1).string("rbd_data.77").done()
    io.write("rbd_header.77", [api.Create(exclusive=True), api.Exec("rbd", "create", create)])
    size, prefix = io.read(
        "rbd_header.77",
        [api.Exec("rbd", "get_size", Encoder().u64(NOSNAP).done()), api.Exec("rbd", "get_object_prefix")],
    )
    assert size == Encoder().u8(20).u64(MIB).done()
    assert prefix == Encoder().string("rbd_data.77").done()
    set_size = api.Exec("rbd", "set_size", Encoder().u64(2 * MIB).done())
    fails(errno.EEXIST, io.write, "rbd_header.77", [set_size, api.Exec("rbd", "create", create)])
    assert io.exec("rbd_header.77", "rbd", "get_size", Encoder().u64(NOSNAP).done())[1:] == Encoder().u64(MIB).done()


def test_a_method_that_writes_may_not_be_read(store_cluster: StoreCluster, io: ObjectContext) -> None:
    io.write("o", [api.Create()])
    if store_cluster.kind != "ceph":  # an OSD takes the list for a write then
        fails(errno.EPERM, io.read, "o", [api.Exec("rbd", "set_access_timestamp")])
        fails(errno.EPERM, io.read, "o", [api.WriteFull(b"x")])
    assert content(io) == b""


def test_data_objects_of_an_image(io: ObjectContext) -> None:
    """They live elsewhere in some stores; nobody can tell."""
    create = Encoder().u64(64 * MIB).u8(22).u64(0x1).string("rbd_data.abc").done()
    io.write("rbd_header.abc", [api.Create(), api.Exec("rbd", "create", create)])
    name = "rbd_data.abc.0000000000000003"
    fails(errno.ENOENT, io.read, name, [api.Read()])
    io.write(name, [api.SetAllocHint(4 * MIB, 4 * MIB), api.Write(5000, b"data")])
    snap = io.snap_create()
    io.write(name, [api.Write(0, b"new"), api.Truncate(5001)], context(snap))
    assert io.stat(name).size == 5001 and io.stat(name, snap).size == 5004
    assert content(io, name)[:4] == b"new\0" and content(io, name, snap)[-4:] == b"data"
    assert name in set(io.objects())
    io.exec("rbd_data.abc.0000000000000004", "rbd", "copyup", b"parent")
    io.exec("rbd_data.abc.0000000000000004", "rbd", "copyup", b"never")
    assert content(io, "rbd_data.abc.0000000000000004") == b"parent"
    io.write(name, [api.Remove()], context(snap))
    fails(errno.ENOENT, io.stat, name)
    assert content(io, name, snap)[-4:] == b"data"


def test_the_object_map_of_an_image(io: ObjectContext) -> None:
    create = Encoder().u64(64 * MIB).u8(22).u64(0x3D).string("rbd_data.abd").done()
    io.write("rbd_header.abd", [api.Create(), api.Exec("rbd", "create", create)])
    name = "rbd_object_map.abd"
    io.exec(name, "rbd", "object_map_resize", Encoder().u64(16).u8(0).done())
    io.exec(name, "rbd", "object_map_update", Encoder().u64(3).u64(5).u8(1).bool(False).done())
    loaded = io.exec(name, "rbd", "object_map_load").hex()
    assert loaded == "0e000000" + "010108000000" + "1000000000000000" + "01400000" + "00000000"
    assert content(io, name).hex()[:44] == loaded[:44]
    io.write(name, [api.Remove()])
    fails(errno.ENOENT, io.exec, name, "rbd", "object_map_load")

"""Objects of the embedded store on SQLite: sparse data, ordered keys, clones, against plain Python values."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from librbd_py.store.api import (
    Append,
    AssertVersion,
    Create,
    GetXattrs,
    ListSnaps,
    OmapClear,
    OmapGetVals,
    OmapRmRange,
    OmapSet,
    Read,
    Remove,
    SetXattr,
    SnapContext,
    SparseRead,
    Truncate,
    Version,
    Write,
    WriteFull,
    Zero,
)
from librbd_py.store.embedded import EmbeddedStore
from librbd_py.store.embedded.context import EmbeddedContext
from librbd_py.store.embedded.schema import CHUNK


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(tmp_path / "store", create=True) as made:
        yield made


@pytest.fixture
def io(store: EmbeddedStore) -> EmbeddedContext:
    return store.open("rbd")


@contextmanager
def refused(code: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == code, caught.value


def rows(store: EmbeddedStore, table: str) -> int:
    with store.db.read() as c:
        count: int = c.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    return count


@pytest.mark.parametrize("seed", range(4))
def test_random_data_operations_match_a_bytearray(io: EmbeddedContext, seed: int) -> None:
    rng = random.Random(seed)
    model = bytearray()
    limit = 3 * CHUNK + 100
    edges = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK]
    io.write("o", [Create()])

    def place() -> int:
        return rng.choice(edges) if rng.random() < 0.5 else rng.randrange(limit)

    for _ in range(150):
        match rng.randrange(5):
            case 0 | 1:
                offset, data = place(), rng.randbytes(rng.choice([1, 100, CHUNK, CHUNK + 7]))
                io.write("o", [Write(offset, data)])
                model.extend(bytes(max(0, offset + len(data) - len(model))))
                model[offset : offset + len(data)] = data
            case 2:
                offset, length = place(), rng.choice([1, 500, CHUNK, 2 * CHUNK + 3])
                io.write("o", [Zero(offset, length)])
                if offset + length >= len(model):
                    del model[offset:]  # as an OSD does
                else:
                    model[offset : offset + length] = bytes(length)
            case 3:
                size = place()
                io.write("o", [Truncate(size)])
                model = model[:size].ljust(size, b"\0")
            case 4:
                data = rng.randbytes(rng.randrange(300))
                io.write("o", [Append(data)])
                model += data
        assert io.stat("o").size == len(model)
        assert io.read("o", [Read()])[0] == model
        offset, length = place(), rng.randrange(1, limit)
        assert io.read("o", [Read(offset, length)])[0] == model[offset : offset + length]
        extents, data = io.read("o", [SparseRead(0, len(model) + 9)])[0]
        rebuilt, at = bytearray(len(model)), 0
        for start, size in extents:
            rebuilt[start : start + size] = data[at : at + size]
            at += size
        assert rebuilt == model


def test_zeroing_and_truncating_give_space_back(store: EmbeddedStore, io: EmbeddedContext) -> None:
    io.write("o", [Write(0, b"x" * (4 * CHUNK))])
    assert rows(store, "chunks") == 4
    io.write("o", [Zero(CHUNK - 10, 2 * CHUNK + 20)])
    assert rows(store, "chunks") == 2
    io.write("o", [Truncate(CHUNK // 2)])
    assert rows(store, "chunks") == 1
    io.write("o", [Truncate(100 << 20)])
    assert rows(store, "chunks") == 1
    io.write("o", [Remove()])
    assert rows(store, "chunks") == rows(store, "objects") == 0


def test_omap_pages_in_key_order_with_prefix_and_start(io: EmbeddedContext) -> None:
    keys = {b"a%04d" % i: b"%d" % i for i in range(1500)} | {b"b": b"", b"\xff\xff": b"last", b"": b"empty"}
    io.write("o", [OmapSet(keys)])
    page, more = io.read("o", [OmapGetVals(b"", b"a", 10)])[0]
    assert list(page) == sorted(k for k in keys if k.startswith(b"a"))[:10] and more
    found: dict[bytes, bytes] = {}
    after, more = b"", True
    while more:
        page, more = io.read("o", [OmapGetVals(after)])[0]
        assert len(page) <= 1024
        found |= page
        after = list(page)[-1]
    assert found == keys and list(found) == sorted(keys)
    assert io.read("o", [OmapGetVals(b"b")])[0] == ({b"\xff\xff": b"last"}, False)
    assert io.read("o", [OmapGetVals(b"", b"\xff")])[0] == ({b"\xff\xff": b"last"}, False)
    io.write("o", [OmapRmRange(b"a", b"b")])
    assert set(io.read("o", [OmapGetVals()])[0][0]) == {b"", b"b", b"\xff\xff"}
    io.write("o", [OmapClear()])
    assert io.read("o", [OmapGetVals()])[0] == ({}, False)


def test_names_of_objects_and_attributes_are_only_values(store: EmbeddedStore, io: EmbeddedContext) -> None:
    names = ["../../etc/passwd", "/", "a/b", "..", "%s'; DROP TABLE objects; --", "é" * 100, "new\nline", "x" * 2048]
    for name in names:
        io.write(name, [WriteFull(name.encode()), SetXattr("tést\udcff", b"v")])
    assert sorted(io.objects()) == sorted(names)
    for name in names:
        assert io.read(name, [Read(), GetXattrs()]) == [name.encode(), {"tést\udcff": b"v"}]
    assert not list(Path(store.path, "data").iterdir())
    for bad in ("", "nul\0", "x" * 2049, "\ud800"):
        with pytest.raises(OSError):
            io.write(bad, [Create()])


def test_a_snapshot_keeps_data_attributes_and_keys(store: EmbeddedStore, io: EmbeddedContext) -> None:
    io.write("o", [WriteFull(b"one" * CHUNK), SetXattr("a", b"1"), OmapSet({b"k": b"1"})])
    first = io.snap_create()
    snapc = SnapContext(first, (first,))
    io.write("o", [Write(5, b"two"), SetXattr("a", b"2"), OmapSet({b"k": b"2"})], snapc)
    assert io.read("o", [Read(0, 6), GetXattrs(), OmapGetVals()], first) == [
        b"oneone",
        {"a": b"1"},
        ({b"k": b"1"}, False),
    ]
    io.write("o", [Remove()], snapc)
    assert list(io.objects()) == []
    snapset = io.read("o", [ListSnaps()], 0xFFFFFFFFFFFFFFFF)[0]
    assert [clone.clone_id for clone in snapset.clones] == [first]
    io.snap_remove(first)
    io.snap_remove(first)  # idempotent
    for table in ("objects", "clones", "clone_snaps", "chunks", "xattrs", "omap", "trims"):
        assert rows(store, table) == 0, table


def test_removed_snapshot_ids_are_kept_as_intervals(store: EmbeddedStore, io: EmbeddedContext) -> None:
    ids = [io.snap_create() for _ in range(12)]
    assert ids == list(range(1, 13))
    order = ids.copy()
    random.Random(1).shuffle(order)
    for snap in order:
        io.snap_remove(snap)
    with store.db.read() as c:
        assert c.execute("SELECT pool, first, last FROM removed_snaps").fetchall() == [(1, 1, 12)]
    assert io.snap_create() == 13
    io.snap_remove(0)
    io.snap_remove(99)
    io.snap_remove(1 << 62)


def test_versions_grow_across_removal(io: EmbeddedContext) -> None:
    io.write("o", [Create()])
    first = io.read("o", [Version()])[0]
    io.write("o", [Remove()])
    io.write("o", [Create()])
    second = io.read("o", [Version()])[0]
    assert second > first
    with refused(errno.ERANGE):
        io.write("o", [AssertVersion(first), WriteFull(b"no")])
    assert io.stat("o").size == 0


def test_a_failed_list_changes_nothing(io: EmbeddedContext) -> None:
    io.write("o", [WriteFull(b"before")])
    with refused(errno.EEXIST):
        io.write("o", [WriteFull(b"after"), OmapSet({b"k": b"v"}), Create(exclusive=True)])
    assert io.read("o", [Read(), OmapGetVals()]) == [b"before", ({}, False)]


def test_impossible_snap_contexts_are_refused(io: EmbeddedContext) -> None:
    for snapc in (SnapContext(1 << 63, (1 << 63,)), SnapContext(1, (2,)), SnapContext(3, (1, 2))):
        with refused(errno.EINVAL):
            io.write("o", [Create()], snapc)


def test_pools_have_ids_that_are_never_given_twice(store: EmbeddedStore) -> None:
    assert [(p.pool_id, p.name) for p in store.pools()] == [(1, "rbd")]
    second = store.pool_create("second")
    io = store.open("second", "space")
    io.write("o", [WriteFull(b"x"), SetXattr("a", b"b")])
    store.pool_remove("second")
    with refused(errno.ENOENT):
        io.stat("o")
    with refused(errno.ENOENT):
        store.open("second")
    assert store.pool_create("second") > second
    with refused(errno.EEXIST):
        store.pool_create("second")
    for bad in ("", "a/b", "a@b", "nul\0", "x" * 1025, "\ud800"):
        with refused(errno.EINVAL):
            store.pool_create(bad)


def test_namespaces_are_apart(store: EmbeddedStore) -> None:
    one, two = store.open("rbd", "one"), store.open("rbd", "two")
    one.write("o", [WriteFull(b"1")])
    two.write("o", [WriteFull(b"22")])
    assert (one.stat("o").size, two.stat("o").size, list(store.open("rbd").objects())) == (1, 2, [])

"""Class rbd where damage, hostile input or a store's own arrangements matter."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator

import pytest

from librbd_py.format import header
from librbd_py.format.encoding import Decoder, Encoder
from librbd_py.format.header import NOSNAP
from librbd_py.store import api, executor
from librbd_py.store.classes import find, registry
from librbd_py.store.memory import MemoryStore
from librbd_py.store.memory_objects import MemoryTransaction, Pool
from librbd_py.store.record import Changes, LayoutSpec


@pytest.fixture
def io() -> Iterator[api.ObjectContext]:
    with MemoryStore() as store:
        store.pool_create("rbd")
        yield store.open("rbd")


def create(
    prefix: str = "rbd_data.1a", order: int = 22, *, features: int = 1, data_pool: int | None = None
) -> api.Exec:
    out = Encoder().u64(1 << 30).u8(order).u64(features).string(prefix)
    if data_pool is not None:
        out.s64(data_pool)
    return api.Exec("rbd", "create", out.done())


# --- a store learns where an image keeps its data


class Recorder(MemoryTransaction):
    applied: list[Changes]

    def apply(self, changes: Changes) -> None:
        self.applied.append(changes)
        super().apply(changes)


def run(*ops: api.Op, oid: str = "rbd_header.1a", pool: Pool | None = None) -> list[Changes]:
    tx = Recorder(pool or Pool(3, "p"), (3, "", oid), api.Client(1, "1.2.3.4:0/5"), 10**18, 1, [])
    tx.applied = []
    executor.execute_write(tx, ops)
    return tx.applied


def test_creation_registers_the_layout() -> None:
    (changes,) = run(api.Create(), create())
    assert changes.layout == LayoutSpec("rbd_data.1a", 22, 3)
    (changes,) = run(create("rbd_data.3.1a", 12, features=0x81, data_pool=8))
    assert changes.layout == LayoutSpec("rbd_data.3.1a", 12, 8)


@pytest.mark.parametrize(
    ("prefix", "order"), [("rbd_data.1a", 40), ("rbd_data.1a", 11), ("other.1a", 22), ("rbd_data.../x", 22)]
)
def test_what_no_layout_can_hold_is_left_to_ordinary_objects(prefix: str, order: int) -> None:
    (changes,) = run(create(prefix, order))
    assert changes.layout is None and changes.exists


def test_a_list_that_changes_nothing_is_not_applied() -> None:
    assert run(api.Zero(0, 5), api.Truncate(3)) == []


def test_removal_is_seen_by_the_store() -> None:
    pool = Pool(3, "p")
    run(create(), pool=pool)
    (changes,) = run(api.Remove(), pool=pool)
    assert not changes.exists and changes.forget


# --- damage


@pytest.mark.parametrize(
    ("key", "value", "method", "data"),
    [
        (b"size", b"short", "get_size", Encoder().u64(NOSNAP).done()),
        (b"features", b"", "get_features", Encoder().u64(NOSNAP).done()),
        (b"object_prefix", b"\xff\xff\xff\xff", "get_object_prefix", b""),
        (b"snapshot_0000000000000004", b"\x08\x08garbage", "snapshot_get", Encoder().u64(4).done()),
        (b"snapshot_nonsense", b"", "get_snapcontext", b""),
        (b"parent", b"\x02\x09\x00\x00\x00\x00", "parent_get", b""),
        (b"create_timestamp", b"x", "get_create_timestamp", b""),
    ],
)
def test_damaged_metadata_is_an_io_error(
    io: api.ObjectContext, key: bytes, value: bytes, method: str, data: bytes
) -> None:
    io.write("h", [create()])
    io.write("h", [api.OmapSet({key: value})])
    with pytest.raises(OSError) as caught:
        io.exec("h", "rbd", method, data)
    assert caught.value.errno == errno.EIO


def test_a_protection_status_nobody_knows_is_an_io_error(io: api.ObjectContext) -> None:
    io.write("h", [create()])
    io.write("h", [api.OmapSet({header.snap_key(4): header.Snap(4, "s", 1, protection_status=9).encode()})])
    with pytest.raises(OSError) as caught:
        io.exec("h", "rbd", "get_protection_status", Encoder().u64(4).done())
    assert caught.value.errno == errno.EIO


# --- hostile input


def all_methods() -> list[registry.Method]:
    return [find(cls, name) for cls, name in sorted(registry._WHERE)]


@pytest.mark.parametrize("method", all_methods(), ids=lambda method: f"{method.cls}.{method.name}")
def test_any_bytes_are_answered_or_refused(io: api.ObjectContext, method: registry.Method) -> None:
    rng = random.Random(method.name)
    setups: list[list[api.Op]] = [
        [api.Remove()],
        [api.Create()],
        [api.WriteFull(b"\x0e\0\0\0" + rng.randbytes(60)), api.OmapSet({b"features": rng.randbytes(8)})],
        [create()],
    ]
    for number in range(160):
        try:
            io.write("o", rng.choice(setups))
        except OSError:
            pass
        data = rng.choice([rng.randbytes(rng.randrange(60)), b"\xff" * rng.randrange(60), bytes(rng.randrange(60))])
        try:
            io.exec("o", method.cls, method.name, data)
        except OSError as e:
            assert e.errno, f"{number}: {data.hex()}"


def test_a_method_that_only_reads_cannot_write() -> None:
    for method in all_methods():
        if not method.writes:
            assert not executor.has_writes([api.Exec(method.cls, method.name)])
    assert executor.has_writes([api.Exec("rbd", "create")])


def test_listings_go_on_where_they_ended(io: api.ObjectContext) -> None:
    io.write("d", [api.Create()])
    names = [f"image-{number:04}" for number in range(150)]
    for number, name in enumerate(names):
        io.exec("d", "rbd", "dir_add_image", Encoder().string(name).string(f"{number:x}a").done())
    seen: list[str] = []
    while True:
        reply = Decoder(io.exec("d", "rbd", "dir_list", Encoder().string(seen[-1] if seen else "").u64(64).done()))
        page = reply.map(Decoder.string, Decoder.string, 8)
        if not page:
            break
        seen += page
    assert seen == names


def test_an_update_of_a_large_map_rewrites_one_block(io: api.ObjectContext) -> None:
    pool = Pool(3, "p")
    resize = api.Exec("rbd", "object_map_resize", Encoder().u64(262144).u8(0).done())
    run(resize, oid="rbd_object_map.1a", pool=pool)
    update = api.Exec("rbd", "object_map_update", Encoder().u64(100000).u64(100001).u8(1).bool(False).done())
    (changes,) = run(update, oid="rbd_object_map.1a", pool=pool)
    assert sum(len(step.data) for step in changes.steps) == 4096 + 4  # type: ignore[union-attr]

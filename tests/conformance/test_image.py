"""Creating, opening, reading, writing, resizing, renaming and removing images; values seen with librbd 16.2.15."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest
from image_fixtures import MIB, Cluster, R, cluster, heads, io, refused

from librbd_py import rbd
from librbd_py.format import features as ft
from librbd_py.store.api import ObjectContext

__all__ = ["cluster", "io"]


def facts(ctx: ObjectContext, name: str) -> tuple[int, int, int, int]:
    """features, order, stripe unit, stripe count."""
    with rbd.Image(ctx, name) as image:
        return image.features(), image.stat()["order"], image.stripe_unit(), image.stripe_count()


# --- create --------------------------------------------------------------------------------------------------------


def test_a_new_image_has_the_defaults(io: ObjectContext) -> None:
    R.create(io, "a", 10 * MIB)
    with rbd.Image(io, "a") as image:
        image_id = image.id()
        assert image.stat() == {
            "size": 10 * MIB,
            "obj_size": 4 * MIB,
            "num_objs": 3,
            "order": 22,
            "block_name_prefix": f"rbd_data.{image_id}",
            "parent_pool": (1 << 64) - 1,
            "parent_name": b"",
        }
        assert (image.features(), image.op_features(), image.flags()) == (61, 0, 0)
        assert (image.stripe_unit(), image.stripe_count(), image.overlap()) == (4 * MIB, 1, 0)
        assert image.data_pool_id() == io.pool_id
        assert image.get_snap_limit() == (1 << 64) - 1
        assert not image.old_format()
        assert image.get_name() == "a"
        assert repr(image) == "rbd.Image(ioctx, b'a')"
        assert image.group() == {"pool": -1, "name": ""}
        assert len(image_id) <= 14 and image_id.startswith(f"{io.store.client.gid:x}")
    assert R.list(io) == ["a"]
    assert list(R.list2(io)) == [{"id": image_id, "name": "a"}]


@pytest.mark.parametrize("order", [11, 26, -1])
def test_object_order_is_checked(io: ObjectContext, order: int) -> None:
    refused(rbd.ArgumentOutOfRange, 33, R.create, io, "b", MIB, order=order)
    assert R.list(io) == []


def test_names_and_sizes_are_checked(io: ObjectContext) -> None:
    R.create(io, "a", MIB)
    refused(rbd.ImageExists, 17, R.create, io, "a", MIB)
    refused(rbd.InvalidArgument, 22, R.create, io, "", MIB)
    refused(rbd.InvalidArgument, None, R.create, io, None, MIB)
    refused(rbd.InvalidArgument, None, R.create, io, 5, MIB)
    refused(OverflowError, None, R.create, io, "b", -1)
    refused(OverflowError, None, R.create, io, "b", 1 << 64)
    refused(rbd.InvalidArgument, 22, R.create, io, "b", 1 << 63)
    refused(rbd.InvalidArgument, 22, R.create, io, "b", (256_000_000 << 22) + 1)  # more than an object map may have
    R.create(io, "big", (256_000_000 << 22) + 1, features=ft.LAYERING)
    R.create(io, b"bytes", 0)
    R.create(io, "x@y/z", 1)
    R.create(io, "zero", 0, order=0)
    assert R.list(io) == ["a", "big", "bytes", "x@y/z", "zero"]


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (0, 0),
        (ft.LAYERING | ft.STRIPINGV2, ft.LAYERING),  # not striped
        (ft.LAYERING | ft.DATA_POOL, ft.LAYERING),  # no data pool
        (ft.EXCLUSIVE_LOCK | ft.FAST_DIFF, ft.EXCLUSIVE_LOCK),
        (ft.EXCLUSIVE_LOCK | ft.OBJECT_MAP, ft.EXCLUSIVE_LOCK | ft.OBJECT_MAP | ft.FAST_DIFF),
        (ft.OPERATIONS, 0),
    ],
)
def test_features_become_what_they_must(io: ObjectContext, asked: int, given: int) -> None:
    R.create(io, "a", MIB, features=asked)
    assert facts(io, "a")[0] == given


def test_impossible_features_are_refused(io: ObjectContext) -> None:
    refused(rbd.InvalidArgument, 22, R.create, io, "a", MIB, features=ft.OBJECT_MAP)
    refused(rbd.InvalidArgument, 22, R.create, io, "a", MIB, features=ft.JOURNALING)
    refused(rbd.FunctionNotSupported, 38, R.create, io, "a", MIB, features=1 << 20)
    refused(OverflowError, None, R.create, io, "a", MIB, features=-1)
    assert [oid for oid in heads(io) if not oid.startswith("rbd_directory")] == []


def test_striping(io: ObjectContext) -> None:
    refused(rbd.InvalidArgument, 22, R.create, io, "s", MIB, stripe_unit=4096)
    refused(rbd.InvalidArgument, 22, R.create, io, "s", MIB, stripe_count=2)
    refused(rbd.InvalidArgument, 22, R.create, io, "s", MIB, stripe_unit=5000, stripe_count=2)
    refused(rbd.InvalidArgument, 22, R.create, io, "s", MIB, order=12, stripe_unit=8192, stripe_count=2)
    R.create(io, "s", MIB, order=20, stripe_unit=65536, stripe_count=4)
    assert facts(io, "s") == (63, 20, 65536, 4)
    R.create(io, "t", MIB, order=20, stripe_unit=1 << 20, stripe_count=1)
    assert facts(io, "t") == (61, 20, 1 << 20, 1)
    with rbd.Image(io, "s") as image:
        assert image.stat()["num_objs"] == 4
        data = bytes(range(256)) * 1024
        image.write(data, 1000)
        assert image.read(0, 1000 + len(data)) == bytes(1000) + data


def test_a_data_pool(cluster: Cluster, io: ObjectContext) -> None:
    refused(rbd.ImageNotFound, 2, R.create, io, "d", MIB, data_pool="nope")
    R.create(io, "d", MIB, data_pool="data")
    R.create(io, "e", MIB, data_pool="rbd")
    data = cluster.pool("data")
    with rbd.Image(io, "d") as image:
        assert image.features() == 61 | ft.DATA_POOL
        assert image.data_pool_id() == data.pool_id
        assert image.block_name_prefix() == f"rbd_data.{io.pool_id}.{image.id()}"
        image.write(b"x", 0)
        assert heads(data) == [f"{image.block_name_prefix()}.{0:016x}"]
        image.create_snap("s")
        image.write(b"y", 0)
        image.set_snap("s")
        assert image.read(0, 1) == b"x"
    assert facts(io, "e")[0] == 61
    with rbd.Image(io, "d") as image:
        image.remove_snap("s")
    R.remove(io, "d")
    assert heads(data) == []


def test_old_format_gives_a_new_image_and_excludes_its_options(io: ObjectContext) -> None:
    R.create(io, "old", MIB, old_format=True)
    assert facts(io, "old")[0] == 61
    refused(rbd.InvalidArgument, None, R.create, io, "o", MIB, old_format=True, features=1)


# --- open ----------------------------------------------------------------------------------------------------------


def test_opening(io: ObjectContext) -> None:
    R.create(io, "a", MIB)
    refused(rbd.ImageNotFound, 2, rbd.Image, io, "nope")
    refused(rbd.ImageNotFound, 2, rbd.Image, io, image_id="123")
    refused(rbd.ImageNotFound, 2, rbd.Image, io, "a", snapshot="nope")
    refused(rbd.InvalidArgument, None, rbd.Image, io)
    refused(rbd.InvalidArgument, None, rbd.Image, io, "a", image_id="123")
    with rbd.Image(io, "a") as image:
        image_id = image.id()
    with rbd.Image(io, image_id=image_id) as image:
        assert image.get_name() == "a"
        assert repr(image) == "rbd.Image(ioctx, b'a')"
    refused(rbd.InvalidArgument, None, image.size)
    image.close()


def test_a_read_only_image_refuses_changes(io: ObjectContext) -> None:
    R.create(io, "a", MIB)
    with rbd.Image(io, "a") as image:
        image.create_snap("s")
    with rbd.Image(io, "a", read_only=True) as image:
        for call, args in (
            (image.write, (b"a", 0)),
            (image.discard, (0, 4096)),
            (image.write_zeroes, (0, 4096)),
            (image.resize, (2 * MIB,)),
            (image.create_snap, ("t",)),
            (image.remove_snap, ("s",)),
            (image.rename_snap, ("s", "t")),
            (image.protect_snap, ("s",)),
            (image.rollback_to_snap, ("s",)),
            (image.update_features, (ft.EXCLUSIVE_LOCK, False)),
            (image.metadata_set, ("a", "b")),
            (image.metadata_remove, ("a",)),
            (image.set_snap_limit, (3,)),
            (image.lock_exclusive, ("c",)),
            (image.unlock, ("c",)),
            (image.break_lock, ("client.1", "c")),
            (image.rebuild_object_map, ()),
            (image.sparsify, (4096,)),
        ):
            refused(rbd.ReadOnlyImage, 30, call, *args)
        image.flush()
        assert image.list_lockers() == []
        assert list(image.watchers_list()) == []
        assert not image.is_exclusive_lock_owner()


# --- data ----------------------------------------------------------------------------------------------------------


def test_reads_and_writes_at_the_end_of_the_image(io: ObjectContext) -> None:
    size = 10 * MIB
    R.create(io, "a", size)
    with rbd.Image(io, "a") as image:
        assert image.read(0, 10) == bytes(10)
        assert image.write(b"hello", 0) == 5
        assert image.read(0, 6) == b"hello\0"
        assert image.read(size - 5, 10) == bytes(5)
        refused(rbd.InvalidArgument, 22, image.read, size, 10)
        assert image.read(0, 0) == image.read(2 * size, 0) == b""
        refused(rbd.IncompleteWriteError, None, image.write, b"hello", size - 2)
        assert image.read(size - 2, 2) == b"he"
        refused(rbd.InvalidArgument, 22, image.write, b"hello", size)
        assert image.write(b"", 2 * size) == 0
        for call, args in (
            (image.read, (-1, 10)),
            (image.read, (0, -1)),
            (image.resize, (-1,)),
        ):
            refused(OverflowError, None, call, *args)
        for wrong in ("hello", bytearray(b"x"), memoryview(b"x")):
            refused(TypeError, None, image.write, wrong, 0)
        refused(TypeError, None, image.read, "a", 1)


def test_discard_and_write_zeroes(io: ObjectContext) -> None:
    size = 10 * MIB
    R.create(io, "a", size)
    with rbd.Image(io, "a") as image:
        image.write(b"x" * MIB, 0)
        image.write(b"y" * MIB, 4 * MIB)
        image.write_zeroes(100, 50)
        assert image.read(99, 52) == b"x" + bytes(50) + b"x"
        image.write_zeroes(200, 50, rbd.RBD_WRITE_ZEROES_FLAG_THICK_PROVISION)
        assert image.read(199, 52) == b"x" + bytes(50) + b"x"
        image.discard(4 * MIB, 4 * MIB)
        assert image.read(4 * MIB, MIB) == bytes(MIB)
        image.discard(size - 10, 100)
        image.discard(0, 0)
        image.write_zeroes(size - 10, 100)
        refused(rbd.InvalidArgument, 22, image.discard, size, 10)
        refused(rbd.InvalidArgument, 22, image.discard, 0, 3 << 30)
        refused(rbd.InvalidArgument, 22, image.write_zeroes, size, 10)
        refused(rbd.InvalidArgument, 22, image.write_zeroes, 0, 10, 2)
        image.flush()
        image.invalidate_cache()


def test_compare_and_write(io: ObjectContext) -> None:
    R.create(io, "a", MIB, order=16)
    with rbd.Image(io, "a") as image:
        image.write(b"abcdefgh", 4096)
        assert image.compare_and_write(4096, b"abcXefgh", b"12345678") == 4099
        assert image.read(4096, 8) == b"abcdefgh"
        assert image.compare_and_write(4096, b"abcdefgh", b"12345678") is None
        assert image.read(4096, 8) == b"12345678"
        refused(rbd.InvalidArgument, 22, image.compare_and_write, 65532, bytes(8), bytes(8))
        refused(rbd.InvalidArgument, 22, image.compare_and_write, 0, b"a", b"bc")


def test_asynchronous_requests(io: ObjectContext) -> None:
    size = 10 * MIB
    R.create(io, "a", size)
    seen: list[tuple[int, tuple[object, ...]]] = []

    def done(completion: rbd.Completion, *more: object) -> None:
        seen.append((completion.get_return_value(), more))

    def wait(completion: rbd.Completion) -> tuple[int, tuple[object, ...]]:
        completion.wait_for_complete_and_cb()
        assert completion.is_complete()
        return seen.pop()

    with rbd.Image(io, "a") as image:
        assert wait(image.aio_write(b"abc", 0, done)) == (0, ())
        assert wait(image.aio_read(0, 3, done)) == (3, (b"abc",))
        assert wait(image.aio_read(size - 2, 5, done)) == (2, (bytes(2),))
        assert wait(image.aio_read(size, 3, done)) == (-22, (None,))
        assert wait(image.aio_write(b"x", size, done)) == (-22, ())
        assert wait(image.aio_discard(0, 4096, done)) == (0, ())
        assert wait(image.aio_write_zeroes(0, 100, done)) == (0, ())
        assert wait(image.aio_compare_and_write(0, bytes(3), b"new", done)) == (0, ())
        assert wait(image.aio_compare_and_write(0, bytes(3), b"new", done)) == (-84, ())
        assert wait(image.aio_flush(done)) == (0, ())
        refused(TypeError, None, image.aio_write, "abc", 0, done)

        def bad(completion: rbd.Completion, *more: object) -> None:
            raise KeyError("in the callback")

        refused(KeyError, None, image.aio_read(0, 3, bad).wait_for_complete_and_cb)
        many = [image.aio_write(bytes([n]) * 512, n * 512, done) for n in range(200)]
        for completion in many:
            completion.wait_for_complete_and_cb()
        assert seen == [(0, ())] * 200
        seen.clear()
        assert image.read(0, 200 * 512) == b"".join(bytes([n]) * 512 for n in range(200))
    result = wait(R.aio_open_image(done, io, "a"))
    assert result[0] == 0
    opened = result[1][0]
    assert isinstance(opened, rbd.Image) and opened.size() == size
    assert wait(opened.aio_close(done)) == (0, ())
    assert wait(R.aio_open_image(done, io, "nope"))[0] == -2


# --- size, name, end -----------------------------------------------------------------------------------------------


def test_resize(io: ObjectContext) -> None:
    R.create(io, "a", 10 * MIB)
    with rbd.Image(io, "a") as image:
        image.write(b"z" * (2 * MIB), 7 * MIB)
        image.resize(10 * MIB)
        image.resize(12 * MIB)
        assert (image.size(), image.stat()["num_objs"]) == (12 * MIB, 3)
        refused(rbd.InvalidArgument, None, image.resize, 8 * MIB, allow_shrink=False)
        image.resize(8 * MIB)
        image.resize(12 * MIB)
        assert image.read(7 * MIB, 2 * MIB) == b"z" * MIB + bytes(MIB)
        refused(rbd.InvalidArgument, 22, image.resize, 1 << 63)
        refused(rbd.InvalidArgument, 22, image.resize, 256_000_001 << 22)
        assert image.size() == 12 * MIB
        image.resize(0)
        assert image.read(0, 0) == b""
        assert [oid for oid in heads(io) if oid.startswith("rbd_data.")] == []


def test_rename(io: ObjectContext) -> None:
    R.create(io, "a", MIB)
    R.create(io, "b", MIB)
    refused(rbd.ImageNotFound, 2, R.rename, io, "nope", "x")
    refused(rbd.ImageExists, 17, R.rename, io, "a", "b")
    refused(rbd.ImageExists, 17, R.rename, io, "a", "a")
    refused(rbd.InvalidArgument, 22, R.rename, io, "a", "")
    with rbd.Image(io, "a") as image:
        R.rename(io, "a", "c")
        assert image.get_name() == "c"
        image.write(b"still mine", 0)
    assert R.list(io) == ["b", "c"]
    with rbd.Image(io, "c") as image:
        assert image.read(0, 10) == b"still mine"


def test_a_removal_cancelled_is_taken_up_again(io: ObjectContext) -> None:
    R.create(io, "a", 10 * MIB)
    with rbd.Image(io, "a") as image:
        image.write(b"x" * MIB, 0)
        first = image.id()
    refused(rbd.OperationCanceled, 125, R.remove, io, "a", on_progress=lambda *_: -rbd.ECANCELED)
    assert R.list(io) == ["a"]
    refused(rbd.ImageNotFound, 2, rbd.Image, io, "a")
    R.create(io, "a", MIB)
    R.create(io, "b", MIB)
    assert R.list(io) == ["a", "b", "a"]
    assert [row["id"] for row in R.list2(io)][2] == first
    R.remove(io, "a")
    assert [row["id"] for row in R.list2(io)][1] == first
    R.remove(io, "a")
    assert R.list(io) == ["b"]
    R.remove(io, "b")
    assert set(heads(io)) <= {"rbd_directory", "rbd_trash"}


def test_remove_refuses_what_is_in_use(cluster: Cluster, io: ObjectContext) -> None:
    R.create(io, "a", 10 * MIB)
    refused(rbd.ImageNotFound, 2, R.remove, io, "nope")
    with rbd.Image(cluster.connect().open("rbd"), "a") as other:
        other.write(b"x" * MIB, 0)
        refused(rbd.ImageBusy, 16, R.remove, io, "a")
        other.create_snap("s")
        refused(rbd.ImageHasSnapshots, 39, R.remove, io, "a")
    refused(rbd.ImageHasSnapshots, 39, R.remove, io, "a")
    with rbd.Image(io, "a") as image:
        image.remove_snap("s")
        assert image.read(0, 1) == b"x"
    steps: list[tuple[int, int]] = []
    R.remove(io, "a", on_progress=lambda *step: steps.append(step) or 5)  # type: ignore[func-returns-value]
    assert steps[0] == steps[-1] == (0, 3)
    assert R.list(io) == []
    assert set(heads(io)) <= {"rbd_directory", "rbd_trash"}
    refused(rbd.ImageNotFound, 2, R.remove, io, "a")


def test_two_removals_at_once_leave_nothing(cluster: Cluster, io: ObjectContext) -> None:
    R.create(io, "a", 10 * MIB)
    outcome: list[object] = []

    def remove(ctx: ObjectContext) -> None:
        try:
            R.remove(ctx, "a")
            outcome.append("removed")
        except rbd.Error as failure:
            outcome.append(failure)

    threads = [threading.Thread(target=remove, args=(cluster.connect().open("rbd"),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if "removed" not in outcome:  # each saw the other's watch
        R.remove(io, "a")
    assert R.list(io) == []


def test_timestamps(io: ObjectContext) -> None:
    R.create(io, "a", MIB)
    with rbd.Image(io, "a") as image:
        made = image.create_timestamp()
        assert abs(made - datetime.now(UTC).replace(tzinfo=None)) < timedelta(minutes=5) and made.microsecond == 0
        assert image.access_timestamp() >= made and image.modify_timestamp() >= made


# --- features, metadata --------------------------------------------------------------------------------------------


def test_features_can_be_switched(io: ObjectContext) -> None:
    R.create(io, "a", 10 * MIB)
    with rbd.Image(io, "a") as image:
        image.write(b"x", 5 * MIB)
        image.create_snap("s")
        update = image.update_features
        refused(rbd.InvalidArgument, 22, update, ft.EXCLUSIVE_LOCK, False)
        update(ft.OBJECT_MAP, False)
        assert image.features() == 37
        update(ft.FAST_DIFF, True)
        assert (image.features(), image.flags()) == (61, 3)
        refused(rbd.InvalidArgument, 22, update, ft.OBJECT_MAP, True)
        image.rebuild_object_map()
        assert image.flags() == 0
        image.set_snap("s")
        assert image.flags() == 0
        image.set_snap(None)
        update(ft.FAST_DIFF, False)
        assert image.features() == 37
        update(ft.OBJECT_MAP, True)
        update(ft.EXCLUSIVE_LOCK | ft.OBJECT_MAP | ft.FAST_DIFF, False)
        assert (image.features(), image.flags()) == (33, 0)
        image.write(b"y", 0)
        for features, enabled in (
            (ft.OBJECT_MAP, True),
            (ft.OBJECT_MAP, False),
            (ft.DEEP_FLATTEN, True),
            (ft.LAYERING, False),
            (ft.LAYERING, True),
            (ft.OPERATIONS, True),
            (ft.DATA_POOL, True),
            (1 << 20, True),
            (0, True),
        ):
            refused(rbd.InvalidArgument, 22, update, features, enabled)
        refused(rbd.InvalidArgument, 22, image.rebuild_object_map)
        update(ft.DEEP_FLATTEN, False)
        update(ft.EXCLUSIVE_LOCK, True)
        refused(rbd.InvalidArgument, 22, update, ft.EXCLUSIVE_LOCK, True)
        image.write(b"z", 0)
        assert image.features() == 5 and image.is_exclusive_lock_owner()


def test_metadata(io: ObjectContext) -> None:
    R.create(io, "a", MIB)
    with rbd.Image(io, "a") as image:
        image.metadata_set("k", "v")
        assert image.metadata_get("k") == "v"
        image.metadata_set(b"kb", b"vb")
        image.metadata_set("e", "")
        assert list(image.metadata_list()) == [("e", ""), ("k", "v"), ("kb", "vb")]
        image.metadata_remove("k")
        refused(KeyError, None, image.metadata_get, "k")
        refused(KeyError, None, image.metadata_remove, "k")
        refused(rbd.InvalidArgument, 22, image.metadata_set, "conf_nope", "1")
        image.config_set("rbd_cache", "false")
        assert image.config_get("rbd_cache") == "false"
        R.config_set(io, "rbd_cache", "true")
        R.config_set(io, "rbd_cache_size", "4K")
        rows = list(image.config_list())
        assert [row for row in rows if row["source"]] == [
            {"name": "rbd_cache", "value": "false", "source": rbd.RBD_CONFIG_SOURCE_IMAGE},
            {"name": "rbd_cache_size", "value": "4K", "source": rbd.RBD_CONFIG_SOURCE_POOL},
        ]
        assert len(rows) == 77 and {"name": "rbd_qos_iops_limit", "value": "0", "source": 0} in rows
        image.config_remove("rbd_cache")
        refused(KeyError, None, image.config_get, "rbd_cache")
        for name, value in (("rbd_cache", "maybe"), ("rbd_default_order", "20"), ("rbd_nonsense", "1"), ("cache", "1")):
            refused(rbd.InvalidArgument, 22, image.config_set, name, value)
            refused(rbd.InvalidArgument, 22, image.metadata_set, f"conf_{name}", value)
        R.config_remove(io, "rbd_cache")
        R.config_remove(io, "rbd_cache_size")
        refused(rbd.InvalidArgument, 22, image.migration_source_spec)


# --- namespaces and trash ------------------------------------------------------------------------------------------


def test_namespaces(cluster: Cluster, io: ObjectContext) -> None:
    R.namespace_create(io, "ns")
    refused(rbd.ImageExists, 17, R.namespace_create, io, "ns")
    refused(rbd.InvalidArgument, 22, R.namespace_create, io, "")
    assert R.namespace_list(io) == ["ns"]
    assert R.namespace_exists(io, "ns") and not R.namespace_exists(io, "no")
    inside = cluster.pool("rbd", "ns")
    R.create(inside, "q", MIB)
    assert (R.list(inside), R.list(io)) == (["q"], [])
    refused(rbd.ImageBusy, 16, R.namespace_remove, io, "ns")
    refused(rbd.ImageNotFound, 2, R.create, cluster.pool("rbd", "none"), "q", MIB)
    R.remove(inside, "q")
    R.namespace_remove(io, "ns")
    refused(rbd.ImageNotFound, 2, R.namespace_remove, io, "ns")
    assert heads(inside) == []


def test_trash(io: ObjectContext) -> None:
    R.create(io, "t", 5 * MIB)
    R.create(io, "p", MIB)
    with rbd.Image(io, "t") as image:
        image.write(b"kept", 0)
    R.trash_move(io, "t", 3600)
    assert R.list(io) == ["p"]
    (row,) = R.trash_list(io)
    assert (row["name"], row["source"]) == ("t", "USER")
    assert row["deferment_end_time"] - row["deletion_time"] == timedelta(hours=1)
    assert R.trash_get(io, row["id"]) == row
    refused(rbd.PermissionError, 1, R.trash_remove, io, row["id"])
    refused(rbd.ImageExists, 17, R.trash_restore, io, row["id"], "p")
    R.trash_restore(io, row["id"], "t2")
    refused(rbd.ImageNotFound, 2, R.trash_get, io, row["id"])
    refused(rbd.ImageNotFound, 2, R.trash_remove, io, "nope")
    refused(rbd.ImageNotFound, 2, R.trash_move, io, "nope")
    with rbd.Image(io, "t2") as image:
        assert image.read(0, 4) == b"kept"
        image.create_snap("s")
    R.trash_move(io, "t2")
    refused(rbd.ImageHasSnapshots, 39, R.trash_purge, io)
    with rbd.Image(io, image_id=row["id"]) as image:
        image.remove_snap("s")
    R.trash_purge(io)
    assert list(R.trash_list(io)) == []
    assert [oid for oid in heads(io) if row["id"] in oid] == []


def test_pool_totals_and_metadata(io: ObjectContext) -> None:
    R.pool_init(io, True)
    R.create(io, "a", 5 * MIB)
    R.create(io, "b", MIB)
    with rbd.Image(io, "a") as image:
        image.create_snap("s")
        image.resize(MIB)
    R.trash_move(io, "b")
    assert R.pool_stats_get(io) == {
        "image_count": 1,
        "image_provisioned_bytes": MIB,
        "image_max_provisioned_bytes": 5 * MIB,
        "image_snap_count": 1,
        "trash_count": 1,
        "trash_provisioned_bytes": MIB,
        "trash_max_provisioned_bytes": MIB,
        "trash_snap_count": 0,
    }
    refused(KeyError, None, R.pool_metadata_get, io, "x")
    R.pool_metadata_set(io, "x", "y")
    assert list(R.pool_metadata_list(io)) == [("x", "y")]
    R.pool_metadata_remove(io, "x")
    refused(KeyError, None, R.pool_metadata_remove, io, "x")
    R.config_set(io, "rbd_cache", "true")
    rows = list(R.config_list(io))
    assert [row for row in rows if row["source"]] == [{"name": "rbd_cache", "value": "true", "source": 1}]
    assert len(rows) == 109
    R.config_remove(io, "rbd_cache")
    for name, value in (("rbd_cache", "maybe"), ("rbd_default_order", "twenty"), ("rbd_nonsense", "1"), ("cache", "1")):
        refused(rbd.InvalidArgument, 22, R.config_set, io, name, value)

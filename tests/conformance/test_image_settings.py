"""Options of RBD that an open image honours: where they come from, and what they do, on every store."""

from __future__ import annotations

import time

import pytest
from image_fixtures import MIB, Cluster, R, cluster, eventually, io, refused

from librbd_py import rbd
from librbd_py.format import names
from librbd_py.image import settings
from librbd_py.image.ahead import at_once, is_local
from librbd_py.image.datapath import NativeImage
from librbd_py.image.options import OF_IMAGES, OPTIONS
from librbd_py.image.settings import HONOURED, HONOURED_AT_REMOVAL, HONOURED_OF_POOLS, Settings, resolve
from librbd_py.store.api import ObjectContext, OmapRmKeys, OmapSet

__all__ = ["cluster", "io"]

OLD = (1_000_000_000).to_bytes(4, "little") + bytes(4)  # a utime of 2001


@pytest.fixture
def image(io: ObjectContext) -> rbd.Image:
    R.create(io, "img", 64 * MIB)
    return rbd.Image(io, "img")


def test_every_name_is_an_option() -> None:
    assert set(OF_IMAGES) >= HONOURED | HONOURED_AT_REMOVAL and set(OPTIONS) >= HONOURED_OF_POOLS
    assert settings.is_honoured("rbd_qos_read_bps_limit") and not settings.is_honoured("rbd_cache_size")
    assert resolve({}, {}, None) == Settings()


def test_precedence() -> None:
    name = "rbd_concurrent_management_ops"
    assert resolve({}, {}, lambda asked: "4" if asked == name else "").management_ops == 4
    assert resolve({}, {f"conf_{name}": "5"}, lambda asked: "4").management_ops == 5
    assert resolve({f"conf_{name}": "6"}, {f"conf_{name}": "5"}, lambda asked: "4").management_ops == 6


@pytest.mark.parametrize(
    ("text", "count"), [("12", 12), ("4K", 4096), ("4Ki", 4096), ("1G", 1 << 30), ("7B", 7), ("x", 0), ("", 0)]
)
def test_numbers(text: str, count: int) -> None:
    assert settings.number(text) == count


def test_a_burst_is_what_may_come_at_once() -> None:
    def first(**values: str) -> tuple[int, int]:
        return resolve({f"conf_rbd_qos_iops_{key}": value for key, value in values.items()}, {}, None).limits[0]

    assert first(limit="100") == (100, 100)
    assert first(limit="100", burst="500", burst_seconds="3") == (100, 1500)
    assert first(limit="100", burst="50") == (100, 100)
    assert first(burst="500") == (0, 0)


def seconds(image: rbd.Image, count: int, size: int = 512, *, read: bool = False) -> float:
    started = time.monotonic()
    for _ in range(count):
        if read:
            image.read(0, size)
        else:
            image.write(bytes(size), 0)
    return time.monotonic() - started


def test_a_limit_holds_at_once_also_where_somebody_else_set_it(cluster: Cluster, image: rbd.Image) -> None:
    other = cluster.connect().open("rbd")
    native = isinstance(image.handle.data, NativeImage)
    with image:
        image.write(b"x", 0)
        with rbd.Image(other, "img") as second:
            second.config_set("rbd_qos_write_iops_limit", "10")
            eventually(lambda: image.handle.settings.limits[4] == (10, 10))
            if native:
                assert seconds(image, 18) >= 0.5  # ten at once, then ten a second
                assert seconds(image, 100, read=True) < 9  # reads have no limit
            second.config_remove("rbd_qos_write_iops_limit")
            eventually(lambda: image.handle.settings.limits[4] == (0, 0))
            if native:
                assert seconds(image, 100) < 9


@pytest.mark.parametrize("kind", ["", "read_", "write_"])
def test_bytes_are_limited(io: ObjectContext, image: rbd.Image, kind: str) -> None:
    image.write(bytes(MIB), 0)
    image.close()
    R.config_set(io, f"rbd_qos_{kind}bps_limit", "1M")
    try:
        with rbd.Image(io, "img") as again:
            assert (MIB, MIB) in again.handle.settings.limits
            if isinstance(again.handle.data, NativeImage):
                assert seconds(again, 7, 256 << 10, read=kind == "read_") >= 0.4
    finally:
        R.config_remove(io, f"rbd_qos_{kind}bps_limit")


def test_the_grain_of_discards(image: rbd.Image) -> None:
    with image:
        image.write(b"x" * MIB, 0)
        image.discard(4096, 8192)
        assert image.read(4096, 8192) == b"x" * 8192
        image.config_set("rbd_discard_granularity_bytes", "4096")
        image.discard(4096, 8192)
        assert image.read(0, 16384) == b"x" * 4096 + bytes(8192) + b"x" * 4096
        image.config_remove("rbd_discard_granularity_bytes")
        image.discard(32768, 8192)
        assert image.read(32768, 8192) == b"x" * 8192
        image.config_set("rbd_skip_partial_discard", "false")
        image.discard(32768, 100)
        assert image.read(32768, 101) == bytes(100) + b"x"


@pytest.mark.parametrize("which", ["access", "modify"])
def test_times_are_kept_as_often_as_is_asked(io: ObjectContext, image: rbd.Image, which: str) -> None:
    header = names.header(image.id())
    key, option = f"{which}_timestamp".encode(), f"rbd_{which[0]}time_update_interval"

    def after(interval: str) -> int:
        with rbd.Image(io, "img") as again:
            again.config_set(option, interval)
            io.write(header, [OmapSet({key: OLD})])
            again.write(b"x", 0)
            again.read(0, 1)
            stamp = again.access_timestamp() if which == "access" else again.modify_timestamp()
            return stamp.year

    with image:
        assert after("0") == 2001
        assert after("2000000000") == 2001
        assert after("60") > 2001
    io.write(header, [OmapRmKeys((key,))])


def test_how_many_objects_at_a_time(image: rbd.Image) -> None:
    with image:
        image.config_set("rbd_concurrent_management_ops", "3")
        image.handle.refresh()
        wanted = 1 if not isinstance(image.handle.data, NativeImage) else 2 if is_local(image.handle) else 3
        assert at_once(image.handle) == wanted


def test_what_is_no_value_is_refused(image: rbd.Image) -> None:
    with image:
        refused(rbd.InvalidArgument, 22, image.config_set, "rbd_qos_iops_limit", "many")

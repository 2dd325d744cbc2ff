"""The C engine from Python, on a real layout in a folder: views, requests, completions, the gate, events, exit."""

from __future__ import annotations

import errno
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from librbd_py.image import datapath
from librbd_py.image.datapath import NativeImage
from librbd_py.image.events import EVENTS, IO_ERROR, LOCK_NEEDED, LOST
from librbd_py.image.layout import Layout
from librbd_py.image.view import DataObjects, ViewSpec
from librbd_py.native import ffi, lib
from librbd_py.store.api import NativeData, ObjectContext, SnapContext

ORDER = 16
SIZE = 4 << 20

Opener = Callable[..., DataObjects]


def wait(event: threading.Event) -> None:
    assert event.wait(30), "nothing happened in 30 s"


def spec(data: DataObjects, **more: Any) -> ViewSpec:
    layout = more.pop("layout", Layout(data.order, 1 << data.order, 1))
    return ViewSpec(size=more.pop("size", SIZE), layout=layout, data=data, **more)


def unexpected() -> None:
    raise AssertionError("the lock was asked for")


@pytest.fixture
def open_data(tmp_path: Path) -> Iterator[Opener]:
    """Makes the data objects of an image in the embedded store's C part; `fault` as store_fault.c takes it."""
    opened: list[DataObjects] = []

    def make(order: int = ORDER, fault: str | None = None) -> DataObjects:
        error = ffi.new("int *")
        handle = lib.rbdn_layout_open(str(tmp_path / str(len(opened))).encode(), order, 1, error)
        assert handle, error[0]
        if fault is not None:
            handle = lib.rbdn_fault_open(handle, fault.encode(), error)
            assert handle, error[0]
        data = DataObjects(cast(ObjectContext, None), "rbd_data.1", order)
        data.native = NativeData(handle, True, lambda: lib.rbdn_store_close(handle))
        opened.append(data)
        return data

    yield make
    for data in opened:
        data.close()


@pytest.fixture
def image(open_data: Opener) -> Iterator[NativeImage]:
    made = NativeImage(spec(open_data()), unexpected)
    yield made
    made.close()


def random_operation(dice: random.Random, image: NativeImage, model: bytearray) -> None:
    offset = dice.randrange(len(model))
    length = min(dice.choice([1, 512, 4096, 70000, 300000]), len(model) - offset)
    end = offset + length
    kind = dice.randrange(8)
    if kind < 3:
        data = dice.randbytes(length)
        image.write(offset, data, fua=dice.random() < 0.1)
        model[offset:end] = data
    elif kind == 3:
        image.write_zeroes(offset, length, unmap=dice.random() < 0.5)
        model[offset:end] = bytes(length)
    elif kind == 4:
        image.discard(offset, length, exact=True)
        model[offset:end] = bytes(length)
    elif kind == 5:
        pattern = dice.randbytes(dice.choice([1, 16, 512]))
        length -= length % len(pattern)
        image.writesame(offset, length, pattern)
        model[offset : offset + length] = pattern * (length // len(pattern))
    elif kind == 6:
        compare, data = bytearray(model[offset:end]), dice.randbytes(length)
        assert image.compare_and_write(offset, bytes(compare), data) is None
        model[offset:end] = data
        at = dice.randrange(length)
        compare = bytearray(model[offset:end])
        compare[at] ^= 1
        assert image.compare_and_write(offset, bytes(compare), bytes(length)) == offset + at
    else:
        image.flush()
    assert image.read(offset, end - offset) == model[offset:end]


@pytest.mark.parametrize("layout", [Layout(ORDER, 1 << ORDER, 1), Layout(ORDER, 4096, 3)], ids=["plain", "striped"])
def test_random_requests_on_a_clone_of_a_clone_agree_with_a_model(open_data: Opener, layout: Layout) -> None:
    dice = random.Random(5)
    base, middle, top = open_data(), open_data(14), open_data()
    model = bytearray(SIZE)
    parent = spec(base, layout=layout)
    view = parent
    for data in (base, middle, top):
        if data is not base:
            frozen = ViewSpec(view.size, view.layout, view.data, 1, parent=view.parent, overlap=view.overlap)
            overlap = SIZE - 123456
            model[overlap:] = bytes(SIZE - overlap)
            plain = Layout(data.order, 1 << data.order, 1)
            view = spec(data, layout=layout if data is top else plain, parent=frozen, overlap=overlap)
        image = NativeImage(view, unexpected)
        for _ in range(150):
            random_operation(dice, image, model)
        assert image.read(0, SIZE) == model
        at = 0
        while at < SIZE:
            for length, flags in image.runs(at, SIZE - at):
                assert not flags or not any(model[at : at + length])
                at += length
        image.close()


def test_a_snapshot_keeps_what_is_overwritten_later(open_data: Opener) -> None:
    data = open_data()
    image = NativeImage(spec(data), unexpected)
    image.write(0, b"old" * 1000)
    image.publish(spec(data, snapc=SnapContext(7, (7,))))
    image.settle(30)
    image.write(1000, b"new" * 1000)
    image.write(3 << ORDER, b"later")
    snap = NativeImage(spec(data, snap_id=7), unexpected)
    assert snap.read(0, 6000) == (b"old" * 1000).ljust(6000, b"\0")
    assert snap.read(3 << ORDER, 5) == bytes(5)
    with pytest.raises(OSError) as failure:
        snap.write(0, b"x")
    assert failure.value.errno == errno.EROFS
    assert image.read(0, 4000) == (b"old" * 1000)[:1000] + b"new" * 1000
    snap.close()
    image.close()


def test_errors_carry_errno_and_a_sentence(image: NativeImage) -> None:
    for call in (
        lambda: image.read(SIZE, 1),
        lambda: image.write(SIZE - 1, b"ab"),
        lambda: image.writesame(0, 5, b"ab"),
        lambda: image.compare_and_write(0, b"a", b"ab"),
        lambda: image.unblock(1),
        lambda: image.runs(SIZE, 1),
    ):
        with pytest.raises(OSError, match=r"\w+: Invalid argument") as failure:
            call()
        assert failure.value.errno == errno.EINVAL
    assert image.read(SIZE, 0) == b""


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 1 << 63},
        {"layout": Layout(30, 1 << 30, 1)},
        {"layout": Layout(ORDER, 3000, 2)},
        {"snapc": SnapContext(3, (4,))},
        {"snapc": SnapContext(9, (2, 4))},
        {"discard_granularity": 3000},
    ],
)
def test_a_view_that_makes_no_sense_is_refused(open_data: Opener, wrong: dict[str, Any]) -> None:
    data = open_data()
    with pytest.raises(OSError) as refused:
        NativeImage(spec(data, **wrong), unexpected)
    assert refused.value.errno == errno.EINVAL
    parent = spec(data, snap_id=3, size=1000)
    with pytest.raises(OSError) as too_long:
        NativeImage(spec(data, parent=parent, overlap=1001), unexpected)
    assert too_long.value.errno == errno.EINVAL


def test_a_closed_image_refuses_everything(open_data: Opener) -> None:
    image = NativeImage(spec(open_data()), unexpected)
    image.close()
    image.close()
    nothing: Callable[[int, int], None] = lambda result, mismatch: None  # noqa: E731
    for call in (
        lambda: image.read(0, 1),
        lambda: image.block(1, 0),
        lambda: image.aio(datapath.FLUSH, 0, 0, None, nothing),
        image.stats,
        image.flush,
    ):
        with pytest.raises(OSError) as failure:
            call()
        assert failure.value.errno == errno.EBADF
    assert datapath.REAPER.drain(30)


def test_a_call_that_another_thread_overtakes_with_close_fails(open_data: Opener) -> None:
    """What happens between fetching the pointer and entering the engine cannot be ordered from outside; so it is done
    by hand: the image's memory is still there."""
    image = NativeImage(spec(open_data()), unexpected)
    pointer = image.pointer
    image.close()
    buffer = bytearray(4096)
    refused = lib.rbdn_io(pointer, datapath.READ, 0, 4096, ffi.from_buffer(buffer), 4096, 0, ffi.NULL)
    assert refused == -errno.ESHUTDOWN
    ended: list[int] = []
    token = datapath.REAPER.expect(lambda result, mismatch: ended.append(result), None)
    assert lib.rbdn_aio(pointer, datapath.FLUSH, 0, 0, ffi.NULL, 0, 0, token) == 0
    assert datapath.REAPER.drain(30) and ended == [-errno.ESHUTDOWN]
    assert lib.rbdn_image_block(pointer, 3, 0) == 0 == lib.rbdn_image_unblock(pointer, 3)
    assert lib.rbdn_image_users(pointer) == 0


def test_closing_while_other_threads_are_in_calls(open_data: Opener) -> None:
    data = open_data()
    for _ in range(20):
        image = NativeImage(spec(data), unexpected)
        busy = threading.Semaphore(0)
        wrong: list[object] = []

        def work(call: Callable[[], object], image: NativeImage = image, busy: Any = busy, wrong: Any = wrong) -> None:
            try:
                while True:
                    call()
                    busy.release()
            except OSError as failure:
                if failure.errno not in (errno.EBADF, errno.ESHUTDOWN, errno.ETIMEDOUT):  # block() on a busy machine
                    wrong.append(failure)

        calls: list[Callable[[], object]] = [
            lambda image=image: image.read(0, 100_000),
            lambda image=image: image.write(5, bytes(70_000)),
            lambda image=image: image.aio(datapath.READ, 0, 4096, bytearray(4096), lambda result, mismatch: None),
            lambda image=image: (image.runs(0, SIZE), image.stats(), image.in_use),
            lambda image=image: (image.block(3, 0.01), image.unblock(3)),
            lambda image=image: image.publish(spec(data)),
        ]
        threads = [threading.Thread(target=work, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        for _ in range(30):
            assert busy.acquire(timeout=30)
        image.close()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert wrong == []
    assert datapath.REAPER.drain(30)


def test_an_interrupt_while_an_image_closes_leaves_it_to_be_closed_again(
    open_data: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = NativeImage(spec(open_data()), unexpected)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupted(result: int, what: str) -> int:
            raise KeyboardInterrupt

        patch.setattr(datapath, "check", interrupted)
        image.close()
    image.close()


def test_asynchronous_requests_complete_once_on_the_reaper_thread(image: NativeImage) -> None:
    results: list[tuple[int, str]] = []
    last = threading.Event()

    def completed(result: int, mismatch: int) -> None:
        results.append((result, threading.current_thread().name))
        if len(results) == 200:
            last.set()

    buffers = [bytearray(b"%04d" % n * 1024) for n in range(100)]
    for n, buffer in enumerate(buffers):
        image.aio(datapath.WRITE, n * 4096, 4096, buffer, completed)
    assert datapath.REAPER.drain(30)
    into = [bytearray(4096) for _ in buffers]
    for n, buffer in enumerate(into):
        image.aio(datapath.READ, n * 4096, 4096, buffer, completed)
    wait(last)
    assert datapath.REAPER.drain(30)
    assert into == buffers
    assert set(results) == {(0, "rbd-aio")}
    with pytest.raises(OSError) as failure:
        image.aio(datapath.READ, 0, 10, bytearray(5), completed)
    assert failure.value.errno == errno.EINVAL


def test_a_failing_callback_does_not_stop_completions(image: NativeImage, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(str(args.exc_value)))

    def fails(result: int, mismatch: int) -> None:
        raise ValueError("mine")

    done = threading.Event()
    image.aio(datapath.FLUSH, 0, 0, None, fails)
    image.aio(datapath.FLUSH, 0, 0, None, lambda result, mismatch: done.set())
    wait(done)
    assert seen == ["mine"]


def test_a_blocked_image_parks_requests_until_unblocked(image: NativeImage) -> None:
    image.block(1, 30)
    done = threading.Event()
    image.aio(datapath.WRITE, 0, 4, b"late", lambda result, mismatch: done.set())
    assert image.stats().parked == 1
    assert image.read(0, 4) == bytes(4)
    image.block(3, 30)
    image.unblock(3)
    assert not done.is_set()
    image.unblock(1)
    wait(done)
    assert image.read(0, 4) == b"late"
    assert image.stats().parked == 0


def test_a_write_without_the_lock_waits_for_a_view_with_it(open_data: Opener) -> None:
    data = open_data()
    asked, written = threading.Event(), threading.Event()
    image = NativeImage(spec(data, need_lock=True), asked.set)
    image.aio(datapath.WRITE, 0, 2, b"ok", lambda result, mismatch: written.set())
    wait(asked)
    assert not written.is_set()
    image.publish(spec(data))
    wait(written)
    assert image.read(0, 2) == b"ok"
    image.close()


def test_lost_events_reach_every_handler() -> None:
    seen: list[tuple[str, int]] = []
    EVENTS.on_image(1 << 40, lambda kind, value: seen.append(("image", kind)))
    EVENTS.on_export(1 << 40, lambda kind, value: seen.append(("export", kind)))
    EVENTS._deliver(LOST, 0, 0)
    EVENTS._deliver(LOCK_NEEDED, 1 << 40, 0)
    EVENTS.forget_image(1 << 40)
    EVENTS.forget_export(1 << 40)
    assert seen == [("image", LOST), ("export", LOST), ("image", LOCK_NEEDED)]


def test_a_fenced_image_fails_waiting_and_new_requests(image: NativeImage) -> None:
    results: list[int] = []
    done = threading.Event()

    def completed(result: int, mismatch: int) -> None:
        results.append(result)
        done.set()

    image.block(3, 30)
    image.aio(datapath.READ, 0, 4, bytearray(4), completed)
    image.fence(errno.ESHUTDOWN)
    wait(done)
    image.unblock(3)
    assert results == [-errno.ESHUTDOWN]
    for call in (lambda: image.read(0, 1), image.flush, lambda: image.runs(0, 1)):
        with pytest.raises(OSError) as failure:
            call()
        assert failure.value.errno == errno.ESHUTDOWN


def test_statistics_count_requests_and_their_time(image: NativeImage) -> None:
    for n in range(20):
        image.write(n * 4096, bytes(4096))
    image.read(0, 100)
    stats = image.stats()
    assert (stats.write.operations, stats.write.bytes, stats.write.failed) == (20, 81920, 0)
    assert sum(stats.write.histogram) == 20
    assert stats.write.total_ns > 0
    assert (stats.read.operations, stats.read.bytes) == (1, 100)
    assert stats.in_flight == stats.parked == 0


def test_flatten_copies_only_what_is_missing(open_data: Opener) -> None:
    base = open_data()
    parent = NativeImage(spec(base), unexpected)
    parent.write(0, b"parent")
    parent.write(2 << ORDER, b"parent")
    parent.close()
    image = NativeImage(spec(open_data(), parent=spec(base, snap_id=1), overlap=SIZE), unexpected)
    image.write(2 << ORDER, b"child")
    assert [image.copyup(n) for n in range(3)] == [True, False, False]
    assert image.copyup(0) is False
    assert image.copyup(1 << 40) is False
    assert image.read(2 << ORDER, 8) == b"childt\0\0"
    image.close()


def test_throttled_requests_wait(image: NativeImage) -> None:
    image.throttle(0, 1)
    image.read(0, 4096)
    done = threading.Event()
    image.aio(datapath.READ, 0, 4096, bytearray(4096), lambda result, mismatch: done.set())
    assert image.stats().parked == 1
    assert not done.is_set()
    image.throttle(0, 0)
    wait(done)


def test_a_failed_flush_fences_the_image_and_is_reported(open_data: Opener) -> None:
    image = NativeImage(spec(open_data(fault="flush:nth=1:errno=5")), unexpected)
    reported: list[tuple[int, int]] = []
    done = threading.Event()

    def handler(kind: int, value: int) -> None:
        reported.append((kind, value))
        done.set()

    EVENTS.on_image(image.id, handler)
    image.write(0, b"x")
    for _ in range(2):
        with pytest.raises(OSError) as failure:
            image.flush()
        assert failure.value.errno == errno.EIO
    wait(done)
    assert reported == [(IO_ERROR, -errno.EIO)]
    image.close()


EXIT = """
import sys
sys.path[:0] = {path!r}
from test_datapath import *
error = ffi.new("int *")
data = DataObjects(None, "rbd_data.1", ORDER)
data.native = NativeData(lib.rbdn_layout_open({folder!r}.encode(), ORDER, 1, error), True)
image = NativeImage(spec(data), unexpected)
def completed(result, mismatch):
    print("completed", result, flush=True)
for n in range(50):
    image.aio(datapath.WRITE, n << ORDER, 4096, bytes(4096), completed)
"""


def test_the_interpreter_ends_while_requests_are_under_way(tmp_path: Path) -> None:
    script = EXIT.format(path=[str(Path(__file__).parent)], folder=str(tmp_path / "data"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "completed 0\n" * 50

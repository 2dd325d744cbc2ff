"""The C engine as a data path: views go in, requests go in, completions and events come out.

A call that waits gives up the GIL; an asynchronous one is completed by a single reaper thread for the whole process.
Source: native/ffi/api_engine.h. Failures are OSError with the engine's errno.
"""

from __future__ import annotations

import atexit
import errno
import itertools
import os
import select
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from librbd_py.format.logs import logger
from librbd_py.format.values import dataclass
from librbd_py.native import check, ffi, lib

from .events import EVENTS, IO_ERROR, LOCK_NEEDED, LOST, OBJECT_WANTED, READ_ERROR
from .view import NO_MAP, ObjectMapKeeper, ViewSpec

if TYPE_CHECKING:
    from concurrent.futures import Executor

READ, WRITE, DISCARD, WRITE_ZEROES, WRITESAME, COMPARE_AND_WRITE, FLUSH = range(7)  # enum req_type
KINDS = dict(enumerate(("read", "write", "discard", "write_zeroes", "writesame", "compare_and_write", "flush")))
FUA, UNMAP, EXACT = 1, 2, 4  # enum req_flags
RUN_HOLE, RUN_ZERO = 1, 2  # enum run_flags
BUCKETS = 40  # of a latency histogram
EXIT_SECONDS = 5.0  # how long the interpreter's exit waits for requests whose buffers are Python's

_uncleared = ffi.new_allocator(should_clear_after_alloc=False)  # for buffers that a read fills

Callback = Callable[[int, int], None]  # (result: 0 or -errno, mismatch offset), on the reaper thread


@dataclass(frozen=True)
class OpStats:
    """One kind of request since the image was opened. `histogram[b]`: latencies in [2^b, 2^(b+1)) nanoseconds."""

    operations: int
    bytes: int
    failed: int
    total_ns: int
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Stats:
    read: OpStats
    write: OpStats
    discard: OpStats
    write_zeroes: OpStats
    writesame: OpStats
    compare_and_write: OpStats
    flush: OpStats
    idle_ns: int
    last: str  # kind of the last request that ended, by the names above; "" when none did
    in_flight: int
    parked: int


class View:
    """A `rbdn_view` and what it borrows: the stores' handles stay open while the ViewSpec is referenced."""

    def __init__(self, spec: ViewSpec) -> None:
        self.spec = spec
        self._parent = View(spec.parent) if spec.parent is not None and spec.overlap else None
        assert spec.data.native is not None
        config = ffi.new("rbdn_view_config *")
        snaps = ffi.new("uint64_t[]", list(spec.snapc.ids) or 1)
        config.size = spec.size
        config.order = spec.layout.order
        config.stripe_unit = spec.layout.stripe_unit
        config.stripe_count = spec.layout.stripe_count
        config.store = spec.data.native.handle
        config.snap_id = spec.snap_id
        config.snap_seq = spec.snapc.seq
        config.snaps = snaps
        config.snap_count = len(spec.snapc.ids)
        config.read_only = spec.read_only
        config.need_lock = spec.need_lock
        config.parent = self._parent.pointer if self._parent is not None else ffi.NULL
        config.overlap = spec.overlap if self._parent is not None or spec.fetch is not None else 0
        config.fetch = spec.fetch is not None
        config.discard_granularity = spec.discard_granularity
        error = ffi.new("int *")
        self.pointer: Any = lib.rbdn_view_new(config, error)
        if not self.pointer:
            self.release()
            check(error[0], "view of the image")

    def release(self) -> None:
        """Gives back this reference; the engine keeps its own."""
        pointer, self.pointer = self.pointer, ffi.NULL  # first: an interrupt must not lead to a second put
        if pointer:
            lib.rbdn_view_put(pointer)
        if self._parent is not None:
            self._parent.release()
            self._parent = None


class NativeMap(ObjectMapKeeper):
    """The HEAD object map in C, where the store asks and changes it with every request. Who changes objects past the
    data path says it here. The caller owns the map's lock, the map is valid, and no write runs."""

    def __init__(
        self, store: Any, pool_id: int, image_id: str, states: bytes, *, fast_diff: bool, assert_locked: bytes
    ) -> None:
        """`store`: `rbdn_store *`; `pool_id`: of the header; `assert_locked`: input of lock.assert_locked."""
        self._store = store
        config = ffi.new("rbdn_object_map *")
        name = ffi.new("char[]", image_id.encode())
        config.pool_id = pool_id
        config.image_id = name
        config.states = ffi.from_buffer("uint8_t[]", states)
        config.count = len(states)
        config.fast_diff = fast_diff
        config.assert_locked = ffi.from_buffer(assert_locked)
        config.assert_len = len(assert_locked)
        check(lib.rbdn_map_start(store, config), "object map")

    def exists(self, objno: int) -> None:
        check(lib.rbdn_map_change(self._store, objno, 1), "object map")

    def pending(self, objno: int) -> None:
        check(lib.rbdn_map_change(self._store, objno, 2), "object map")

    def gone(self, objno: int) -> None:
        check(lib.rbdn_map_change(self._store, objno, 0), "object map")

    @property
    def broken(self) -> bool:
        return bool(self._store) and lib.rbdn_map_broken(self._store) == 1

    def stop(self) -> None:
        if self._store:
            check(lib.rbdn_map_stop(self._store), "object map")
            self._store = ffi.NULL


class Reaper:
    """Completions of asynchronous requests, on one thread a process, started with the first request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)  # notified when nothing is waited for
        self._tokens = itertools.count(1)
        self._waiting: dict[int, tuple[Callback, Any]] = {}
        self._thread: threading.Thread | None = None

    def expect(self, callback: Callback, keep: Any) -> int:
        """A token for a request whose buffers `keep` holds alive."""
        with self._lock:
            token = next(self._tokens)
            self._waiting[token] = (callback, keep)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rbd-aio", daemon=True)
                self._thread.start()
                atexit.register(self.drain, EXIT_SECONDS)
            return token

    def forget(self, token: int) -> None:
        """The request was not started."""
        with self._idle:
            del self._waiting[token]
            if not self._waiting:
                self._idle.notify_all()

    def drain(self, seconds: float) -> bool:
        """Waits until every request has completed and its callback has returned; False after `seconds`. Until then the
        engine writes into Python's buffers. Not from a callback."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._waiting, seconds)

    def _run(self) -> None:
        fd = check(lib.rbdn_aio_fd(), "completions")
        found = ffi.new("rbdn_completion[64]")
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while True:
            poll.poll()
            try:
                os.read(fd, 8)
            except BlockingIOError:
                continue
            while count := lib.rbdn_aio_reap(found, 64):
                for at in range(count):
                    self._complete(found[at].token, found[at].result, found[at].mismatch)

    def _complete(self, token: int, result: int, mismatch: int) -> None:
        with self._lock:
            callback, _keep = self._waiting[token]
        try:
            callback(result, mismatch)
        except Exception as failure:  # a callback's defect must not end the completions of everybody else
            threading.excepthook(threading.ExceptHookArgs((type(failure), failure, failure.__traceback__, None)))
        with self._idle:
            del self._waiting[token]
            if not self._waiting:
                self._idle.notify_all()


REAPER = Reaper()
_IDS = itertools.count(1)
FETCHERS = 4  # objects that are brought at once, of all images
log = logger("librbd_py.image")


def _happened(image: weakref.ref[NativeImage], lock_needed: Callable[[], None], kind: int, value: int) -> None:
    made = image()
    if kind in (LOCK_NEEDED, LOST):
        lock_needed()
    elif kind in (IO_ERROR, READ_ERROR) and made is not None and made.on_error is not None:
        made.on_error(kind == READ_ERROR, -value)
    if kind in (OBJECT_WANTED, LOST) and made is not None:
        made.fetch_wanted()


@cache
def _fetchers() -> Executor:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(FETCHERS, "rbdpy-fetch")


class NativeImage:
    """One image in the engine. `lock_needed` runs on the event thread when a write waits for the exclusive lock; it
    must not block. `on_error(read, errno)`, where set, runs there when the store fails requests.

    States: open -> closed; after close() every call raises EBADF.

    Any thread may close while others are in the middle of a call: those fail with ESHUTDOWN or have completed. The
    engine's memory goes with the last reference to its pointer, and a call in progress holds one.
    """

    def __init__(self, spec: ViewSpec, lock_needed: Callable[[], None]) -> None:
        self.id = next(_IDS)
        self._spec = spec
        self._fetch = spec.fetch  # kept when a view has none any more: requests of older ones may still ask
        self.object_map: ObjectMapKeeper = NO_MAP
        self.on_error: Callable[[bool, int], None] | None = None
        EVENTS.on_image(self.id, partial(_happened, weakref.ref(self), lock_needed))
        error = ffi.new("int *")
        view = View(spec)
        try:
            image = lib.rbdn_image_new(self.id, view.pointer, error)
        finally:
            view.release()
        if not image:
            EVENTS.forget_image(self.id)
            check(error[0], "image in the data plane")
        self._image = ffi.gc(image, lib.rbdn_image_free)

    @property
    def pointer(self) -> Any:
        """The `rbdn_image *` that exports serve. EBADF after close()."""
        image = self._image
        if not image:
            raise OSError(errno.EBADF, "the image is closed")
        return image

    # --- view and gate

    def publish(self, spec: ViewSpec) -> None:
        view = View(spec)
        try:
            check(lib.rbdn_image_publish(self.pointer, view.pointer), "publish a view")
            self._spec = spec
            self._fetch = spec.fetch or self._fetch
        finally:
            view.release()

    def fetch_wanted(self) -> None:
        """Starts bringing the objects that requests wait for. Does not block."""
        image = self._image
        objno, token = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        while image and lib.rbdn_image_wanted(image, objno, token) == 1:
            _fetchers().submit(self._fetch_one, image, objno[0], token[0])

    def _fetch_one(self, image: Any, objno: int, token: int) -> None:
        what, content = -errno.EIO, b""
        try:
            found = self._fetch(objno) if self._fetch is not None else True
            what = 2 if isinstance(found, bytes) else 0 if found else 1
            content = found if isinstance(found, bytes) else b""
        except OSError as failure:
            log.warning("image in the data plane, object %d: it cannot be brought: %s", objno, failure)
            what = -(failure.errno or errno.EIO)
        except Exception:
            log.exception("object %d cannot be brought", objno)
        lib.rbdn_image_fetched(image, token, what, content, len(content))

    def block(self, which: int, timeout: float) -> None:
        """Parks new requests (1 writes, 3 everything) and waits for those admitted; ETIMEDOUT leaves it open again."""
        image = self.pointer
        result = lib.rbdn_image_block(image, which, int(timeout * 1000))
        if result < 0:
            if result == -errno.ETIMEDOUT:
                lib.rbdn_image_unblock(image, which)
            check(result, "requests in flight do not end")

    def settle(self, timeout: float) -> None:
        """Waits until no request uses a view published earlier: their stores may then be closed. ETIMEDOUT."""
        check(lib.rbdn_image_settle(self.pointer, int(timeout * 1000)), "requests in flight do not end")

    def unblock(self, which: int) -> None:
        check(lib.rbdn_image_unblock(self.pointer, which), "unblock the image")

    def fence(self, code: int) -> None:
        check(lib.rbdn_image_fence(self.pointer, -code), "fence the image")

    def throttle(self, iops: int, bytes_per_second: int) -> None:
        """0 = unlimited."""
        check(lib.rbdn_image_throttle(self.pointer, iops, bytes_per_second), "throttle the image")

    def limits(self, limits: Sequence[tuple[int, int]]) -> None:
        """The image's own, beside `throttle`: (rate, what may come at once) of requests and bytes a second, of all, of
        reads, of the rest; rate 0 = unlimited."""
        check(lib.rbdn_image_limits(self.pointer, ffi.new("rbdn_limit[6]", list(limits))), "limit the image")

    @property
    def in_use(self) -> bool:
        """An export serves it."""
        image = self._image
        return bool(image) and lib.rbdn_image_users(image) > 0

    def close(self) -> None:
        """EBUSY while an export serves the image. Idempotent."""
        image = self._image
        if image:
            check(lib.rbdn_image_shut(image), "close the image")
            self._image = ffi.NULL
            EVENTS.forget_image(self.id)

    # --- requests that wait

    def _io(self, kind: int, offset: int, length: int, buffer: Any = None, flags: int = 0, what: str = "") -> int:
        size = memoryview(buffer).nbytes if buffer is not None else 0
        pointer = ffi.from_buffer(buffer) if size else ffi.NULL
        mismatch = ffi.new("uint64_t *")
        result = int(lib.rbdn_io(self.pointer, kind, offset, length, pointer, size, flags, mismatch))
        if result == -errno.EILSEQ and kind == COMPARE_AND_WRITE:
            return int(mismatch[0])
        check(result, what)
        return -1

    def read(self, offset: int, length: int) -> bytes:
        buffer = ffi.buffer(_uncleared("char[]", length))
        self._io(READ, offset, length, buffer, what="read")
        return bytes(buffer)

    def read_into(self, offset: int, buffer: Any) -> None:
        """Fills a writable buffer."""
        self._io(READ, offset, memoryview(buffer).nbytes, buffer, what="read")

    def write(self, offset: int, data: bytes | bytearray, *, fua: bool = False) -> None:
        self._io(WRITE, offset, len(data), data, FUA if fua else 0, "write")

    def discard(self, offset: int, length: int, *, exact: bool = False) -> None:
        self._io(DISCARD, offset, length, flags=EXACT if exact else 0, what="discard")

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._io(WRITE_ZEROES, offset, length, flags=UNMAP if unmap else 0, what="write zeroes")

    def writesame(self, offset: int, length: int, pattern: bytes) -> None:
        self._io(WRITESAME, offset, length, pattern, what="write same")

    def compare_and_write(self, offset: int, compare: bytes, data: bytes) -> int | None:
        """None when written, else the image offset of the first difference."""
        found = self._io(COMPARE_AND_WRITE, offset, len(data), compare + data, what="compare and write")
        return None if found < 0 else offset + found

    def flush(self) -> None:
        self._io(FLUSH, 0, 0, what="flush")

    def copyup(self, objno: int) -> bool:
        """Copies one object of the parent into the image unless it exists there; True when something was copied."""
        return check(lib.rbdn_image_copyup(self.pointer, objno), "copy from the parent") == 0

    def pump(
        self,
        fd: int,
        offset: int,
        length: int,
        *,
        into_image: bool,
        position: int | None,
        step: int,
        threads: int,
        grain: int,
        chunk: int,
    ) -> tuple[int, int, bool]:
        """Moves `length` bytes between the image and a file, where `offset` is at `position` (None: a pipe, into the
        image only). Zeros of `grain` bytes, aligned in their `chunk`, are not written (0: all is). `step`: bytes each
        thread moves at once.

        Returns the bytes moved, how many of them were zeros and not written, and whether the file ended; fewer without
        its end: the pipe is silent for 200 ms."""
        what = ffi.new("rbdn_pump *")
        what.fd, what.off, what.len = fd, offset, length
        setattr(what, "in", into_image)
        what.stream, what.pos = position is None, position or 0
        what.step, what.threads, what.grain, what.chunk = step, threads, grain, chunk
        out = ffi.new("rbdn_pumped *")
        moved = lib.rbdn_image_pump(self.pointer, what, out)
        if moved < 0:
            raise OSError(-moved, f"{'import' if into_image else 'export'} of {length} bytes at {offset}")
        return int(moved), int(out.left_out), bool(out.ended)

    # --- requests that complete later

    def aio(self, kind: int, offset: int, length: int, buffer: Any, callback: Callback, flags: int = 0) -> None:
        """Starts a request; `callback(result, mismatch)` runs once, on the reaper thread. `buffer` (bytes, or a
        bytearray to read into) is kept until then. OSError: not started, no callback."""
        image = self.pointer
        size = memoryview(buffer).nbytes if buffer is not None else 0
        pointer = ffi.from_buffer(buffer) if size else ffi.NULL
        token = REAPER.expect(callback, (buffer, pointer))
        result = lib.rbdn_aio(image, kind, offset, length, pointer, size, flags, token)
        if result < 0:
            REAPER.forget(token)
            check(result, "start a request")

    # --- facts

    def runs(self, offset: int, length: int, most: int = 1024) -> list[tuple[int, int]]:
        """(length, RUN_HOLE | RUN_ZERO) in order from `offset`; short of the range when there are more than `most`."""
        found = ffi.new("rbdn_run[]", most)
        count = check(lib.rbdn_image_runs(self.pointer, offset, length, found, most), "allocation of the image")
        return [(found[at].len, found[at].flags) for at in range(count)]

    def stats(self) -> Stats:
        raw = ffi.new("rbdn_stats *")
        check(lib.rbdn_image_stats(self.pointer, raw), "statistics")

        def one(kind: int) -> OpStats:
            histogram = tuple(raw.histogram[kind][bucket] for bucket in range(BUCKETS))
            return OpStats(raw.ops[kind], raw.bytes[kind], raw.failed[kind], raw.total_ns[kind], histogram)

        return Stats(
            read=one(READ),
            write=one(WRITE),
            discard=one(DISCARD),
            write_zeroes=one(WRITE_ZEROES),
            writesame=one(WRITESAME),
            compare_and_write=one(COMPARE_AND_WRITE),
            flush=one(FLUSH),
            idle_ns=raw.idle_ns,
            last=KINDS.get(raw.last_type, ""),
            in_flight=raw.in_flight,
            parked=raw.parked,
        )

"""`rbdpy bench`: asynchronous requests from one thread, a line a second, a summary at the end."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import Any

from librbd_py.cli.arguments import IMAGE
from librbd_py.cli.failure import Failure
from librbd_py.cli.output import size_text
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session, failing


@verb(
    "bench",
    "Simple benchmark.",
    *IMAGE,
    "io-size",
    "io-threads",
    "io-total",
    "io-pattern",
    "rw-mix-read",
    "io-type",
    spec=("image-spec",),
)
def bench(session: Session) -> None:
    given = session.given
    if "io-type" not in given:
        raise Failure("rbd: --io-type must be specified.", 22)
    kind = "readwrite" if given["io-type"] == "rw" else given["io-type"]
    spec = session.spec(snap="may" if kind == "read" else "no")
    io_size, depth = given.get("io-size", 4096), given.get("io-threads", 16)
    total, mix = given.get("io-total", 1 << 30), given.get("rw-mix-read", 50)
    if not io_size:
        raise Failure("rbd: --io-size should be greater than zero.", 22)
    if not depth:
        raise Failure("rbd: --io-threads should be greater than zero.", 22)
    if mix > 100:
        raise Failure("rbd: --rw-mix-read should not be larger than 100.", 22)
    pattern = given.get("io-pattern", "seq")
    name = {"seq": "sequential", "rand": "random", "full-seq": "full sequential"}[pattern]
    with session.image(spec, read_only=kind == "read", snap=True) as image, failing("failed", "bench "):
        size = image.size()
        if io_size > size:
            session.say(f"rbd: io-size {size_text(io_size)} larger than image size {size_text(size)}")
            raise OSError(22, "")
        if io_size >= 1 << 32:
            session.say("rbd: io-size should be less than 4G")
            raise OSError(22, "")
        shown = f"{kind} read:write={mix}:{100 - mix}" if kind == "readwrite" else kind
        print(f"bench  type {shown} io_size {io_size} io_threads {depth} bytes {total} pattern {name}")
        print("  SEC       OPS   OPS/SEC   BYTES/SEC", flush=True)
        _Bench(image, size, io_size, depth, kind, pattern, mix).run(-(-total // io_size))


class _Bench:
    def __init__(self, image: Any, size: int, io_size: int, depth: int, kind: str, pattern: str, mix: int) -> None:
        self._image, self._size, self._io_size, self._depth = image, size, io_size, min(depth, 1024)
        self._kind, self._pattern, self._mix = kind, pattern, mix
        self._slots = threading.Semaphore(self._depth)
        self._failed: list[int] = []
        self._done = {True: 0, False: 0}  # reads, writes

    def _offset(self, number: int) -> int:
        blocks = self._size // self._io_size
        if self._pattern == "rand":
            return random.randrange(blocks) * self._io_size
        if self._pattern == "full-seq":
            return number % blocks * self._io_size
        # as rbd: every one of `depth` streams runs through its own part of the image
        stream, step = number % self._depth, number // self._depth
        part = max(blocks // self._depth, 1)
        return (stream * part + step % part) % blocks * self._io_size

    def _complete(self, completion: Any, read: bool) -> None:
        result = completion.get_return_value()
        if result is not None and result < 0:
            self._failed.append(-result)
        self._done[read] += 1
        self._slots.release()

    def run(self, count: int) -> None:
        started = said = time.monotonic()
        pattern = bytes(random.Random(1).randbytes(self._io_size))
        for number in range(count):
            self._slots.acquire()
            if self._failed:
                self._slots.release()
                break
            read = self._kind == "read" or (self._kind == "readwrite" and random.randrange(100) < self._mix)
            if read:
                self._image.aio_read(self._offset(number), self._io_size, lambda c, *_: self._complete(c, True))
            else:
                self._image.aio_write(pattern, self._offset(number), lambda c, *_: self._complete(c, False))
            now = time.monotonic()
            if now - said >= 1:
                said = now
                self._line(int(now - started), sum(self._done.values()), now - started)
        for _ in range(self._depth):
            self._slots.acquire()
        if self._failed:
            raise Failure(f"rbd: bench: I/O error: ({self._failed[0]}) {os.strerror(self._failed[0])}", self._failed[0])
        if self._kind != "read":
            self._image.flush()
        elapsed = max(time.monotonic() - started, 1e-9)
        done = sum(self._done.values())
        print(
            f"elapsed: {elapsed:.0f}   ops: {done}   ops/sec: {done / elapsed:.6g}   "
            f"bytes/sec: {size_text(int(done / elapsed * self._io_size))}/s"
        )
        if self._kind == "readwrite":
            for word, number in (("read", self._done[True]), ("write", self._done[False])):
                rate = number / elapsed
                print(
                    f"{word}_ops: {number}   {word}_ops/sec: {rate:.6g}   "
                    f"{word}_bytes/sec: {size_text(int(rate * self._io_size))}/s"
                )

    def _line(self, second: int, ops: int, elapsed: float) -> None:
        rate = ops / elapsed
        print(f"{second:5d} {ops:9d} {rate:9.6g}   {size_text(int(rate * self._io_size))}/s", flush=True)

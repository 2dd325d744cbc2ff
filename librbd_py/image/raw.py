"""Format 1, an image's content alone, to and from files and pipes. The bytes go through C (native/engine/pump.c)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO

from librbd_py.format.object_map import NONEXISTENT
from librbd_py.format.values import dataclass, replace
from librbd_py.native import check, lib

from .ahead import at_once, in_order, is_local
from .datapath import NativeImage
from .diff import HUGE, diff_iterate
from .handle import ImageHandle
from .io import before_write
from .progress import Progress, report
from .resize import known_states, resize
from .streams import PIECE, SPARSE, put, runs

AT_ONCE = 64 << 20  # bytes between two reports of progress
FAR_AT_ONCE = 256 << 20  # of a store at the other end of a network: all its round trips end before the next begin
LOCAL_STEP = 256 << 10  # bytes: stays in a CPU's cache between being read and being written
LOCAL_THREADS = 2
DIRECT_STEP = 1 << 20  # bytes written past the page cache at once
DIRECT_THREADS = 4  # these wait for the disk, not for a CPU
MIN_STEP, MAX_STEP = 1 << 20, 8 << 20  # bytes, of a store at the other end of a network
WRITE_STEP = 2 << 20  # bytes written there at once: twice as much took half as long again
BLOCK = 4096  # bytes of a file system
HOLE = 65536  # bytes of zeros that stay a hole in an exported file


@dataclass(frozen=True)
class _Pace:
    """How much is moved at once."""

    step: int  # bytes
    threads: int
    most: int  # bytes between two reports

    @classmethod
    def of(cls, handle: ImageHandle) -> _Pace:
        if is_local(handle):
            return cls(LOCAL_STEP, min(LOCAL_THREADS, os.cpu_count() or 1), AT_ONCE)
        step = max(MIN_STEP, min(handle.header.layout.object_size, MAX_STEP))
        return cls(step, at_once(handle), FAR_AT_ONCE if isinstance(handle.data, NativeImage) else AT_ONCE)

    @classmethod
    def into(cls, handle: ImageHandle) -> _Pace:
        """Of an import, which is durable at its end."""
        if is_local(handle) and handle.header.layout.object_size >= DIRECT_STEP:
            return cls(DIRECT_STEP, DIRECT_THREADS, AT_ONCE)
        pace = cls.of(handle)
        return replace(pace, step=min(pace.step, WRITE_STEP))


_Range = Callable[[int, int], object]  # offset, length


class _Room:
    """Room on the disk, taken ahead of writing as long as all of it is used. What refuses is not asked again."""

    def __init__(self, take: _Range | None, give_back: _Range) -> None:
        """Both are called with offset and length; `take` None: there is none to be had."""
        self._take = take
        self._give_back = give_back
        self._dense = False
        self._refused = take is None

    @contextmanager
    def for_(self, offset: int, length: int) -> Iterator[list[int]]:
        """The caller adds up what it did not write of these bytes."""
        taken = False
        if self._take is not None and self._dense and not self._refused:
            try:
                self._take(offset, length)
                taken = True
            except OSError:
                self._refused = True
        unused: list[int] = []
        yield unused
        self._dense = not sum(unused)
        if taken and not self._dense:
            self._give_back(offset, length)


def _room_in_file(fd: int) -> _Room:
    return _Room(
        lambda offset, length: check(lib.rbdn_file_reserve(fd, offset, length), "room for the export"),
        lambda offset, length: check(lib.rbdn_file_give_back(fd, offset, length), "room for the export"),
    )


def _room_in_image(handle: ImageHandle) -> _Room:
    """None to be had where it is not in files of this machine, or striped."""
    native, layout = handle.objects.native, handle.header.layout
    if native is None or native.reserve is None or layout.stripe_count != 1:
        return _Room(None, lambda offset, length: None)
    reserve, give_back, grain = native.reserve, native.give_back, layout.object_size

    def objects(call: _Range, offset: int, length: int) -> None:
        first, last = -(-offset // grain), (offset + length) // grain
        if first < last:
            call(first, last - first)

    return _Room(partial(objects, reserve), partial(objects, give_back))


# --- out


def export_raw(
    handle: ImageHandle,
    fd: int,
    progress: Progress | None = None,
    *,
    begin: int = 0,
    reached: Callable[[int], object] | None = None,
) -> None:
    """Into a file: holes stay holes. The file holds what the image does up to `begin` and nothing behind it.
    `reached(offset)` is called when everything before `offset` was moved."""
    size = handle.header.size_at(handle.snap_id)
    if size >= 1 << 63:
        raise OSError(errno.EFBIG, f"no file is as large as the {size} bytes that the image claims")
    pace, room = _Pace.of(handle), _room_in_file(fd)
    for offset, length in _pieces(_data(handle, begin, size), pace.most):
        with room.for_(offset, length) as unused:
            unused += _out(handle, fd, offset, length, pace)
        report(progress, offset + length, size)
        if reached is not None:
            reached(offset + length)
    os.ftruncate(fd, size)


def _out(handle: ImageHandle, fd: int, offset: int, length: int, pace: _Pace) -> Iterator[int]:
    """Yields lengths of zeros that were not written."""
    if isinstance(handle.data, NativeImage):
        _, left_out, _ = handle.data.pump(
            fd,
            offset,
            length,
            into_image=False,
            position=offset,
            step=pace.step,
            threads=pace.threads,
            grain=HOLE,
            chunk=HOLE,
        )
        yield left_out
        return
    data = handle.data.read(offset, length)
    for at, count, is_data in runs(data, HOLE):
        if is_data:
            _write_at(fd, memoryview(data)[at : at + count], offset + at)
        else:
            yield count


def _data(handle: ImageHandle, begin: int, size: int) -> Iterator[tuple[int, int]]:
    """Where there may be data, ascending. A store at the other end of a network is asked nothing for it: reading what
    is not there costs it as little as saying so."""
    if begin >= size:
        return
    huge = (size - begin) // handle.header.layout.object_size > HUGE
    if huge or is_local(handle) or not isinstance(handle.data, NativeImage):
        rows: list[tuple[int, int]] = []
        diff_iterate(handle, begin, size - begin, None, lambda at, count, _: rows.append((at, count)))
        yield from rows
        return
    header = handle.header
    plain = header.layout.stripe_count == 1 and not header.overlap_at(handle.snap_id)
    states = known_states(handle, handle.snap_id) if plain else None
    if states is None:
        yield begin, size - begin
        return
    grain = handle.header.layout.object_size
    for objno in range(begin // grain, min(len(states), -(-size // grain))):
        if states[objno] != NONEXISTENT:
            first = max(objno * grain, begin)
            yield first, min((objno + 1) * grain, size) - first


def _pieces(rows: Iterator[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """Neighbours joined, at most `most` bytes in one."""
    start = end = 0
    for offset, length in rows:
        if offset != end:
            yield from _cut(start, end, most)
            start = offset
        end = offset + length
    yield from _cut(start, end, most)


def _cut(start: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    while start < end:
        stop = min((start // most + 1) * most, end)
        yield start, stop - start
        start = stop


def export_pipe(handle: ImageHandle, write: Callable[[bytes], object], progress: Progress | None = None) -> None:
    """Into a pipe: all bytes. The next ones are read while it takes these."""
    size = handle.header.size_at(handle.snap_id)

    def piece(at: int) -> bytes:
        return handle.data.read(at, min(PIECE, size - at))

    for at, data in in_order(range(0, size, PIECE), piece, at_once(handle)):
        write(data)
        report(progress, at + len(data), size)


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


# --- in


def import_raw(
    handle: ImageHandle,
    fd: int,
    size: int,
    sparse: int = SPARSE,
    progress: Progress | None = None,
    *,
    begin: int = 0,
    reached: Callable[[int], object] | None = None,
) -> None:
    """From a file of `size` bytes into an image of that size that holds nothing from `begin` on. `reached(offset)` is
    called when everything before `offset` was moved."""
    before_write(handle)
    pace, room = _Pace.into(handle), _room_in_image(handle)
    native = handle.objects.native
    grain = 1 if sparse and not BLOCK % sparse else handle.header.layout.object_size
    if native is not None:
        native.bulk(True)
    try:
        for offset, length in _pieces(_file_data(fd, begin, size, grain), pace.most):
            with room.for_(offset, length) as unused:
                moved, left_out = _in(handle, fd, offset, length, sparse, pace)
                unused.append(left_out + length - moved)
            if native is not None and native.write_back is not None:
                native.write_back()
            report(progress, offset + moved, size)
            if reached is not None:
                reached(offset + moved)
            if moved < length:
                break  # somebody made the file shorter
    finally:
        if native is not None:
            native.bulk(False)
    handle.data.flush()


def _in(handle: ImageHandle, fd: int, offset: int, length: int, sparse: int, pace: _Pace) -> tuple[int, int]:
    """(bytes moved, how many of them were zeros and not written)."""
    if not isinstance(handle.data, NativeImage):
        data = os.pread(fd, length, offset)
        put(handle, offset, data, sparse, zeroes=False)
        return len(data), 0
    moved, left_out, _ = handle.data.pump(
        fd,
        offset,
        length,
        into_image=True,
        position=offset,
        step=_step(pace, sparse),
        threads=pace.threads,
        grain=sparse,
        chunk=handle.header.layout.object_size,
    )
    return moved, left_out


def _step(pace: _Pace, sparse: int) -> int:
    """A step is no smaller than the zeros that are looked for."""
    return min(max(pace.step, sparse), 32 << 20)


def _file_data(fd: int, begin: int, size: int, grain: int) -> Iterator[tuple[int, int]]:
    """Where the file has data, in units of `grain`; all of it where holes cannot be asked for."""
    at = begin
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            stop = -(-os.lseek(fd, start, os.SEEK_HOLE) // grain) * grain
            start = max(start // grain * grain, at)
        except OSError as failure:
            if failure.errno != errno.ENXIO:
                yield at, size - at
            return
        if start < size:
            yield start, min(stop, size) - start
        at = stop


def import_pipe(handle: ImageHandle, source: BinaryIO, sparse: int = SPARSE) -> None:
    """From a pipe: the image grows with it."""
    before_write(handle)
    offset = 0
    pace = _Pace.of(handle)
    fd = source.fileno() if isinstance(handle.data, NativeImage) else -1
    ended = False
    while not ended:
        room = handle.header.size - offset
        if not room:
            resize(handle, max(offset + AT_ONCE, handle.header.size * 2))
            continue
        if isinstance(handle.data, NativeImage):
            moved, _, ended = handle.data.pump(
                fd,
                offset,
                min(room, AT_ONCE),
                into_image=True,
                position=None,
                step=_step(pace, sparse),
                threads=pace.threads,
                grain=sparse,
                chunk=handle.header.layout.object_size,
            )
        else:
            data = source.read(min(room, PIECE))
            put(handle, offset, data, sparse, zeroes=False)
            moved, ended = len(data), not data
        offset += moved
    if handle.header.size != offset:
        resize(handle, offset)
    handle.data.flush()

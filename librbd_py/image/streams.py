"""Images to and from files and pipes: everything (format 2), or what changed (diffs). `raw.py`: content alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator

from librbd_py.format import features as ft
from librbd_py.format import header as fh
from librbd_py.format import streams
from librbd_py.format.streams import BadStream, Extent, ImageHead, Named, Protection, Reader, Resized
from librbd_py.store.api import NOSNAP, Read

from . import cls, metadata, snapshots
from .ahead import at_once, in_order, is_local
from .datapath import NativeImage
from .diff import changes, diff_iterate
from .handle import ImageHandle
from .io import before_write
from .objects import ignoring
from .progress import Progress, report
from .resize import resize

PIECE = 4 << 20  # bytes read and written at once
SPARSE = 4096  # zeros of this length, aligned, are not written
_ZEROES = bytes(PIECE)
ROWS = 32  # of a diff, read one after the other
READY = 256 << 10  # bytes of a diff that are written at once
Row = tuple[int, int, bool]  # offset, length, data or zeros
Write = Callable[[bytes], object]
Say = Callable[[str], None]


def writer(fd: int) -> Write:
    """Writes all of a buffer, however little the file takes at once."""

    def write(data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]

    return write


# --- out


def export_diff(
    handle: ImageHandle,
    from_snapshot: str | int | None,
    write: Write,
    *,
    whole_object: bool = False,
    version: int = 1,
    progress: Progress | None = None,
) -> None:
    """What changed from the snapshot (None: since the image was empty) to what the handle shows. ENOENT, EINVAL."""
    header = handle.header
    size = header.size_at(handle.snap_id)
    end = None if handle.snap_id == NOSNAP else header.snaps[handle.snap_id]
    start = snapshots.find(header, from_snapshot) if isinstance(from_snapshot, str) else None
    if isinstance(from_snapshot, int):
        start = snapshots.by_id(header, from_snapshot)
    protected = end is not None and end.protection != fh.PROTECTION_UNPROTECTED
    from_name, to_name = (None if snap is None else snap.name for snap in (start, end))
    write(streams.diff_head(version, from_name, to_name, size, protected))
    if start is not None and start.id > handle.snap_id:
        raise OSError(errno.EINVAL, "the snapshot is newer than what the image is open at")
    since = start.id if start is not None else 0
    rows = changes(handle, 0, size, since, whole_object=whole_object) if size else ()

    together = _is_plain(handle)
    grain = header.layout.object_size if together else 0

    def content(some: list[Row]) -> list[bytes]:
        if together and len(some) > 1:
            return _of_object(handle, some)
        return [handle.data.read(offset, length) if exists else b"" for offset, length, exists in some]

    ready = bytearray()
    for some, contents in in_order(_batches(rows, grain), content, at_once(handle)):
        for (offset, length, _), data in zip(some, contents, strict=True):
            exists = not is_zero(data)  # what is all zeros is a hole
            ready += streams.extent(offset, length, exists, version)
            if exists and len(data) >= READY:
                write(bytes(ready))
                ready.clear()
                write(data)
            elif exists:
                ready += data
            if len(ready) >= READY:
                write(bytes(ready))
                ready.clear()
            report(progress, offset, size)
    write(bytes(ready) + streams.END)


def _is_plain(handle: ImageHandle) -> bool:
    """Whether an object's bytes are the image's, and asking for them takes a round trip."""
    header = handle.header
    alone = header.layout.stripe_count == 1 and not header.overlap_at(handle.snap_id) and not header.migrates
    return alone and isinstance(handle.data, NativeImage) and not is_local(handle)


def _of_object(handle: ImageHandle, some: list[Row]) -> list[bytes]:
    """All rows of one object in one round trip."""
    grain = handle.header.layout.object_size
    wanted = [Read(offset % grain, length) for offset, length, exists in some if exists]
    found: Iterator[bytes] = iter(())
    with ignoring(errno.ENOENT):  # removed since: zeros
        oid = handle.objects.oid(some[0][0] // grain)
        found = iter(handle.data_ctx.read(oid, wanted, handle.snap_id) if wanted else ())
    return [next(found, b"").ljust(length, b"\0") if exists else b"" for _, length, exists in some]


def _batches(rows: Iterable[Row], grain: int) -> Iterator[list[Row]]:
    """Many small rows in one, so that each costs no thread's wake-up; of bytes no more than one large row may have, and
    within `grain` bytes of the image (0: anywhere)."""
    some: list[Row] = []
    total = 0
    for row in rows:
        if some and (len(some) == ROWS or total + row[1] > PIECE or (grain and some[0][0] // grain != row[0] // grain)):
            yield some
            some, total = [], 0
        some.append(row)
        total += row[1]
    if some:
        yield some


def is_zero(data: bytes | bytearray | memoryview) -> bool:
    size = len(data)
    if bytes(data[:SPARSE]) != _ZEROES[: min(size, SPARSE)]:
        return False
    return all(data[at : at + PIECE] == _ZEROES[: min(PIECE, size - at)] for at in range(0, size, PIECE))


def export_image(handle: ImageHandle, write: Write, progress: Progress | None = None) -> None:
    """Format 2: layout, metadata, and every snapshot as a diff from the one before. The handle is at HEAD."""
    header = handle.header
    image = ImageHead(
        header.order,
        header.features,
        header.layout.stripe_unit,
        header.layout.stripe_count,
        tuple(sorted(cls.metadata(handle.ctx, handle.oid).items())),
    )
    order = list(header.snaps)
    write(image.encode(len(order) + 1))
    before: int | None = None
    try:
        for number, snap_id in enumerate(order):
            handle.set_snapshot(snap_id)
            export_diff(handle, before, write, version=2)
            report(progress, number, len(order) + 1)
            before = snap_id
    finally:
        handle.set_snapshot(None)
    export_diff(handle, before, write, version=2)
    report(progress, len(order) + 1, len(order) + 1)


# --- in


def import_diff(
    handle: ImageHandle,
    source: Reader,
    *,
    version: int = 1,
    sparse: int = SPARSE,
    progress: Callable[[], object] | None = None,
    say: Say = lambda text: None,
) -> None:
    """Applies a diff to HEAD, then makes the snapshot it leads to. EINVAL: it begins at a snapshot the image lacks;
    EEXIST: the image has what it leads to. BadStream. A diff that broke off can be applied again."""
    name, protect = "", False
    for record in streams.read_diff(source, version, say):
        if isinstance(record, Named) and record.start:
            if handle.header.snap_named(record.name, fh.NAMESPACE_USER) is None:
                raise OSError(errno.EINVAL, f"start snapshot '{record.name}' does not exist in the image, aborting")
        elif isinstance(record, Named):
            if handle.header.snap_named(record.name, fh.NAMESPACE_USER) is not None:
                raise OSError(errno.EEXIST, f"end snapshot '{record.name}' already exists, aborting")
            name = record.name
        elif isinstance(record, Protection):
            protect = record.protected
        elif isinstance(record, Resized):
            if record.size != handle.header.size:
                resize(handle, record.size)
        else:
            _apply(handle, record, source, sparse)
        if progress is not None:
            progress()
    handle.data.flush()
    if name:
        snapshots.create(handle, name)
        if protect:
            snapshots.protect(handle, name)


def _apply(handle: ImageHandle, record: Extent, source: Reader, sparse: int) -> None:
    if record.offset + record.length > handle.header.size:
        raise BadStream(errno.EINVAL, f"an extent of {record.length} bytes at {record.offset} exceeds the image")
    before_write(handle)
    if not record.is_data:
        _zero(handle, record.offset, record.length)
        return
    offset = record.offset
    for piece in source.pieces(record.length, "write data"):
        put(handle, offset, piece, sparse, zeroes=True)
        offset += len(piece)


def _zero(handle: ImageHandle, offset: int, length: int) -> None:
    """Long runs of zeros are written only where there is something: a stream may claim an exabyte of them."""
    if length <= 16 * PIECE:
        handle.data.write_zeroes(offset, length)
        return
    rows: list[tuple[int, int]] = []

    def found(at: int, size: int, data: bool) -> None:
        if data:
            rows.append((at, size))

    diff_iterate(handle, offset, length, None, found)
    for at, size in rows:
        handle.data.write_zeroes(at, size)


def put(handle: ImageHandle, offset: int, data: bytes | bytearray, sparse: int, *, zeroes: bool) -> None:
    """Writes `data` but for aligned zeros of `sparse` bytes (0: writes all), which are zeroed only when `zeroes`."""
    for at, size, is_data in runs(data, sparse):
        if is_data:
            if size == len(data) and isinstance(handle.data, NativeImage):
                handle.data.write(offset, data)
            else:
                handle.data.write(offset + at, bytes(data[at : at + size]))
        elif zeroes:
            handle.data.write_zeroes(offset + at, size)


def runs(data: bytes | bytearray, grain: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, not zero) of alternating parts of `data`, at a granularity of `grain`."""
    size = len(data)
    if not grain or grain >= size:
        yield 0, size, not grain or not is_zero(data)
        return
    zero = _ZEROES[:grain] if grain <= PIECE else bytes(grain)
    begin, kind = 0, not data.startswith(zero)
    for at in range(grain, size, grain):
        left = size - at
        now = not data.startswith(zero if left >= grain else zero[:left], at)
        if now != kind:
            yield begin, at - begin, kind
            begin, kind = at, now
    yield begin, size - begin, kind


def import_metadata(handle: ImageHandle, image: ImageHead) -> None:
    for key, value in image.metadata:
        metadata.put(handle, key, value)


def importable(features: int) -> int:
    """Of the features an export names, what a new image is asked for; the rest follows from how it is made."""
    return features & ~(ft.INTERNAL | ft.STRIPINGV2)


def import_diffs(
    handle: ImageHandle,
    source: Reader,
    sparse: int = SPARSE,
    progress: Progress | None = None,
    say: Say = lambda text: None,
) -> None:
    """Format 2, behind its head: a diff for every snapshot and for the head. BadStream."""
    source.banner(streams.DIFFS_V2)
    count = source.u64("diff count")
    for number in range(count):
        import_diff(handle, source, version=2, sparse=sparse, say=say)
        report(progress, number + 1, count)

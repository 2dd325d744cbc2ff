"""A new image from a source: its content at every point, with a snapshot for each of the source's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from librbd_py.source import DATA, Extent, Source
from librbd_py.store.api import ObjectContext

from . import snapshots
from .diff import changes
from .directory import DEFAULTS, CreateOptions, create_unnamed, give_name
from .handle import ImageHandle
from .io import before_write
from .progress import Progress, report
from .resize import resize
from .streams import put
from .transfer_data import runs
from .trash import remove_from_trash

PIECE = 4 << 20  # bytes read at once
PARALLEL = 4  # reads at a time: a source may be far away
SPARSE = 4096  # aligned zeros of this length are not written
LOOKED_AT = 1 << 30  # bytes that are looked through at once for what has to be zeroed


def import_source(
    source: Source,
    ctx: ObjectContext,
    name: str,
    options: CreateOptions = DEFAULTS,
    progress: Progress | None = None,
    parallel: int = PARALLEL,
) -> str:
    """Returns the new image's id. It has its name when it is complete. EEXIST, and what the source and
    `directory.create` raise."""
    points: list[int | None] = [*range(len(source.snapshots)), None]
    sizes = [*(snap.size for snap in source.snapshots), source.size]
    image_id = create_unnamed(ctx, name, sizes[0], options)
    try:
        with ImageHandle.open(ctx, image_id=image_id) as dest:
            done, total = 0, sum(sizes)
            for point, since, size in zip(points, [None, *points], sizes, strict=False):
                if dest.header.size != size:
                    resize(dest, size)
                before_write(dest)
                for row, data in _read(source, point, since, size, parallel):
                    _copy(dest, row, data, fresh=since is None)
                    report(progress, done + row.offset, total)
                dest.data.flush()
                done += size
                if point is not None:
                    snapshots.create(dest, source.snapshots[point].name)
        give_name(ctx, name, image_id)
    except BaseException:
        remove_from_trash(ctx, image_id, force=True)
        raise
    return image_id


def _read(
    source: Source, point: int | None, since: int | None, size: int, parallel: int
) -> Iterator[tuple[Extent, bytes | None]]:
    """What has to be copied, in order and in pieces, read ahead; without data: zeros."""
    with ThreadPoolExecutor(max(parallel, 1), thread_name_prefix="import") as pool:
        coming: deque[tuple[Extent, Future[bytes] | None]] = deque()
        try:
            for piece in _pieces(source.extents(0, size, point, since) if size else iter(())):
                work = pool.submit(source.read, piece.offset, piece.length, point) if piece.kind is DATA else None
                coming.append((piece, work))
                if len(coming) > max(parallel, 1):
                    row, first = coming.popleft()
                    yield row, first.result() if first is not None else None
            while coming:
                row, first = coming.popleft()
                yield row, first.result() if first is not None else None
        finally:
            for _, work in coming:
                if work is not None:
                    work.cancel()


def _pieces(rows: Iterator[Extent]) -> Iterator[Extent]:
    for row in rows:
        if row.kind is not DATA:
            yield row
            continue
        at = row.offset
        while at < row.end:
            step = min(PIECE - at % PIECE, row.end - at)
            yield Extent(at, step, DATA)
            at += step


def _copy(dest: ImageHandle, row: Extent, data: bytes | None, *, fresh: bool) -> None:
    """Later points are compared with what is there: a source may know only that everything may have changed, and what
    did not is shared with the snapshot before."""
    if data is None:
        if not fresh:
            zero(dest, row.offset, row.length)
        return
    if fresh:
        put(dest, row.offset, data, SPARSE, zeroes=False)
        return
    for at, length in runs(dest.data.read(row.offset, row.length), data):
        put(dest, row.offset + at, data[at : at + length], SPARSE, zeroes=True)


def zero(dest: ImageHandle, offset: int, length: int) -> None:
    """Only where there is something: a range may be the whole of a large image."""
    end = offset + length
    for start in range(offset, end, LOOKED_AT):
        for at, size, data in list(changes(dest, start, min(LOOKED_AT, end - start), 0)):
            if data:
                dest.data.write_zeroes(at, size)

"""Commands that move or measure data: import, export, diff, du, bench."""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
import time
from typing import Any, BinaryIO

from librbd_py import rbd
from librbd_py.cli import sizes
from librbd_py.cli.cmd_image import creation, pool_spec
from librbd_py.cli.output import Progress, Rows, Section, Table, size_text
from librbd_py.cli.registry import (
    command,
    with_create,
    with_dest,
    with_format,
    with_image,
    with_progress,
    with_snap,
)
from librbd_py.cli.session import Failure, Session, code_of, failing, reason

STEP = 4 << 20  # bytes read or written at once


def with_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", help="file (or '-' for standard input or output)")
    parser.add_argument("--export-format", choices=("1",), default="1", help="format of image file")


def with_sparse(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sparse-size", default="4K", help="sparse size in B/K/M [default: 4K]")


def number_option(name: str, text: str) -> int:
    try:
        return sizes.size(text, "B")
    except ValueError:
        raise Failure(f"rbd: the argument for option '{name}' is invalid") from None


# --- import, export


@command(
    "import",
    "Import image from file.",
    with_image,
    with_path,
    with_dest,
    with_create,
    with_sparse,
    with_progress,
    specs=("path-name", "dest-image-spec"),
)
def import_(session: Session) -> None:
    """Zero runs of --sparse-size are not written. Without an image name the file's name is taken."""
    options = session.options
    if options.path:
        options.specs.insert(0, options.path)
    if not options.specs:
        raise Failure("rbd: path was not specified", 22)
    path = options.specs[0]
    if len(options.specs) < 2 and not (options.dest or options.image):
        if path == "-":
            raise Failure("rbd: image name must be specified when reading from stdin", 22)
        options.specs.append(os.path.basename(path))
    options.image = options.dest = options.dest or options.image
    spec = session.spec(1, prefix="dest_" if options.dest_pool or options.dest else "")
    sparse = number_option("--sparse-size", options.sparse_size)
    if sparse < 512 or sparse > STEP or sparse & (sparse - 1):
        raise Failure("rbd: the argument for option '--sparse-size' is invalid")
    chosen = creation(session)
    ioctx = session.ioctx(spec)
    source: BinaryIO
    try:
        source = sys.stdin.buffer if path == "-" else open(path, "rb", buffering=0)  # noqa: SIM115 - closed below
        size = None if path == "-" else _file_size(source)
    except OSError as error:
        raise Failure(f"rbd: error opening {path}\nrbd: import failed: {reason(error)}", code_of(error)) from None
    progress = session.progress("Importing image")
    try:
        with progress:
            rbd.RBD().create(ioctx, spec.image, size or 0, old_format=False, **chosen)
            try:
                with rbd.Image(ioctx, spec.image) as image:
                    _fill(image, source, size, sparse, progress)
            except BaseException:
                rbd.RBD().remove(ioctx, spec.image)  # half an image must not look like a whole one
                raise
    except rbd.ImageExists as error:
        raise Failure(f"rbd: image creation failed\nrbd: import failed: {reason(error)}", code_of(error)) from None
    except (rbd.Error, OSError) as error:
        raise Failure(f"rbd: import failed: {reason(error)}", code_of(error)) from None
    finally:
        if path != "-":
            source.close()


def _file_size(source: BinaryIO) -> int:
    """Also of a block device, whose stat says 0."""
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    return size


def _fill(image: Any, source: BinaryIO, size: int | None, sparse: int, progress: Progress) -> None:
    """Copies `source` into the image, without holes of the file and zero runs. size None (a pipe): grows the image."""
    offset = 0
    while size is None or offset < size:
        if size is not None:
            offset = _next_data(source, offset, size)
            source.seek(offset)
        data = _read_exactly(source, STEP if size is None else min(STEP, size - offset))
        if not data:
            break
        if size is None and offset + len(data) > image.size():
            image.resize(max(offset + len(data), image.size() * 2))
        for start, run in _runs(data, sparse):
            image.write(run, offset + start)
        offset += len(data)
        if size:
            progress(offset, size)
    if size is None:
        image.resize(offset)
    image.flush()


def _next_data(source: BinaryIO, offset: int, size: int) -> int:
    try:
        found = os.lseek(source.fileno(), offset, os.SEEK_DATA)
    except OSError:  # ENXIO: only a hole follows; others: holes cannot be asked for
        try:
            os.lseek(source.fileno(), offset, os.SEEK_HOLE)
        except OSError:
            return offset
        return size
    return found - found % STEP if found - found % STEP > offset else offset


def _read_exactly(source: BinaryIO, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = source.read(count)
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _runs(data: bytes, sparse: int) -> list[tuple[int, bytes]]:
    """(offset, bytes) of the parts of `data` that are not all zero, at a granularity of `sparse`."""
    if not data.strip(b"\0"):
        return []
    zero = bytes(sparse)
    found: list[tuple[int, bytes]] = []
    begin: int | None = None
    for at in range(0, len(data), sparse):
        piece = data[at : at + sparse]
        empty = piece == zero or not piece.strip(b"\0")
        if not empty and begin is None:
            begin = at
        elif empty and begin is not None:
            found.append((begin, data[begin:at]))
            begin = None
    if begin is not None:
        found.append((begin, data[begin:]))
    return found


def export_file(session: Session) -> None:
    """`rbd export IMAGE PATH`: holes stay holes in a file; standard output gets zeros."""
    options = session.options
    if options.path:
        options.specs.insert(0 if options.image else 1, options.path)
    spec = session.spec(snap="may")
    words = options.specs[0 if options.image else 1 :]
    path = words[0] if words else spec.image
    with session.image(spec, read_only=True) as image:
        size = image.size()
        try:
            if path == "-":
                _export_pipe(image, size)
            else:
                with open(path, "xb", buffering=0) as target, session.progress("Exporting image") as progress:
                    _export_sparse(image, size, target, progress)
        except (rbd.Error, OSError) as error:
            raise Failure(f"rbd: export error: {reason(error)}", code_of(error)) from None


def _export_pipe(image: Any, size: int) -> None:
    out = sys.stdout.buffer
    for offset in range(0, size, STEP):
        out.write(image.read(offset, min(STEP, size - offset)))
    out.flush()


def _export_sparse(image: Any, size: int, target: BinaryIO, progress: Progress) -> None:
    def extent(offset: int, length: int, exists: bool) -> None:
        while exists and length:
            step = min(STEP, length)
            for start, run in _runs(image.read(offset, step), 4096):
                os.pwrite(target.fileno(), run, offset + start)
            offset, length = offset + step, length - step
        progress(offset, size)

    image.diff_iterate(0, size, None, extent, whole_object=False)
    target.truncate(size)


# --- diff, du


def with_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from-snap", help="snapshot starting point")
    parser.add_argument("--whole-object", action="store_true", help="compare whole object")


def with_usage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from-snap", help="snapshot starting point")
    parser.add_argument("--exact", action="store_true", help="compute exact disk usage (slow)")
    parser.add_argument("--merge-snapshots", action="store_true", help="merge snapshot sizes with its image")


@command(
    "diff",
    "Print extents that differ since a previous snap, or image creation.",
    with_image,
    with_snap,
    with_diff,
    with_format,
    specs=("image-or-snap-spec",),
)
def diff(session: Session) -> None:
    options = session.options
    rows = Rows("extents")

    def extent(offset: int, length: int, exists: bool) -> None:
        rows.append(Section("extent", {"offset": offset, "length": length, "exists": "true" if exists else "false"}))

    with session.image(session.spec(snap="may"), read_only=True) as image, failing("diff error"):
        image.diff_iterate(0, image.size(), options.from_snap, extent, whole_object=options.whole_object)
    if not session.plain:
        session.show(rows)
        return
    table = Table(("Offset", "left"), ("Length", "left"), ("Type", "left"))
    for row in rows:
        table.add(row["offset"], row["length"], "data" if row["exists"] == "true" else "zero")
    sys.stdout.write(table.text())


@command(
    "disk-usage",
    "Show disk usage stats for pool, image or snapshot.",
    with_image,
    with_snap,
    with_usage,
    with_format,
    specs=("image-or-snap-spec",),
    aliases=("du",),
)
def usage(session: Session) -> None:
    spec = session.spec(snap="may", need_image=False)
    if spec.image:
        names = [spec.image]
        ioctx = session.ioctx(spec)
        if spec.image not in rbd.RBD().list(ioctx):
            raise Failure(
                f"specified image {spec.image} is not found.\nrbd: du failed: (2) No such file or directory", 2
            )
    else:
        spec = pool_spec(session)
        ioctx = session.ioctx(spec)
        names = sorted(rbd.RBD().list(ioctx))
    rows: list[Section] = []
    provisioned = used = 0
    for name in names:
        found, size = _image_usage(session, ioctx, name, spec.snap)
        rows += found
        provisioned += size
        used += sum(row["used_size"] for row in found)
    if not session.plain:
        shown = Section("stats", {"images": Rows("images", rows)})
        if not spec.image:
            shown |= {"total_provisioned_size": provisioned, "total_used_size": used}
        session.show(shown)
        return
    table = Table(("NAME", "left"), ("PROVISIONED", "right"), ("USED", "right"))
    for row in rows:
        name = row["name"] + (f"@{row['snapshot']}" if "snapshot" in row else "")
        table.add(name, size_text(row["provisioned_size"]), size_text(row["used_size"]))
    if len(rows) > 1:
        table.add("<TOTAL>", size_text(provisioned), size_text(used))
    sys.stdout.write(table.text())


def _image_usage(session: Session, ioctx: Any, name: str, only: str) -> tuple[list[Section], int]:
    """Rows of an image's snapshots, oldest first, and of its head; each row counts what changed since the one before.
    And the size that the image as a whole has provisioned."""
    options = session.options
    rows: list[Section] = []
    with rbd.Image(ioctx, name, read_only=True) as image, failing("du failed"):
        image_id = image.id()
        features = image.features()
        whole = bool(features & sizes.FEATURES["fast-diff"]) and not options.exact
        snaps = [s for s in image.list_snaps() if s.get("namespace", 0) == rbd.RBD_SNAP_NAMESPACE_TYPE_USER]
        size = image.size()
        if not features & sizes.FEATURES["fast-diff"]:
            print(f"warning: fast-diff map is not enabled for {name}. operation may be slow.", file=sys.stderr)
        before = options.from_snap
        started = before is None
        merged = 0
        for snap in [*snaps, None]:
            if snap and not started:
                started = snap["name"] == before
                continue
            if only and (snap is None or snap["name"] != only):
                before = snap["name"] if snap else before
                continue
            image.set_snap(snap["name"] if snap else None)
            if whole and image.flags() & sizes.FLAGS["fast diff invalid"]:
                where = name + (f"@{snap['name']}" if snap else "")
                print(f"warning: fast-diff map is invalid for {where}. operation may be slow.", file=sys.stderr)
            used = _used(image, before, whole)
            before = snap["name"] if snap else None
            if options.merge_snapshots and snap:
                merged += used
                continue
            row = Section("image", {"name": name, "id": image_id})
            if snap:
                row |= {"snapshot": snap["name"], "snapshot_id": snap["id"]}
            row |= {"provisioned_size": image.size(), "used_size": used + merged}
            rows.append(row)
    return rows, size if not only else sum(row["provisioned_size"] for row in rows)


def _used(image: Any, from_snap: str | None, whole: bool) -> int:
    total = 0

    def extent(offset: int, length: int, exists: bool) -> None:
        nonlocal total
        total += length if exists else 0

    image.diff_iterate(0, image.size(), from_snap, extent, include_parent=False, whole_object=whole)
    return total


# --- bench


def with_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--io-size", default="4K", help="IO size (in B/K/M/G/T) [default: 4K]")
    parser.add_argument("--io-threads", type=int, default=16, help="ios in flight [default: 16]")
    parser.add_argument("--io-total", default="1G", help="total size for IO (in B/K/M/G/T) [default: 1G]")
    parser.add_argument("--io-pattern", default="seq", choices=("rand", "seq", "full-seq"), help="IO pattern")
    parser.add_argument(
        "--rw-mix-read", type=int, default=50, help="read proportion in readwrite (<= 100) [default: 50]"
    )
    parser.add_argument(
        "--io-type", choices=("read", "write", "readwrite", "rw"), help="IO type (read, write, or readwrite(rw))"
    )


@command("bench", "Simple benchmark.", with_image, with_bench, specs=("image-spec",))
def bench(session: Session) -> None:
    """Asynchronous requests from one thread, `--io-threads` in flight; a line a second, a summary at the end."""
    options = session.options
    if not options.io_type:
        raise Failure("rbd: bench io-type was not specified", 22)
    io_size, total = number_option("--io-size", options.io_size), number_option("--io-total", options.io_total)
    if not io_size or io_size >= 1 << 32 or not 0 < options.io_threads <= 1024 or not 0 <= options.rw_mix_read <= 100:
        raise Failure("rbd: the argument for option '--io-size' is invalid", 22)
    kind = "readwrite" if options.io_type == "rw" else options.io_type
    pattern = {"seq": "sequential", "rand": "random", "full-seq": "full sequential"}[options.io_pattern]
    with session.image(session.spec(), read_only=kind == "read") as image, failing("bench failed"):
        size = image.size()
        if size < io_size:
            raise Failure(f"rbd: image size is smaller than io size {size_text(io_size)}", 22)
        print(f"bench  type {kind} io_size {io_size} io_threads {options.io_threads} bytes {total} pattern {pattern}")
        print("  SEC       OPS   OPS/SEC   BYTES/SEC")
        _Bench(image, size, io_size, options.io_threads, kind, options.io_pattern, options.rw_mix_read).run(
            total // io_size
        )


class _Bench:
    def __init__(self, image: Any, size: int, io_size: int, depth: int, kind: str, pattern: str, mix: int) -> None:
        self._image, self._size, self._io_size, self._depth = image, size, io_size, depth
        self._kind, self._pattern, self._mix = kind, pattern, mix
        self._slots = threading.Semaphore(depth)
        self._failed: list[int] = []
        self._done = 0

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

    def _complete(self, completion: Any, *_: object) -> None:
        result = completion.get_return_value()
        if result is not None and result < 0:
            self._failed.append(-result)
        self._done += 1
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
                self._image.aio_read(self._offset(number), self._io_size, self._complete)
            else:
                self._image.aio_write(pattern, self._offset(number), self._complete)
            now = time.monotonic()
            if now - said >= 1:
                said = now
                self._line(f"{now - started:5.0f}", self._done, now - started)
        for _ in range(self._depth):
            self._slots.acquire()
        if self._failed:
            raise Failure(f"rbd: bench: I/O error: ({self._failed[0]}) {os.strerror(self._failed[0])}", self._failed[0])
        if self._kind != "read":
            self._image.flush()
        elapsed = max(time.monotonic() - started, 1e-9)
        rate = self._done / elapsed
        print(
            f"elapsed: {elapsed:.0f}   ops: {self._done}   ops/sec: {rate:.6g}   "
            f"bytes/sec: {size_text(int(rate * self._io_size))}/s"
        )

    def _line(self, second: str, ops: int, elapsed: float) -> None:
        rate = ops / elapsed
        print(f"{second} {ops:9d} {rate:9.2f}   {size_text(int(rate * self._io_size))}/s", flush=True)

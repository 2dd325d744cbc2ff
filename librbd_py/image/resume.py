"""Imports and exports that go on where they were broken off, by a kill or a power cut too.

A mark says up to where everything was moved and is durable: of an import it is a key of the image's metadata, of an
export a file beside the target. It also says what was being moved, so that the rest of something else is never added.
What lies behind the mark may have been moved or not; an import moves it again, an export cuts it off.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import cls, metadata
from .handle import ImageHandle

KEY = "rbdpy_import"
SUFFIX = ".rbdpy-export"
EVERY = 256 << 20  # bytes between two marks


class Import:
    """Of a file into an image, `sparse`: what the import leaves out."""

    def __init__(self, handle: ImageHandle, fd: int, sparse: int) -> None:
        self._handle = handle
        found = os.fstat(fd)
        size = os.lseek(fd, 0, os.SEEK_END)
        self._what = {"size": size, "mtime": found.st_mtime_ns, "inode": found.st_ino, "sparse": sparse}
        self._last = 0

    def start(self) -> None:
        """The image is new."""
        self._mark(0)

    def go_on(self) -> int:
        """From where. EEXIST: nothing is being imported into this image; ESTALE: something else is."""
        record = _decoded(cls.metadata(self._handle.ctx, self._handle.oid).get(KEY))
        if record is None:
            raise OSError(errno.EEXIST, f"image {self._handle.name} is not one whose import was broken off")
        if {key: record.get(key) for key in self._what} != self._what:
            raise OSError(errno.ESTALE, f"image {self._handle.name} is being imported from something else")
        self._last = min(max(int(record["done"]), 0), int(self._what["size"]))
        return self._last

    def reached(self, offset: int) -> None:
        if offset - self._last >= EVERY:
            self._handle.data.flush()
            self._mark(offset)

    def done(self) -> None:
        metadata.remove(self._handle, KEY)

    def _mark(self, offset: int) -> None:
        metadata.put(self._handle, KEY, json.dumps(self._what | {"done": offset}))
        self._last = offset


class Export:
    """Of an image at a snapshot into the file `path`."""

    def __init__(self, handle: ImageHandle, path: str) -> None:
        """EINVAL: it is at no snapshot, so what it holds may change."""
        if handle.snap_id not in handle.header.snaps:
            raise OSError(errno.EINVAL, "only the export of a snapshot can go on")
        self._mark_file = Path(path + SUFFIX)
        self._path = path
        size = handle.header.size_at(handle.snap_id)
        self._what = {"fsid": handle.store.fsid, "image": handle.id, "snapshot": handle.snap_id, "size": size}
        self._last = 0

    def open(self) -> tuple[int, int]:
        """(descriptor, from where). EEXIST: the file is there and no export of it was broken off; ESTALE: one of
        something else was."""
        try:
            record = _decoded(self._mark_file.read_bytes())
        except FileNotFoundError:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._fd = fd
            self._mark(0)
            return fd, 0
        if record is None or {key: record.get(key) for key in self._what} != self._what:
            raise OSError(errno.ESTALE, f"{self._mark_file} is of the export of something else")
        self._fd = fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # What was never written because it is zeros may lie behind the file's end.
            self._last = max(int(record["done"]), 0)
            os.ftruncate(fd, self._last)
        except BaseException:
            os.close(fd)
            raise
        return fd, self._last

    def reached(self, offset: int) -> None:
        if offset - self._last >= EVERY:
            os.fdatasync(self._fd)
            self._mark(offset)

    def done(self) -> None:
        os.fdatasync(self._fd)
        with suppress(FileNotFoundError):
            self._mark_file.unlink()

    def _mark(self, offset: int) -> None:
        fresh = self._mark_file.with_name(self._mark_file.name + ".new")
        fresh.write_text(json.dumps(self._what | {"done": offset}))
        os.replace(fresh, self._mark_file)
        self._last = offset


def _decoded(data: bytes | None) -> dict[str, Any] | None:
    if data is None:
        return None
    try:
        record = json.loads(data)
        return record if isinstance(record, dict) and isinstance(record.get("done"), int) else None
    except ValueError:
        return None

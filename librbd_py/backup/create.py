"""Backing up a snapshot: what differs from the last backup's, in parts, and a manifest when all of them are there."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from librbd_py.image import cls
from librbd_py.image.cls import Snapshot
from librbd_py.image.handle import ImageHandle
from librbd_py.image.native_source import NativeSource
from librbd_py.image.progress import Progress, report
from librbd_py.image.snapshots import find
from librbd_py.image.streams import runs
from librbd_py.source import DATA
from librbd_py.store.api import ObjectContext

from .vault import INDEX_ROWS, LEAST_PART, MAX_PART, Vault
from .wire import MAX_ROWS, RECORD, Manifest, Part, PartRef, digest_of, encode_index, folder_of

PART = 8 << 20  # bytes of data in a part
PARALLEL = 4  # uploads at a time
PIECE = 4 << 20  # bytes read at once
GRAIN = 4096  # aligned zeros of this length are not stored


def create(
    vault: Vault,
    ctx: ObjectContext,
    image: str,
    snapshot: str,
    name: str,
    *,
    full: bool = False,
    part_size: int = PART,
    parallel: int = PARALLEL,
    progress: Progress | None = None,
) -> Manifest:
    """Backs a snapshot up into the set `name`: as an increment to the newest backup there of an older snapshot of this
    image that still exists, else (or when `full`) completely. Called again after it was cut short it uploads what is
    missing.

    ENOENT: no such image or snapshot. EEXIST: it is backed up. EINVAL: the part size. EBADMSG: a manifest in the set is
    damaged. EIO and others: the place for backups failed, again and again."""
    if not LEAST_PART <= part_size <= MAX_PART or part_size % LEAST_PART:
        raise OSError(errno.EINVAL, f"a part has {LEAST_PART} to {MAX_PART} bytes, in steps of {LEAST_PART}")
    folder_of(name)
    handle = ImageHandle.open(ctx, image, snapshot=snapshot, read_only=True)
    try:
        header = handle.header
        snap = find(header, snapshot)
        parent = _parent(vault, name, handle, snap, full)
        kept = sorted(row for row in cls.metadata(handle.ctx, handle.oid).items() if not row[0].startswith(RECORD))
        source = NativeSource(ctx, handle)
    except BaseException:
        handle.close()
        raise
    try:
        since = None
        if parent is not None:
            older = [each.id for each in header.snaps.values() if each.is_user and each.id <= snap.id]
            since = older.index(parent.snapshot_id)
        backup = _id(name, handle.id, snap, parent, part_size)
        upload = _Upload(vault, backup, parallel)
        upload.send_all(_parts(source, since, part_size, progress))
        manifest = Manifest(
            id=backup,
            set=name,
            number=parent.number + 1 if parent is not None else 0,
            parent=parent.id if parent is not None else "",
            created=time.time(),
            image_id=handle.id,
            image=image,
            snapshot_id=snap.id,
            snapshot=snap.name,
            snapshot_time=snap.timestamp,
            protected=bool(snap.protection),
            size=snap.size,
            order=header.order,
            stripe_unit=header.layout.stripe_unit,
            stripe_count=header.layout.stripe_count,
            features=header.features,
            part_size=part_size,
            parts=len(upload),
            stored=upload.stored,
            indexes=upload.indexes,
            metadata={key: value.decode(errors="surrogateescape") for key, value in kept},
        )
        data = manifest.encode()
        vault.target.put(manifest.key, data, digest_of(data))
        report(progress, 1, 1)
        return manifest
    finally:
        source.close()


def _parent(vault: Vault, name: str, handle: ImageHandle, snap: Snapshot, full: bool) -> Manifest | None:
    """EEXIST: this snapshot is backed up already, `full` or not."""
    every = vault.manifests(name)
    mine = [each for each in every if each.image_id == handle.id]
    for each in mine:
        if (each.snapshot_id, each.snapshot_time) == (snap.id, snap.timestamp) and not (full and each.parent):
            raise OSError(errno.EEXIST, f"snapshot {snap.name} is backed up: {each.id}")
    snaps = handle.header.snaps
    usable = [
        each
        for each in mine
        if each.snapshot_id < snap.id
        and (found := snaps.get(each.snapshot_id)) is not None
        and found.is_user
        and found.timestamp == each.snapshot_time
    ]
    for each in () if full else sorted(usable, key=lambda each: (each.snapshot_id, -each.number), reverse=True):
        with suppress(OSError):
            vault.chain(each, every)
            return each
    return None


def _id(name: str, image_id: str, snap: Snapshot, parent: Manifest | None, part_size: int) -> str:
    """The same for the same backup, so that one that was cut short finds its parts again."""
    words = [name, image_id, snap.id, snap.timestamp, parent.id if parent is not None else "", part_size]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:24]


def _parts(source: NativeSource, since: int | None, part_size: int, progress: Progress | None) -> Iterator[bytes]:
    part = Part()
    for row in source.extents(0, source.size, None, since):
        at = row.offset
        while at < row.end:
            if row.kind is not DATA:
                part.add(at, row.end - at, None)
                at = row.end
            else:
                step = min(PIECE - at % PIECE, row.end - at, part_size - part.bytes)
                data = source.read(at, step)
                for position, length, filled in runs(data, GRAIN):
                    if filled:
                        part.add(at + position, length, data[position : position + length])
                    elif since is not None:
                        part.add(at + position, length, None)
                at += step
            if part.bytes >= part_size or len(part.rows) >= MAX_ROWS - PIECE // GRAIN:
                yield part.encode()
                part = Part()
            report(progress, at, source.size + 1)
    if part.rows:
        yield part.encode()


class _Upload:
    """Sends parts, several at a time; as many are in memory, and two more. Afterwards `indexes` and `stored` say what
    is there."""

    def __init__(self, vault: Vault, backup: str, parallel: int) -> None:
        self._target = vault.target
        self._backup = backup
        self._have = {row.key: row.size for row in self._target.list(f"data/{backup}/")}
        self._pool = ThreadPoolExecutor(max(parallel, 1), thread_name_prefix="backup")
        self._room = threading.Semaphore(max(parallel, 1) + 1)
        self._rows: list[PartRef] = []
        self._count = 0
        self.indexes: list[str] = []
        self.stored = 0

    def __len__(self) -> int:
        return self._count

    def send_all(self, parts: Iterator[bytes]) -> None:
        """What the target raises."""
        under_way: list[Future[PartRef]] = []
        try:
            for number, data in enumerate(parts):
                self._room.acquire()
                under_way.append(self._pool.submit(self._send, number, data))
                while under_way and under_way[0].done():
                    self._take(under_way.pop(0).result())
            for each in under_way:
                self._take(each.result())
        finally:
            self._pool.shutdown(cancel_futures=True)
        if self._rows:
            self._write_index()

    def _send(self, number: int, data: bytes) -> PartRef:
        try:
            ref = PartRef(number, digest_of(data), len(data))
            if self._have.get(ref.key(self._backup)) != ref.size:
                self._target.put(ref.key(self._backup), data, ref.digest)
            return ref
        finally:
            self._room.release()

    def _take(self, ref: PartRef) -> None:
        self._rows.append(ref)
        self._count += 1
        self.stored += ref.size
        if len(self._rows) == INDEX_ROWS:
            self._write_index()

    def _write_index(self) -> None:
        data = encode_index(self._rows)
        digest = digest_of(data)
        key = f"data/{self._backup}/index-{len(self.indexes):05}-{digest}"
        if self._have.get(key) != len(data):
            self._target.put(key, data, digest)
        self.indexes.append(digest)
        self._rows = []

"""`rbd.Image` with coroutines. Import it from `librbd_py.aio`.

Reads, writes, discards, zeroes and flushes go straight to the C engine and come back through its completion queue: no
thread waits for them, however many are under way. Only what may block before that (a header to read again, a lock to
take) visits a thread. On a store without the engine every call does.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from librbd_py import rbd as face
from librbd_py.errors import rbd_errors
from librbd_py.format import notify as nf
from librbd_py.image import datapath, io
from librbd_py.image.datapath import NativeImage

from .run import Face, coroutine, executor, listing, operation, post


class AsyncImage(Face):
    """`async with AsyncImage(ioctx, name) as image:` takes the arguments of `rbd.Image`; or `open()` and `close()`."""

    sync: face.Image

    def __init__(self, ioctx: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(None)
        self._arguments = (ioctx, args, kwargs)
        self._closing: asyncio.Future[None] | None = None

    async def open(self) -> AsyncImage:
        """When cancelled, an image that opens all the same is closed again."""
        self._closing = None
        ioctx, args, kwargs = self._arguments
        begun = executor().submit(partial(face.Image, ioctx, *args, **kwargs))
        try:
            self.sync = await asyncio.shield(asyncio.wrap_future(begun))
        except asyncio.CancelledError:
            if not begun.cancel():
                executor().submit(_close_opened, begun)
            raise
        return self

    async def __aenter__(self) -> AsyncImage:
        return await self.open()

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Waits for what is under way, also if this is cancelled."""

        async def end() -> None:
            await self._outstanding.settle()
            if self.sync is not None:
                await self._run(self.sync.close)

        self._closing = asyncio.ensure_future(end())
        await asyncio.shield(self._closing)

    # --- data -----------------------------------------------------------------------------------------------------

    async def read(self, offset: int, length: int, fadvise_flags: int = 0) -> bytes:
        native = self._native()
        if native is None:
            return await self._run(self.sync.read, offset, length, fadvise_flags)
        with self._outstanding.call(), rbd_errors(f"error reading {self.sync.label} {offset}~{length}"):
            length = await self._admit("access", offset, length)
            if not length:
                return b""
            buffer = bytearray(length)
            await self._request(native, datapath.READ, offset, length, buffer)
            return bytes(buffer)

    async def write(self, data: bytes, offset: int, fadvise_flags: int = 0) -> int:
        native = self._native()
        if native is None:
            return await self._run(self.sync.write, data, offset, fadvise_flags)
        if not isinstance(data, bytes):
            raise TypeError("data must be a byte string")
        with self._outstanding.call(), rbd_errors(f"error writing to {self.sync.label}"):
            length = await self._admit("modify", offset, len(data))
            if length:
                await self._request(native, datapath.WRITE, offset, length, data[:length])
        if length != len(data):
            raise face.IncompleteWriteError(f"Wrote only {length} out of {len(data)} bytes")
        return length

    async def discard(self, offset: int, length: int) -> None:
        native = self._native()
        if native is None:
            await self._run(self.sync.discard, offset, length)
            return
        with self._outstanding.call(), rbd_errors(f"error discarding region {offset}~{length}"):
            if length > io.MAX_DISCARD:
                raise OSError(errno.EINVAL, f"{length} bytes are too many for one discard")
            length = await self._admit("modify", offset, length)
            if length:
                await self._request(native, datapath.DISCARD, offset, length)

    async def write_zeroes(self, offset: int, length: int, zero_flags: int = 0) -> None:
        native = self._native()
        if native is None or zero_flags:
            await self._run(self.sync.write_zeroes, offset, length, zero_flags)
            return
        with self._outstanding.call(), rbd_errors(f"error zeroing region {offset}~{length}"):
            length = await self._admit("modify", offset, length)
            if length:
                await self._request(native, datapath.WRITE_ZEROES, offset, length, flags=datapath.UNMAP)

    async def flush(self) -> None:
        native = self._native()
        if native is None or self.sync.handle.read_only:
            await self._run(self.sync.flush)
            return
        with self._outstanding.call(), rbd_errors("error flushing image"):
            await self._request(native, datapath.FLUSH, 0, 0)

    def _native(self) -> NativeImage | None:
        """InvalidArgument when closed, or about to be."""
        if self.sync is None or self._closing is not None:
            raise face.InvalidArgument("image is closed")
        self.sync.require_not_closed()
        data = self.sync.handle.data
        return data if isinstance(data, NativeImage) else None

    async def _admit(self, which: str, offset: int, length: int) -> int:
        """What the synchronous call does before its request: the length that fits. On a thread only if it may block."""
        if offset < 0 or length < 0:
            raise OverflowError("can't convert negative value to uint64_t")
        handle = self.sync.handle
        changes = which == "modify"

        def admit() -> int:
            if changes:
                handle.require_writable()
            fits = io.clip(handle, offset, length)
            if fits and changes:
                io.before_write(handle)
            elif fits:
                io.touch(handle, which)
            return fits

        touched = handle.control is None or handle.next_touch.get(which, 0.0) > time.monotonic()
        locked = not changes or not handle.uses_lock or handle.is_lock_owner
        if touched and locked and not handle.stale:
            return admit()
        return await self._run(admit)

    async def _request(
        self, native: NativeImage, kind: int, offset: int, length: int, buffer: Any = None, flags: int = 0
    ) -> None:
        """One request of the engine. Cancelling leaves it to end by itself; `close` waits for it."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()
        ended: Future[None] = Future()

        def settle(result: int) -> None:
            if answer.done():
                return
            if result < 0:
                answer.set_exception(OSError(-result, "the request failed"))
            else:
                answer.set_result(None)

        def completed(result: int, mismatch: int) -> None:
            ended.set_result(None)
            post(loop, settle, result)

        native.aio(kind, offset, length, buffer, completed, flags)
        self._outstanding.add(ended)
        await answer

    # --- news -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def updates(self) -> AsyncIterator[AsyncIterator[None]]:
        """`async with image.updates() as news: async for _ in news: ...`: one item after each change of the image
        by anybody (size, snapshots, features...); changes that come faster than they are fetched are one item."""
        self._native()
        handle, loop, news = self.sync.handle, asyncio.get_running_loop(), asyncio.Event()

        def changed() -> None:
            post(loop, news.set)

        def notified(notify_id: int, notifier: int, cookie: int, payload: bytes) -> bytes:
            try:
                if isinstance(nf.decode(payload), nf.HeaderUpdate):
                    changed()
            except ValueError:
                pass
            return b""

        async def items() -> AsyncIterator[None]:
            while True:
                await news.wait()
                news.clear()
                yield

        if handle.control is not None:
            end = handle.control.on_update(changed)
        else:
            end = (await self._run(handle.ctx.watch, handle.oid, notified)).close
        try:
            yield items()
        finally:
            await asyncio.shield(self._run(end))

    async def diff_iterate(
        self,
        offset: int,
        length: int,
        from_snapshot: str | bytes | int | None,
        iterate_cb: Any,
        include_parent: bool = True,
        whole_object: bool = False,
    ) -> None:
        """`iterate_cb` runs on the thread that does the work."""
        arguments = (offset, length, from_snapshot, iterate_cb, include_parent, whole_object)
        await self._run(self.sync.diff_iterate, *arguments)

    # --- the rest, on threads -------------------------------------------------------------------------------------

    copy = operation(face.Image.copy)
    deep_copy = operation(face.Image.deep_copy)
    flatten = operation(face.Image.flatten)
    rebuild_object_map = operation(face.Image.rebuild_object_map)
    resize = operation(face.Image.resize)
    rollback_to_snap = operation(face.Image.rollback_to_snap)
    config_list = listing(face.Image.config_list)
    list_children = listing(face.Image.list_children)
    list_children2 = listing(face.Image.list_children2)
    list_descendants = listing(face.Image.list_descendants)
    list_snaps = listing(face.Image.list_snaps)
    lock_get_owners = listing(face.Image.lock_get_owners)
    metadata_list = listing(face.Image.metadata_list)
    watchers_list = listing(face.Image.watchers_list)
    register_update_watch = coroutine(face.Image.register_update_watch)
    unregister_update_watch = coroutine(face.Image.unregister_update_watch)
    readv = coroutine(face.Image.readv)
    writev = coroutine(face.Image.writev)
    writesame = coroutine(face.Image.writesame)
    quiesce_watch = coroutine(face.Image.quiesce_watch)
    quiesce_unwatch = coroutine(face.Image.quiesce_unwatch)
    access_timestamp = coroutine(face.Image.access_timestamp)
    block_name_prefix = coroutine(face.Image.block_name_prefix)
    break_lock = coroutine(face.Image.break_lock)
    compare_and_write = coroutine(face.Image.compare_and_write)
    config_get = coroutine(face.Image.config_get)
    config_remove = coroutine(face.Image.config_remove)
    config_set = coroutine(face.Image.config_set)
    create_snap = coroutine(face.Image.create_snap)
    create_timestamp = coroutine(face.Image.create_timestamp)
    data_pool_id = coroutine(face.Image.data_pool_id)
    features = coroutine(face.Image.features)
    flags = coroutine(face.Image.flags)
    get_name = coroutine(face.Image.get_name)
    get_parent_image_spec = coroutine(face.Image.get_parent_image_spec)
    get_snap_limit = coroutine(face.Image.get_snap_limit)
    get_snap_timestamp = coroutine(face.Image.get_snap_timestamp)
    group = coroutine(face.Image.group)
    id = coroutine(face.Image.id)
    invalidate_cache = coroutine(face.Image.invalidate_cache)
    is_exclusive_lock_owner = coroutine(face.Image.is_exclusive_lock_owner)
    is_protected_snap = coroutine(face.Image.is_protected_snap)
    list_lockers = coroutine(face.Image.list_lockers)
    lock_acquire = coroutine(face.Image.lock_acquire)
    lock_break = coroutine(face.Image.lock_break)
    lock_exclusive = coroutine(face.Image.lock_exclusive)
    lock_release = coroutine(face.Image.lock_release)
    lock_shared = coroutine(face.Image.lock_shared)
    metadata_get = coroutine(face.Image.metadata_get)
    metadata_remove = coroutine(face.Image.metadata_remove)
    metadata_set = coroutine(face.Image.metadata_set)
    migration_source_spec = coroutine(face.Image.migration_source_spec)
    modify_timestamp = coroutine(face.Image.modify_timestamp)
    old_format = coroutine(face.Image.old_format)
    op_features = coroutine(face.Image.op_features)
    overlap = coroutine(face.Image.overlap)
    parent_id = coroutine(face.Image.parent_id)
    parent_info = coroutine(face.Image.parent_info)
    protect_snap = coroutine(face.Image.protect_snap)
    remove_snap = coroutine(face.Image.remove_snap)
    remove_snap2 = coroutine(face.Image.remove_snap2)
    remove_snap_by_id = coroutine(face.Image.remove_snap_by_id)
    remove_snap_limit = coroutine(face.Image.remove_snap_limit)
    rename_snap = coroutine(face.Image.rename_snap)
    set_snap = coroutine(face.Image.set_snap)
    set_snap_by_id = coroutine(face.Image.set_snap_by_id)
    set_snap_limit = coroutine(face.Image.set_snap_limit)
    size = coroutine(face.Image.size)
    snap_exists = coroutine(face.Image.snap_exists)
    snap_get_group_namespace = coroutine(face.Image.snap_get_group_namespace)
    snap_get_id = coroutine(face.Image.snap_get_id)
    snap_get_mirror_namespace = coroutine(face.Image.snap_get_mirror_namespace)
    snap_get_name = coroutine(face.Image.snap_get_name)
    snap_get_namespace_type = coroutine(face.Image.snap_get_namespace_type)
    snap_get_trash_namespace = coroutine(face.Image.snap_get_trash_namespace)
    sparsify = coroutine(face.Image.sparsify)
    stat = coroutine(face.Image.stat)
    stripe_count = coroutine(face.Image.stripe_count)
    stripe_unit = coroutine(face.Image.stripe_unit)
    unlock = coroutine(face.Image.unlock)
    unprotect_snap = coroutine(face.Image.unprotect_snap)
    update_features = coroutine(face.Image.update_features)


def _close_opened(begun: Future[face.Image]) -> None:
    """Nobody wants the image any more. It was begun before this, so it has a thread."""
    if begun.exception() is None:
        begun.result().close()

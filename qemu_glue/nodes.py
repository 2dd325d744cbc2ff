"""Block nodes: RBD images that the daemon has open, as QMP describes them."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from librbd_py.image import settings
from librbd_py.image.datapath import NativeImage
from librbd_py.image.handle import ImageHandle
from librbd_py.image.resize import resize
from librbd_py.store import connect, default_url, is_ceph
from librbd_py.store.api import Store
from qemu_glue.former import Former
from qemu_glue.qmp_wire import QMPError


class Stores:
    """Connections by store URL, shared by the nodes of a daemon and closed with the last one that uses them. Any
    thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, _Shared] = {}
        self._refused: list[_Shared] = []  # still in use

    def take(self, url: str) -> Store:
        """Blocks while it connects; other URLs are not kept waiting. OSError."""
        with self._lock:
            shared = self._open.setdefault(url, _Shared())
            shared.users += 1
        try:
            with shared.connecting:
                if shared.store is None:
                    shared.store = connect(url)
                return shared.store
        except BaseException:
            self._leave(url, shared)
            raise

    def shut_out(self, store: Store) -> None:
        """The store refuses this connection for ever (ESHUTDOWN): who comes next gets another."""
        with self._lock:
            for url in [url for url, shared in self._open.items() if shared.store is store]:
                self._refused.append(self._open.pop(url))

    def give_back(self, url: str, store: Store) -> None:
        with self._lock:
            shared = self._open.get(url)
            if shared is None or shared.store is not store:
                shared = next(refused for refused in self._refused if refused.store is store)
        self._leave(url, shared)

    def _leave(self, url: str, shared: _Shared) -> None:
        with self._lock:
            shared.users -= 1
            if shared.users:
                return
            if self._open.get(url) is shared:
                del self._open[url]
            elif shared in self._refused:
                self._refused.remove(shared)
        if shared.store is not None:
            shared.store.close()


class _Shared:
    def __init__(self) -> None:
        self.connecting = threading.Lock()
        self.store: Store | None = None
        self.users = 0


STORES = Stores()  # one a process: a thousand images are one client of their store


class Node:
    """One open image. Made by open(); close() gives up its lock, watch and store connection."""

    def __init__(self, arguments: dict[str, Any], url: str, store: Store, handle: ImageHandle) -> None:
        self.name: str = arguments["node-name"]
        self.pool: str = arguments["pool"]
        self.namespace: str = arguments["namespace"]
        self.image_name: str = arguments["image"]
        self.snapshot: str | None = arguments["snapshot"]
        self.read_only: bool = arguments["read-only"] or self.snapshot is not None
        self.handle = handle
        self._url: str | None = url  # None: closed
        self._store = store
        self._direct = bool((arguments["cache"] or {}).get("direct", False))
        self._limits: dict[str, int] = {}  # as throttle() set them
        self._no_flush = bool((arguments["cache"] or {}).get("no-flush", False))

    @classmethod
    def open(cls, arguments: dict[str, Any], store_url: str | None, former: Former | None = None) -> Node:
        """Blocks. `former`: who this daemon was before; its locks are broken at once. QMPError or OSError with the
        reason when the store, pool or image cannot be opened."""
        url = arguments["conf"] or store_url or default_url()
        if arguments["user"] and is_ceph(url):
            url = f"ceph:{quote(url)}" if url.startswith("/") else url
            url += f"{'&' if '?' in url else '?'}user={quote(arguments['user'])}"
        read_only = arguments["read-only"] or arguments["snapshot"] is not None
        store = STORES.take(url)
        try:
            context = store.open(arguments["pool"], arguments["namespace"])
            dead = former.of(url, store) if former is not None else frozenset()
            handle = ImageHandle.open(
                context, arguments["image"], snapshot=arguments["snapshot"], read_only=read_only, former=dead
            )
            try:
                handle.configure(settings.of_store(store))
            except BaseException:
                handle.close()
                raise
        except OSError as error:
            if error.errno == errno.ESHUTDOWN:
                STORES.shut_out(store)
            STORES.give_back(url, store)
            where = "/".join(part for part in (arguments["pool"], arguments["namespace"], arguments["image"]) if part)
            raise OSError(error.errno, f"error opening image {where}: {error.strerror or error}") from None
        return cls(arguments, url, store, handle)

    @property
    def native(self) -> Any:
        """The rbdn_image * that exports serve."""
        return self.handle.native.pointer

    @property
    def size(self) -> int:
        """Bytes, as of the last header read."""
        return self.handle.header.size_at(self.handle.snap_id)

    def resize(self, size: int) -> None:
        """Blocks. Grows or shrinks the image; exports tell their clients."""
        if self.read_only:
            raise OSError(errno.EROFS, f"Block node is read-only: '{self.name}'")
        resize(self.handle, size, allow_shrink=True)

    def on_error(self, handler: Callable[[bool, int], None]) -> None:
        """`handler(read, errno)` runs on the event thread when the store fails requests. It must not block."""
        if isinstance(self.handle.data, NativeImage):
            self.handle.data.on_error = handler

    def throttle(self, iops: int, bytes_per_second: int) -> None:
        self.handle.native.throttle(iops, bytes_per_second)
        self._limits = {"iops": iops, "bps": bytes_per_second}

    def close(self) -> None:
        """Blocks. Idempotent."""
        if self._url is None:
            return
        try:
            self.handle.close()
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise QMPError(f"Node '{self.name}' is in use") from None
            raise
        finally:
            if self.handle.closed:
                url, self._url = self._url, None
                STORES.give_back(url, self._store)

    # --- what QMP says of it

    def describe(self) -> dict[str, Any]:
        """BlockDeviceInfo."""
        size = self.size
        filename = "rbd:" + "/".join(part for part in (self.pool, self.namespace, self.image_name) if part)
        if self.snapshot:
            filename += "@" + self.snapshot
        cache = {"writeback": True, "direct": self._direct, "no-flush": self._no_flush}
        zeros = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
        return {
            "node-name": self.name,
            "file": filename,
            "drv": "rbd",
            "ro": self.read_only,
            "encrypted": False,
            "active": True,
            "detect_zeroes": "off",
            "write_threshold": 0,
            "cache": cache,
            "backing_file_depth": 0,
            **zeros,
            **self._limits,
            "image": {
                "filename": filename,
                "format": "rbd",
                "virtual-size": size,
                "cluster-size": 1 << self.handle.header.order,
                "dirty-flag": False,
            },
        }

    def blockstats(self) -> dict[str, Any]:
        """BlockStats: totals since the node was added; latencies in nanoseconds."""
        stats = self.handle.native.stats()
        read, write, flush = stats.read, stats.write, stats.flush
        unmap = stats.discard
        numbers = {
            "rd_bytes": read.bytes,
            "wr_bytes": write.bytes,
            "unmap_bytes": unmap.bytes,
            "rd_operations": read.operations,
            "wr_operations": write.operations,
            "unmap_operations": unmap.operations,
            "flush_operations": flush.operations,
            "rd_total_time_ns": read.total_ns,
            "wr_total_time_ns": write.total_ns,
            "unmap_total_time_ns": unmap.total_ns,
            "flush_total_time_ns": flush.total_ns,
            "rd_merged": 0,
            "wr_merged": 0,
            "unmap_merged": 0,
            "failed_rd_operations": read.failed,
            "failed_wr_operations": write.failed,
            "failed_unmap_operations": unmap.failed,
            "failed_flush_operations": flush.failed,
            "invalid_rd_operations": 0,
            "invalid_wr_operations": 0,
            "invalid_unmap_operations": 0,
            "invalid_flush_operations": 0,
            "idle_time_ns": stats.idle_ns,
            "wr_highest_offset": 0,
            "account_invalid": True,
            "account_failed": True,
            "timed_stats": [],
        }
        return {"node-name": self.name, "stats": numbers}

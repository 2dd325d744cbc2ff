"""Watches: events from the C ring, callbacks on one thread of the connection."""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from librbd_py.format.logs import logger
from librbd_py.native import check as check_native
from librbd_py.native import ffi, lib

from .. import api
from .connection import check, fail
from .stall import TICK, StallWatch

if TYPE_CHECKING:
    from .connection import Connection
    from .context import RadosContext
    from .store import RadosStore

log = logger(__name__)


class WatchRing:
    """Of one connection; a thread from the first watch until the connection is shut down."""

    def __init__(self, connection: Connection) -> None:
        self._stall = StallWatch(connection, self._shut_out)
        self._fenced = False  # set once; the thread then tells every watch
        self.pointer = lib.rbdn_watch_ring_new()
        if not self.pointer:
            raise OSError(errno.EMFILE, "no room for a watch")
        self._lock = threading.Lock()  # guards the next three
        self._watches: dict[int, RadosWatch] = {}
        self._next = 1
        self._running: int | None = None  # token whose callback runs
        self._idle = threading.Condition(self._lock)  # `_running` changed
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="rbdpy-ceph-watch", daemon=True)
        self._thread.start()

    def add(self, watch: RadosWatch) -> int:
        """Its token."""
        with self._lock:
            token = self._next
            self._next += 1
            self._watches[token] = watch
            return token

    def remove(self, token: int) -> None:
        """Afterwards its callbacks do not run, unless we are in one."""
        with self._idle:
            self._watches.pop(token, None)
            if not self.is_current:
                self._idle.wait_for(lambda: self._running != token)

    def _run(self) -> None:
        fd = check_native(lib.rbdn_watch_ring_fd(self.pointer), "watches")
        event = ffi.new("rbdn_watch_event *")
        payload = ffi.new("char[]", lib.RBDN_PAYLOAD_MAX)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        due = time.monotonic() + TICK
        while not self._closing:
            poll.poll(max(0.0, due - time.monotonic()) * 1000)
            for number in (self._wake, fd):
                with suppress(BlockingIOError):
                    os.eventfd_read(number)
            if self._closing:
                break
            if time.monotonic() >= due:
                due = time.monotonic() + TICK
                self._stall.tick()
            if self._fenced:
                self._fence_all()
            while lib.rbdn_watch_ring_next(self.pointer, event, payload):
                self._deliver(event, payload)
        os.close(self._wake)
        lib.rbdn_watch_ring_free(self.pointer)

    def _shut_out(self) -> None:
        """On any thread."""
        self._fenced = True
        os.eventfd_write(self._wake, 1)

    def _fence_all(self) -> None:
        self._fenced = False
        with self._lock:
            tokens = list(self._watches)
        for token in tokens:
            self._call(token, lambda watch: watch.lost(-errno.ESHUTDOWN))

    def _deliver(self, event: Any, payload: Any) -> None:
        def tell(watch: RadosWatch) -> None:
            if event.notify_id == 0:
                watch.lost(event.error)
            else:
                watch.notified(event.notify_id, event.notifier, event.cookie, ffi.buffer(payload, event.len)[:])

        self._call(event.token, tell)

    def _call(self, token: int, tell: Callable[[RadosWatch], None]) -> None:
        with self._lock:
            watch = self._watches.get(token)
            if watch is None:
                return
            self._running = token
        try:
            tell(watch)
        except Exception:
            log.exception("a callback of watch %d failed", watch.cookie)
        finally:
            with self._idle:
                self._running = None
                self._idle.notify_all()

    @property
    def is_current(self) -> bool:
        """We are in a callback."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """No watch is left. The thread frees the ring; on that thread itself nothing is waited for."""
        self._closing = True
        os.eventfd_write(self._wake, 1)
        if not self.is_current:
            self._thread.join()


class RadosWatch(api.Watch):
    def __init__(
        self,
        context: RadosContext,
        oid: str,
        callback: api.NotifyCallback,
        error: api.WatchErrorCallback | None,
        timeout: int,
    ) -> None:
        """On the caller's reference to the connection; takes one of its own."""
        self._context = context
        self._store: RadosStore = context.store
        self._connection = context.store.connection
        self._oid = oid
        self._callback = callback
        self._error = error
        self._lock = threading.Lock()  # guards the next
        self._closed = False
        self._ring: WatchRing = self._connection.ring(lambda: WatchRing(self._connection))
        self._token = self._ring.add(self)
        code = ffi.new("int *")
        self._watch = lib.rbdn_watch_new(self._ring.pointer, context.io, oid.encode(), self._token, timeout, code)
        if not self._watch:
            self._ring.remove(self._token)
            raise fail(code[0], f"watch of {oid}")
        self.cookie = int(lib.rbdn_watch_cookie(self._watch))
        self._connection.acquire()

    def notified(self, notify_id: int, notifier: int, cookie: int, payload: bytes) -> None:
        try:
            answer = self._callback(notify_id, notifier, cookie, payload)
        except Exception:
            # The others must not wait for a callback that failed.
            log.exception("notify callback of watch %d on %s failed", cookie, self._oid)
            answer = b""
        if answer is not None:
            try:
                self._context.notify_ack(self._oid, notify_id, cookie, answer)
            except OSError as failure:
                log.debug("a notify on %s could not be acknowledged: %s", self._oid, failure)

    def lost(self, code: int) -> None:
        if -code == errno.ESHUTDOWN:
            self._connection.fenced = True
        if self._error is not None:
            known = code if -code in (errno.ESHUTDOWN, errno.ENOTCONN) else -errno.ENOTCONN
            self._error(self.cookie, OSError(-known, f"the watch on {self._oid} is lost: {os.strerror(-code)}"))

    def check(self) -> float:
        with self._lock:
            if self._closed:
                raise OSError(errno.ENOTCONN, "the watch is closed")
            with self._connection.using():
                result = lib.rbdn_watch_check(self._watch)
                if result < 0 and result != -errno.ESHUTDOWN:
                    result = -errno.ENOTCONN
                return check(result, f"the watch on {self._oid}") / 1000

    def close(self) -> None:
        if self._connection.of_parent:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._ring.remove(self._token)
        # Of a client that is shut out the cluster has dropped all watches, and an OSD that hangs would never say so:
        # what is left in librados ends with the connection (and our 72 bytes stay, for its callbacks).
        if not self._connection.fenced:
            # Fails when the cluster has dropped the watch before: it is gone, which is what was asked for.
            lib.rbdn_watch_end(self._watch, self._connection.handle)
        self._store.forget_watch(self)
        self._connection.release()

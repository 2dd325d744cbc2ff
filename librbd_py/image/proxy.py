"""Maintenance operations while another client owns the exclusive lock: asked of the owner, and done for others.

The requester notifies the header with the operation and an id; the owner acks 0 at once, runs it, tells all watchers
how far it has come, and at the end what came of it (AsyncProgress, AsyncComplete). The requester starts over when it
hears nothing for REQUEST_SECONDS, or the lock has another owner; an owner that knows the id does not run it twice. What
an owner does not know (EOPNOTSUPP) is done here, after it was asked for the lock. As librbd's Operations.cc and
ImageWatcher.cc.
"""

from __future__ import annotations

import errno
import itertools
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from librbd_py.format import notify as nf
from librbd_py.format.logs import logger
from librbd_py.format.notify import AsyncRequestId, ClientId

from .progress import Progress

if TYPE_CHECKING:
    from .handle import ImageHandle

REQUEST_SECONDS = 30.0  # rbd_request_timed_out_seconds
LOOK_SECONDS = 1.0  # between two looks whether the owner is still the same
RETRY_SECONDS = 0.25  # nobody answered: an owner that is just going, or coming
REPORT_SECONDS = 1.0  # between two AsyncProgress
HEARTBEAT_SECONDS = 5.0  # and when nothing moves
RUNNING_MAX = 16  # operations run for others at a time; more are refused (EBUSY)
FINISHED_MAX = 64  # results kept for requesters that did not hear theirs

Ask = Callable[[AsyncRequestId], nf.Message]
Reply = Callable[[int | None], None]
Operation = Callable[["ImageHandle", Any, Progress], object]

log = logger("librbd_py.image")


class Restart(Exception):
    """The owner was lost, or never heard the request: look who owns the lock now."""


def perform(
    handle: ImageHandle,
    ask: Ask,
    local: Callable[[], object],
    progress: Progress | None = None,
    done_already: int = 0,
) -> None:
    """Runs `local` owning the lock, or has the owner do what `ask` says. Raises what either raises.

    `done_already`: the errno that means success when the operation was asked for a second time. The callback's wish to
    cancel does not reach another owner.
    """
    again = False
    number = handle.requests.number()
    while handle.asks_owner and not _locked(handle):
        try:
            handle.requests.ask(ask, number, progress)
        except Restart:
            again = True
            continue
        except OSError as failure:
            if failure.errno == errno.EOPNOTSUPP:
                handle.acquire_lock()
                break
            if not again or failure.errno != done_already:
                raise
        handle.refresh()
        return
    local()


def _locked(handle: ImageHandle) -> bool:
    """EROFS, as librbd says it: somebody holds the lock who cannot be asked."""
    try:
        return handle.try_lock()
    except OSError as failure:
        if failure.errno != errno.EBUSY:
            raise
        raise OSError(errno.EROFS, failure.strerror) from failure


class Requests:
    """What this handle asks of the lock's owner. Thread-safe."""

    def __init__(self, handle: ImageHandle) -> None:
        self._handle = handle
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # guards _waiting
        self._waiting: dict[AsyncRequestId, queue.SimpleQueue[nf.AsyncProgress | nf.AsyncComplete]] = {}

    def number(self) -> int:
        """Of a new request; asked again it keeps it, so that the owner knows it."""
        return next(self._numbers)

    def heard(self, message: nf.AsyncProgress | nf.AsyncComplete) -> None:
        with self._lock:
            waiting = self._waiting.get(message.request)
        if waiting is not None and waiting.qsize() < 1024:
            waiting.put(message)

    def ask(self, make: Ask, number: int, progress: Progress | None) -> None:
        """Blocks until the owner has done it. OSError: what it answered. Restart."""
        control = self._handle.control
        assert control is not None
        watch, owner = control.watch_handle, control.owner()
        if watch is None or owner is None:
            time.sleep(RETRY_SECONDS)
            raise Restart
        request = AsyncRequestId(ClientId(self._handle.store.client.gid, watch), number)
        answers: queue.SimpleQueue[nf.AsyncProgress | nf.AsyncComplete] = queue.SimpleQueue()
        with self._lock:
            self._waiting[request] = answers
        try:
            result = control.ask_owner(make(request))
            if result is None:
                time.sleep(RETRY_SECONDS)
                raise Restart
            _check(result)
            limit = time.monotonic() + REQUEST_SECONDS
            while True:
                try:
                    message = answers.get(timeout=LOOK_SECONDS)
                except queue.Empty:
                    if time.monotonic() < limit and control.owner() == owner and control.owner_lives():
                        continue
                    try:
                        message = answers.get(timeout=LOOK_SECONDS)  # said last, before the lock went
                    except queue.Empty:
                        raise Restart from None
                limit = time.monotonic() + REQUEST_SECONDS
                if isinstance(message, nf.AsyncComplete):
                    _check(message.result)
                    return
                if progress is not None:
                    progress(message.offset, message.total)
        finally:
            with self._lock:
                del self._waiting[request]


def _check(result: int) -> None:
    if result == -errno.ERESTART:
        raise Restart
    if result < 0:
        raise OSError(-result, f"the lock owner says: {os.strerror(-result)}")


class Served:
    """What others ask of this handle while it owns the lock. `operations`: message type -> how to do it."""

    def __init__(self, handle: ImageHandle, operations: dict[type, Operation]) -> None:
        self._handle = handle
        self._operations = operations
        self._lock = threading.Lock()  # guards the next two
        self._running: set[object] = set()
        self._finished: OrderedDict[AsyncRequestId, int] = OrderedDict()

    def accept(self, message: Any, reply: Reply) -> None:
        """Answers at once, runs the operation in a thread of its own. A message without an id (clients before Ceph 16)
        is answered when it is done."""
        operation = self._operations.get(type(message))
        if operation is None:
            reply(None)
            return
        request: AsyncRequestId | None = message.request
        key: object = request or object()
        with self._lock:
            finished = None if request is None else self._finished.get(request)
            running = key in self._running
            full = len(self._running) >= RUNNING_MAX
            if finished is None and not running and not full:
                self._running.add(key)
        if finished is not None and request is not None:
            reply(0)
            self._tell(nf.AsyncComplete(request, finished))
        elif running:
            reply(0)
        elif full:
            reply(-errno.EBUSY)
        else:
            threading.Thread(target=self._run, args=(operation, message, key, reply), daemon=True).start()

    def _run(self, operation: Operation, message: Any, key: object, reply: Reply) -> None:
        request: AsyncRequestId | None = message.request
        if request is not None:
            reply(0)
        log.info("image %s: doing %s for a client", self._handle.id, message)
        at = (0, 0)
        results: queue.SimpleQueue[int] = queue.SimpleQueue()

        def progress(done: int, total: int) -> None:
            nonlocal at
            at = done, total

        def work() -> None:
            try:
                operation(self._handle, message, progress)
                results.put(0)
            except OSError as failure:
                # Closed or fenced meanwhile: the requester looks who owns the lock now, and asks that one.
                results.put(-errno.ERESTART if failure.errno == errno.ESHUTDOWN else -(failure.errno or errno.EIO))
            except Exception:
                log.exception("image %s: %s", self._handle.id, message)
                results.put(-errno.EIO)

        threading.Thread(target=work, daemon=True).start()
        told, told_at = at, time.monotonic()
        while True:
            try:
                result = results.get(timeout=REPORT_SECONDS)
                break
            except queue.Empty:
                now = time.monotonic()
                if request is not None and (at != told or now > told_at + HEARTBEAT_SECONDS):
                    told, told_at = at, now
                    self._tell(nf.AsyncProgress(request, *told))
        with self._lock:
            self._running.discard(key)
            if request is not None:
                self._finished[request] = result
                if len(self._finished) > FINISHED_MAX:
                    self._finished.popitem(last=False)
        if request is None:
            reply(result)
        else:
            self._tell(nf.AsyncComplete(request, result))

    def _tell(self, message: nf.Message) -> None:
        control = self._handle.control
        assert control is not None
        try:
            control.tell(message)
        except OSError as failure:
            log.info("image %s: %s could not be told: %s", self._handle.id, type(message).__name__, failure)

"""Guests are asked to stand still before a snapshot is made of their disks.

Who makes a snapshot notifies the header (Quiesce), waits until every watcher has answered, makes it, and lets them go
on (Unquiesce). A watcher that hears nothing more for TIMEOUT_SECONDS goes on by itself. As librbd's ImageWatcher.cc.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from librbd_py.control.pool import Timer, control_pool
from librbd_py.control.wire import result_of
from librbd_py.format import notify as nf
from librbd_py.format.logs import logger
from librbd_py.format.notify import AsyncRequestId, ClientId

from .objects import ignoring

if TYPE_CHECKING:
    from .handle import ImageHandle

TIMEOUT_SECONDS = 10.0  # after which who was quiesced goes on unasked
NOTIFY_MS = 5000

# Flags of a snapshot's creation, as on the wire.
SKIP_QUIESCE = nf.SNAP_SKIP_QUIESCE
IGNORE_QUIESCE_ERROR = nf.SNAP_IGNORE_QUIESCE_ERROR

Reply = Callable[[int | None], None]
Hook = Callable[[], object]  # raises OSError: it cannot

log = logger("librbd_py.image")


class QuiesceWatchers:
    """Who on this handle wants to be asked. Thread-safe; hooks run on threads of their own, one request at a time."""

    def __init__(self, image_id: str) -> None:
        self._image_id = image_id
        self._lock = threading.Lock()  # guards all below
        self._hooks: dict[int, tuple[Hook, Hook]] = {}
        self._next = 0
        self._waiting: dict[AsyncRequestId, list[Reply]] = {}  # hooks are running for it
        self._still: dict[AsyncRequestId, tuple[Timer, list[Hook]]] = {}  # quiesced; what ends it
        self._one = threading.Lock()  # held while hooks run

    def add(self, quiesce: Hook, unquiesce: Hook) -> int:
        with self._lock:
            self._next += 1
            self._hooks[self._next] = quiesce, unquiesce
            return self._next

    def remove(self, number: int) -> None:
        """ENOENT."""
        with self._lock:
            if self._hooks.pop(number, None) is None:
                raise OSError(errno.ENOENT, f"no quiesce watcher {number}")

    def heard(self, message: nf.Quiesce | nf.Unquiesce, reply: Reply) -> None:
        if isinstance(message, nf.Unquiesce):
            self._go_on(message.request)
            reply(0)
            return
        request = message.request
        with self._lock:
            still = self._still.pop(request, None)
            if still is not None:  # asked again because somebody else was slow
                still[0].cancel()
                self._still[request] = self._timer(request), still[1]
            elif request in self._waiting:
                self._waiting[request].append(reply)
                return
            elif self._hooks:
                self._waiting[request] = [reply]
                hooks = [*self._hooks.values()]
                threading.Thread(target=self._quiesce, args=(request, hooks), daemon=True).start()
                return
        reply(0)

    def _timer(self, request: AsyncRequestId) -> Timer:
        def late() -> None:
            log.warning("image %s: nobody ended the quiesce of %s", self._image_id, request)
            self._go_on(request)

        return control_pool().call_later(TIMEOUT_SECONDS, late)

    def _quiesce(self, request: AsyncRequestId, hooks: list[tuple[Hook, Hook]]) -> None:
        result = 0
        undo: list[Hook] = []
        with self._one:
            for quiesce, unquiesce in hooks:
                try:
                    quiesce()
                    undo.append(unquiesce)
                except OSError as failure:
                    result = -(failure.errno or errno.EIO)
                except Exception:
                    log.exception("image %s: a quiesce hook", self._image_id)
                    result = -errno.EIO
        with self._lock:
            replies = self._waiting.pop(request)
            self._still[request] = self._timer(request), undo
        for reply in replies:
            reply(result)

    def _go_on(self, request: AsyncRequestId) -> None:
        with self._lock:
            timer, hooks = self._still.pop(request, (None, []))
        if timer is not None:
            timer.cancel()
        if hooks:
            threading.Thread(target=self._run, args=(hooks,), daemon=True).start()

    def _run(self, hooks: list[Hook]) -> None:
        with self._one:
            for hook in hooks:
                try:
                    hook()
                except Exception:
                    log.exception("image %s: an unquiesce hook", self._image_id)


@contextmanager
def guests_quiesced(handles: Sequence[ImageHandle], flags: int = 0) -> Iterator[None]:
    """Everybody who has these images open stands still inside. With SKIP_QUIESCE nobody is asked.

    ETIMEDOUT: somebody never answered. Another error is what a watcher answered; with IGNORE_QUIESCE_ERROR both are
    only logged. Whatever happens, those who were asked are let go.
    """
    asked: list[tuple[ImageHandle, AsyncRequestId]] = []
    try:
        for handle in [] if flags & SKIP_QUIESCE else handles:
            watch = handle.control.watch_handle if handle.control is not None else None
            if watch is None:
                continue
            request = AsyncRequestId(ClientId(handle.store.client.gid, watch), handle.requests.number())
            asked.append((handle, request))
            try:
                _ask(handle, request)
            except OSError as failure:
                if not flags & IGNORE_QUIESCE_ERROR:
                    raise
                log.warning("image %s: a snapshot without everybody standing still: %s", handle.id, failure)
        yield
    finally:
        for handle, request in asked:
            with ignoring(errno.ENOENT):
                handle.ctx.notify(handle.oid, nf.encode(nf.Unquiesce(request)), NOTIFY_MS)


def _ask(handle: ImageHandle, request: AsyncRequestId) -> None:
    for _ in range(handle.settings.quiesce_attempts):
        answer = handle.ctx.notify(handle.oid, nf.encode(nf.Quiesce(request)), NOTIFY_MS)
        for payload in answer.acks.values():
            result = result_of(payload) or 0
            if result < 0 and result != -errno.EOPNOTSUPP:
                raise OSError(-result, f"a watcher cannot be quiesced: {os.strerror(-result)}")
        if not answer.timed_out:
            return
    raise OSError(errno.ETIMEDOUT, "a watcher did not say that it is quiesced")

"""Events of the C data plane, delivered on one thread a process. Source: native/engine/event.h.

Handlers must not block: whoever has work to do hands it on.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

from librbd_py.format.logs import logger
from librbd_py.native import check, ffi, lib

LOCK_NEEDED = 1
IO_ERROR = 2
EXPORT_CONNECTED = 3
EXPORT_DISCONNECTED = 4
EXPORT_BROKEN = 5
EXPORT_STOPPED = 6
EXPORT_SWITCHOVER = 9  # the front end has stopped its rings in a migration and waits: api_export.h, rbdn_export_go_on
EXPORT_RINGS = 10  # a front end starts its rings
EXPORT_STALE = 12  # a guest came with memory that is older than its state: event.h
OBJECT_WANTED = 11  # a request waits for an object that the control side brings
READ_ERROR = 8  # the store failed a read; IO_ERROR: a write or a flush. The value is -errno
LOST = 7  # more unread events than the data plane holds: every handler gets it and asks for the state it cares about
OF_IMAGES = (LOCK_NEEDED, IO_ERROR, READ_ERROR, OBJECT_WANTED)

Handler = Callable[[int, int], None]  # (event type, value)

log = logger("librbd_py.events")


class Dispatcher:
    """Handlers by source: images (OF_IMAGES) and exports (the rest) number their sources apart."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._images: dict[int, Handler] = {}
        self._exports: dict[int, Handler] = {}
        self._thread: threading.Thread | None = None

    def on_image(self, image_id: int, handler: Handler) -> None:
        with self._lock:
            self._images[image_id] = handler
            self._start()

    def on_export(self, export_id: int, handler: Handler) -> None:
        with self._lock:
            self._exports[export_id] = handler
            self._start()

    def forget_image(self, image_id: int) -> None:
        with self._lock:
            self._images.pop(image_id, None)

    def forget_export(self, export_id: int) -> None:
        with self._lock:
            self._exports.pop(export_id, None)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rbd-events", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        fd = check(lib.rbdn_event_fd(), "events of the data plane")
        event = ffi.new("rbdn_event *")
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while True:
            poll.poll()
            try:
                os.read(fd, 8)
            except BlockingIOError:
                continue
            while lib.rbdn_event_next(event) == 1:
                self._deliver(event.type, event.source, event.value)

    def _deliver(self, kind: int, source: int, value: int) -> None:
        with self._lock:
            if kind == LOST:
                handlers = [*self._images.values(), *self._exports.values()]
            else:
                found = (self._images if kind in OF_IMAGES else self._exports).get(source)
                handlers = [found] if found is not None else []
        for handler in handlers:
            try:
                handler(kind, value)
            except Exception:
                log.exception("handler of event %d from %d", kind, source)


EVENTS = Dispatcher()  # the data plane has one ring a process

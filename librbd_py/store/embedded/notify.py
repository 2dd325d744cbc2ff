"""Watches and notifies between the processes that use a store: sockets in run/, one thread per client.

The thread starts with the client's first watch or notify. It takes datagrams from run/<gid>.sock, runs callbacks one
at a time and collects acks. A notify waits in the caller's thread until every watcher has answered, is found dead (its
lock is free) or the time is over.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable

from librbd_py.format.logs import logger

from ..api import NotifyCallback, NotifyReply, WatchErrorCallback
from .client import Presence
from .messages import MAX_COOKIES, MAX_DATAGRAM, MAX_PAYLOAD, Ack, Fenced, Lost, Message, Notify, decode, encode
from .registry import Place, Registry

log = logger(__name__)

RETRY = 0.005  # seconds between tries to put something into a full socket
LOOK = 0.1  # seconds between looks whether silent watchers are alive, at most
PATROL = 2.0  # seconds between looks at the blocklist while there are watches
ACK_LIFE = 30.0  # seconds an ack waits for room in the notifier's socket
MAX_OUTBOX = 4096  # acks waiting for room
MAX_QUEUE = 4096  # callbacks waiting for the thread; more are refused, so their notifier times out
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Watcher:
    """One registered watch of this client."""

    def __init__(
        self, place: Place, cookie: int, callback: NotifyCallback, error: WatchErrorCallback | None, timeout: int
    ) -> None:
        self.place = place
        self.cookie = cookie
        self.callback = callback
        self.error = error
        self.timeout = timeout
        self.registered = False  # its row is in the registry
        self.failed: OSError | None = None


class _Waiting:
    """A notify in progress. Guarded by the dispatcher's lock."""

    def __init__(self, waiting: set[tuple[int, int]]) -> None:
        self.waiting = waiting
        self.acks: dict[tuple[int, int], bytes] = {}
        self.done = threading.Event()


class Dispatcher:
    """`fenced()` looks into the blocklist; it is called from any thread."""

    def __init__(self, presence: Presence, registry: Registry, fenced: Callable[[], bool]) -> None:
        self._presence = presence
        self._run = presence.run
        self._registry = registry
        self._fenced = fenced
        self._gid = presence.gid
        self._lock = threading.Lock()  # guards the next six
        self._watches: dict[int, Watcher] = {}
        self._queue: deque[Callable[[], None]] = deque()
        self._outbox: list[tuple[int, bytes, float]] = []  # gid, datagram, deadline
        self._notifies: dict[int, _Waiting] = {}
        self._next = 1  # cookies and notify ids, never given twice
        self._closing = False
        self._idle = threading.Condition(self._lock)  # `_running` changed
        self._running: int | None = None  # cookie whose callback runs
        self._socket = self._bind()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._loop, name=f"rbdpy-watch-{self._gid}", daemon=True)
        self._thread.start()

    def _bind(self) -> socket.socket:
        name = f"{self._gid}.sock"
        s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._run.remove(name)
            s.bind(self._run.proc_path(name))
        except BaseException:
            s.close()
            raise
        return s

    # --- watches

    def watch(self, place: Place, callback: NotifyCallback, error: WatchErrorCallback | None, timeout: int) -> Watcher:
        with self._lock:
            self._open()
            watcher = Watcher(place, self._unique(), callback, error, timeout)
            self._watches[watcher.cookie] = watcher
            first = len(self._watches) == 1
        try:
            if first:
                self._presence.give_signs(self._was_late)
            self._registry.add(place, watcher.cookie, timeout)
        except BaseException:
            with self._lock:
                self._watches.pop(watcher.cookie, None)
            raise
        watcher.registered = True
        if first:
            self._kick()  # patrols begin
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        """Afterwards its callback does not run, unless we are in it."""
        with self._lock:
            known = self._watches.pop(watcher.cookie, None) is not None
            if threading.current_thread() is not self._thread:
                while self._running == watcher.cookie:
                    self._idle.wait()
        if known:
            self._registry.remove(watcher.place, watcher.cookie)

    def check(self, watcher: Watcher) -> float:
        if watcher.failed is None and self._fenced():
            self._fail([watcher], OSError(errno.ESHUTDOWN, "this client is blocklisted"))
        if watcher.failed is None and not self._registry.registered(watcher.place, watcher.cookie):
            self._fail([watcher], _lost())
        if watcher.failed is not None:
            raise watcher.failed
        return 0.0

    # --- notifies

    def notify(self, place: Place, payload: bytes, timeout_ms: int) -> NotifyReply:
        if len(payload) > MAX_PAYLOAD:
            raise OSError(errno.EMSGSIZE, f"notify of {len(payload)} bytes: at most {MAX_PAYLOAD}")
        if threading.current_thread() is self._thread:
            raise OSError(errno.EDEADLK, "a watch callback must not wait for a notify")
        deadline = time.monotonic() + max(timeout_ms, 0) / 1000
        rows = self._registry.watchers(place)
        state = _Waiting({(row.gid, row.cookie) for row in rows})
        with self._lock:
            self._open()
            notify_id = (self._gid & 0xFFFFFFFF) << 32 | self._unique() & 0xFFFFFFFF
            self._notifies[notify_id] = state
        try:
            unsent: list[tuple[int, bytes]] = []
            cookies: dict[int, list[int]] = {}
            for row in rows:
                cookies.setdefault(row.gid, []).append(row.cookie)
            for gid, all_of in cookies.items():
                for at in range(0, len(all_of), MAX_COOKIES):
                    message = Notify(notify_id, self._gid, *place, tuple(all_of[at : at + MAX_COOKIES]), payload)
                    if gid == self._gid:
                        self._received(message)
                    else:
                        unsent.append((gid, encode(message)))
            self._collect(state, unsent, deadline)
        finally:
            with self._lock:
                del self._notifies[notify_id]
        with self._lock:
            return NotifyReply(dict(sorted(state.acks.items())), tuple(sorted(state.waiting)))

    def _collect(self, state: _Waiting, unsent: list[tuple[int, bytes]], deadline: float) -> None:
        look = RETRY
        next_look = time.monotonic() + look
        while True:
            unsent = [item for item in unsent if not self._send_notify(state, *item)]
            with self._lock:
                if self._closing:
                    raise OSError(errno.ENOTCONN, "the store was closed during a notify")
                if not state.waiting:
                    return
            now = time.monotonic()
            if now >= deadline:
                return
            if now >= next_look:
                if self._fenced():
                    raise OSError(errno.ESHUTDOWN, "this client is blocklisted")
                self._drop_dead(state)
                look = min(look * 2, LOOK)
                next_look = now + look
            until = min(deadline, next_look)
            if unsent:
                until = min(until, now + RETRY)
            state.done.wait(max(until - now, 0.0005))

    def _send_notify(self, state: _Waiting, gid: int, datagram: bytes) -> bool:
        """True: sent, or there is nobody to send it to."""
        sent = self._send(gid, datagram)
        if sent is None:
            self._drop(state, {gid})
        return sent is not False

    def _drop_dead(self, state: _Waiting) -> None:
        with self._lock:
            silent = {gid for gid, _ in state.waiting}
        dead = {gid for gid in silent if not self._presence.alive(gid)}
        if dead:
            for gid in dead:
                self._registry.drop_client(gid)
                self._presence.forget(gid)
            self._drop(state, dead)

    def _drop(self, state: _Waiting, gids: set[int]) -> None:
        with self._lock:
            state.waiting = {key for key in state.waiting if key[0] not in gids}
            if not state.waiting:
                state.done.set()

    def ack(self, notify_id: int, cookie: int, payload: bytes, *, gone: bool = False) -> None:
        if len(payload) > MAX_PAYLOAD:
            raise OSError(errno.EMSGSIZE, f"ack of {len(payload)} bytes: at most {MAX_PAYLOAD}")
        message = Ack(notify_id, self._gid, cookie, gone, payload)
        notifier = notify_id >> 32
        if notifier == self._gid & 0xFFFFFFFF:
            self._take_ack(message)
            return
        datagram = encode(message)
        if self._send(notifier, datagram) is False:
            with self._lock:
                if len(self._outbox) < MAX_OUTBOX:
                    self._outbox.append((notifier, datagram, time.monotonic() + ACK_LIFE))
            self._kick()

    def tell(self, gids: set[int], message: Lost | Fenced) -> None:
        """A hint to look at something. One that does not arrive is made up for by check() and the patrols."""
        for gid in gids:
            if gid == self._gid:
                self._received(message)
            else:
                self._send(gid, encode(message))

    def _send(self, gid: int, datagram: bytes) -> bool | None:
        """False: no room now. None: nobody is there. A socket of its own per message, because what a stopped receiver
        does not read is charged to the sending socket and would silence it for everybody else."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as s:
            try:
                s.sendto(datagram, self._run.proc_path(f"{gid}.sock"))
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM):
                    return False
                if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK, errno.EPROTOTYPE, errno.ENOTCONN):
                    return None
                raise
        return True

    # --- the thread

    def _loop(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        buffer = bytearray(MAX_DATAGRAM + 1)
        patrol = time.monotonic() + PATROL
        while True:
            with self._lock:
                if self._closing:
                    return
                timeout = RETRY if self._outbox else patrol - time.monotonic() if self._watches else None
                task = self._queue.popleft() if self._queue else None
            if task is not None:
                task()
                continue
            ready = poll.poll(None if timeout is None else max(timeout, 0) * 1000)
            for fd, _ in ready:
                if fd == self._wake:
                    try:
                        os.eventfd_read(self._wake)
                    except BlockingIOError:
                        pass
                else:
                    self._drain(buffer)
            self._empty_outbox()
            if time.monotonic() >= patrol:
                patrol = time.monotonic() + PATROL
                self._patrol()

    def _drain(self, buffer: bytearray) -> None:
        for _ in range(64):  # then the queue has its turn
            try:
                length, ancillary, flags, _ = self._socket.recvmsg_into([buffer], socket.CMSG_SPACE(_CREDENTIALS.size))
            except OSError:  # EAGAIN, or nothing that would be better next time
                return
            if not _trusted(ancillary) or flags & socket.MSG_TRUNC:
                continue
            message = decode(memoryview(buffer)[:length])
            if message is not None:
                self._received(message)

    def _received(self, message: Message) -> None:
        match message:
            case Ack():
                self._take_ack(message)
            case Notify():
                self._enqueue(lambda: self._deliver(message))
            case Lost():
                self._enqueue(self._look_for_lost)
            case Fenced():
                self._enqueue(self._patrol)

    def _enqueue(self, task: Callable[[], None]) -> None:
        with self._lock:
            if len(self._queue) < MAX_QUEUE:
                self._queue.append(task)
        self._kick()

    def _kick(self) -> None:
        if threading.current_thread() is not self._thread:
            try:
                os.eventfd_write(self._wake, 1)
            except OSError:  # closed
                pass

    def _take_ack(self, ack: Ack) -> None:
        key = (ack.gid, ack.cookie)
        with self._lock:
            state = self._notifies.get(ack.notify_id)
            if state is None or key not in state.waiting:
                return
            state.waiting.discard(key)
            if not ack.gone:
                state.acks[key] = ack.payload
            if not state.waiting:
                state.done.set()

    def _deliver(self, message: Notify) -> None:
        for cookie in message.cookies:
            with self._lock:
                watcher = self._watches.get(cookie)
                known = watcher is not None and watcher.place == (message.pool, message.namespace, message.oid)
                known = known and watcher is not None and watcher.failed is None
                self._running = cookie if known else None
            answer: bytes | None = b""
            if known and watcher is not None:
                try:
                    answer = watcher.callback(message.notify_id, message.notifier, cookie, message.payload)
                except Exception:
                    log.exception("watch callback of %s failed", message.oid)
                finally:
                    with self._lock:
                        self._running = None
                        self._idle.notify_all()
            if answer is not None:
                try:
                    self.ack(message.notify_id, cookie, bytes(answer), gone=not known)
                except Exception:
                    log.exception("acknowledging a notify of %s failed", message.oid)

    def _empty_outbox(self) -> None:
        with self._lock:
            pending, self._outbox = self._outbox, []
        now = time.monotonic()
        left = [item for item in pending if now < item[2] and self._send(item[0], item[1]) is False]
        if left:
            with self._lock:
                self._outbox = left + self._outbox

    def _patrol(self) -> None:
        with self._lock:
            watchers = list(self._watches.values())
        try:
            if watchers and self._fenced():
                self._fail(watchers, OSError(errno.ESHUTDOWN, "this client is blocklisted"))
        except OSError as error:
            log.warning("cannot look at the blocklist: %s", error)

    def _was_late(self) -> None:
        """This process stood still for a while (or the heart did): who noticed may have ended our watches."""
        self._enqueue(self._look_after_pause)

    def _look_after_pause(self) -> None:
        self._registry.settle()
        self._look_for_lost()

    def _look_for_lost(self) -> None:
        with self._lock:
            watchers = [w for w in self._watches.values() if w.registered]
        self._fail([w for w in watchers if not self._registry.registered(w.place, w.cookie)], _lost())

    def _fail(self, watchers: list[Watcher], failure: OSError) -> None:
        """Tells each of them once, on the dispatch thread."""
        for watcher in watchers:
            with self._lock:
                if watcher.failed is not None:
                    continue
                watcher.failed = failure
            if watcher.error is not None:
                self._enqueue(lambda watcher=watcher: self._tell_error(watcher, failure))  # type: ignore[misc]

    def _tell_error(self, watcher: Watcher, failure: OSError) -> None:
        with self._lock:
            if watcher.cookie not in self._watches or watcher.error is None:
                return
            self._running = watcher.cookie
        try:
            watcher.error(watcher.cookie, failure)
        except Exception:
            log.exception("watch error callback of %s failed", watcher.place[2])
        finally:
            with self._lock:
                self._running = None
                self._idle.notify_all()

    # --- the end

    def _open(self) -> None:
        if self._closing:
            raise OSError(errno.ENOTCONN, "the store is closed")

    def _unique(self) -> int:
        """Cookies carry the gid, so no client's is ever another's."""
        number = self._next
        self._next += 1
        return (self._gid & 0x7FFFFFFF) << 32 | number & 0xFFFFFFFF

    def close(self) -> None:
        """Ends the watches. Their rows go with the client's lock file."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._watches.clear()
            for state in self._notifies.values():
                state.done.set()
        self._kick()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._registry.drop_client(self._gid)
        self.drop()

    def drop(self) -> None:
        """Closes descriptors only (in the child of a fork, too)."""
        self._socket.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1


def _lost() -> OSError:
    return OSError(errno.ENOTCONN, "the watch is gone: its object was removed, or this client stood still for too long")


def _trusted(ancillary: list[tuple[int, int, bytes]]) -> bool:
    """Only root and our own user; descriptors that somebody slipped in are closed."""
    trusted = False
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and len(data) >= _CREDENTIALS.size:
            trusted = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])[1] in (0, os.geteuid())
        elif level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds = array.array("i")
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
            for fd in fds:
                os.close(fd)
    return trusted

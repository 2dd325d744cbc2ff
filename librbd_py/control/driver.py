"""The driver of the watch and lock machines of one image header: the only part of `control` that does I/O.

Events come from users, from the store's dispatch thread (notifies, lost watches) and from finished operations; the
machines answer with operations, which run on the process's control pool. The dispatch thread never blocks here.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import Literal, Protocol

from librbd_py.control import lock as lk
from librbd_py.control import lock_events as le
from librbd_py.control import watch as wt
from librbd_py.control import wire
from librbd_py.control.lock_events import Locker
from librbd_py.control.pool import Timer, control_pool
from librbd_py.control.who import Diary
from librbd_py.format import notify as nf
from librbd_py.format.encoding import DecodeError
from librbd_py.format.lock import Offer, parse_auto_cookie
from librbd_py.format.logs import INFO, WARNING, logger
from librbd_py.store.api import ObjectContext, Watch

NOTIFY_MS = 5000  # how long a notify waits for a silent watcher
Policy = Literal["automatic", "exclusive"]

Job = Callable[[], "list[Job]"]  # blocks; returns what to run next

log = logger("librbd_py.control")


class ControlCallbacks(Protocol):
    """What the image does when its header's watch or lock moves. Runs on control threads, not on the dispatch thread.

    None of these may call the blocking methods of the same HeaderControl.
    """

    def header_updated(self) -> None:
        """Somebody changed the header (or a lost watch came back): refresh. Several updates may come as one call."""

    def post_acquire(self) -> None:
        """The class lock is ours: refresh, lock the object map, open the gate. OSError gives the lock back."""

    def pre_release(self, final: bool) -> None:
        """The lock is about to go: close the gate, drain, flush. OSError keeps the lock; leave the gate as it was.
        `final`: the image is being closed; OSError but ETIMEDOUT does not keep the lock, so let nothing in any more.
        """

    def lost(self, failure: OSError) -> None:
        """Fenced (ESHUTDOWN) or the image is gone (ENOENT): fail everything from now on. Called at most once."""

    def peer_op(self, message: nf.Message, reply: Callable[[int | None], None]) -> None:
        """A proxied operation (asked of the owner only), progress, completion or quiesce from a peer.

        `reply(result)`, now or later and once: what to ack, 0 or -errno; None says that it is not supported.
        """


class HeaderControl:
    """Watch and exclusive lock on one header object.

    Call `open()` first and `close()` last. All methods are thread-safe. `policy` "exclusive" refuses peers that ask for
    the lock (EROFS); "automatic" hands it over. `former`: addresses of clients that the caller knows to be dead (this
    host's own, before a crash): their lock is broken at once.
    """

    def __init__(
        self,
        ctx: ObjectContext,
        header_oid: str,
        callbacks: ControlCallbacks,
        policy: Policy = "automatic",
        former: frozenset[str] = frozenset(),
    ) -> None:
        client = ctx.store.client
        self.ctx = ctx
        self.header_oid = header_oid
        self.header_seq = 0  # header updates heard of; compare before and after to know that a refresh is due
        self.diary = Diary()  # what it says when it is asked who it is
        self._callbacks = callbacks
        self._gid = client.gid
        self._pool = control_pool()
        self._mutex = threading.Lock()  # guards all below; never held during I/O or callbacks
        self._watch = wt.WatchMachine()
        self._lock = lk.LockMachine(client.gid, client.address, exclusive=policy == "exclusive", former=former)
        self._watches: dict[int, Watch] = {}
        self._acquiring: list[Future[None]] = []
        self._releasing: list[Future[None]] = []
        self._offering: list[Future[None]] = []
        self._opening: Future[None] = Future()
        self._stopped: Future[None] = Future()
        self._closed: Future[None] = Future()
        self._timers: dict[str, tuple[int, Timer]] = {}
        self._announcements: deque[tuple[bytes, int]] = deque()  # payload, op to report (0: none)
        self._announcing = False
        self._refresh_queued = False
        self._listeners: list[Callable[[], None]] = []

    # --- for users -------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Registers the watch. ENOENT when the header does not exist; afterwards it can be opened again."""
        with self._mutex:
            self._opening = Future()
        self._run(self._feed_watch(wt.Open()))
        self._opening.result()

    def close(self, timeout: float | None = None) -> None:
        """Releases the lock, ends the watch. Idempotent. ETIMEDOUT when the image does not drain: call it again.

        Another error is one of draining; everything is closed then. After `lost` it has ended by itself.
        """
        with self._mutex:
            if self._closed.done():
                return
            if self._stopped.done():
                self._stopped = Future()
            stopped = self._stopped
        if timeout is None:
            self._run(self._feed_lock(le.Shutdown())[1])
        else:
            self._lock_event(le.Shutdown())
        failure: OSError | None = None
        try:
            _wait(stopped, timeout, f"{self.header_oid}: the lock is not released")
        except OSError as problem:
            if problem.errno == errno.ETIMEDOUT:
                raise
            failure = problem
        self._run(self._feed_watch(wt.Close()))
        _wait(self._closed, timeout, f"{self.header_oid}: the watch is not closed")
        if failure is not None:
            raise failure

    def acquire(self, timeout: float | None = None) -> None:
        """Blocks until this client owns the lock. `timeout` in seconds, None waits for ever.

        EROFS: the owner keeps it; EBUSY: locked by hand; ESHUTDOWN: fenced or closed; ENOENT: image gone; ECANCELED:
        released meanwhile; ETIMEDOUT; EINVAL: held by a dead handle of this very client.
        """
        future = self.request_acquire()
        try:
            future.result(timeout)
        except FutureTimeout:
            said = self._lock.owner_says
            self._lock_event(le.Abandon(), partial(self._give_up, future))
            if future.done():
                future.result()  # it ended in this very moment
                return
            why = f" and says: {os.strerror(said)}" if said else ""
            raise OSError(errno.ETIMEDOUT, f"{self.header_oid}: the owner does not give up the lock{why}") from None

    def try_acquire(self) -> bool:
        """As `acquire`, but an owner that lives is not asked: False. It waits when another waiter had it asked."""
        try:
            self.request_acquire(ask=False).result()
        except OSError as failure:
            if failure.errno == errno.EAGAIN:
                return False
            raise
        return True

    def request_acquire(self, ask: bool = True) -> Future[None]:
        """Starts acquiring and returns at once. The future ends as `acquire()` does; without `ask` it ends with EAGAIN
        when the lock's owner lives."""
        future: Future[None] = Future()

        def prepare() -> bool:
            if self._lock.hand.moving:
                future.set_exception(OSError(errno.EBUSY, f"{self.header_oid}: the lock is moving to another host"))
                return False
            self._acquiring.append(future)
            return True

        self._lock_event(le.Acquire(ask), prepare)
        return future

    def _waiting_to_acquire(self) -> list[Future[None]]:
        return self._acquiring

    def _give_up(self, future: Future[None]) -> bool:
        """Under the mutex: True when nobody else waits for the lock."""
        if future not in self._acquiring:
            return False
        self._acquiring.remove(future)
        return not self._acquiring

    def release(self) -> None:
        """Gives the lock up; waiters of `acquire` end with ECANCELED. Raises what `pre_release` raised: still owner."""
        future: Future[None] = Future()
        self._run(self._feed_lock(le.Release(), partial(_append, self._waiting_to_release, future))[1])
        future.result()

    def _waiting_to_release(self) -> list[Future[None]]:
        return self._releasing

    # --- hand-off: see handoff.py

    def offer(self, key: str, seconds: float) -> bool:
        """Offers the lock to the next host of the VM `key`; True when it may take it from now on. A client without the
        lock gets it first, which may take `seconds`; False: it could not, so there is nothing to offer. OSError: what
        draining or the store said; the lock stays as it was. The image must let no request in until `take_back`.
        """
        if not self._lock.owning and not self.moving:
            try:
                self.acquire(seconds)
            except OSError:
                return False
        future: Future[None] = Future()
        self._lock_event(le.Offer(key), partial(_append, lambda: self._offering, future))
        try:
            future.result()
        except OSError as failure:
            if failure.errno == errno.EAGAIN:
                return False
            raise
        return True

    def take_back(self) -> None:
        """After `offer`: this client owns the lock again, as after `acquire`. ESTALE: somebody who is not the VM's next
        host owned it meanwhile; call it again, or `take_over` by force."""
        self._move(le.TakeBack())

    def stand_by(self, key: str) -> None:
        """From now on only `take_over` acquires: the VM `key` runs elsewhere and will come here. EBUSY: this client
        owns the lock, offers it or is after it. After another error it does not stand by, unless it did before."""
        now = self.owner()
        accepted = False

        def prepare() -> bool:
            nonlocal accepted
            idle = self._lock.state in (le.LockState.UNLOCKED, le.LockState.NO_WATCH)
            accepted = idle and not self._lock.wanted
            return accepted

        while True:
            owner = now
            self._lock_event(le.StandBy(key, owner), prepare)
            if not accepted:
                raise OSError(errno.EBUSY, f"{self.header_oid}: the lock is in use or wanted here")
            try:
                now = self.owner()  # what changed before the event nobody here has heard of
            except BaseException:
                self.stand_down()
                raise
            if now == owner:
                return

    def stand_down(self) -> None:
        """After `stand_by`, or `offer` when it was taken: the VM is not here. The lock is acquired as ever from now
        on."""
        self._lock_event(le.StandDown())

    def offered_to(self, key: str) -> bool:
        """Whether the owner offers the lock to the VM `key` just now."""
        owner = self.owner()
        offer = Offer.parse(owner.mark) if owner is not None else None
        return offer is not None and offer.meant_for(key)

    def take_over(self, force: bool = False) -> None:
        """The VM runs here: takes the lock that was offered, or asks the owner that had it when `stand_by` was called.
        ESTALE: somebody else owned it meanwhile, and the image may have changed; still standing by. `force`: acquires
        from whomever."""
        self._move(le.TakeOver(force))

    def _move(self, event: le.TakeBack | le.TakeOver) -> None:
        future: Future[None] = Future()
        self._run(self._feed_lock(event, partial(_append, self._waiting_to_acquire, future))[1])
        future.result()

    @property
    def moving(self) -> bool:
        """The lock is on its way to another host, or to this one: `acquire` is refused (EBUSY)."""
        return self._lock.hand.moving

    @property
    def standing_by(self) -> bool:
        """Waits for `take_over`."""
        return self._lock.hand.standby is not None and not self._lock.owning

    @property
    def offered(self) -> bool:
        """The lock is offered and, as far as is known, not taken. Closing now would take the offer away."""
        return self._lock.offered

    @property
    def is_owner(self) -> bool:
        """True while the image may change its header and write data."""
        return self._lock.owning

    @property
    def arrived(self) -> bool:
        """As `is_owner`, and already while `post_acquire` makes the image ready."""
        return self._lock.owning or self._lock.state is le.LockState.POST_ACQUIRING

    @property
    def state(self) -> str:
        """Watch and lock state, for people."""
        return f"{self._watch.state.name.lower()}, {self._lock.state.name.lower()}"

    @property
    def watch_handle(self) -> int | None:
        """The watch's handle, None while it is lost."""
        return self._watch.watch

    @property
    def lock_cookie(self) -> str | None:
        """The cookie in the lock while it is ours."""
        return self._lock.cookie

    @property
    def policy(self) -> Policy:
        return "exclusive" if self._lock.exclusive else "automatic"

    def set_policy(self, policy: Policy) -> None:
        """For requests that come from now on."""
        self._lock.exclusive = policy == "exclusive"

    @property
    def heir(self) -> bool:
        """Whether `acquire` takes a lock that is offered to a VM that nobody knows: for those that serve VMs."""
        return self._lock.heir

    @heir.setter
    def heir(self, heir: bool) -> None:
        self._lock.heir = heir

    def owner(self) -> Locker | None:
        """Who holds the lock, as the store says now."""
        return wire.get_lock(self.ctx, self.header_oid).owner

    def owner_lives(self) -> bool:
        """Whether the lock has an owner that lives."""
        owner = self.owner()
        return owner is not None and self._lives(owner)

    def _lives(self, owner: Locker) -> bool:
        """It watches the header, as the dead still do for a while: those that the caller knows, or this host."""
        if owner.address in self._lock.former or self.ctx.store.ended(owner.address):
            return False
        return wire.is_watching(self.ctx, self.header_oid, owner)

    def ask_owner(self, message: nf.Message) -> int | None:
        """What the lock's owner answers to a request: 0 or -errno; None when no owner spoke."""
        return self._owners_answer(nf.encode(message))

    def tell(self, message: nf.Message) -> None:
        """Says something to every watcher; returns when those that live have acked."""
        self.ctx.notify(self.header_oid, nf.encode(message), NOTIFY_MS)

    def notify_header_update(self) -> None:
        """Tells every watcher that the header changed; returns when those that live have acked."""
        self.ctx.notify(self.header_oid, wire.header_update(), NOTIFY_MS)

    def on_update(self, listener: Callable[[], None]) -> Callable[[], None]:
        """`listener()` runs on a control thread after each refresh of the header. Returns what ends it."""
        with self._mutex:
            self._listeners.append(listener)

        def remove() -> None:
            with self._mutex:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return remove

    def fenced(self, code: int = errno.ESHUTDOWN) -> None:
        """The data path was told that this client is fenced."""
        self._lock_event(le.Fenced(code))

    # --- the dispatch thread ---------------------------------------------------------------------------------------

    def _notified(self, notify_id: int, notifier: int, cookie: int, payload: bytes) -> bytes | None:
        try:
            message = nf.decode(payload)
        except DecodeError as problem:
            log.warning("%s: a notify of client %d cannot be read: %s", self.header_oid, notifier, problem)
            return b""
        match message:
            case nf.HeaderUpdate():
                self._header_changed()
                return nf.encode_response(0)
            case nf.AcquiredLock(client):
                self._lock_event(le.PeerAcquired(client.gid, client.handle))
                return b""
            case nf.ReleasedLock(client):
                self._lock_event(le.PeerReleased(client.gid))
                return b""
            case nf.WhoAreYou():
                return self.diary.answer(self.state, self.policy, self.standing_by).encode()
            case nf.RequestLock(client):
                self.diary.asked(client)
                result = self._lock_event(le.PeerRequested(client.gid, client.handle))
                return b"" if result is None else nf.encode_response(-result)
        if wire.asks_owner(message) and not self._lock.owning:
            return b""
        self._submit(partial(self._peer_op, message, notify_id, cookie))
        return None

    def _watch_error(self, handle: int, failure: OSError) -> None:
        self._watch_event(wt.Lost(handle, failure.errno or errno.ENOTCONN))

    def _header_changed(self) -> None:
        with self._mutex:
            self.header_seq += 1
            if self._refresh_queued:
                return
            self._refresh_queued = True
        self._submit(self._refresh)

    # --- control threads ---------------------------------------------------------------------------------------------

    def _refresh(self) -> list[Job]:
        with self._mutex:
            self._refresh_queued = False
            gone = self._closed.done()
            listeners = list(self._listeners)
        if not gone:
            self._callbacks.header_updated()
            for listener in listeners:
                listener()
        return []

    def _peer_op(self, message: nf.Message, notify_id: int, cookie: int) -> list[Job]:
        """Progress and completion are acked empty; requests non-empty, and by the owner alone."""

        def reply(result: int | None) -> None:
            code = -errno.EOPNOTSUPP if result is None else result
            payload = nf.encode_response(code) if wire.wants_result(message) else b""
            try:
                self.ctx.notify_ack(self.header_oid, notify_id, cookie, payload)
            except OSError as failure:
                log.info("%s: an ack could not be sent: %s", self.header_oid, failure)

        try:
            self._callbacks.peer_op(message, reply)
        except OSError as failure:
            reply(-(failure.errno or errno.EIO))
        return []

    def _lock_event(self, event: le.Event, prepare: Callable[[], bool] | None = None) -> int | None:
        """Feeds the lock machine; operations run on the pool. Returns the ack a Reply asks for."""
        reply, work = self._feed_lock(event, prepare)
        for job in work:
            self._submit(job)
        return reply

    def _feed_lock(self, event: le.Event, prepare: Callable[[], bool] | None = None) -> tuple[int | None, list[Job]]:
        """`prepare` runs under the mutex; when it answers False the event is dropped."""
        work: list[Job] = []
        calls: list[Callable[[], None]] = []
        with self._mutex:
            if prepare is not None and not prepare():
                return None, []
            reply = self._lock_actions(event, work, calls)
        for call in calls:
            call()
        return reply, work

    def _lock_actions(self, event: le.Event, work: list[Job], calls: list[Callable[[], None]]) -> int | None:
        """Under the mutex: sorts what the machine wants into jobs (they block) and calls (they end futures)."""
        reply: int | None = None
        for action in self._lock.handle(event):
            match action:
                case le.Reply(result):
                    reply = result
                case le.Acquired():
                    calls += [_ender(future) for future in self._acquiring]
                    self._acquiring = []
                case le.Refused(code):
                    calls += [_ender(future, self._failure(code)) for future in self._acquiring]
                    self._acquiring = []
                case le.Released(code):
                    calls += [_ender(future, self._failure(code)) for future in self._releasing]
                    self._releasing = []
                case le.Offered(code):
                    calls += [_ender(future, self._failure(code)) for future in self._offering]
                    self._offering = []
                case le.Stopped(code):
                    calls.append(_ender(self._stopped, self._failure(code)))
                case le.Lost(code, cookies):
                    self._submit(partial(self._end_lost, code, cookies))
                case le.AnnounceAcquired(handle):
                    self._announcements.append((wire.acquired_lock(self._gid, handle), 0))
                    self._submit(self._announce)
                case le.AnnounceReleased(op, handle):
                    self._announcements.append((wire.released_lock(self._gid, handle), op))
                    work.append(self._announce)
                case le.Sleep(op, seconds):
                    self._sleep("lock", op, seconds, partial(self._lock_event, le.Done(op)))
                case _:
                    work.append(partial(self._lock_operation, action))
        self._forget_timer("lock", self._lock.outstanding)
        self.diary.note(self._lock.handle_now, self._lock.owning)
        return reply

    def _submit(self, job: Job) -> None:
        self._pool.submit(partial(self._run, [job]))

    def _run(self, work: list[Job]) -> None:
        """Runs jobs and what follows from them in this thread; a second one at a time goes to another."""
        while work:
            job, *others = work
            for other in others:
                self._submit(other)
            work = job()

    def _sleep(self, name: str, op: int, seconds: float, job: Callable[[], object]) -> None:
        def wake() -> None:
            job()

        self._timers[name] = (op, self._pool.call_later(seconds, wake))

    def _forget_timer(self, name: str, outstanding: int) -> None:
        entry = self._timers.get(name)
        if entry is not None and entry[0] != outstanding:
            entry[1].cancel()
            del self._timers[name]

    def _failure(self, code: int) -> OSError | None:
        if code == 0:
            return None
        return OSError(code, f"{self.header_oid}: {_REASONS.get(code) or os.strerror(code)}")

    def _end_lost(self, code: int, cookies: tuple[str, ...]) -> list[Job]:
        """Tells the image, and leaves nothing behind that makes others wait. `close` has nothing left to do then."""
        failure = self._failure(code)
        assert failure is not None
        try:
            self._callbacks.lost(failure)
        except Exception:
            log.exception("%s: its image cannot be told that it is lost", self.header_oid)
        for cookie in cookies:
            handle = parse_auto_cookie(cookie)
            assert handle is not None
            try:
                wire.unlock(self.ctx, self.header_oid, cookie)
                self.ctx.notify(self.header_oid, wire.released_lock(self._gid, handle), NOTIFY_MS)
            except OSError as problem:
                log.log(
                    INFO if problem.errno == errno.ENOENT else WARNING,
                    "%s: the lock %s is left behind: %s",
                    self.header_oid,
                    cookie,
                    problem,
                )
        return self._feed_watch(wt.Close())

    def _lock_operation(self, operation: le.Operation) -> list[Job]:
        """Runs one operation; returns those that follow from it."""
        try:
            done = le.Done(operation.op, 0, self._execute(operation))
        except OSError as failure:
            done = le.Done(operation.op, failure.errno or errno.EIO)
        except Exception:
            log.exception("%s: %s failed", self.header_oid, type(operation).__name__)
            done = le.Done(operation.op, errno.EIO)
        return self._feed_lock(done)[1]

    def _execute(self, operation: le.Operation) -> object:
        ctx, oid = self.ctx, self.header_oid
        match operation:
            case le.Look():
                return wire.get_lock(ctx, oid)
            case le.TryLock(_, cookie):
                wire.lock(ctx, oid, cookie)
            case le.CheckOwner(_, owner):
                return self._lives(owner)
            case le.Blocklist(_, address):
                log.warning("%s: fencing the dead lock owner %s", oid, address)
                ctx.store.blocklist_add(address)
            case le.Break(_, owner):
                wire.break_lock(ctx, oid, owner)
            case le.Ask():
                return self._ask()
            case le.RunPostAcquire():
                self._callbacks.post_acquire()
            case le.RunPreRelease(_, final):
                self._callbacks.pre_release(final)
            case le.Unlock(_, cookie):
                wire.unlock(ctx, oid, cookie)
            case le.SetCookie(_, old, new):
                wire.set_cookie(ctx, oid, old, new)
            case le.Mark(_, owner, new):
                wire.mark(ctx, oid, owner, new)
            case le.TakeOffer(_, cookie, owner, mark, record):
                wire.take(ctx, oid, owner, cookie, mark, record)
            case _:
                raise AssertionError(operation)
        return None

    def _ask(self) -> le.Answer:
        handle = self._watch.watch
        if handle is None:
            return le.Answer(None)
        result = self._owners_answer(wire.request_lock(self._gid, handle))
        return le.Answer(None if result is None else abs(result))

    def _owners_answer(self, payload: bytes) -> int | None:
        reply = self.ctx.notify(self.header_oid, payload, NOTIFY_MS)
        for ack in reply.acks.values():
            result = wire.result_of(ack)
            if result is not None:
                return result
        return None

    def _announce(self) -> list[Job]:
        """Sends what is queued, in order, unless another thread is at it."""
        with self._mutex:
            if self._announcing:
                return []
            self._announcing = True
        work: list[Job] = []
        while True:
            with self._mutex:
                if not self._announcements:
                    self._announcing = False
                    return work
                payload, op = self._announcements.popleft()
            code = 0
            try:
                self.ctx.notify(self.header_oid, payload, NOTIFY_MS)
            except OSError as failure:
                code = failure.errno or errno.EIO
            if op:
                work += self._feed_lock(le.Done(op, code))[1]

    def _feed_watch(self, event: wt.Event) -> list[Job]:
        """Feeds the watch machine, and the lock machine with what that means for it."""
        work: list[Job] = []
        calls: list[Callable[[], None]] = []
        with self._mutex:
            for action in self._watch.handle(event):
                match action:
                    case wt.Opened(code):
                        calls.append(_ender(self._opening, self._failure(code)))
                    case wt.Up(handle, again):
                        self._lock_actions(le.WatchUp(handle), work, calls)
                        if again:
                            calls.append(self._header_changed)
                    case wt.Down():
                        self._lock_actions(le.WatchDown(), work, calls)
                    case wt.Failed(code):
                        self._lock_actions(le.Fenced(code), work, calls)
                    case wt.Closed():
                        calls.append(_ender(self._closed))
                    case wt.Sleep(op, seconds):
                        self._sleep("watch", op, seconds, partial(self._watch_event, wt.Done(op)))
                    case _:
                        work.append(partial(self._watch_operation, action))
            self._forget_timer("watch", self._watch.outstanding)
        for call in calls:
            call()
        return work

    def _watch_event(self, event: wt.Event) -> None:
        for job in self._feed_watch(event):
            self._submit(job)

    def _watch_operation(self, operation: wt.Operation) -> list[Job]:
        done: wt.Done
        match operation:
            case wt.Register(op):
                try:
                    watch = self.ctx.watch(self.header_oid, self._notified, self._watch_error)
                    with self._mutex:
                        self._watches[watch.cookie] = watch
                    done = wt.Done(op, 0, watch.cookie)
                except OSError as failure:
                    done = wt.Done(op, failure.errno or errno.EIO)
            case wt.Unregister(op, handle):
                with self._mutex:
                    old = self._watches.pop(handle, None)
                code = 0
                try:
                    if old is not None:
                        old.close()
                except OSError as failure:
                    code = failure.errno or errno.EIO
                done = wt.Done(op, code)
            case _:
                raise AssertionError(operation)
        return self._feed_watch(done)


_REASONS = {
    errno.EROFS: "the lock owner refuses to give it up",
    errno.EBUSY: "locked by hand or by something else than an RBD client",
    errno.ESHUTDOWN: "this client is fenced or the image is being closed",
    errno.ENOENT: "the image is gone",
    errno.ECANCELED: "released before it was acquired",
    errno.EAGAIN: "another client owns the lock",
    errno.ESTALE: "somebody else owned the lock while the VM was moving",
    errno.EINVAL: "locked by a handle of this process that is no longer there",
}


def _append(futures: Callable[[], list[Future[None]]], future: Future[None]) -> bool:
    futures().append(future)
    return True


def _ender(future: Future[None], failure: OSError | None = None) -> Callable[[], None]:
    def end() -> None:
        try:
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(OSError(failure.errno, failure.strerror))
        except InvalidStateError:
            pass  # the waiter cancelled it

    return end


def _wait(future: Future[None], timeout: float | None, what: str) -> None:
    try:
        future.result(timeout)
    except FutureTimeout:
        raise OSError(errno.ETIMEDOUT, what) from None

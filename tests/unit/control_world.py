"""A simulated store, clock and network for the watch and lock machines. Everything is decided by one seed."""

from __future__ import annotations

import errno
import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from librbd_py.control import lock_events as le
from librbd_py.control import watch as wt
from librbd_py.control.lock import LockMachine
from librbd_py.control.lock_events import LockState
from librbd_py.format.lock import auto_cookie

WRITING = frozenset(
    {
        LockState.LOCKED,
        LockState.RELOCK_LOOKING,
        LockState.RELOCKING,
        LockState.RELOCK_WAITING,
        LockState.POST_ACQUIRING,
        LockState.QUIESCING,
    }
)


class Violation(AssertionError):
    """A promise of the lock was broken."""


@dataclass
class Chances:
    """Probability of each fault, per operation or per step."""

    lost_answer: float = 0.02
    failure: float = 0.01
    lost_notify: float = 0.05
    repeated_notify: float = 0.05
    forged_notify: float = 0.01
    watch_loss: float = 0.01
    crash: float = 0.003
    shutdown: float = 0.005
    exclusive: float = 0.05
    full: float = 0.005  # the store becomes full, for some seconds


CALM = Chances(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@dataclass
class Client:
    gid: int
    lock: LockMachine
    watch: wt.WatchMachine = field(default_factory=wt.WatchMachine)
    alive: bool = True
    waits_lock: bool = False
    waits_release: bool = False
    waits_stop: bool = False
    closed: bool = False
    lost: int = 0

    @property
    def address(self) -> str:
        return self.lock.address


class World:
    def __init__(self, seed: int, clients: int = 3, chances: Chances | None = None) -> None:
        self.rng = random.Random(seed)
        self.chances = chances or Chances()
        self.now = 0.0
        self.steps = 0
        self.grants = 0
        self.owner: le.Locker | None = None
        self.full = 0  # how many episodes of a full store overlap
        self.watchers: dict[tuple[int, int], str] = {}  # (gid, handle) -> address
        self.blocklist: set[str] = set()
        self.lossy: set[int] = set()  # clients that ever lost a watch
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = itertools.count()
        self._gids = itertools.count(4100)
        self._handles = itertools.count(1000)
        self.clients: list[Client] = []
        for _ in range(clients):
            self.join()

    # --- time ------------------------------------------------------------------------------------------------

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + seconds, next(self._sequence), call))

    def latency(self) -> float:
        return self.rng.random() * (0.01 if self.rng.random() < 0.9 else 2.0)

    def hit(self, chance: float) -> bool:
        return chance > 0 and self.rng.random() < chance

    def step(self) -> bool:
        if not self._heap:
            return False
        self.now, _, call = heapq.heappop(self._heap)
        call()
        self.steps += 1
        self.check()
        return True

    def check(self) -> None:
        writers = [c for c in self.clients if c.alive and c.lock.state in WRITING and c.address not in self.blocklist]
        if len(writers) > 1:
            raise Violation(f"two owners: {[(c.gid, c.lock.state) for c in writers]}")

    # --- clients ---------------------------------------------------------------------------------------------------

    def join(self) -> Client:
        gid = next(self._gids)
        client = Client(gid, LockMachine(gid, f"10.0.0.{gid % 250}:0/{gid}"))
        client.lock.exclusive = self.hit(self.chances.exclusive)
        self.clients.append(client)
        self.tell_watch(client, wt.Open())
        return client

    def user(self) -> None:
        """One random thing a user, an operator or fate does; arranges for the next."""
        self.after(self.rng.random() * 0.5, self.user)
        client = self.rng.choice(self.clients)
        c = self.chances
        if self.hit(c.crash):
            self.crash(client)
        elif self.hit(c.shutdown) or client.lost:
            if not client.waits_stop and not client.closed:
                client.waits_stop = True
                self.tell_lock(client, le.Shutdown())
        elif self.hit(c.watch_loss) and client.watch.watch is not None:
            self.lose_watch(client, client.watch.watch)
        elif self.hit(c.full):
            self.full += 1
            self.after(self.rng.random() * 10, self._less_full)
        elif self.hit(c.forged_notify):
            forged = self.rng.choice([le.PeerReleased(), le.PeerRequested(), le.PeerAcquired(1, 2)])
            self.tell_lock(client, forged)
        else:
            what = self.rng.random()
            if what < 0.7:
                client.waits_lock = True
                self.tell_lock(client, le.Acquire(ask=self.rng.random() < 0.7))
            elif what < 0.85:
                client.waits_release = True
                self.tell_lock(client, le.Release())
            elif client.waits_lock:
                client.waits_lock = False
                self.tell_lock(client, le.Abandon())

    def _less_full(self) -> None:
        self.full -= 1

    def crash(self, client: Client) -> None:
        client.alive = False
        self._leave(client, self.rng.choice([0.0, 30.0]))

    def _leave(self, client: Client, seconds: float) -> None:
        """Gone; the store notices by itself after a while."""
        self.clients.remove(client)
        self.join()
        for key in [k for k in self.watchers if k[0] == client.gid]:
            self.after(seconds, lambda key=key: self._drop_watch(key))  # type: ignore[misc]

    def _drop_watch(self, key: tuple[int, int]) -> None:
        self.watchers.pop(key, None)

    def lose_watch(self, client: Client, handle: int) -> None:
        self.watchers.pop((client.gid, handle), None)
        self.lossy.add(client.gid)
        late = self.rng.random() * 20.0 if self.hit(0.3) else self.latency()
        self.after(late, lambda: self.tell_watch(client, wt.Lost(handle, errno.ENOTCONN)))

    def _fenced(self, address: str) -> None:
        """The store drops a fenced client's watches and tells it, sooner or later."""
        for (gid, handle), where in list(self.watchers.items()):
            if where == address:
                del self.watchers[gid, handle]
                for client in self.clients:
                    if client.gid == gid:
                        lost = wt.Lost(handle, errno.ESHUTDOWN)
                        self.after(self.latency(), lambda client=client, lost=lost: self.tell_watch(client, lost))  # type: ignore[misc]

    # --- machines ----------------------------------------------------------------------------------------------------

    def tell_watch(self, client: Client, event: wt.Event) -> None:
        if not client.alive:
            return
        for action in client.watch.handle(event):
            match action:
                case wt.Register(op):
                    self._answer_watch(client, op, lambda: self._register(client))
                case wt.Unregister(op, handle):
                    self._answer_watch(client, op, lambda handle=handle: self._unregister(client, handle))  # type: ignore[misc]
                case wt.Sleep(op, seconds):
                    self.after(seconds, lambda op=op: self.tell_watch(client, wt.Done(op)))  # type: ignore[misc]
                case wt.Up(handle, _):
                    self.tell_lock(client, le.WatchUp(handle))
                case wt.Down():
                    self.tell_lock(client, le.WatchDown())
                case wt.Failed(code):
                    self.tell_lock(client, le.Fenced(code))
                case wt.Closed():
                    client.closed = True
                    if not client.lost:
                        assert self.owner is None or self.owner.gid != client.gid, "closed with the lock held"
                    client.alive = False
                    self._leave(client, 30.0)
                case wt.Opened(code) if code:
                    self.after(0.1, lambda: self.tell_watch(client, wt.Open()))

    def _answer_watch(self, client: Client, op: int, effect: Callable[[], tuple[int, int]]) -> None:
        def at_store() -> None:
            code, handle = effect()
            self.after(self.latency(), lambda: self.tell_watch(client, wt.Done(op, code, handle)))

        if self.hit(self.chances.failure):
            self.after(self.latency(), lambda: self.tell_watch(client, wt.Done(op, errno.ETIMEDOUT)))
        else:
            self.after(self.latency(), at_store)

    def _register(self, client: Client) -> tuple[int, int]:
        if client.address in self.blocklist:
            return errno.ESHUTDOWN, 0
        handle = next(self._handles)
        if client.alive:
            self.watchers[client.gid, handle] = client.address
        return 0, handle

    def _unregister(self, client: Client, handle: int) -> tuple[int, int]:
        self.watchers.pop((client.gid, handle), None)
        return (errno.ESHUTDOWN if client.address in self.blocklist else 0), 0

    def tell_lock(self, client: Client, event: le.Event) -> int | None:
        if not client.alive:
            return None
        reply: int | None = None
        for action in client.lock.handle(event):
            match action:
                case le.Reply(result):
                    reply = result
                case le.Acquired():
                    self.grants += 1
                    client.waits_lock = False
                case le.Refused():
                    client.waits_lock = False
                case le.Released():
                    client.waits_release = False
                case le.Stopped(code):
                    client.waits_stop = False
                    if code == 0 or client.lock.state is LockState.STOPPED:
                        self.tell_watch(client, wt.Close())
                case le.Lost():
                    client.lost += 1
                    if client.lost > 1:
                        raise Violation("lost twice")
                case le.Sleep(op, seconds):
                    self.after(seconds, lambda op=op: self.tell_lock(client, le.Done(op)))  # type: ignore[misc]
                case le.AnnounceAcquired(handle):
                    self._notify(client, le.PeerAcquired(client.gid, handle), None)
                case le.AnnounceReleased(op, _):
                    self._notify(client, le.PeerReleased(), op)
                case le.Ask(op):
                    self._notify(client, le.PeerRequested(), op)
                case le.RunPostAcquire(op) | le.RunPreRelease(op):
                    self._run_callback(client, op)
                case _:
                    self._operate(client, action)
        return reply

    def _run_callback(self, client: Client, op: int) -> None:
        code = self.rng.choice([errno.EIO, errno.ETIMEDOUT]) if self.hit(self.chances.failure) else 0

        def end() -> None:
            fenced = client.address in self.blocklist
            self.tell_lock(client, le.Done(op, errno.ESHUTDOWN if fenced else code))

        self.after(self.latency(), end)

    def _operate(self, client: Client, action: le.Action) -> None:
        """The request reaches the store, takes effect there, and the answer comes back or is lost."""
        op: int = action.op  # type: ignore[union-attr]

        def at_store() -> None:
            if client.alive:
                code, value = self._apply(client, action)
                if self.hit(self.chances.lost_answer):
                    code, value = errno.ETIMEDOUT, None
                self.after(self.latency(), lambda: self.tell_lock(client, le.Done(op, code, value)))

        if self.hit(self.chances.failure):
            self.after(self.latency(), lambda: self.tell_lock(client, le.Done(op, errno.EIO)))
        else:
            self.after(self.latency(), at_store)

    def _apply(self, client: Client, action: le.Action) -> tuple[int, object]:
        if client.address in self.blocklist:
            return errno.ESHUTDOWN, None
        if self.full and not isinstance(action, le.Look | le.CheckOwner):
            return errno.ENOSPC, None
        mine = self.owner is not None and self.owner.gid == client.gid
        match action:
            case le.Look():
                return 0, le.LockView(self.owner)
            case le.TryLock(_, cookie):
                if self.owner is None:
                    self.owner = le.Locker(client.gid, cookie, client.address)
                    return 0, None
                return (errno.EEXIST if mine and self.owner.cookie == cookie else errno.EBUSY), None
            case le.CheckOwner(_, owner):
                watched = {(auto_cookie(handle), where) for (_, handle), where in self.watchers.items()}
                return 0, (owner.cookie, owner.address) in watched
            case le.Blocklist(_, address):
                # One that loses its watch may be taken for dead; one that never did must not.
                if any(c.address == address and c.watch.watch and c.gid not in self.lossy for c in self.clients):
                    raise Violation("a living owner is fenced")
                self.blocklist.add(address)
                self._fenced(address)
                return 0, None
            case le.Break(_, owner):
                if self.owner != owner:
                    return errno.ENOENT, None
                self.owner = None
                return 0, None
            case le.Unlock(_, cookie):
                if not mine or self.owner is None or self.owner.cookie != cookie:
                    return errno.ENOENT, None
                self.owner = None
                return 0, None
            case le.SetCookie(_, old, new):
                if not mine or self.owner is None or self.owner.cookie != old:
                    return errno.EBUSY, None
                self.owner = le.Locker(client.gid, new, client.address)
                return 0, None
        raise AssertionError(action)

    def _notify(self, sender: Client, event: le.Event, op: int | None) -> None:
        """Delivers to every watcher; answers `op` when all have acked or after 5 s."""
        if sender.address in self.blocklist:
            if op is not None:
                self.after(self.latency(), lambda: self.tell_lock(sender, le.Done(op, errno.ESHUTDOWN)))
            return
        waiting = set(self.watchers)
        acks: list[int] = []
        open_ops = [op] if op is not None else []

        def finish() -> None:
            if open_ops:
                answer = le.Answer(acks[0] if acks else None)
                self.tell_lock(sender, le.Done(open_ops.pop(), 0, answer))

        def deliver(key: tuple[int, int], first: bool) -> None:
            for client in self.clients:
                if client.gid == key[0] and client.watch.watch == key[1]:
                    result = self.tell_lock(client, event)
                    if first:
                        if result is not None:
                            acks.append(result)
                        waiting.discard(key)
                        if not waiting:
                            self.after(self.latency(), finish)

        for key in list(waiting):
            if not self.hit(self.chances.lost_notify):
                self.after(self.latency(), lambda key=key: deliver(key, True))  # type: ignore[misc]
            if self.hit(self.chances.repeated_notify):
                self.after(self.latency() * 5, lambda key=key: deliver(key, False))  # type: ignore[misc]
        self.after(5.0, finish)

    # --- whole runs -----------------------------------------------------------------------------------------------

    def run(self, steps: int) -> None:
        """Chaos for `steps` steps, then calm until everybody who waits was answered."""
        self.user()
        while self.steps < steps:
            self.step()
        self.chances = CALM
        self._heap = [entry for entry in self._heap if entry[2] != self.user]
        heapq.heapify(self._heap)
        for client in self.clients:
            client.lock.exclusive = False
        deadline = self.now + 600.0
        while self.now < deadline and self.step():
            pass
        for client in self.clients:
            waits = (client.waits_lock, client.waits_release, client.waits_stop)
            if any(waits):
                raise Violation(f"client {client.gid} waits for ever in {client.lock.state}: {waits}")
            if client.lost:
                continue
            fresh = le.Locker(client.gid, auto_cookie(client.watch.watch or 0), client.address)
            if client.lock.owning and (self.owner != fresh or client.lock.cookie != fresh.cookie):
                raise Violation(f"{fresh} should hold the lock, not {self.owner}")
            if self.owner is not None and self.owner.gid == client.gid and not client.lock.owning:
                raise Violation(f"client {client.gid} holds the lock and does not know")

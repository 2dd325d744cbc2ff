"""A simulated store, clock and network for the watch and lock machines. Everything is decided by one seed."""

from __future__ import annotations

import errno
import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from librbd_py.control import lock_events as le
from librbd_py.control import watch as wt
from librbd_py.control.handoff import HANDING
from librbd_py.control.lock import LockMachine
from librbd_py.control.lock_events import LockState
from librbd_py.format.lock import Offer, auto_cookie

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
RENEWING = frozenset({LockState.RELOCK_LOOKING, LockState.RELOCKING, LockState.RELOCK_WAITING})


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
    blocklist: float = 0.001  # an operator fences somebody
    restart: float = 0.5  # of those who crash: the next one on this host knows that it is dead
    slow: float = 0.1  # of answers and notifies


CALM = Chances(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


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
    gate: bool = False  # the image lets writes through
    parked: bool = False  # all requests wait, for a hand-off
    writing: int = 0  # writes in flight
    drained: list[Callable[[], None]] = field(default_factory=list)  # to call when there are none
    waits_offer: bool = False
    waits_move: bool = False
    expected: le.Locker | None = None  # who owned the lock when it began to stand by
    heard: set[int] = field(default_factory=set)  # who announced to it, since then, that it took the lock
    answer: int = 0  # to the last Offer, TakeBack or TakeOver
    moves: bool = False  # takes part in a migration

    @property
    def address(self) -> str:
        return self.lock.address

    def __str__(self) -> str:
        waits = [name for name, value in vars(self).items() if name.startswith("waits_") and value]
        return f"client {self.gid} ({self.watch.state.name}, {self.lock.state.name}, {waits}, answered {self.answer})"

    @property
    def waits(self) -> bool:
        return self.waits_lock or self.waits_release or self.waits_stop or self.waits_offer or self.waits_move


class World:
    def __init__(self, seed: int, clients: int = 3, chances: Chances | None = None) -> None:
        self.rng = random.Random(seed)
        self.chances = chances or Chances()
        self.now = 0.0
        self.steps = 0
        self.grants = 0
        self.writes = 0
        self.renewing = 0  # writes that arrived while the cookie was renewed under a new watch
        self.left_behind = 0  # locks that could not be unlocked and were broken by the next owner
        self.owner: le.Locker | None = None
        self.owners: list[int] = []  # who held the lock, in turn
        self.offered_at: dict[str, int] = {}  # nonce -> how many had held it then
        self.fenced_in: set[LockState] = set()  # states in which somebody was put on the blocklist
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
        return self.rng.random() * (2.0 if self.hit(self.chances.slow) else 0.01)

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

    def join(self, former: frozenset[str] = frozenset()) -> Client:
        gid = next(self._gids)
        client = Client(gid, LockMachine(gid, f"10.0.0.{gid % 250}:0/{gid}", former=former))
        client.lock.exclusive = self.hit(self.chances.exclusive)
        client.lock.heir = self.hit(0.5)
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
        elif self.hit(c.blocklist):
            self.fenced_in.add(client.lock.state)
            self.blocklist.add(client.address)
            self._fenced(client.address)
        elif self.hit(c.full):
            self.full += 1
            self.after(self.rng.random() * 10, self._less_full)
        elif self.hit(c.forged_notify):
            forged = self.rng.choice([le.PeerReleased(), le.PeerRequested(), le.PeerAcquired(1, 2)])
            self.tell_lock(client, forged)
        else:
            what = self.rng.random()
            if what < 0.3:
                self.write(client)
            elif what < 0.75:
                if not client.lock.hand.moving:  # as the driver
                    client.waits_lock = True
                    self.tell_lock(client, le.Acquire(ask=self.rng.random() < 0.7))
            elif what < 0.85:
                client.waits_release = True
                self.tell_lock(client, le.Release())
            elif client.waits_lock:
                self.abandon(client)

    def abandon(self, client: Client) -> None:
        """One waiter gives up; as in the driver the machine hears of it when it was the last."""
        client.waits_lock = False
        if not client.waits_move:
            self.tell_lock(client, le.Abandon())

    def _less_full(self) -> None:
        self.full -= 1

    def crash(self, client: Client) -> None:
        """Its writes in flight may still arrive."""
        client.alive = False
        self._leave(client, self.rng.choice([0.0, 30.0]), self.hit(self.chances.restart))

    def _leave(self, client: Client, seconds: float, restart: bool = False) -> None:
        """Gone; the store notices by itself after a while."""
        if client not in self.clients:
            return  # closed while it was being fenced
        self.clients.remove(client)
        self.join(frozenset({client.address} if restart else ()))
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

    # --- the image: what the gate lets through ------------------------------------------------------------------------

    def write(self, client: Client) -> None:
        """One write of a guest, if it need not wait."""
        if not client.alive or not client.gate or client.parked:
            return
        client.writing += 1

        def arrives() -> None:
            client.writing -= 1
            if client.address in self.blocklist:
                self.tell_lock(client, le.Fenced())
            elif self.owner is None or self.owner.gid != client.gid:
                raise Violation(f"a write of client {client.gid} arrives while {self.owner} owns the image")
            elif Offer.parse(self.owner.mark) is not None:
                raise Violation(f"client {client.gid} writes to what it has offered")
            else:
                self.writes += 1
                self.renewing += client.lock.state in RENEWING
            if not client.writing:
                ready, client.drained = client.drained, []
                for call in ready:
                    call()

        self.after(self.latency(), arrives)

    def drain(self, client: Client, then: Callable[[], None]) -> None:
        if client.writing:
            client.drained.append(then)
        else:
            then()

    def _post_acquire(self, client: Client, op: int) -> None:
        def end() -> None:
            code = self._callback_code(client)
            client.gate = client.alive and not code and not client.lost
            self.tell_lock(client, le.Done(op, code))

        self.after(self.latency(), end)

    def _pre_release(self, client: Client, op: int, final: bool) -> None:
        def end() -> None:
            code = self._callback_code(client)
            client.gate = bool(code) and not client.lost and not (final and code != errno.ETIMEDOUT)
            self.tell_lock(client, le.Done(op, code))

        client.gate = False
        self.drain(client, lambda: self.after(self.latency(), end))

    def _callback_code(self, client: Client) -> int:
        if client.address in self.blocklist:
            return errno.ESHUTDOWN
        return self.rng.choice([errno.EIO, errno.ETIMEDOUT]) if self.hit(self.chances.failure) else 0

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
                case wt.Closed() if client.lock.state is LockState.FENCED:
                    pass  # by itself; its program has not closed the image yet
                case wt.Closed():
                    client.closed = True
                    if not client.lost:
                        assert self.owner is None or self.owner.gid != client.gid, "closed with the lock held"
                    client.alive = False
                    self._leave(client, 30.0)
                case wt.Opened(errno.ESHUTDOWN):
                    client.alive = False  # fenced before it began: the program sees that it cannot open the image
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
        if isinstance(event, le.PeerAcquired):
            client.heard.add(event.gid)
        for action in client.lock.handle(event):
            match action:
                case le.Reply(result):
                    reply = result
                case le.Acquired():
                    self.grants += 1
                    self.granted(client)
                    client.waits_lock = client.waits_move = False
                    client.answer = 0
                case le.Refused(code):
                    client.waits_lock = client.waits_move = False
                    client.answer = code
                case le.Released():
                    client.waits_release = False
                case le.Offered(code):
                    client.waits_offer = False
                    client.answer = code
                case le.Stopped(code):
                    client.waits_stop = False
                    if code == 0 or client.lock.state is LockState.STOPPED:
                        self.tell_watch(client, wt.Close())
                case le.Lost(_, cookies):
                    client.lost += 1
                    client.gate = False
                    if client.lost > 1:
                        raise Violation("lost twice")
                    if cookies and client.writing:
                        raise Violation(f"{client} would unlock with writes under way")
                    self.after(self.latency(), lambda: self._end_lost(client, cookies))
                case le.Sleep(op, seconds):
                    self.after(seconds, lambda op=op: self.tell_lock(client, le.Done(op)))  # type: ignore[misc]
                case le.AnnounceAcquired(handle):
                    self._notify(client, le.PeerAcquired(client.gid, handle), None)
                case le.AnnounceReleased(op, _):
                    self._notify(client, le.PeerReleased(client.gid), op)
                case le.Ask(op):
                    self._notify(client, le.PeerRequested(client.gid, client.lock.handle_now or 0), op)
                case le.RunPostAcquire(op):
                    self._post_acquire(client, op)
                case le.RunPreRelease(op, final):
                    self._pre_release(client, op, final)
                case _:
                    self._operate(client, action)
        if reply == 0 and client.lock.state in HANDING:
            raise Violation(f"client {client.gid} promises a stranger the lock it offers")
        return reply

    def granted(self, client: Client) -> None:
        """The machine says that its lock is there."""

    def _end_lost(self, client: Client, cookies: tuple[str, ...]) -> None:
        for cookie in cookies:
            if client.alive and not self.hit(self.chances.failure):
                self._apply(client, le.Unlock(0, cookie))
        if self.owner is not None and self.owner.gid == client.gid:
            self.left_behind += 1
        self.tell_watch(client, wt.Close())

    def _operate(self, client: Client, action: le.Action) -> None:
        """The request reaches the store, takes effect there, and the answer comes back or is lost."""
        op: int = action.op  # type: ignore[union-attr]
        takes = isinstance(action, le.TakeOffer) and Offer.parse(action.owner.mark) is not None
        if takes and not (client.moves or client.lock.heir):
            raise Violation(f"{client} takes what is offered to a VM")

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
                    self._owned(le.Locker(client.gid, cookie, client.address))
                    return 0, None
                return (errno.EEXIST if mine and self.owner.cookie == cookie else errno.EBUSY), None
            case le.CheckOwner(_, owner):
                watched = {(auto_cookie(handle), where) for (_, handle), where in self.watchers.items()}
                return 0, (owner.cookie, owner.address) in watched
            case le.Blocklist(_, address):
                # One that loses its watch may be taken for dead; one that never did must not.
                fenced = address in self.blocklist  # by an operator, and has not heard of it
                living = [c for c in self.clients if c.address == address and c.watch.watch and c.gid not in self.lossy]
                if living and not fenced:
                    raise Violation("a living owner is fenced")
                self.blocklist.add(address)
                self._fenced(address)
                return 0, None
            case le.Break(_, owner):
                if self.owner is None or (self.owner.gid, self.owner.cookie) != (owner.gid, owner.cookie):
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
                self.owner = replace(self.owner, cookie=new)
                return 0, None
            case le.Mark(_, owner, new):
                if self.owner != owner:
                    return errno.ECANCELED, None
                self.owner = replace(owner, mark=new)
                if offer := Offer.parse(new):
                    if offer.nonce in self.offered_at:
                        raise Violation(f"the generation {offer.nonce} is offered twice")
                    self.offered_at[offer.nonce] = len(self.owners)
                return 0, None
            case le.TakeOffer(_, cookie, owner, mark, _):
                if self.owner != owner:
                    return errno.ECANCELED, None
                offer = Offer.parse(owner.mark)
                if offer is None and owner.address not in self.blocklist:
                    raise Violation(f"client {client.gid} takes the lock of {owner}, which is not fenced")
                if offer is not None and self.offered_at[offer.nonce] != len(self.owners):
                    raise Violation(f"client {client.gid} takes what {owner} does not offer any more")
                self._owned(le.Locker(client.gid, cookie, client.address, mark))
                return 0, None
        raise AssertionError(action)

    def _owned(self, locker: le.Locker) -> None:
        self.owner = locker
        self.owners.append(locker.gid)

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
        """Chaos for `steps` steps, then calm until everybody who waits was answered and everybody has had the lock."""
        self.user()
        while self.steps < steps:
            self.step()
        self.chances = CALM
        self._heap = [entry for entry in self._heap if entry[2] != self.user]
        heapq.heapify(self._heap)
        self.settle(600.0)
        for client in [c for c in self.clients if c.alive and not (c.lost or c.closed or c.lock.stopping)]:
            client.waits_lock = True
            self.tell_lock(client, le.Acquire())
            self.settle(120.0)
            if not client.lock.owning:
                raise Violation(f"{client} does not get the lock though nobody minds")

    def calm(self) -> None:
        """Nobody keeps a lock for good. Who lost an image may never close it."""
        for client in self.clients:
            client.lock.exclusive = False

    def settle(self, seconds: float) -> None:
        """Nobody does anything new: every wait ends."""
        deadline = self.now + seconds
        while self.now < deadline and self.step():
            self.calm()
        for client in self.clients:
            if client.waits:
                raise Violation(f"{client} waits for ever")
            if client.lost or not client.alive:
                continue
            handle = client.watch.watch or 0
            fresh = (client.gid, auto_cookie(handle), client.address)
            held = self.owner and (self.owner.gid, self.owner.cookie, self.owner.address)
            if client.lock.owning and (held != fresh or client.lock.cookie != fresh[1]):
                raise Violation(f"{fresh} should hold the lock, not {self.owner}")
            if self.owner is not None and self.owner.gid == client.gid and not client.lock.owning:
                raise Violation(f"client {client.gid} holds the lock and does not know")
            if client.gate != client.lock.owning or client.parked:
                gate = "open" if client.gate else "closed"
                raise Violation(f"the gate of {client} is {gate}, parked: {client.parked}")

"""The object-store contract: what a Ceph cluster offers to RBD, as the rest of the library sees it.

One implementation per file: `memory` (a fake that passes the same conformance suite), `embedded` (one machine, no
server), later `rados` (librados). Nothing above this layer knows which one it talks to.

Semantics are RADOS's own: an operation list on one object is atomic; a failed one leaves no trace; class methods run
inside it. Errors are `OSError` (or a subclass from `librbd_py.errors`) with the errno a real OSD answers.

All calls are synchronous and thread-safe. Callers that must not block use a thread (`librbd_py.image.aio` does).
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from librbd_py.format.values import dataclass, field

NOSNAP = 0xFFFFFFFFFFFFFFFE  # "HEAD"
LOCATOR_MARK = "\x02"  # between a namespace and a locator key, in stores that place nothing
POOL_STATE = "\x03"  # the namespace of what such stores keep of a pool (`pool_state`)
SNAPDIR = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class SnapContext:
    """Existing self-managed snapshot ids, newest first, and the highest id ever given."""

    seq: int = 0
    ids: tuple[int, ...] = ()


NO_SNAPS = SnapContext()


@dataclass(frozen=True)
class Client:
    """Who this connection is: `gid` is the global id (entity `client.<gid>`), `address` is `ip:port/nonce`."""

    gid: int
    address: str


@dataclass(frozen=True)
class ClientProcess:
    """What a store on this machine knows of a living client without asking it. `silence`: seconds since it was seen
    running, None when it says nothing; `local`: the pid is one of ours, so it can be killed from here."""

    pid: int
    silence: float | None
    local: bool = True


@dataclass(frozen=True)
class WatcherInfo:
    """One row of list-watchers. `cookie` is the watch handle that lock cookies quote; timeout in seconds."""

    gid: int
    cookie: int
    address: str
    timeout: int = 0


@dataclass(frozen=True)
class NotifyReply:
    """Outcome of a notify: ack payload of each watcher that answered, and who did not within the timeout."""

    acks: Mapping[tuple[int, int], bytes]  # (gid, cookie) -> payload
    timed_out: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class CloneInfo:
    """One row of list_snaps. `clone_id` NOSNAP is the head. `snaps` ascending.
    `overlap`: (offset, length) shared with the next newer."""

    clone_id: int
    snaps: tuple[int, ...]
    size: int
    overlap: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class SnapSet:
    seq: int
    clones: tuple[CloneInfo, ...]


@dataclass(frozen=True)
class ObjectName:
    """One object of a pool, whatever its namespace. `locator`: the key it was placed by instead of its name."""

    name: str
    namespace: str
    locator: str = ""


@dataclass(frozen=True)
class ObjectStat:
    size: int  # bytes
    mtime_ns: int


# --- operations -------------------------------------------------------------------------------------------------
# One frozen dataclass per RADOS op. A list of them goes to ObjectContext.write() or .read(); results come back as a
# list of the same length (None where an op has no output).


@dataclass(frozen=True)
class Create:
    exclusive: bool = False  # EEXIST


@dataclass(frozen=True)
class AssertExists:
    """ENOENT."""


@dataclass(frozen=True)
class AssertVersion:
    version: int  # ERANGE when the object is older, EOVERFLOW when newer


@dataclass(frozen=True)
class Version:
    """-> int, what AssertVersion compares with; grows with every change. 0 in a write list that finds no object."""


@dataclass(frozen=True)
class CmpXattr:
    """ECANCELED unless `value op stored` holds; ops: eq ne gt ge lt le. A missing xattr is empty. ENOENT."""

    name: str
    value: bytes
    op: str = "eq"


@dataclass(frozen=True)
class OmapCmp:
    """ECANCELED unless every comparison `stored op value` holds: key -> (value, op), ops eq lt gt. A missing key is
    empty. ENOENT."""

    comparisons: Mapping[bytes, tuple[bytes, str]]


@dataclass(frozen=True)
class CmpExt:
    """OSError.errno = 4095 + offset of the first difference (in `data`) when data differs; past the end reads as
    zeros."""

    offset: int
    data: bytes


@dataclass(frozen=True)
class Exec:
    """A class method. Output: bytes. In read() only methods without the write flag are allowed (EPERM)."""

    cls: str
    method: str
    data: bytes = b""


# write ops
@dataclass(frozen=True)
class Write:
    offset: int
    data: bytes


@dataclass(frozen=True)
class WriteFull:
    data: bytes


@dataclass(frozen=True)
class Append:
    data: bytes


@dataclass(frozen=True)
class WriteSame:
    offset: int
    length: int
    data: bytes  # its length divides length, else EINVAL


@dataclass(frozen=True)
class Zero:
    """Never extends. When it reaches the end of the object it truncates it, as an OSD does. No object: nothing."""

    offset: int
    length: int


@dataclass(frozen=True)
class Truncate:
    """Cuts or extends. No object: nothing."""

    size: int


@dataclass(frozen=True)
class Remove:
    """ENOENT. Snapshots keep their clones."""


@dataclass(frozen=True)
class Rollback:
    snap_id: int


@dataclass(frozen=True)
class SetXattr:
    name: str
    value: bytes


@dataclass(frozen=True)
class RmXattr:
    name: str  # need not exist; the object must: ENOENT


@dataclass(frozen=True)
class OmapSet:
    values: Mapping[bytes, bytes]


@dataclass(frozen=True)
class OmapRmKeys:
    keys: Sequence[bytes]


@dataclass(frozen=True)
class OmapRmRange:
    begin: bytes
    end: bytes  # exclusive


@dataclass(frozen=True)
class OmapClear:
    pass


@dataclass(frozen=True)
class SetAllocHint:
    object_size: int
    write_size: int


# read ops
@dataclass(frozen=True)
class Stat:
    """-> ObjectStat"""


@dataclass(frozen=True)
class Read:
    """-> bytes, short at the end of the object. length 0 = to the end."""

    offset: int = 0
    length: int = 0


@dataclass(frozen=True)
class SparseRead:
    """-> (list of (offset, length), bytes)"""

    offset: int
    length: int


@dataclass(frozen=True)
class GetXattr:
    """-> bytes; ENODATA"""

    name: str


@dataclass(frozen=True)
class GetXattrs:
    """-> dict[str, bytes]"""


@dataclass(frozen=True)
class OmapGetVals:
    """-> (dict[bytes, bytes] in key order, more: bool). Keys > start_after with the prefix, at most max_return.
    A store gives at most 1024 rows at once, as an OSD does: go on from the last key while `more`."""

    start_after: bytes = b""
    prefix: bytes = b""
    max_return: int = 1 << 62


@dataclass(frozen=True)
class OmapGetKeys:
    """-> (list[bytes] in key order, more: bool), paged like OmapGetVals"""

    start_after: bytes = b""
    max_return: int = 1 << 62


@dataclass(frozen=True)
class OmapGetByKeys:
    """-> dict of those that exist"""

    keys: Sequence[bytes]


@dataclass(frozen=True)
class ListSnaps:
    """-> SnapSet"""


@dataclass(frozen=True)
class ListWatchers:
    """-> list[WatcherInfo]"""


Op = Any  # one of the dataclasses above; executors dispatch on the type and raise EOPNOTSUPP for anything else


class Watch(ABC):
    """A registered watch. States: registered -> error (the store lost it) -> closed. Closing twice is allowed."""

    cookie: int

    @abstractmethod
    def check(self) -> float:
        """Seconds since the watch was last confirmed. Raises ENOTCONN (lost) or ESHUTDOWN (blocklisted)."""

    @abstractmethod
    def close(self) -> None:
        """Unregisters; afterwards no callback runs (one in progress is waited for, unless called from it)."""


# callback(notify_id, notifier_gid, cookie, payload) -> ack payload. Runs on the store's own dispatch thread, one at a
# time per process: it must not block on another notify. To ack later return None and call ObjectContext.notify_ack.
NotifyCallback = Callable[[int, int, int, bytes], bytes | None]
# error(cookie, OSError): the watch is gone (ENOTCONN) or this client is fenced (ESHUTDOWN).
WatchErrorCallback = Callable[[int, OSError], None]


@dataclass
class NativeData:
    """An image's data objects for the C data plane. `handle` is a `rbdn_store *` (owned by the store)."""

    handle: Any
    # The store records existence itself, in the HEAD object map and (what a copy-up gives to snapshots) in theirs; the
    # engine sends no object map updates.
    keeps_object_map: bool
    close: Callable[[], None] = field(repr=False, default=lambda: None)  # drops this user's reference
    # Called by the exclusive-lock owner after it got the class lock / before it gives it up. own() waits until no
    # byte of an earlier owner can reach the store any more; ETIMEDOUT. RADOS fences by blocklist: nothing to do.
    own: Callable[[float], None] = field(repr=False, default=lambda seconds: None)
    disown: Callable[[], None] = field(repr=False, default=lambda: None)
    # Begins to bring what was written to the disk, so that the next flush has less to wait for. None: the data is not
    # in files of this machine.
    write_back: Callable[[], None] | None = field(repr=False, default=None)
    # For much data at once: large writes past the page cache, on or off; room for objects (number, count), and back
    # what was not written of it.
    bulk: Callable[[bool], None] = field(repr=False, default=lambda on: None)
    reserve: Callable[[int, int], None] | None = field(repr=False, default=None)
    give_back: Callable[[int, int], None] = field(repr=False, default=lambda objno, count: None)


class ObjectContext(ABC):
    """A pool and a namespace in it: RADOS's IoCtx without hidden state (snap context and snap id are arguments)."""

    store: Store
    pool_id: int
    namespace: str

    @abstractmethod
    def write(self, oid: str, ops: Sequence[Op], snapc: SnapContext = NO_SNAPS) -> list[Any]:
        """Applies all ops atomically, or raises and changes nothing. Creates the object when an op writes."""

    @abstractmethod
    def read(self, oid: str, ops: Sequence[Op], snap_id: int = NOSNAP) -> list[Any]:
        """ENOENT when the object does not exist at snap_id."""

    @abstractmethod
    def objects(self) -> Iterator[str]:
        """Names of the objects whose head exists, in no promised order. Ceph also lists those that only snapshots
        still need."""

    def listing(self, *, everywhere: bool = False) -> Iterator[ObjectName]:
        """As `objects`, but with those that have a locator key; `everywhere`: of all namespaces of the pool."""
        plain = self.namespace.partition(LOCATOR_MARK)[0]
        for namespace in self.store.namespaces(self.pool_id):
            shown, _, locator = namespace.partition(LOCATOR_MARK)
            if namespace != POOL_STATE and (everywhere or shown == plain):
                for name in self.store.open(self.pool_id, namespace).objects():
                    yield ObjectName(name, shown, locator)

    def with_locator(self, key: str) -> ObjectContext:
        """The same pool and namespace; objects are found by name and this key, "" for none. Stores that place nothing
        keep them apart by namespace."""
        plain = self.namespace.partition(LOCATOR_MARK)[0]
        return self.store.open(self.pool_id, f"{plain}{LOCATOR_MARK}{key}" if key else plain)

    @abstractmethod
    def snap_create(self) -> int:
        """A new self-managed snapshot id of the pool, larger than every earlier one."""

    @abstractmethod
    def snap_remove(self, snap_id: int) -> None:
        """Gives the id back; clones that only it needed disappear in the background. ENOENT never: idempotent."""

    @abstractmethod
    def watch(
        self, oid: str, callback: NotifyCallback, error: WatchErrorCallback | None = None, timeout: int = 0
    ) -> Watch:
        """`timeout`: seconds of silence after which the store ends the watch; 0: its own (30, unless configured).
        ENOENT when the object does not exist."""

    @abstractmethod
    def notify(self, oid: str, payload: bytes, timeout_ms: int = 5000) -> NotifyReply:
        """Sends to every watcher of oid, this client's included, and waits for all. ENOENT. Never raises ETIMEDOUT:
        the reply lists who was silent."""

    @abstractmethod
    def notify_ack(self, oid: str, notify_id: int, cookie: int, payload: bytes) -> None:
        """Late ack of a callback that returned None."""

    @abstractmethod
    def native_data(self, prefix: str, order: int) -> NativeData:
        """The objects `<prefix>.<%016x>` of 2^order bytes for the C engine. Close before the store."""

    def stat(self, oid: str, snap_id: int = NOSNAP) -> ObjectStat:
        result: ObjectStat = self.read(oid, [Stat()], snap_id)[0]
        return result

    def exec(self, oid: str, cls: str, method: str, data: bytes = b"") -> bytes:
        """A class method alone in its op; the method's own flags decide whether it is a read or a write."""
        result: bytes = self.exec_ops(oid, [Exec(cls, method, data)])[0]
        return result

    @abstractmethod
    def exec_ops(self, oid: str, ops: Sequence[Op]) -> list[Any]:
        """read() when no op writes, else write()."""


@dataclass(frozen=True)
class PoolInfo:
    pool_id: int
    name: str


@dataclass(frozen=True)
class PoolStats:
    num_bytes: int
    num_objects: int
    counters: Mapping[str, int] = field(default_factory=dict)  # what else the store counts, by librados' names


class Store(ABC):
    """A connection to a cluster: the client identity, pools, fencing. Closing it ends its watches."""

    client: Client
    fsid: str

    @abstractmethod
    def pools(self) -> list[PoolInfo]: ...

    @abstractmethod
    def pool_create(self, name: str) -> int:
        """EEXIST. Ids start at 1 and are never given twice."""

    @abstractmethod
    def pool_remove(self, name: str) -> None:
        """ENOENT. Removes every object."""

    @abstractmethod
    def pool_stats(self, pool_id: int) -> PoolStats: ...

    def namespaces(self, pool_id: int) -> list[str]:
        """Those with objects in them, "" too. EOPNOTSUPP: only its contexts can list them (`listing`)."""
        raise OSError(errno.EOPNOTSUPP, "this store lists no namespaces")

    @abstractmethod
    def open(self, pool: str | int, namespace: str = "") -> ObjectContext:
        """ENOENT for a pool that does not exist. A namespace needs no creation at this level."""

    @abstractmethod
    def blocklist_add(self, address: str, seconds: int = 3600) -> None:
        """Every later operation of that client fails with ESHUTDOWN (EBLOCKLISTED, 108)."""

    @abstractmethod
    def blocklist_remove(self, address: str) -> None: ...

    @abstractmethod
    def blocklist(self) -> dict[str, float]:
        """address -> time.time() of expiry."""

    def process_of(self, address: str) -> ClientProcess | None:
        """The process of a living client. None: it does not live, or the store cannot know."""
        return None

    def ended(self, address: str) -> bool:
        """Whether that client's process has certainly ended, though its watches may be there. False: who knows."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Idempotent."""

    def pool_id(self, name: str) -> int:
        for pool in self.pools():
            if pool.name == name:
                return pool.pool_id
        raise OSError(errno.ENOENT, f"no pool named {name!r}")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

"""A connection to a cluster: one `rados_t`, shared by everything in the process that means the same cluster and user.

Whoever uses it holds a reference: a store, an image's C data objects, an operation in progress. The last one to let go
shuts it down, so closing a store never pulls the connection from under a call of another thread.
"""

from __future__ import annotations

import atexit
import errno
import os
import re
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from librbd_py.format.logs import logger
from librbd_py.format.values import dataclass, replace
from librbd_py.native import ffi, lib

from ..api import Client
from .life import Life

log = logger(__name__)

MISSING = "librados is not installed: Ceph clusters need the Debian package librados2"
DEFAULT_NAME = "client.admin"
_ADDRESS = r"(?:\[[0-9a-fA-F:.%]+\]|[0-9]+(?:\.[0-9]+){3}):[0-9]+/[0-9]+"
_MAX_ADDRESSES = 4096  # bytes


def fail(code: int, what: str) -> OSError:
    """`code`: an errno, negative or not. A compare-and-write's 4095 + offset has no text of its own."""
    code = abs(code)
    return OSError(code, f"{what}: {os.strerror(code) if code <= 4095 else 'data differs'}")


def check(result: int, what: str) -> int:
    """The result of a call of librados, or OSError."""
    if result < 0:
        raise fail(result, what)
    return result


def load() -> None:
    """ENOPKG without librados."""
    if lib.rbdn_rados_load() < 0:
        raise OSError(errno.ENOPKG, MISSING)


@dataclass(frozen=True)
class ClusterOptions:
    """What makes two connections the same. Precedence as in Ceph's own tools: the file, then $CEPH_ARGS, then `hints`
    and `options`."""

    conf: str | None = None  # a file; None: $CEPH_CONF, else the usual places. "": none is read
    name: str | None = None  # "client.admin"; None: from $CEPH_ARGS (--id, --name), else that
    options: tuple[tuple[str, str], ...] = ()
    hints: tuple[tuple[str, str], ...] = ()  # options too, but none of Ceph's is needed: a program may have its own
    cluster: str = "ceph"  # its name, which default paths contain
    words: tuple[str, ...] = ()  # of $CEPH_ARGS

    def resolved(self) -> ClusterOptions:
        """Nothing left that the environment decides, so that it can be compared."""
        conf = self.conf
        if conf is None and os.environ.get("CEPH_CONF"):
            conf = os.environ["CEPH_CONF"]
        if conf:
            conf = os.path.abspath(conf)
        words = _words_of_environment()
        return replace(self, conf=conf, name=self.name or _name_in(words), words=words)


def entity(user: str) -> str:
    """`admin` and `client.admin` are the same user."""
    return user if "." in user else f"client.{user}"


def _words_of_environment() -> tuple[str, ...]:
    words = os.environ.get("CEPH_ARGS", "")
    if not words:
        return ()
    import shlex

    try:
        return tuple(shlex.split(words))
    except ValueError as failure:
        raise OSError(errno.EINVAL, f"CEPH_ARGS: {failure}") from None


def _name_in(words: tuple[str, ...]) -> str:
    name = DEFAULT_NAME
    for at, word in enumerate(words):
        option, equals, value = word.partition("=")
        if not equals:
            value = words[at + 1] if at + 1 < len(words) else ""
        if option in ("--id", "--user") and value:
            name = f"client.{value}"
        elif option in ("--name", "-n") and value:
            name = value
    return name


def addresses(text: str) -> list[str]:
    """`ip:port/nonce` of every address in what librados writes."""
    return re.findall(_ADDRESS, text)


class Connection:
    """Made connected, with one reference. `fenced` is set once the cluster has refused this client."""

    def __init__(self, options: ClusterOptions) -> None:
        load()
        self.options = options
        where = f"{options.conf or 'the cluster'} as {options.name}"
        begun = self._begun(where)
        self._prepare(begun or self._new())
        try:
            if not begun:
                self._configure()
                check(lib.rbdn_rados_connect(self.handle), where)
            self._identify()
        except BaseException:
            self._shut_down()
            raise
        _live.add(self)

    def _new(self) -> Any:
        error, name = ffi.new("int *"), (self.options.name or DEFAULT_NAME).encode()
        handle = lib.rbdn_rados_create(self.options.cluster.encode(), name, error)
        if not handle:
            raise fail(error[0], f"librados for {self.options.name}")
        return handle

    def _begun(self, where: str) -> Any:
        """The connection that the command line began when it started (`cli/start.py`), if it is this one."""
        conf = self.options.conf
        if not conf or self.options != ClusterOptions(conf, DEFAULT_NAME):
            return None
        error = ffi.new("int *")
        handle = lib.rbdn_rados_early_take(conf.encode("utf-8", "surrogateescape"), error)
        check(error[0], where)
        return handle or None

    def _prepare(self, handle: Any) -> None:
        self.fenced = False
        self.handle: Any = handle
        self._pid = os.getpid()
        self._lock = threading.Lock()  # guards the next five
        self._references = 1
        self._calls = self._calls_ended = 0
        self._contexts: dict[tuple[int, str, str], Any] = {}
        self._ring: Any = None
        self._life: Life | None = None

    def _identify(self) -> None:
        self.fsid = self._text(lib.rbdn_rados_fsid, 64, "fsid")
        found = addresses(self._text(lib.rbdn_rados_addresses, _MAX_ADDRESSES, "address"))
        if not found:
            raise OSError(errno.EPROTO, "librados gives this client no address")
        self.client = Client(lib.rbdn_rados_instance(self.handle), found[0])

    def _shut_down(self) -> None:
        handle, self.handle = self.handle, None
        lib.rbdn_rados_shutdown(handle)

    def _configure(self) -> None:
        options = self.options
        if options.conf != "":
            path = options.conf.encode() if options.conf else ffi.NULL
            result = lib.rbdn_rados_conf_read(self.handle, path)
            if result == -errno.ENOENT and options.conf is None:
                # As with Ceph's tools, what is said beside it may be enough.
                if not any(option == "mon_host" for option, _ in options.options):
                    raise OSError(errno.ENOENT, "there is no ceph.conf: name one, as in ceph:/etc/ceph/ceph.conf")
            else:
                check(result, f"configuration {options.conf or 'of Ceph'}")
        # Librados would read $CEPH_ARGS itself, but only once a process.
        words = [ffi.new("char[]", word.encode()) for word in ("rbdpy", *options.words)]
        if len(words) > 1:
            check(lib.rbdn_rados_conf_words(self.handle, len(words), ffi.new("char *[]", words)), "CEPH_ARGS")
        for option, value in options.hints:
            self._set(option, value, missing=True)
        for option, value in options.options:
            self._set(option, value, missing=False)

    def _set(self, option: str, value: str, *, missing: bool) -> None:
        result = lib.rbdn_rados_conf_set(self.handle, option.encode(), value.encode())
        if result == -errno.ENOENT:
            if missing:
                return
            raise OSError(errno.EINVAL, f"Ceph has no option {option!r}")
        check(result, f"option {option}={value}")

    def _text(self, call: Any, size: int, what: str) -> str:
        buffer = ffi.new("char[]", size)
        check(call(self.handle, buffer, size), what)
        return str(ffi.string(buffer).decode(errors="replace"))

    def conf_get(self, option: str) -> str:
        """ENOENT for an option Ceph does not have."""
        buffer = ffi.new("char[]", 8192)
        check(lib.rbdn_rados_conf_get(self.handle, option.encode(), buffer, 8192), f"option {option}")
        return str(ffi.string(buffer).decode(errors="replace"))

    # --- who uses it

    def acquire(self) -> None:
        """ENOTCONN when it is shut down, EBADFD after a fork."""
        if self.of_parent:
            raise OSError(errno.EBADFD, "this connection was made before a fork: the child must connect itself")
        with self._lock:
            if self._references == 0:
                raise OSError(errno.ENOTCONN, "the connection is closed")
            self._references += 1

    def release(self) -> None:
        if self.of_parent:
            return
        with self._lock:
            self._references -= 1
            if self._references:
                return
            contexts, self._contexts = self._contexts, {}
            ring, self._ring = self._ring, None
            life, self._life = self._life, None
        _live.discard(self)
        for context in contexts.values():
            lib.rbdn_ioctx_close(context)
        self._shut_down()
        if ring is not None:
            ring.close()
        if life is not None:
            life.close()

    def leave_proof(self) -> None:
        """From now on others on this host can know when this client is dead: before it takes a lock."""
        with self._lock:
            if self._life is None:
                try:
                    self._life = Life(self.fsid, self.client.address)
                except OSError as failure:
                    log.info("the end of client %s will not be known at once: %s", self.client.address, failure)

    @contextmanager
    def using(self) -> Iterator[None]:
        """Kept alive for the time of a call. Notices when the cluster refuses this client."""
        self.acquire()
        with self._lock:
            self._calls += 1
        try:
            yield
        except OSError as failure:
            if failure.errno == errno.ESHUTDOWN:
                self.fenced = True
            raise
        finally:
            with self._lock:
                self._calls -= 1
                self._calls_ended += 1
            self.release()

    def calls(self) -> tuple[int, int]:
        """How many are in progress, and how many have ended ever."""
        with self._lock:
            return self._calls, self._calls_ended

    @property
    def of_parent(self) -> bool:
        """It came through a fork: nothing of it may be touched."""
        return os.getpid() != self._pid

    @property
    def shareable(self) -> bool:
        """A new user of the cluster may have it too."""
        return not self.fenced and self._references > 0 and not self.of_parent

    # --- what hangs on it

    def context(self, pool_id: int, namespace: str, locator: str = "") -> Any:
        """The one `rbdn_ioctx` of this pool, namespace and locator key. ENOENT for no such pool."""
        key = (pool_id, namespace, locator)
        with self._lock:
            found = self._contexts.get(key)
        if found is not None:
            return found
        error = ffi.new("int *")
        made = lib.rbdn_ioctx_open(self.handle, pool_id, namespace.encode(), error)
        if not made:
            raise fail(error[0], f"pool {pool_id}")
        if locator:
            check(lib.rbdn_ioctx_locator(made, locator.encode()), f"locator in pool {pool_id}")
        with self._lock:
            kept = self._contexts.setdefault(key, made)
        if kept is not made:
            lib.rbdn_ioctx_close(made)
        return kept

    def ring(self, make: Any) -> Any:
        """The events of its watches, made at first use; `make` builds what has a `close()`."""
        with self._lock:
            if self._ring is None:
                self._ring = make()
            return self._ring

    def in_callback(self) -> bool:
        """The calling thread is the one that runs callbacks of watches."""
        with self._lock:
            return self._ring is not None and self._ring.is_current

    # --- commands

    def command(self, target: int, where: str, text: str, data: bytes = b"") -> tuple[int, bytes, str]:
        """(0 or -errno, output, message)."""
        with self.using():
            reply = ffi.new("rbdn_rados_reply *")
            result = lib.rbdn_rados_command(self.handle, target, where.encode(), text.encode(), data, len(data), reply)
            try:
                output = ffi.buffer(reply.out, reply.out_len)[:] if reply.out_len else b""
                status = ffi.buffer(reply.status, reply.status_len)[:] if reply.status_len else b""
            finally:
                lib.rbdn_rados_reply_free(reply)
        return int(result), bytes(output), bytes(status).decode(errors="replace")


_live: weakref.WeakSet[Connection] = weakref.WeakSet()


@atexit.register
def _at_exit() -> None:
    """Threads of librados must not outlive the interpreter's use of it; one that is in use is left alone."""
    for connection in list(_live):
        if connection.shareable and connection._references == 1:
            with suppress(OSError):
                connection.release()


# --- sharing


_shared: dict[ClusterOptions, Connection] = {}
_turns: dict[ClusterOptions, threading.Lock] = {}  # held while connecting: two threads must not make two
_shared_lock = threading.Lock()  # guards both; never held while connecting


def shared(options: ClusterOptions) -> Connection:
    """The process's connection to that cluster as that user, with a reference for the caller."""
    options = options.resolved()
    with _shared_lock:
        turn = _turns.setdefault(options, threading.Lock())
    with turn:
        with _shared_lock:
            found = _shared.get(options)
        if found is not None and found.shareable:
            with suppress(OSError):  # its last user may just have let go
                found.acquire()
                return found
        made = Connection(options)
        with _shared_lock:
            _shared[options] = made
        return made


def _after_fork() -> None:
    """Locks that other threads of the parent held would never be free."""
    global _shared_lock
    _shared_lock = threading.Lock()
    _turns.clear()
    _abandoned.extend(_shared.values())
    _shared.clear()


_abandoned: list[Connection] = []  # connections of a parent process: never touched, never collected
os.register_at_fork(after_in_child=_after_fork)

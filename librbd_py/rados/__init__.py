"""Drop-in for Ceph's `rados` module: same names, signatures, constants and exceptions, over any store of this library.

Which store: the option `rbdpy_store` (in `conf`, `conf_set` or a configuration file), else the environment variable
`RBDPY_STORE`, else a `conffile` that is a store's folder, else the Ceph cluster of a `conffile` (or of the option
`mon_host`), else the library's default. Options nobody knows are kept. On Ceph what was set by a call wins over
$CEPH_ARGS, and that over the file.
"""

from __future__ import annotations

import builtins
import errno
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from librbd_py import errors
from librbd_py import store as stores
from librbd_py.errors import MAX_ERRNO, rados_errors
from librbd_py.rados.commands import Commands
from librbd_py.rados.ioctx import LIBRADOS_SNAP_HEAD, Ioctx
from librbd_py.rados.monitor_log import MONITOR_LEVELS, MonitorLogs
from librbd_py.rados.objects import LIBRADOS_ALL_NSPACES, Object, ObjectIterator, Snap, SnapIterator, Watch
from librbd_py.rados.ops import (
    LIBRADOS_CMPXATTR_OP_EQ,
    LIBRADOS_OP_FLAG_EXCL,
    LIBRADOS_OP_FLAG_FAILOK,
    LIBRADOS_OPERATION_NOFLAG,
    Completion,
    OmapIterator,
    OpCtx,
    ReadOp,
    ReadOpCtx,
    WriteOp,
    WriteOpCtx,
    XattrIterator,
    text,
    unsupported,
)
from librbd_py.store.api import Store
from librbd_py.store.rados import ClusterOptions, RadosStore

Error = errors.rados.Error
OSError = errors.rados.OSError
InvalidArgumentError = errors.rados.InvalidArgumentError
ExtendMismatch = errors.rados.ExtendMismatch
InterruptedOrTimeoutError = errors.rados.InterruptedOrTimeoutError
PermissionError = errors.rados.PermissionError
PermissionDeniedError = errors.rados.PermissionDeniedError
ObjectNotFound = errors.rados.ObjectNotFound
NoData = errors.rados.NoData
ObjectExists = errors.rados.ObjectExists
ObjectBusy = errors.rados.ObjectBusy
IOError = errors.rados.IOError
NoSpace = errors.rados.NoSpace
NotConnected = errors.rados.NotConnected
RadosStateError = errors.rados.RadosStateError
IoctxStateError = errors.rados.IoctxStateError
ObjectStateError = errors.rados.ObjectStateError
LogicError = errors.rados.LogicError
TimedOut = errors.rados.TimedOut
InProgress = errors.rados.InProgress
IsConnected = errors.rados.IsConnected
ConnectionShutdown = errors.rados.ConnectionShutdown
OutcomeUnknown = errors.rados.OutcomeUnknown

ANONYMOUS_AUID = 0xFFFFFFFFFFFFFFFF
ADMIN_AUID = 0

LIBRADOS_CMPXATTR_OP_NE = 2
LIBRADOS_CMPXATTR_OP_GT = 3
LIBRADOS_CMPXATTR_OP_GTE = 4
LIBRADOS_CMPXATTR_OP_LT = 5
LIBRADOS_CMPXATTR_OP_LTE = 6
LIBRADOS_CREATE_IDEMPOTENT = 0
LIBRADOS_CREATE_EXCLUSIVE = 1
LIBRADOS_OPERATION_BALANCE_READS = 1
LIBRADOS_OPERATION_LOCALIZE_READS = 2
LIBRADOS_OPERATION_ORDER_READS_WRITES = 4
LIBRADOS_OPERATION_IGNORE_CACHE = 8
LIBRADOS_OPERATION_SKIPRWLOCKS = 16
LIBRADOS_OPERATION_IGNORE_OVERLAY = 32
LIBRADOS_OP_FLAG_FADVISE_RANDOM = 4
LIBRADOS_OP_FLAG_FADVISE_SEQUENTIAL = 8
LIBRADOS_OP_FLAG_FADVISE_WILLNEED = 16
LIBRADOS_OP_FLAG_FADVISE_DONTNEED = 32
LIBRADOS_OP_FLAG_FADVISE_NOCACHE = 64

IMAGE_DEFAULTS = {  # Ceph's, as a program without a cluster would read them
    "rbd_default_format": "2",
    "rbd_default_order": "22",
    "rbd_default_features": "61",
    "rbd_default_stripe_unit": "0",
    "rbd_default_stripe_count": "0",
    "rbd_default_data_pool": "",
}
DEFAULT_CONF_PATHS = ("/etc/ceph/ceph.conf", "~/.ceph/ceph.conf", "ceph.conf")
ENTITY_TYPES = ("client", "osd", "mon", "mds", "mgr", "auth")
STORE_OPTION = "rbdpy_store"
STORE_VARIABLE = "RBDPY_STORE"
BLOCKLIST_SECONDS = 3600

__all__ = [
    "ADMIN_AUID",
    "ANONYMOUS_AUID",
    "LIBRADOS_ALL_NSPACES",
    "LIBRADOS_CMPXATTR_OP_EQ",
    "LIBRADOS_CMPXATTR_OP_GT",
    "LIBRADOS_CMPXATTR_OP_GTE",
    "LIBRADOS_CMPXATTR_OP_LT",
    "LIBRADOS_CMPXATTR_OP_LTE",
    "LIBRADOS_CMPXATTR_OP_NE",
    "LIBRADOS_CREATE_EXCLUSIVE",
    "LIBRADOS_CREATE_IDEMPOTENT",
    "LIBRADOS_OPERATION_BALANCE_READS",
    "LIBRADOS_OPERATION_IGNORE_CACHE",
    "LIBRADOS_OPERATION_IGNORE_OVERLAY",
    "LIBRADOS_OPERATION_LOCALIZE_READS",
    "LIBRADOS_OPERATION_NOFLAG",
    "LIBRADOS_OPERATION_ORDER_READS_WRITES",
    "LIBRADOS_OPERATION_SKIPRWLOCKS",
    "LIBRADOS_OP_FLAG_EXCL",
    "LIBRADOS_OP_FLAG_FADVISE_DONTNEED",
    "LIBRADOS_OP_FLAG_FADVISE_NOCACHE",
    "LIBRADOS_OP_FLAG_FADVISE_RANDOM",
    "LIBRADOS_OP_FLAG_FADVISE_SEQUENTIAL",
    "LIBRADOS_OP_FLAG_FADVISE_WILLNEED",
    "LIBRADOS_OP_FLAG_FAILOK",
    "LIBRADOS_SNAP_HEAD",
    "MAX_ERRNO",
    "MONITOR_LEVELS",
    "Completion",
    "ConnectionShutdown",
    "Error",
    "ExtendMismatch",
    "IOError",
    "InProgress",
    "InterruptedOrTimeoutError",
    "InvalidArgumentError",
    "Ioctx",
    "IoctxStateError",
    "IsConnected",
    "LogicError",
    "MonitorLog",
    "NoData",
    "NoSpace",
    "NotConnected",
    "OSError",
    "Object",
    "ObjectBusy",
    "ObjectExists",
    "ObjectIterator",
    "ObjectNotFound",
    "ObjectStateError",
    "OmapIterator",
    "OpCtx",
    "OutcomeUnknown",
    "PermissionDeniedError",
    "PermissionError",
    "Rados",
    "RadosStateError",
    "ReadOp",
    "ReadOpCtx",
    "Snap",
    "SnapIterator",
    "TimedOut",
    "Version",
    "Watch",
    "WriteOp",
    "WriteOpCtx",
    "XattrIterator",
]  # fmt: skip


class Version:
    """Version of the interface: that of the librados whose module this is a drop-in for."""

    def __init__(self, major: int, minor: int, extra: int) -> None:
        self.major = major
        self.minor = minor
        self.extra = extra

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.extra}"


class Rados(Commands, MonitorLogs):
    """A connection to a store. States: configuring, connected, shutdown.

    `store` is the store itself, for `librbd_py.rbd` and the tools.
    """

    NO_CONF_FILE = -1
    DEFAULT_CONF_FILES = -2

    def __init__(
        self,
        rados_id: str | None = None,
        name: str | None = None,
        clustername: str | None = None,
        conf_defaults: dict[str, str] | None = None,
        conffile: str | int | None = NO_CONF_FILE,
        conf: dict[str, str] | None = None,
        flags: int = 0,
        context: object = None,
    ) -> None:
        if rados_id and name:
            raise Error("Rados(): can't supply both rados_id and name")
        if (name and name.partition(".")[0] not in ENTITY_TYPES) or (name and not name.partition(".")[2]):
            raise Error(f"rados_initialize failed with error code: {-errno.EINVAL}: {name!r} is no TYPE.ID")
        if context is not None:
            raise unsupported("Rados(context=)")
        self.state = "configuring"
        self.rados_id = rados_id
        self.name = f"client.{rados_id}" if rados_id else (name or "client.admin")
        self._named = bool(rados_id or name)
        self.clustername = clustername or ""
        self.conf_defaults = conf_defaults
        self.conffile = conffile
        self.parsed_args: Sequence[str] = []
        self.monitor_callback: object = None
        self.monitor_callback2: object = None
        self._conf: dict[str, str] = {}
        self._explicit: dict[str, str] = {}  # what was set by a call, not by a file: it wins on Ceph too
        self._folder: str | None = None  # a conffile that is a store
        self._conffile: str | None = None  # the last ceph.conf that was read
        self._store: Store | None = None
        for option, value in (conf_defaults or {}).items():
            self._conf[_normal(text(option, "option"))] = text(value, "val")
        if conffile in (self.DEFAULT_CONF_FILES, ""):
            self.conf_read_file(None)
        elif conffile not in (self.NO_CONF_FILE, None):
            self.conf_read_file(str(conffile))
        for option, value in (conf or {}).items():
            self.conf_set(option, value)

    @property
    def store(self) -> Store:
        """RadosStateError unless connected."""
        self.require_state("connected")
        assert self._store is not None
        return self._store

    def require_state(self, *args: str) -> None:
        if self.state not in args:
            raise RadosStateError(f"You cannot perform that operation on a Rados object in state {self.state}.")

    def __enter__(self) -> Rados:
        self.connect()
        return self

    def __exit__(
        self, type_: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def version(self) -> Version:
        return Version(3, 0, 0)

    # --- configuration ---------------------------------------------------------------------------------------------

    def conf_read_file(self, path: str | None = None) -> None:
        """Reads [global], [client] and [client.NAME]. ObjectNotFound when there is no such file.

        Without a path the usual places are tried; there need be none when the environment names a store.
        """
        import configparser

        self.require_state("configuring", "connected")
        if path is not None and os.path.isdir(path):
            self._folder = path
            return
        paths = [text(path, "path")] if path is not None else _default_paths()
        parser = configparser.RawConfigParser(strict=False, allow_no_value=True, inline_comment_prefixes=("#", ";"))
        for candidate in paths:
            try:
                with open(candidate, encoding="utf-8") as file:
                    parser.read_string(_with_section(file.read()))
            except FileNotFoundError:
                continue
            except (configparser.Error, UnicodeDecodeError) as failure:
                raise InvalidArgumentError(f"error calling conf_read_file: {failure}", errno.EINVAL) from failure
            except builtins.OSError as failure:
                raise errors.rados_error(failure, "error calling conf_read_file") from failure
            self._conffile = os.path.abspath(candidate)
            for section in ("global", "client", self.name):
                if parser.has_section(section):
                    for option, value in parser.items(section):
                        self._conf[_normal(option)] = value or ""
            return
        if path is not None or not (os.environ.get(STORE_VARIABLE) or STORE_OPTION in self._conf):
            raise ObjectNotFound("error calling conf_read_file", errno.ENOENT)

    def conf_parse_argv(self, args: Sequence[str]) -> list[str] | None:
        """Takes `--option=value` and `--option value` of options already known; returns the rest."""
        self.require_state("configuring", "connected")
        if not args:
            return None
        rest: list[str] = []
        items = iter(args)
        for item in items:
            option, equals, value = item.partition("=")
            known = _normal(option.removeprefix("--"))
            if not option.startswith("--") or (known not in self._conf and known != STORE_OPTION):
                rest.append(item)
            elif equals:
                self.conf_set(known, value)
            else:
                self.conf_set(known, next(items, ""))
        self.parsed_args = args
        return rest

    def conf_parse_env(self, var: str | None = "CEPH_ARGS") -> None:
        self.require_state("configuring", "connected")
        if var and os.environ.get(var):
            self.conf_parse_argv(os.environ[var].split())

    def conf_get(self, option: str) -> str | None:
        """None for an option nobody set; a connection to Ceph knows the defaults too, others those of new images."""
        self.require_state("configuring", "connected")
        name = _normal(text(option, "option"))
        if isinstance(self._store, RadosStore) and name not in self._explicit:
            with suppress(builtins.OSError):
                return self._store.connection.conf_get(name)
        return self._conf.get(name, IMAGE_DEFAULTS.get(name))

    def conf_set(self, option: str, val: str) -> None:
        self.require_state("configuring", "connected")
        name = _normal(text(option, "option"))
        self._conf[name] = self._explicit[name] = text(val, "val")

    # --- the connection ----------------------------------------------------------------------------------------------

    def connect(self, timeout: int = 0) -> None:
        self.require_state("configuring")
        url = self._conf.get(STORE_OPTION) or os.environ.get(STORE_VARIABLE) or self._folder
        if not url and (self._conffile or "mon_host" in self._conf):
            url = "ceph"
        with rados_errors("error connecting to the cluster"):
            # Two of these are two clients, as in a program that uses Ceph's own module: one may fence the other.
            self._store = stores.connect(url, self._cluster_options(), share=False)
        self.state = "connected"

    def _cluster_options(self) -> ClusterOptions:
        """For Ceph: what this object was told."""
        options = {option: value for option, value in self._explicit.items() if not option.startswith("rbdpy_")}
        if self._conffile is None:
            options = {**self._conf, **options}
            options.pop(STORE_OPTION, None)
        conf = self._conffile if self._conffile or "mon_host" not in self._conf else ""
        return ClusterOptions(
            conf,
            self.name if self._named else None,
            hints=tuple(sorted(options.items())),
            cluster=self.clustername or "ceph",
        )

    def shutdown(self) -> None:
        self.stop_following()
        if self._store is not None:
            store, self._store = self._store, None
            store.close()
        self.state = "shutdown"

    def get_addrs(self) -> str:
        """`ip:port/nonce` of this client, as blocklists and locks name it."""
        self.require_state("configuring", "connected")
        return self._store.client.address if self._store is not None else ""

    def get_instance_id(self) -> int:
        """The client's global id."""
        return self.store.client.gid

    def get_fsid(self) -> str:
        return self.store.fsid

    def get_cluster_stats(self) -> dict[str, int]:
        store = self.store
        with rados_errors("get_stats failed"):
            if isinstance(store, RadosStore):
                return store.cluster_stats()
            stats = [store.pool_stats(pool.pool_id) for pool in store.pools()]
        used = (sum(s.num_bytes for s in stats) + 1023) // 1024
        available = 0
        folder = getattr(store, "path", None)
        if folder is not None:
            disk = os.statvfs(folder)
            available = disk.f_bavail * disk.f_frsize // 1024
            used += sum(os.stat(entry).st_blocks for entry in os.scandir(folder) if entry.is_file()) // 2
        return {
            "kb": used + available,
            "kb_used": used,
            "kb_avail": available,
            "num_objects": sum(s.num_objects for s in stats),
        }

    def wait_for_latest_osdmap(self) -> int:
        """0. Elsewhere than on Ceph what this client did to the cluster is seen at once."""
        store = self.store
        if isinstance(store, RadosStore):
            with rados_errors("wait_for_latest_osdmap"):
                store.latest_map()
        return 0

    def blocklist_add(self, client_address: str, expire_seconds: int = 0) -> None:
        """Fences a client. 0 seconds means the usual hour."""
        store = self.store
        with rados_errors(f"error blocklisting client '{client_address}'"):
            address = text(client_address, "client_address")
            host, slash, nonce = address.partition("/")
            if slash and ":" not in host:  # librados takes it for port 0
                address = f"{host}:0/{nonce}"
            store.blocklist_add(address, expire_seconds or BLOCKLIST_SECONDS)

    blacklist_add = blocklist_add  # of releases before 16

    # --- pools -------------------------------------------------------------------------------------------------------

    def list_pools(self) -> list[str]:
        store = self.store
        with rados_errors("error listing pools"):
            return [pool.name for pool in store.pools()]

    def pool_exists(self, pool_name: str) -> bool:
        return self.pool_lookup(pool_name) is not None

    def pool_lookup(self, pool_name: str) -> int | None:
        """The pool's id, None when there is none of that name."""
        name, store = text(pool_name, "pool_name"), self.store
        with rados_errors(f"error looking up pool '{name}'"):
            return next((pool.pool_id for pool in store.pools() if pool.name == name), None)

    def pool_reverse_lookup(self, pool_id: int) -> str | None:
        """The pool's name, None when there is none of that id."""
        store = self.store
        with rados_errors(f"error reverse looking up pool '{pool_id}'"):
            return next((pool.name for pool in store.pools() if pool.pool_id == pool_id), None)

    def create_pool(self, pool_name: str, crush_rule: int | None = None, auid: int | None = None) -> None:
        """ObjectExists. Placement rule and owner are accepted and ignored."""
        name, store = text(pool_name, "pool_name"), self.store
        with rados_errors(f"error creating pool '{name}'"):
            if isinstance(store, RadosStore):
                store.pool_create(name, application=False)
            else:
                store.pool_create(name)

    def delete_pool(self, pool_name: str) -> None:
        name, store = text(pool_name, "pool_name"), self.store
        with rados_errors(f"error deleting pool '{name}'"):
            store.pool_remove(name)

    def get_pool_base_tier(self, pool_id: int) -> int:
        """The pool whose cache tier it is; else the pool itself, which it always is elsewhere than on Ceph."""
        with rados_errors(f"get_pool_base_tier({pool_id})"):
            if isinstance(self.store, RadosStore):
                pools = json.loads(self.store.mon_command({"prefix": "osd dump", "format": "json"}))["pools"]
                found = {int(pool["pool"]): int(pool.get("tier_of", -1)) for pool in pools}
            else:
                found = {pool.pool_id: -1 for pool in self.store.pools()}
        if pool_id not in found:
            raise ObjectNotFound(f"get_pool_base_tier({pool_id})", errno.ENOENT)
        return pool_id if found[pool_id] == -1 else found[pool_id]

    def get_inconsistent_pgs(self, pool_id: int) -> list[str]:
        self.require_state("connected")
        return []

    def open_ioctx(self, ioctx_name: str) -> Ioctx:
        self.require_state("connected")
        return Ioctx(self, text(ioctx_name, "ioctx_name"))

    def open_ioctx2(self, pool_id: int) -> Ioctx:
        self.require_state("connected")
        return Ioctx(self, str(pool_id), int(pool_id))

    def ping_monitor(self, mon_id: str) -> str:
        """What that monitor says of itself and the cluster's health, as JSON. ObjectNotFound: no such monitor."""
        self.require_state("configuring", "connected")
        name = text(mon_id, "mon_id")
        return self._ping(name)

    # --- of no use to images ---------------------------------------------------------------------------------------

    def service_daemon_register(self, service: str, daemon: str, metadata: dict[str, str]) -> None:
        """Accepted: there is no service map."""

    def service_daemon_update(self, status: dict[str, str]) -> None:
        """Accepted."""


class MonitorLog:
    """Kept for old programs; see `Rados.monitor_log`."""

    def __init__(self, cluster: Rados, level: str, callback: Callable[..., Any], arg: object) -> None:
        self.level = level
        self.callback = callback
        self.arg = arg
        self.cluster = cluster
        cluster.monitor_log(level, callback, arg)


def _default_paths() -> list[str]:
    named = os.environ.get("CEPH_CONF")
    return [named] if named else [os.path.expanduser(path) for path in DEFAULT_CONF_PATHS]


def _normal(option: str) -> str:
    """Ceph takes spaces, dashes and underscores in option names for the same."""
    return option.strip().replace(" ", "_").replace("-", "_")


def _with_section(content: str) -> str:
    """Options before the first section belong to [global]; indentation means nothing in ceph.conf."""
    lines = [line.strip() for line in content.splitlines()]
    return "[global]\n" + "\n".join(lines)

"""The store on Ceph: `Store` of the contract on a connection."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from librbd_py.format.lock import EntityAddress
from librbd_py.format.values import replace
from librbd_py.native import ffi, lib

from .. import api
from ..api import PoolInfo, PoolStats
from ..executor import check_name
from . import life
from .connection import ClusterOptions, Connection, check, entity, fail, shared
from .context import RadosContext
from .watches import RadosWatch

_APPLICATION = "rbd"
CONNECTION = "rbdpy_connection"  # the option that tells connections apart
_COUNTERS = (
    "num_bytes",
    "num_kb",
    "num_objects",
    "num_object_clones",
    "num_object_copies",
    "num_objects_missing_on_primary",
    "num_objects_unfound",
    "num_objects_degraded",
    "num_rd",
    "num_rd_kb",
    "num_wr",
    "num_wr_kb",
)


_TARGETS = {"mon": lib.RBDN_TO_MON, "mgr": lib.RBDN_TO_MGR, "osd": lib.RBDN_TO_OSD, "pg": lib.RBDN_TO_PG}


def unquote(text: str) -> str:
    """As `urllib.parse.unquote`, which is imported only for what needs it."""
    if "%" not in text:
        return text
    from urllib import parse

    return parse.unquote(text)


def parse_url(url: str, base: ClusterOptions | None = None) -> ClusterOptions:
    """`ceph[:CONF][?user=NAME&OPTION=VALUE...]`, percent-encoded where needed; OPTION is any of Ceph's, as `keyring`,
    or `rbdpy_connection`: URLs that differ in it do not share a connection. What the URL does not say comes from
    `base`. EINVAL."""
    base = base or ClusterOptions()
    where, _, query = url.partition("?")
    kind, _, conf = where.partition(":")
    if kind not in ("ceph", "rados"):
        raise OSError(errno.EINVAL, f"{url!r} names no Ceph cluster; use ceph:/etc/ceph/ceph.conf?user=admin")
    name, options, hints = base.name, dict(base.options), dict(base.hints)
    for part in query.split("&") if query else []:
        option, equals, value = part.partition("=")
        value = unquote(value)
        if not option or not equals or not value:
            raise OSError(errno.EINVAL, f"{url!r}: {part!r} is not OPTION=VALUE")
        if option == "user":
            name = entity(value)
        elif option == CONNECTION:
            hints[option] = value
        else:
            options[option] = value
    return replace(
        base,
        conf=unquote(conf) or base.conf,
        name=name,
        options=tuple(sorted(options.items())),
        hints=tuple(sorted(hints.items())),
    )


def make_url(conf: str = "", **options: str) -> str:
    """What parse_url() reads; empty values are left out."""
    from urllib.parse import quote

    words = [f"{option}={quote(value, safe='/:,')}" for option, value in options.items() if value]
    return "ceph" + (":" + quote(conf) if conf else "") + ("?" + "&".join(words) if words else "")


def connect(options: ClusterOptions, *, share: bool = True) -> RadosStore:
    """A store on the process's connection to that cluster as that user; `share` False: on one of its own.

    ENOPKG without librados; ENOENT for a missing configuration or keyring; what the monitors answer.
    """
    return RadosStore(shared(options) if share else Connection(options.resolved()))


class RadosStore(api.Store):
    """States: open -> closed. Stores on one connection are one client: they share identity and fate."""

    def __init__(self, connection: Connection) -> None:
        """Takes over one reference to the connection."""
        self.connection = connection
        self.client = connection.client
        self.fsid = connection.fsid
        self._lock = threading.Lock()  # guards the next two
        self._closed = False
        self._watches: set[RadosWatch] = set()

    @contextmanager
    def using(self) -> Iterator[None]:
        """The connection stays for the time of a call. ENOTCONN when the store is closed, EBADFD after a fork."""
        with self.connection.using():
            if self._closed:
                raise OSError(errno.ENOTCONN, "the store is closed")
            yield

    # --- watches close with the store

    def keep_watch(self, watch: RadosWatch) -> RadosWatch:
        self.connection.leave_proof()
        with self._lock:
            if not self._closed:
                self._watches.add(watch)
                return watch
        watch.close()
        raise OSError(errno.ENOTCONN, "the store is closed")

    def forget_watch(self, watch: RadosWatch) -> None:
        with self._lock:
            self._watches.discard(watch)

    def close(self) -> None:
        if self.connection.of_parent:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            watches = list(self._watches)
        for watch in watches:
            watch.close()
        self.connection.release()

    # --- pools

    def pools(self) -> list[PoolInfo]:
        with self.using():
            size = 4096
            while True:
                names = ffi.new("char[]", size)
                used = check(lib.rbdn_rados_pools(self.connection.handle, names, size), "list of pools")
                if used <= size:
                    break
                size = used
            found = []
            for name in ffi.buffer(names, used)[:].split(b"\0"):
                if name:
                    number = lib.rbdn_rados_pool_lookup(self.connection.handle, name)
                    if number != -errno.ENOENT:  # removed meanwhile
                        found.append(PoolInfo(check(number, "pool"), name.decode(errors="replace")))
            return sorted(found, key=lambda pool: pool.pool_id)

    def pool_id(self, name: str) -> int:
        with self.using():
            if not name or "\0" in name:
                raise OSError(errno.ENOENT, f"no pool named {name!r}")
            number = lib.rbdn_rados_pool_lookup(self.connection.handle, name.encode("utf-8", "surrogateescape"))
            if number == -errno.ENOENT:
                raise OSError(errno.ENOENT, f"no pool named {name!r}")
            return check(number, f"pool {name!r}")

    def pool_create(self, name: str, *, application: bool = True) -> int:
        """With the cluster's defaults; for RBD, so that no health warning follows, unless `application` is False."""
        raw = _pool_name(name)
        with self.using():
            check(lib.rbdn_rados_pool_create(self.connection.handle, raw), f"new pool {name!r}")
            number = self.pool_id(name)
            if application:
                lib.rbdn_ioctx_application(self.connection.context(number, ""), _APPLICATION.encode(), False)
            return number

    def application_enable(self, pool_id: int, *, force: bool = False) -> None:
        """Says that the pool is for RBD. EPERM when it is another application's, unless `force`."""
        with self.using():
            io = self.connection.context(pool_id, "")
            check(lib.rbdn_ioctx_application(io, _APPLICATION.encode(), force), f"pool {pool_id} for RBD")

    def pool_remove(self, name: str) -> None:
        raw = _pool_name(name)
        with self.using():
            check(lib.rbdn_rados_pool_delete(self.connection.handle, raw), f"pool {name!r}")

    def pool_stats(self, pool_id: int) -> PoolStats:
        """As the manager last counted: some seconds old."""
        with self.using():
            numbers = ffi.new("uint64_t[]", len(_COUNTERS))
            check(lib.rbdn_ioctx_stat(self.connection.context(pool_id, ""), numbers), f"pool {pool_id}")
            counters = dict(zip(_COUNTERS, ffi.unpack(numbers, len(_COUNTERS)), strict=True))
            return PoolStats(counters["num_bytes"], counters["num_objects"], counters)

    def cluster_stats(self) -> dict[str, int]:
        """`kb`, `kb_used`, `kb_avail`, `num_objects`."""
        with self.using():
            numbers = ffi.new("uint64_t[]", 4)
            check(lib.rbdn_rados_stat(self.connection.handle, numbers), "statistics")
            return dict(zip(("kb", "kb_used", "kb_avail", "num_objects"), ffi.unpack(numbers, 4), strict=True))

    def oldest_client(self) -> int:
        """The oldest release of clients that the cluster must serve: 13 is Mimic."""
        with self.using():
            return check(lib.rbdn_rados_oldest_client(self.connection.handle), "releases of clients")

    def latest_map(self) -> None:
        """Waits until this client knows what the monitors know."""
        with self.using():
            check(lib.rbdn_rados_latest_map(self.connection.handle), "map of the OSDs")

    def open(self, pool: str | int, namespace: str = "") -> RadosContext:
        check_name("x", namespace)
        with self.using():
            number = self.pool_id(pool) if isinstance(pool, str) else pool
            return RadosContext(self, number, namespace, self.connection.context(number, namespace))

    # --- fencing

    def ended(self, address: str) -> bool:
        return address != self.client.address and life.ended(self.fsid, address)

    def blocklist_add(self, address: str, seconds: int = 3600) -> None:
        """0 seconds: Ceph's default."""
        words: dict[str, Any] = {"blocklistop": "add", "addr": _canonical(address)}
        if seconds > 0:
            words["expire"] = float(seconds)
        self._blocklist("osd blocklist", words)
        self.latest_map()

    def blocklist_remove(self, address: str) -> None:
        self._blocklist("osd blocklist", {"blocklistop": "rm", "addr": _canonical(address)})

    def blocklist(self) -> dict[str, float]:
        rows = self._blocklist("osd blocklist ls", {"format": "json"})
        now = time.time()
        from datetime import datetime

        found = {row["addr"]: datetime.fromisoformat(row["until"]).timestamp() for row in _rows(rows)}
        return {_client_address(text): until for text, until in found.items() if until > now}

    def _blocklist(self, prefix: str, words: dict[str, Any]) -> bytes:
        try:
            return self.mon_command({"prefix": prefix, **words})
        except OSError as failure:
            if failure.errno != errno.EINVAL:
                raise
        # Monitors before Ceph 16 know it by its old name.
        old = {"blacklistop" if word == "blocklistop" else word: value for word, value in words.items()}
        return self.mon_command({"prefix": prefix.replace("blocklist", "blacklist"), **old})

    def command(self, kind: str, where: str, text: str, data: bytes = b"") -> tuple[int, bytes, str]:
        """(0 or -errno, output, message) of a command in JSON to a "mon", "mgr", "osd" or "pg"; `where`: which one, ""
        for any monitor."""
        with self.using():
            return self.connection.command(_TARGETS[kind], where, text, data)

    def mon_command(self, words: dict[str, Any]) -> bytes:
        """What a monitor answers to a command; OSError with its errno and words."""
        import json

        result, output, status = self.command("mon", "", json.dumps(words))
        if result < 0:
            raise OSError(-result, f"{words.get('prefix')}: {status.strip() or os.strerror(-result)}")
        return output


def _pool_name(name: str) -> bytes:
    with suppress(UnicodeEncodeError):
        raw = name.encode()
        if raw and b"\0" not in raw and b"/" not in raw and b"@" not in raw:
            return raw
    raise fail(errno.EINVAL, f"{name!r} is no name for a pool")


def _rows(reply: bytes) -> list[dict[str, str]]:
    """Of all lists in it: clients and, since Ceph 16.2.8, ranges come one after the other."""
    import json

    text, rows = reply.decode(errors="replace").strip(), []
    try:
        while text:
            found, end = json.JSONDecoder().raw_decode(text)
            rows += found
            text = text[end:].strip()
    except (ValueError, TypeError) as failure:
        raise OSError(errno.EPROTO, f"the monitor's blocklist: {failure}") from None
    return rows


def _canonical(address: str) -> str:
    try:
        return EntityAddress.parse(address).text
    except ValueError as failure:
        raise OSError(errno.EINVAL, str(failure)) from None


def _client_address(text: str) -> str:
    """Monitors write `v1:` or nothing in front."""
    try:
        return _canonical(text)
    except OSError:
        return text  # a range of addresses

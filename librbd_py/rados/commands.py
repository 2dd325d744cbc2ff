"""Commands to the daemons of a cluster. Only Ceph has daemons: for other stores this answers, in a monitor's words,
what programs about images ask one.
"""

from __future__ import annotations

import errno
import json
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from librbd_py.errors import rados_errors
from librbd_py.rados.ops import raw, text
from librbd_py.store.api import Store
from librbd_py.store.pool_state import PoolState
from librbd_py.store.rados import RadosStore

Answer = tuple[int, bytes, str]
Words = dict[str, Any]
MONITOR = "rbdpy"  # the name of the monitor that there is not
RELEASE = "pacific"  # whose behaviour this follows
BENCH_MAX = 1 << 30  # bytes


class Commands:
    """(0 or -errno, output, message) of a command in JSON. `timeout` is accepted and ignored; so is a manager's
    `target`: librados finds the one that answers."""

    @property
    @abstractmethod
    def store(self) -> Store: ...

    def _command(self, kind: str, where: str, cmd: str | Sequence[str], inbuf: bytes, missing: str) -> Answer:
        store = self.store
        if not isinstance(store, RadosStore):
            return -errno.EOPNOTSUPP, b"", f"this store has no {missing}"
        return store.command(kind, where, text(_one(cmd), "cmd"), raw(inbuf or b"", "inbuf"))

    def mon_command(
        self, cmd: str | Sequence[str], inbuf: bytes, timeout: int = 0, target: str | int | None = None
    ) -> Answer:
        """Without monitors what ANSWERS lists is answered, the rest -EOPNOTSUPP."""
        store = self.store
        try:
            words = json.loads(text(_one(cmd), "cmd"))
            prefix = words["prefix"]
        except (ValueError, TypeError, KeyError):
            if isinstance(store, RadosStore):
                return self._command("mon", "", cmd, inbuf, "monitors")
            return -errno.EINVAL, b"", "the command is not a JSON object with a prefix"
        if isinstance(store, RadosStore):
            return self._command("mon", "" if target is None else str(target), cmd, inbuf, "monitors")
        answer = ANSWERS.get(prefix)
        if answer is None:
            return -errno.EOPNOTSUPP, b"", f"this store has no monitors to ask for {prefix!r}"
        if target is not None:
            words = {"format": "json", **words}
        try:
            return answer(store, words)
        except OSError as failure:
            return -(failure.errno or errno.EIO), b"", failure.strerror or ""
        except KeyError as missing:
            return -errno.EINVAL, b"", f"{prefix}: {missing} is missing"

    def osd_command(self, osdid: int, cmd: str | Sequence[str], inbuf: bytes, timeout: int = 0) -> Answer:
        """Without OSDs only `bench` for number 0, which measures the store's writing."""
        store = self.store
        if not isinstance(store, RadosStore) and int(osdid) == 0:
            try:
                words = json.loads(text(_one(cmd), "cmd"))
            except ValueError:
                return -errno.EINVAL, b"", "the command is not a JSON object"
            if words.get("prefix") == "bench":
                return _bench(store, words)
        return self._command("osd", str(int(osdid)), cmd, inbuf, "OSDs")

    def mgr_command(
        self, cmd: str | Sequence[str], inbuf: bytes, timeout: int = 0, target: str | None = None
    ) -> Answer:
        return self._command("mgr", "", cmd, inbuf, "managers")

    def pg_command(self, pgid: str, cmd: str | Sequence[str], inbuf: bytes, timeout: int = 0) -> Answer:
        return self._command("pg", text(pgid, "pgid"), cmd, inbuf, "placement groups")

    def _ping(self, name: str) -> str:
        """The health that a monitor sees, as JSON. ObjectNotFound: there is none of that name."""
        result, output, message = self.mon_command(json.dumps({"prefix": "mon dump", "format": "json"}), b"")
        with rados_errors("error calling ping_monitor"):
            if result < 0:
                raise OSError(-result, message)
            if name.removeprefix("mon.") not in [mon["name"] for mon in json.loads(output)["mons"]]:
                raise OSError(errno.ENOENT, f"no monitor {name}")
            result, output, message = self.mon_command(json.dumps({"prefix": "health", "format": "json"}), b"")
            if result < 0:
                raise OSError(-result, message)
        return json.dumps({"health": json.loads(output), "mon_status": {"name": name}})


def _one(cmd: str | Sequence[str]) -> str | bytes:
    return cmd if isinstance(cmd, (str, bytes)) else "".join(cmd)


# --- in place of a monitor ------------------------------------------------------------------------------------------


def _told(words: Words, value: Any, plain: str) -> Answer:
    if str(words.get("format", "plain")).startswith("json"):
        return 0, json.dumps(value).encode() + b"\n", ""
    return 0, plain.encode(), ""


def _fsid(store: Store, words: Words) -> Answer:
    return _told(words, {"fsid": store.fsid}, f"{store.fsid}\n")


def _pool_ls(store: Store, words: Words) -> Answer:
    names = [pool.name for pool in store.pools()]
    return _told(words, names, "".join(f"{name}\n" for name in names))


def _lspools(store: Store, words: Words) -> Answer:
    rows = [{"poolnum": pool.pool_id, "poolname": pool.name} for pool in store.pools()]
    return _told(words, rows, "".join(f"{row['poolnum']} {row['poolname']}\n" for row in rows))


def _mon_dump(store: Store, words: Words) -> Answer:
    if int(words.get("epoch", 1)) not in (0, 1):
        return -errno.ENOENT, b"", f"there is no map for epoch {words['epoch']}"
    address = store.client.address.partition("/")[0].rpartition(":")[0]
    mons = [{"rank": 0, "name": MONITOR, "addr": f"{address}:0/0", "public_addr": f"{address}:0/0"}]
    value = {"epoch": 1, "fsid": store.fsid, "min_mon_release_name": RELEASE, "mons": mons, "quorum": [0]}
    return _told(words, value, f"epoch 1\nfsid {store.fsid}\n0: {address}:0/0 mon.{MONITOR}\n")


def _version(store: Store, words: Words) -> Answer:
    version = f"librbd-py, as ceph 16.2.15 {RELEASE} (stable)"
    return _told(words, {"version": version, "release": RELEASE, "release_type": "stable"}, f"{version}\n")


def _health(store: Store, words: Words) -> Answer:
    return _told(words, {"status": "HEALTH_OK", "checks": {}, "mutes": []}, "HEALTH_OK\n")


def _osd_dump(store: Store, words: Words) -> Answer:
    pools = []
    for pool in store.pools():
        state = PoolState(store.open(pool.pool_id))
        pools.append(
            {
                "pool": pool.pool_id,
                "pool_name": pool.name,
                "size": 1,
                "application_metadata": state.applications(),
                "pool_snaps": [{"snapid": snap.snap_id, "name": snap.name} for snap in state.snaps()],
            }
        )
    value = {
        "epoch": 1,
        "fsid": store.fsid,
        "require_osd_release": RELEASE,
        "pools": pools,
        "osds": [],
        "blocklist": store.blocklist(),
    }
    plain = "".join(f"pool {row['pool']} '{row['pool_name']}' replicated size 1\n" for row in pools)
    return _told(words, value, f"epoch 1\nfsid {store.fsid}\nrequire_osd_release {RELEASE}\n{plain}")


def _df(store: Store, words: Words) -> Answer:
    pools = []
    for pool in store.pools():
        stats = store.pool_stats(pool.pool_id)
        counted = {"stored": stats.num_bytes, "objects": stats.num_objects, "bytes_used": stats.num_bytes}
        pools.append({"name": pool.name, "id": pool.pool_id, "stats": counted})
    plain = "".join(f"{row['name']} {row['stats']}\n" for row in pools)
    return _told(words, {"pools": pools}, plain)


def _pool_create(store: Store, words: Words) -> Answer:
    if words.get("pool_type", "replicated") != "replicated":
        return -errno.EOPNOTSUPP, b"", "this store has no erasure-coded pools"
    name = words["pool"]
    if any(pool.name == name for pool in store.pools()):
        return 0, b"", f"pool '{name}' already exists"
    store.pool_create(name)
    return 0, b"", f"pool '{name}' created"


def _pool_remove(store: Store, words: Words) -> Answer:
    name = words["pool"]
    sure = words.get("yes_i_really_really_mean_it") or words.get("sure") == "--yes-i-really-really-mean-it"
    if not sure or words.get("pool2") != name:
        return -errno.EPERM, b"", "say the name twice, and that you really mean it"
    store.pool_remove(name)
    return 0, b"", f"pool '{name}' removed"


def _state(store: Store, words: Words) -> PoolState:
    return PoolState(store.open(store.pool_id(words["pool"])))


def _mksnap(store: Store, words: Words) -> Answer:
    _state(store, words).snap_create(words["snap"])
    return 0, b"", f"created pool {words['pool']} snap {words['snap']}"


def _rmsnap(store: Store, words: Words) -> Answer:
    _state(store, words).snap_remove(words["snap"])
    return 0, b"", f"removed pool {words['pool']} snap {words['snap']}"


def _app_get(store: Store, words: Words) -> Answer:
    if "pool" not in words:
        found: Any = {pool.name: PoolState(store.open(pool.pool_id)).applications() for pool in store.pools()}
        return _told(words, found, json.dumps(found))
    state = _state(store, words)
    if not words.get("app"):
        return _told(words, state.applications(), json.dumps(state.applications()))
    values = state.application(words["app"])
    if words.get("key"):
        if words["key"] not in values:
            return -errno.ENOENT, b"", f"no metadata {words['key']}"
        return _told(words, values[words["key"]], values[words["key"]])
    return _told(words, values, json.dumps(values))


def _app_enable(store: Store, words: Words) -> Answer:
    sure = bool(words.get("yes_i_really_mean_it") or words.get("force"))
    _state(store, words).application_enable(words["app"], force=sure)
    return 0, b"", f"enabled application '{words['app']}' on pool '{words['pool']}'"


def _app_set(store: Store, words: Words) -> Answer:
    _state(store, words).application_set(words["app"], words["key"], words["value"])
    return 0, b"", "set"


def _app_rm(store: Store, words: Words) -> Answer:
    _state(store, words).application_set(words["app"], words["key"], None)
    return 0, b"", "removed"


def _blocklist(store: Store, words: Words) -> Answer:
    address = words["addr"]
    if (words.get("blocklistop") or words.get("blacklistop")) == "add":
        store.blocklist_add(address, int(float(words.get("expire", 0))) or 3600)
        return 0, b"", f"blocklisting {address}"
    store.blocklist_remove(address)
    return 0, b"", f"un-blocklisting {address}"


def _blocklist_ls(store: Store, words: Words) -> Answer:
    rows = [{"addr": addr, "until": until} for addr, until in store.blocklist().items()]
    return _told(words, rows, "".join(f"{row['addr']} {row['until']}\n" for row in rows))


ANSWERS: dict[str, Callable[[Store, Words], Answer]] = {
    "df": _df,
    "fsid": _fsid,
    "health": _health,
    "mon dump": _mon_dump,
    "osd blacklist": _blocklist,
    "osd blocklist": _blocklist,
    "osd blocklist ls": _blocklist_ls,
    "osd dump": _osd_dump,
    "osd lspools": _lspools,
    "osd pool application enable": _app_enable,
    "osd pool application get": _app_get,
    "osd pool application rm": _app_rm,
    "osd pool application set": _app_set,
    "osd pool create": _pool_create,
    "osd pool delete": _pool_remove,
    "osd pool ls": _pool_ls,
    "osd pool mksnap": _mksnap,
    "osd pool rm": _pool_remove,
    "osd pool rmsnap": _rmsnap,
    "version": _version,
}


def _bench(store: Store, words: Words) -> Answer:
    """`count` bytes in objects of `size`, which are removed again."""
    try:
        count, size = int(words.get("count", 1 << 20)), int(words.get("size", 4 << 20))
    except (TypeError, ValueError):
        return -errno.EINVAL, b"", "count and size are numbers"
    if not 0 < size <= 64 << 20 or not 0 < count <= BENCH_MAX:
        return -errno.EINVAL, b"", f"at most {BENCH_MAX} bytes in objects of at most {64 << 20}"
    pools = store.pools()
    if not pools:
        return -errno.ENOENT, b"", "there is no pool to write to"
    state = PoolState(store.open(pools[0].pool_id))
    start = time.monotonic()
    try:
        state.write_and_remove(os.urandom(min(size, 1 << 20)) * -(-size // (1 << 20)), size, count)
    except OSError as failure:
        return -(failure.errno or errno.EIO), b"", failure.strerror or ""
    seconds = max(time.monotonic() - start, 1e-9)
    value = {
        "bytes_written": count,
        "blocksize": size,
        "elapsed_sec": seconds,
        "bytes_per_sec": count / seconds,
        "iops": count / size / seconds,
    }
    return 0, json.dumps(value).encode(), ""

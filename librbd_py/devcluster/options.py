"""What a scratch cluster is like, and the ceph.conf and keyrings that say so. Pure."""

from __future__ import annotations

import base64
import errno
import ipaddress
import os
import struct
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"
MON = "mon.a"
MGR = "mgr.x"
GIB = 1 << 30
MAX_OSDS = 16

CAPABILITIES = {
    "mon": {"mon": "allow *"},
    "client": {"mon": "allow *", "osd": "allow *", "mds": "allow *", "mgr": "allow *"},
    "mgr": {"mon": "allow profile mgr", "osd": "allow *", "mds": "allow *"},
    "osd": {"mon": "allow profile osd", "mgr": "allow profile osd", "osd": "allow *"},
}


@dataclass(frozen=True)
class Options:
    """EINVAL when they contradict each other."""

    osds: int = 1
    auth: str = "none"  # or "cephx"
    objectstore: str = "memstore"  # loses its data with its process; "bluestore": a sparse file
    size: int = 0  # copies of each object; 0: one per OSD, up to 3
    min_size: int = 0  # copies without which I/O waits; 0: 2 of 3, else 1
    placement_groups: int = 8  # of each pool
    device_bytes: int = 4 * GIB  # of each OSD
    mgr: bool = False  # counts what pools hold (quotas need it); 300 MB of memory
    address: str = LOOPBACK  # IPv4, one of this machine: where daemons listen
    pools: tuple[str, ...] = ("rbd",)
    settings: tuple[tuple[str, str], ...] = ()  # more lines for all daemons and clients

    def __post_init__(self) -> None:
        if not 1 <= self.osds <= MAX_OSDS:
            raise OSError(errno.EINVAL, f"a scratch cluster has 1 to {MAX_OSDS} OSDs, not {self.osds}")
        if self.auth not in ("none", "cephx"):
            raise OSError(errno.EINVAL, f"auth is none or cephx, not {self.auth!r}")
        if self.objectstore not in ("memstore", "bluestore"):
            raise OSError(errno.EINVAL, f"objectstore is memstore or bluestore, not {self.objectstore!r}")
        try:
            ipaddress.IPv4Address(self.address)
        except ValueError:
            raise OSError(errno.EINVAL, f"{self.address!r} is no IPv4 address") from None
        if not 0 <= self.size <= self.osds or not 0 <= self.min_size <= self.copies:
            raise OSError(errno.EINVAL, f"{self.osds} OSDs cannot hold {self.size} copies, {self.min_size} at least")

    @property
    def copies(self) -> int:
        return self.size or min(self.osds, 3)

    @property
    def copies_needed(self) -> int:
        return self.min_size or (2 if self.copies >= 3 else 1)

    @property
    def daemons(self) -> list[str]:
        """`mon.a`, `osd.0`, ..., in the order in which they start."""
        return [MON, *([MGR] if self.mgr else []), *(f"osd.{number}" for number in range(self.osds))]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Options:
        """EINVAL for what is none."""
        try:
            known = {field.name: values[field.name] for field in fields(Options)}
            known["pools"] = tuple(known["pools"])
            known["settings"] = tuple((name, value) for name, value in known["settings"])
            return Options(**known)
        except (KeyError, TypeError, ValueError) as failure:
            raise OSError(errno.EINVAL, f"these are no options of a scratch cluster: {failure!r}") from None


def new_key() -> str:
    """A cephx secret: type AES, time of making, 16 random bytes."""
    now = time.time_ns()
    head = struct.pack("<HIIH", 1, now // 10**9 & 0xFFFFFFFF, now % 10**9, 16)
    return base64.b64encode(head + os.urandom(16)).decode()


def keyring(keys: dict[str, str]) -> str:
    """Of these entities (`osd.0`), with what each may do."""
    text = ""
    for entity, key in keys.items():
        text += f"[{entity}]\n\tkey = {key}\n"
        for service, allowed in CAPABILITIES[entity.partition(".")[0]].items():
            text += f'\tcaps {service} = "{allowed}"\n'
    return text


def mon_address(address: str, ports: tuple[int, int]) -> str:
    return f"[v2:{address}:{ports[0]},v1:{address}:{ports[1]}]"


def configuration(options: Options, folder: Path, fsid: str, mon_ports: tuple[int, int], osd_ports: range) -> str:
    """The ceph.conf of daemons and clients. Short times everywhere: on one machine what is late is dead."""
    common: dict[str, Any] = {
        "fsid": fsid,
        "mon host": mon_address(options.address, mon_ports),
        "mon initial members": "a",
        "auth cluster required": options.auth,
        "auth service required": options.auth,
        "auth client required": options.auth,
        "auth allow insecure global id reclaim": "false",
        "public addr": options.address,
        "ms bind ipv4": "true",
        "ms bind ipv6": "false",
        "ms bind port min": osd_ports.start,
        "ms bind port max": osd_ports.stop - 1,
        "ms bind retry delay": 1,
        "run dir": folder / "run",
        "crash dir": folder / "log",
        "pid file": "",
        "admin socket": folder / "run" / "$name.asok",
        "log file": folder / "log" / "$name.log",
        # pools
        "osd pool default size": options.copies,
        "osd pool default min size": options.copies_needed,
        "osd pool default pg num": options.placement_groups,
        "osd pool default pg autoscale mode": "off",
        "osd crush chooseleaf type": 0,  # copies on one host
        "mon allow pool size one": "true",
        "mon allow pool delete": "true",
        "mon warn on pool no redundancy": "false",
        "mon data avail warn": 1,
        "mon data avail crit": 1,
        # times; osd heartbeats are read by monitors too
        "paxos propose interval": 0.05,
        "osd heartbeat interval": 1,
        "osd heartbeat grace": 4,
        "mon osd adjust heartbeat grace": "false",
        "mon osd adjust down out interval": "false",
        "mon osd min down reporters": 1,
        "mon osd reporter subtree level": "osd",
        "mgr stats period": 1,
        "mgr tick period": 1,
        "mon tick interval": 1,  # when quotas are looked at
        "osd client watch timeout": 6,
        "objecter tick interval": 1,  # else a watch of 6 seconds is renewed too late
    }
    if options.copies == 1:
        # An OSD that was suspended longer than its lease to serve reads asks the other copies for a new one: with none
        # it would wait for ever (Ceph 16). Nobody else can serve them, so the lease may be long: this times the grace.
        common["osd pool default read lease ratio"] = 1000
    if options.objectstore == "memstore":
        # Its omap iterators are not safe against changes by another thread, and the record of snapshots that placement
        # groups share is both walked (trimming) and changed: the OSD crashed. One thread does one after the other.
        common["osd op num shards"] = 1
        common["osd op num threads per shard"] = 1
    common |= dict(options.settings)
    osd = {
        "osd data": folder / "osd$id",
        "keyring": folder / "osd$id" / "keyring",
        "osd objectstore": options.objectstore,
        "memstore device bytes": options.device_bytes,
        "memstore page set": "true",  # else a write of 4 KiB copies its whole object
        "bluestore block size": options.device_bytes,
        "bluestore cache autotune": "false",
        "bluestore cache size": 64 << 20,
        "osd class load list": "*",
        "osd class default list": "*",
        "osd max object name len": 256,  # what file systems under a bluestore file can do is no matter here
        "osd max object namespace len": 64,
    }
    sections: dict[str, dict[str, Any]] = {
        "global": common,
        "client": {"keyring": folder / "keyring", "admin socket": "", "log file": ""},
        "mon": {"mon data": folder / "mon", "mon cluster log file": folder / "log" / "cluster.log"},
        "mgr": {"mgr data": folder / "mgr", "keyring": folder / "mgr" / "keyring", "mgr initial modules": "balancer"},
        "osd": osd,
    }
    return "".join(
        f"[{name}]\n" + "".join(f"{option} = {value}\n" for option, value in lines.items())
        for name, lines in sections.items()
    )

"""Trouble for a scratch cluster, on purpose."""

from __future__ import annotations

import errno
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .options import MON

if TYPE_CHECKING:
    from .cluster import DevCluster

DEADLINE = 60.0  # seconds a cluster may take for what it does by itself


class Faults:
    """`name`: osd.0, mon.a, ... Each call returns when what it says has happened. TimeoutError when it does not."""

    def __init__(self, cluster: DevCluster) -> None:
        self._cluster = cluster

    # --- processes

    def kill(self, name: str) -> None:
        """SIGKILL. ESRCH when it is absent."""
        if not self._cluster.daemon(name).kill():
            raise ProcessLookupError(errno.ESRCH, f"{name} does not run")

    def revive(self, name: str) -> None:
        """Starts it again; an OSD of memstore comes back empty and is filled by the others."""
        number = int(name.removeprefix("osd.")) if name.startswith("osd.") else None
        before = self._row(number)["up_from"] if number is not None else 0  # the monitor may not know yet that it died
        self._cluster.spawn(name)
        if number is not None:
            self._until(lambda: self.is_up(number) and self._row(number)["up_from"] > before, f"{name} to be up")
        elif name == MON:
            self._until(lambda: bool(self._mon("mon stat")), "the monitor to answer")

    def restart(self, name: str) -> None:
        self.kill(name)
        self.revive(name)

    def freeze(self, name: str) -> None:
        """SIGSTOP: like a cable that was pulled."""
        self._signal(name, signal.SIGSTOP, "frozen")

    def thaw(self, name: str) -> None:
        """SIGCONT."""
        self._signal(name, signal.SIGCONT, "running")

    def _signal(self, name: str, number: signal.Signals, state: str) -> None:
        daemon = self._cluster.daemon(name)
        if not daemon.send(number):
            raise ProcessLookupError(errno.ESRCH, f"{name} does not run")
        daemon.wait_for_state(state)

    # --- what the cluster thinks

    def _mon(self, prefix: str, **words: Any) -> Any:
        from .admin import Admin

        with Admin(self._cluster.conf) as admin:
            return admin.mon(prefix, **words)

    def _until(self, holds: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + DEADLINE
        while not holds():
            if time.monotonic() > end:
                raise TimeoutError(errno.ETIMEDOUT, f"waited {DEADLINE:.0f} s for {what}")
            time.sleep(0.05)

    def is_up(self, number: int) -> bool:
        """What the monitor knows of that OSD."""
        return bool(self._row(number)["up"])

    def _row(self, number: int) -> dict[str, int]:
        rows: list[dict[str, int]] = self._mon("osd dump")["osds"]
        return next(row for row in rows if row["osd"] == number)

    def wait_down(self, number: int) -> None:
        self._until(lambda: not self.is_up(number), f"osd.{number} to be down")

    def wait_up(self, number: int) -> None:
        self._until(lambda: self.is_up(number), f"osd.{number} to be up")

    def wait_clean(self) -> None:
        """Every object has all its copies."""

        from .admin import Admin

        def clean() -> bool:
            with Admin(self._cluster.conf) as admin:
                return all(state == "active+clean" for state in admin.pg_states())

        self._until(clean, "all copies to be there")

    # --- settings

    def inject_socket_failures(self, one_in: int) -> None:
        """Every OSD drops a connection once in so many messages; 0: no more."""
        from .admin import Admin

        with Admin(self._cluster.conf) as admin:
            for number in range(self._cluster.options().osds):
                admin.osd(number, "config set", var="ms_inject_socket_failures", val=[str(one_in)])

    def quota(self, pool: str, size: int) -> None:
        """Bytes; 0: none. Returns at once: the manager (which must run) notices later that it is reached."""
        self._mon("osd pool set-quota", pool=pool, field="max_bytes", val=str(size))

    def pool_is_full(self, pool: str) -> bool:
        """By quota or because OSDs are full."""
        rows = self._mon("osd dump")["pools"]
        return any("full" in row["flags_names"].split(",") for row in rows if row["pool_name"] == pool)

    def wait_full(self, pool: str, full: bool = True) -> None:
        self._until(lambda: self.pool_is_full(pool) == full, f"pool {pool} to be {'full' if full else 'full no more'}")

    def fill(self, full: bool = True) -> None:
        """Every OSD says that its device is full, or no more. Returns when the pools know."""
        from .admin import Admin

        options = self._cluster.options()
        with Admin(self._cluster.conf) as admin:
            for number in range(options.osds):
                words = {"type": "full" if full else "none"}
                admin.osd(number, "injectfull", **words)
        for pool in options.pools:
            self.wait_full(pool, full)

    def blocklist(self, address: str, seconds: int = 3600) -> None:
        """`ip:port/nonce` of a client."""
        from .admin import Admin

        with Admin(self._cluster.conf) as admin:
            admin.blocklist(address, seconds)

    def unblocklist(self, address: str) -> None:
        from .admin import Admin

        with Admin(self._cluster.conf) as admin:
            admin.unblocklist(address)

"""Two hosts that run the service and libvirtd, a store in a folder and a cluster that both reach; what tests do with
them."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from librbd_py.devcluster import DevCluster
from tests.libvirt.domains import Domain
from tests.libvirt.hosts import Host, HostError, Machine, wait_for
from tests.libvirt.ledger import Verdict

_numbers = itertools.count(1)
MIGRATION_PORT = 49300
MIGRATION_SECONDS = 90.0


class Events:
    """QMP events of a host's service, with the time each arrived (time.monotonic()). Close it."""

    def __init__(self, host: Host) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(host.qmp))
        self._file = self._socket.makefile("rwb")
        json.loads(self._file.readline())
        self._file.write(b'{"execute": "qmp_capabilities"}\n')
        self._file.flush()
        self.seen: list[tuple[float, str, dict[str, Any]]] = []
        self._reactions: list[tuple[str, Callable[[], None]]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def at_once(self, name: str, reaction: Callable[[], None]) -> None:
        """`reaction()` runs, once, as soon as the next event of that name arrives."""
        self._reactions.append((name, reaction))

    def _run(self) -> None:
        try:
            for line in self._file:
                message = json.loads(line)
                if "event" not in message:
                    continue
                self.seen.append((time.monotonic(), message["event"], message.get("data", {})))
                for entry in [entry for entry in self._reactions if entry[0] == message["event"]]:
                    self._reactions.remove(entry)
                    entry[1]()
        except (OSError, ValueError):
            pass  # the service, or the test, ended

    def named(self, name: str) -> list[dict[str, Any]]:
        return [data for _, event, data in self.seen if event == name]

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._file.close()
        self._socket.close()


@dataclass
class World:
    machine: Machine
    alpha: Host
    beta: Host
    folder_store: str  # URL
    cluster: DevCluster
    domains: list[Domain] = field(default_factory=list)
    kept: dict[tuple[str, str], Domain] = field(default_factory=dict)  # that go on from test to test, paused between
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.alpha, self.beta

    def store(self, kind: str) -> str:
        return self.cluster.url if kind == "ceph" else self.folder_store

    def domain(self, transport: str, store: str, url: str = "", **more: Any) -> Domain:
        """`url`: of a store that is none of those that hosts have for their own."""
        name = f"vm{next(_numbers)}"
        made = Domain(name, url or self.store(store), self.machine.folder, transport=transport, **more)
        self.domains.append(made)
        return made

    def running(self, transport: str = "vhost-user", store: str = "embedded", **more: Any) -> Domain:
        """A domain that runs on alpha, its load under way."""
        domain = self.domain(transport, store, **more)
        domain.define(self.alpha)
        self.alpha.virsh("start", domain.name)
        domain.wait_for_console("GUEST-UP")
        domain.wait_for_progress(1)
        return domain

    def kept_running(self, transport: str, store: str) -> tuple[Domain, Host, Host]:
        """A domain that an earlier test may have used; the host that runs it, and the other one."""
        domain = self.kept.get((transport, store))
        if domain is None:
            domain = self.kept[transport, store] = self.running(transport, store)
            self.domains.remove(domain)
            return domain, self.alpha, self.beta
        (source,) = [host for host in self.hosts if host.state(domain.name) == "paused"]
        source.virsh("resume", domain.name)
        domain.wait_for_progress(1)
        return domain, source, self.alpha if source is self.beta else self.beta

    def keep(self, domain: Domain) -> None:
        """Pauses it for a look at what it wrote, and for the next test."""
        (host,) = self.where(domain)
        host.virsh("suspend", domain.name)
        self.look_at(domain)

    def drop_kept(self, only: Domain | None = None) -> None:
        for key, domain in list(self.kept.items()):
            if only in (None, domain):
                del self.kept[key]
                self.end(domain)

    def look_at(self, domain: Domain) -> None:
        """What it wrote must be there; it is paused, or gone."""
        if domain.writes:
            verdict = domain.judge()
            self.verdicts.append(verdict)
            assert verdict.right, str(verdict)

    # --- migration

    def migrate(self, domain: Domain, source: Host, destination: Host) -> None:
        """HostError when it fails."""
        where = f"tcp://{destination.address}:{MIGRATION_PORT}"
        argv = ("migrate", "--live", domain.name, destination.uri, "--migrateuri", where)
        source.virsh(*argv, timeout=MIGRATION_SECONDS)

    @contextmanager
    def migrating(self, domain: Domain, source: Host, destination: Host) -> Iterator[Attempt]:
        """While the block runs a migration is under way; afterwards it has ended, well or not."""
        attempt = Attempt(self, domain, source, destination)
        try:
            yield attempt
        finally:
            attempt.wait()

    def where(self, domain: Domain) -> list[Host]:
        """The hosts whose QEMU of the domain runs its processors."""
        return [host for host in self.hosts if host.state(domain.name) == "running"]

    def check(self, domain: Domain, host: Host) -> None:
        """The VM runs on that host and no other, its load goes on without an error, and the lock is that host's."""
        wait_for(lambda: self.where(domain) == [host], f"{domain.name} to run on {host.name} alone", 30)
        domain.wait_for_progress()
        assert domain.holder() == host.name
        wait_for(lambda: domain.hosts_that_watch() == {host.name}, f"watches of {host.name} alone", 10)

    def end(self, domain: Domain) -> None:
        """Wherever it is. What it wrote must be there; then its images go, too."""
        for host in self.hosts:
            for verb in ("destroy", "managedsave-remove", "undefine"):
                try:
                    host.virsh(verb, domain.name)
                except HostError:
                    pass  # not there
        wait_for(lambda: not domain.hosts_that_watch(), f"the watches of {domain.name} to go", 30)
        self.look_at(domain)
        domain.remove()


class Attempt:
    """A migration in a thread of its own."""

    def __init__(self, world: World, domain: Domain, source: Host, destination: Host) -> None:
        self.failure: HostError | None = None
        self.domain, self.source, self.destination = domain, source, destination
        self._thread = threading.Thread(target=self._run, args=(world,))
        self._thread.start()

    def _run(self, world: World) -> None:
        try:
            world.migrate(self.domain, self.source, self.destination)
        except HostError as failure:
            self.failure = failure

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join(MIGRATION_SECONDS + 10)
        assert self.ended, "virsh migrate does not end"

    def wait_for_part(self, share: float) -> None:
        """Until no more than the rest of the memory is to be sent; at once when it has ended."""
        wait_for(lambda: self.ended or self._sent() >= share, f"{share:.0%} of a migration")

    def _sent(self) -> float:
        try:
            text = self.source.virsh("domjobinfo", self.domain.name)
        except HostError:
            return 0.0
        rows = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        try:
            left, total = (size(rows[f"Memory {what}"]) for what in ("remaining", "total"))
        except (KeyError, ValueError):
            return 0.0
        return 1.0 - left / total if total else 0.0


def size(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit]


def slow(host: Host, domain: Domain, mib_per_second: int) -> None:
    """How fast its memory is sent."""
    host.virsh("migrate-setspeed", domain.name, str(mib_per_second))


def patient(host: Host, domain: Domain, milliseconds: int) -> None:
    """For how long it may stand still: with little, QEMU goes on sending what the guest changes. 300 by default."""
    host.virsh("migrate-setmaxdowntime", domain.name, str(milliseconds))


def store_folder(machine: Machine) -> str:
    return f"embedded:{Path(machine.folder) / 'store'}"

"""What a live migration costs a guest's disk, beside QEMU's own rbd driver on the same cluster.

    python -m tests.bench.migration [--pairs N] [--write]

Two libvirt hosts, one scratch cluster, a guest for each kind of disk that writes block after block and shows each
completed write on its console. The blackout is the longest time without one, by the host's clock. What a disk adds to
it is told by a guest whose disk is a file in the page cache that both hosts see, with nothing to flush, to release or
to take: the rest is QEMU's and libvirt's own. So is what libvirt calls the downtime, but that has librbd's flush and
the release of its lock in it, and not what a vhost-user back end does when it starts. Rounds are interleaved. The
lock's part in it the services' events tell: from the front end's last ring stopped until the offer is in the store,
and from its first ring started until the lock is taken. Then the service is killed and started again, time and again,
until the guest's next write; and QEMU with librbd in it is killed, until librbd elsewhere has written.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from librbd_py.devcluster import Options, scratch
from tests.libvirt.domains import Domain
from tests.libvirt.hosts import Host, Machine, wait_for
from tests.libvirt.world import Events
from vm_images.cache import cache_dir

RESULTS = Path(__file__).resolve().parent / "results" / "migration.md"
PORT = 49200
SETTLE = 0.5  # seconds watched after the migration has ended
NO_DISK = "file in memory"
KINDS = ("librbd in QEMU", "vhost-user", "nbd", NO_DISK)
FILE_DISK = (
    "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='unsafe'/>"
    "<source file='{file}'/><target dev='vda' bus='virtio'/></disk>"
)
DEATHS = 3
NEXT_WRITER = """
import rados, rbd, sys
with rados.Rados(conffile=sys.argv[1]) as cluster, cluster.open_ioctx("rbd") as ioctx:
    with rbd.Image(ioctx, sys.argv[2]) as image:
        print("open", flush=True)
        sys.stdin.readline()
        image.write(b"next", image.size() - 512)
        print("written", flush=True)
"""


@dataclass(frozen=True)
class Blackout:
    """Milliseconds."""

    total: float
    downtime: float


class Clock:
    """Notes when the file of a console grows; `longest` is the longest time it did not, in seconds."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.longest = 0.0

    def _run(self) -> None:
        size, since = os.stat(self._file).st_size, time.monotonic()
        while not self._stop.is_set():
            now, found = time.monotonic(), os.stat(self._file).st_size
            if found != size:
                self.longest = max(self.longest, now - since)
                size, since = found, now
            time.sleep(0.0003)

    def __enter__(self) -> Clock:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


@dataclass
class Found:
    """Milliseconds, but `deaths`: seconds."""

    blackouts: dict[str, list[Blackout]]
    offers: list[float]
    takes: list[float]
    deaths: dict[str, list[float]]


def migrate(domain: Domain, source: Host, destination: Host) -> Blackout:
    with Clock(domain.console_file) as clock:
        where = f"tcp://{destination.address}:{PORT}"
        # libvirt calls a disk unsafe that is in the page cache; here the hosts share that.
        source.virsh("migrate", "--live", "--unsafe", domain.name, destination.uri, "--migrateuri", where)
        time.sleep(SETTLE)
    domain.check_console()
    info = destination.virsh("domjobinfo", domain.name, "--completed")
    found = re.search(r"Total downtime:\s+(\d+)\s+ms", info)
    assert found is not None, info
    return Blackout(clock.longest * 1000, float(found[1]))


def start(kind: str, machine: Machine, host: Host, store: str) -> Domain:
    """Running and writing."""
    name = kind.split()[0]
    converted = kind in ("vhost-user", "nbd")
    transport = kind if converted else "vhost-user"
    domain = Domain(name, store, machine.folder, "rbdpy.mode=tick rbdpy.seconds=3600", transport)
    if not converted:
        text = domain.xml()
        if kind == NO_DISK:
            file = machine.folder / f"{name}.raw"
            with file.open("wb") as disk:
                disk.truncate(64 << 20)
            text = re.sub("<disk .*</disk>", FILE_DISK.format(file=file), text)
        plain = host.folder / f"{name}.xml"
        plain.write_text(text)
        host.virsh("define", plain)
    else:
        domain.define(host)
    host.virsh("start", name)
    domain.wait_for_console("." * 200)
    return domain


def end(domain: Domain, host: Host) -> None:
    host.virsh("destroy", domain.name)
    host.virsh("undefine", domain.name)
    wait_for(lambda: not domain.ownership().others and domain.holder() is None, "the image to be left")
    domain.remove()


def rounds(machine: Machine, hosts: list[Host], store: str, pairs: int, found: Found) -> None:
    """One guest at a time: another one that runs would take the processor away at random."""
    events = [Events(host) for host in hosts]
    for number in range(pairs):
        for kind in KINDS:
            domain = start(kind, machine, hosts[0], store)
            for source, destination in (hosts, hosts[::-1]):
                found.blackouts[kind].append(migrate(domain, source, destination))
            end(domain, hosts[0])
            say(f"round {number + 1}, {kind}: {', '.join(f'{b.total:.1f}' for b in found.blackouts[kind][-2:])} ms")
    for its in events:
        found.offers += [1000 * data["seconds"] for data in its.named("RBD_HANDOFF_OFFERED")]
        found.takes += [1000 * data["seconds"] for data in its.named("RBD_HANDOFF_TAKEN")]
        its.close()


def service_dies(domain: Domain, host: Host) -> float:
    """Seconds from SIGKILL until the guest has written again; who starts the service anew does so at once."""
    host.kill_service()
    begin, size = time.monotonic(), domain.console_file.stat().st_size
    host.start_service()
    wait_for(lambda: domain.console_file.stat().st_size > size, "the guest's next write")
    return time.monotonic() - begin


def qemu_dies(domain: Domain, host: Host, conf: str) -> float:
    """Seconds from SIGKILL of QEMU until another client with librbd has written."""
    argv = ["/usr/bin/python3", "-c", NEXT_WRITER, conf, domain.images[0]]
    pid = host.pid_of(domain.name)
    assert pid is not None
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        assert writer.stdout.readline() == b"open\n"
        os.kill(pid, signal.SIGKILL)
        begin = time.monotonic()
        writer.stdin.write(b"\n")
        writer.stdin.flush()
        assert writer.stdout.readline() == b"written\n"
        return time.monotonic() - begin


def deaths(machine: Machine, host: Host, store: str, found: Found) -> None:
    conf = store.removeprefix("ceph:")
    for kind in KINDS[:2]:
        its = found.deaths.setdefault(f"{kind}: QEMU dies, another librbd writes", [])
        for _ in range(DEATHS):
            domain = start(kind, machine, host, store)
            its.append(qemu_dies(domain, host, conf))
            wait_for(lambda domain=domain: host.virsh("domstate", domain.name).strip() == "shut off", "its end")
            host.virsh("undefine", domain.name)
            wait_for(lambda domain=domain: not domain.ownership().others and domain.holder() is None, "it to be left")
            domain.remove()
        say(f"{kind}: {', '.join(f'{seconds:.2f}' for seconds in its)} s after QEMU's death")
    domain = start(KINDS[1], machine, host, store)
    its = found.deaths.setdefault("vhost-user: the service dies, its guest writes", [])
    for _ in range(DEATHS):
        its.append(service_dies(domain, host))
        domain.wait_for_console("." * 100, len(domain.console))
    say(f"{', '.join(f'{seconds:.2f}' for seconds in its)} s after the service's death")
    domain.check_console()
    end(domain, host)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def spread(values: list[float], form: str = ".1f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}..{max(values):{form}})"


def table(found: Found) -> str:
    middle = {kind: statistics.median(b.total for b in rows) for kind, rows in found.blackouts.items()}
    added = {kind: total - middle[NO_DISK] for kind, total in middle.items()}
    lines = [
        "Milliseconds, medians (smallest..largest) over migrations there and back, one guest under TCG that writes all",
        f"the time. `adds`: median blackout less that of `{NO_DISK}`. Must: not more than librbd in QEMU's; aim: half.",
        "",
        "| disk of the guest | migrations | blackout | adds | of librbd's | libvirt's downtime | less that |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, rows in found.blackouts.items():
        less = spread([b.total - b.downtime for b in rows])
        cells = [spread([b.total for b in rows]), f"{added[kind]:.1f}", f"{added[kind] / added[KINDS[0]]:.2f}x"]
        cells += [spread([b.downtime for b in rows]), less]
        lines.append(f"| {kind} | {len(rows)} | {' | '.join(cells)} |")
    lines += ["", "| the lock, vhost-user | times | ms |", "| --- | --- | --- |"]
    for name, values in (("drained, flushed and offered", found.offers), ("taken", found.takes)):
        lines.append(f"| {name} | {len(values)} | {spread(values)} |")
    lines += ["", "Watches of the dead end after 6 s on this cluster, after 30 s by Ceph's default.", ""]
    lines += ["| from `kill -9` to the next write | times | seconds |", "| --- | --- | --- |"]
    for name, values in found.deaths.items():
        lines.append(f"| {name} | {len(values)} | {spread(values, '.2f')} |")
    return "\n".join(lines) + "\n"


def measure(folder: Path, pairs: int) -> Found:
    found = Found({kind: [] for kind in KINDS}, [], [], {})
    with Machine(folder, cache_dir() / "libvirt-capabilities") as machine:
        hosts = [machine.host("alpha"), machine.host("beta")]
        with scratch(Options(address=machine.address)) as cluster:
            for host in hosts:
                host.set_up(cluster.url)
                host.start_service()
                host.start_libvirtd()
            rounds(machine, hosts, cluster.url, pairs, found)
            deaths(machine, hosts[0], cluster.url, found)
            for host in hosts:
                host.kill_libvirtd()
                host.kill_service()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.migration", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"to {RESULTS.name}, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rbdpy-mb-", ignore_cleanup_errors=True) as folder:
        text = table(measure(Path(folder), options.pairs))
    print(text)
    if options.write:
        RESULTS.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

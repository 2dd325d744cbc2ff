"""What a live migration costs a guest's disk, beside QEMU's own rbd driver on the same cluster.

    python -m tests.bench.migration [--pairs N] [--write]

Two libvirt hosts, one scratch cluster, a guest for each kind of disk that writes block after block and shows each
completed write on its console. The blackout is the longest time without one, by the host's clock; QEMU says how much
of it the VM itself was stopped (downtime: saving and loading devices). What is left is the disk's. Pairs are
interleaved.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from librbd_py.devcluster import Options, scratch
from tests.libvirt.domains import Domain
from tests.libvirt.hosts import Host, Machine
from vm_images.cache import cache_dir

RESULTS = Path(__file__).resolve().parent / "results" / "migration.md"
PORT = 49200
SETTLE = 0.5  # seconds watched after the migration has ended
KINDS = ("librbd in QEMU", "vhost-user", "nbd")


@dataclass(frozen=True)
class Blackout:
    """Milliseconds."""

    total: float
    downtime: float

    @property
    def disk(self) -> float:
        return self.total - self.downtime


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


def migrate(domain: Domain, source: Host, destination: Host) -> Blackout:
    with Clock(domain.console_file) as clock:
        where = f"tcp://{destination.address}:{PORT}"
        source.virsh("migrate", "--live", domain.name, destination.uri, "--migrateuri", where)
        time.sleep(SETTLE)
    domain.check_console()
    info = destination.virsh("domjobinfo", domain.name, "--completed")
    found = re.search(r"Total downtime:\s+(\d+)\s+ms", info)
    assert found is not None, info
    return Blackout(clock.longest * 1000, float(found[1]))


def start(kind: str, machine: Machine, host: Host, store: str) -> Domain:
    name = kind.split()[0]
    domain = Domain(name, store, machine.folder, append="rbdpy.mode=tick rbdpy.seconds=3600")
    if kind == KINDS[0]:
        plain = host.folder / f"{name}.xml"
        plain.write_text(domain.xml())
        host.virsh("define", plain)
    else:
        domain.transport = kind
        domain.define(host)
    host.virsh("start", name)
    return domain


def rounds(machine: Machine, pairs: int) -> dict[str, list[Blackout]]:
    hosts = [machine.host("alpha"), machine.host("beta")]
    found: dict[str, list[Blackout]] = {kind: [] for kind in KINDS}
    with scratch(Options(address=machine.address)) as cluster:
        for host in hosts:
            host.start_service(cluster.url)
            host.start_libvirtd()
        # One guest at a time: another one that runs would take the processor away at random.
        for number in range(pairs):
            for kind in KINDS:
                domain = start(kind, machine, hosts[0], cluster.url)
                domain.images = (f"{domain.images[0]}",)
                domain.wait_for_console("." * 200)
                for source, destination in (hosts, hosts[::-1]):
                    found[kind].append(migrate(domain, source, destination))
                hosts[0].virsh("destroy", domain.name)
                hosts[0].virsh("undefine", domain.name)
                domain.remove()
                say(f"pair {number + 1}, {kind}: " + ", ".join(f"{b.disk:.1f}" for b in found[kind][-2:]) + " ms")
        for host in hosts:
            host.kill_libvirtd()
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(found: dict[str, list[Blackout]]) -> str:
    peer = statistics.median(b.disk for b in found[KINDS[0]])
    lines = [
        "Milliseconds, medians (smallest..largest) over migrations there and back, one guest under TCG that writes all",
        "the time; `disk` is blackout less QEMU's downtime. Must: not more than librbd in QEMU; aim: half of it.",
        "",
        "| disk of the guest | migrations | blackout | QEMU's downtime | disk | ratio to librbd |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, rows in found.items():
        cells = []
        for values in ([b.total for b in rows], [b.downtime for b in rows], [b.disk for b in rows]):
            cells.append(f"{statistics.median(values):.1f} ({min(values):.1f}..{max(values):.1f})")
        ratio = statistics.median(b.disk for b in rows) / peer
        lines.append(f"| {kind} | {len(rows)} | {' | '.join(cells)} | {ratio:.2f}x |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.migration", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"to {RESULTS.name}, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rbdpy-mb-", ignore_cleanup_errors=True) as folder:
        with Machine(Path(folder), cache_dir() / "libvirt-capabilities") as machine:
            text = table(rounds(machine, options.pairs))
    print(text)
    if options.write:
        RESULTS.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

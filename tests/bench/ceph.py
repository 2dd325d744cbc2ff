"""`make bench STORE=ceph`: rows against real Ceph, every pair on one scratch cluster in the same minute.

    python -m tests.bench.ceph [--pairs N] [--seconds S] [--only TEXT] [--write]

The OSD (memstore) runs on CPU 1, clients, servers and loads on CPU 0, so that a client's cost is not hidden in waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from librbd_py import rados, rbd
from librbd_py.devcluster import DevCluster, scratch
from tests.bench import loads, report
from tests.bench.pairs import Load, Row, Sample, measure
from tests.bench.scale import many_images
from tests.bench.servers import Server

MIB = 1 << 20
SIZE = 128 * MIB
IMAGE = "bench"
CLIENT, OSD = 0, 1
IMAGES = 100


def pin_cluster(cluster: DevCluster) -> None:
    for name in ("osd.0", "mon.a"):
        record = cluster.daemon(name).record()
        assert record is not None
        pid = record[0]
        subprocess.run(["taskset", "-a", "-p", "-c", str(OSD), str(pid)], check=True, stdout=subprocess.DEVNULL)


def fill(conf: str) -> str:
    """Makes and fills the image; the prefix of its data objects."""
    piece = os.urandom(4 * MIB)
    with rados.Rados(conffile=conf) as cluster, cluster.open_ioctx("rbd") as ioctx:
        rbd.RBD().create(ioctx, IMAGE, SIZE)
        with rbd.Image(ioctx, IMAGE) as image:
            for offset in range(0, SIZE, len(piece)):
                image.write(piece, offset)
            image.flush()
            prefix: str = image.block_name_prefix()
    return prefix


class Client:
    """What stands where a server would: the library's client is the process of the load itself."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        self.name = name
        self.arguments = arguments


def client_load(mode: str, depth: int, block: int = 4096) -> Callable[[Client, float], Sample]:
    def load(client: Client, seconds: float) -> Sample:
        command = [*loads.pinned(CLIENT), str(loads.image_tool()), *client.arguments]
        command += [str(SIZE), mode, str(depth), str(block), str(seconds)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        result = json.loads(done.stdout)
        return Sample(result["iops"], result["p50_us"], result["p99_us"], result["cpu_us"])

    return load


def client_rows(conf: str, prefix: str, pairs: int, seconds: float, only: str) -> list[Row]:
    ours = Client("librbd-py", ["ours", conf, "rbd", prefix])
    librbd = Client("librbd", ["librbd", conf, "rbd", IMAGE])
    floor = Client("librados", ["rados", conf, "rbd", prefix])
    plan = [
        ("client 4 KiB randread QD32", librbd, client_load("read", 32), "1x", "1.25x"),
        ("client 4 KiB randread QD32", floor, client_load("read", 32), "", ""),
        ("client 4 KiB randwrite QD32", librbd, client_load("write", 32), "1x", "1.25x"),
        ("client 4 KiB randwrite QD32", floor, client_load("write", 32), "", ""),
        ("client 4 KiB randread QD1", librbd, client_load("read", 1), "1x", "1.25x"),
        ("client 4 KiB randread QD1", floor, client_load("read", 1), "", ""),
        ("client 4 KiB randwrite QD1", librbd, client_load("write", 1), "1x", "1.25x"),
        ("client 4 KiB randwrite QD1", floor, client_load("write", 1), "", ""),
        ("client 4 KiB sequential read QD32", librbd, client_load("seqread", 32), "1x", "6x"),
        ("client 4 KiB sequential write QD32", librbd, client_load("seqwrite", 32), "1x", "6x"),
    ]
    rows = []
    for name, peer, load, must, aim in plan:
        if only in name:
            rows.append(measure(Row(name, peer.name, must, aim), ours, peer, load, pairs, seconds))
            print(report.line(rows[-1]), flush=True)
    return rows


def our_export(folder: Path, conf: str, kind: str) -> Server:
    path = folder / f"ours-{kind}.sock"
    command = [sys.executable, "-m", "librbd_py.cli.main", "--store", f"ceph:{conf}", "export", IMAGE]
    command += ["--vhost-user" if kind == "vhost" else "--nbd", str(path)]
    return Server(f"librbd-py {kind}", command, path, {CLIENT}, export=IMAGE)


def qemu_nbd(folder: Path, conf: str) -> Server:
    path = folder / "qemu-nbd.sock"
    command = ["qemu-nbd", "-k", str(path), "-t", "-e", "8", "-f", "raw", "--cache=none"]
    command += [f"rbd:rbd/{IMAGE}:conf={conf}"]
    return Server("qemu-nbd rbd", command, path, {CLIENT})


def storage_daemon(folder: Path, conf: str) -> Server:
    path = folder / "qsd.sock"
    node = f"driver=rbd,node-name=f,pool=rbd,image={IMAGE},conf={conf},cache.direct=on"
    command = ["qemu-storage-daemon", "--blockdev", node]
    command += ["--export", f"type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={path},writable=on"]
    return Server("qemu-storage-daemon rbd", command, path, {CLIENT})


def export_rows(folder: Path, conf: str, pairs: int, seconds: float, only: str) -> list[Row]:
    """One server at a time has the image open: its lock must not move while it is measured."""

    def raw(mode: str, depth: int) -> Load:
        return loads.raw_nbd(mode, depth, 4096, cpu=CLIENT)

    def vufe(mode: str, depth: int) -> Load:
        return loads.vufe(mode, depth, 4096, SIZE, cpu=CLIENT)

    plan: list[tuple[str, str, Load, str, str]] = [
        ("NBD 4 KiB randread QD32", "nbd", raw("read", 32), "4x", ""),
        ("NBD 4 KiB randwrite QD32", "nbd", raw("write", 32), "1.2x", ""),
        ("NBD 4 KiB randread QD1", "nbd", raw("read", 1), "1.2x", ""),
        ("vhost-user 4 KiB randread QD32", "vhost", vufe("randread", 32), "1.2x", ""),
        ("vhost-user 4 KiB randwrite QD32", "vhost", vufe("randwrite", 32), "1.2x", ""),
        ("vhost-user 4 KiB randread QD1", "vhost", vufe("randread", 1), "1.2x", ""),
    ]
    rows = []
    for name, kind, load, must, aim in plan:
        if only not in name:
            continue
        start = qemu_nbd if kind == "nbd" else storage_daemon
        row = Row(name, "qemu-nbd rbd" if kind == "nbd" else "qemu-storage-daemon rbd", must, aim)
        for _ in range(pairs):
            with our_export(folder, conf, kind) as ours:
                row.ours.append(load(ours, seconds))
            with start(folder, conf) as theirs:
                row.theirs.append(load(theirs, seconds))
        rows.append(row)
        print(report.line(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench STORE=ceph", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--only", default="", help="only rows whose name holds this")
    parser.add_argument("--write", action="store_true", help="replace the table and picture in tests/bench/results")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rbdpy-bench-", dir=os.environ.get("TMPDIR", "/tmp")))
    try:
        with scratch() as cluster:
            prefix = fill(cluster.conf)
            pin_cluster(cluster)
            rows = client_rows(cluster.conf, prefix, options.pairs, options.seconds, options.only)
            rows += export_rows(folder, cluster.conf, options.pairs, options.seconds, options.only)
            facts = []
            if options.only in f"open {IMAGES} images":
                with rados.Rados(conffile=cluster.conf) as client:
                    facts = many_images(client, IMAGES, "Ceph")
            where = "OSD (memstore, Ceph 16.2.15) on CPU 1; clients, servers and loads on CPU 0; librbd's cache off."
            text = report.table(rows, facts, where)
            print(text)
            if options.write:
                report.write(text, rows, "ceph-")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

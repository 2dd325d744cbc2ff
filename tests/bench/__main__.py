"""`make bench`: every row of the goals that one machine can measure, beside its named peer, in one run.

    python -m tests.bench [--pairs N] [--seconds S] [--only TEXT] [--write]

With --write the table and the picture in tests/bench/results are replaced.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from librbd_py import rados, rbd
from tests.bench import loads, report, scale, servers
from tests.bench.pairs import Load, Row, measure

MIB = 1 << 20
SIZE = 256 * MIB
IMAGE = "bench"


class Place:
    """A folder with a raw file and an image of the same size and content, filled alike: 64 KiB at a time, synced.

    Fills in larger steps would leave large folios in the page cache, which make 4 KiB overwrites several times dearer
    for whoever is measured second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw = folder / "raw"
        self.store = folder / "store"
        piece = os.urandom(64 << 10)
        with self.raw.open("wb", buffering=0) as raw:
            for _ in range(SIZE // len(piece)):
                raw.write(piece)
            os.fsync(raw.fileno())
        with (
            rados.Rados(conf={"rbdpy_store": str(self.store)}) as cluster,
            cluster.open_ioctx("rbd") as ioctx,
        ):
            rbd.RBD().create(ioctx, IMAGE, SIZE)
            with rbd.Image(ioctx, IMAGE) as image:
                for offset in range(0, SIZE, len(piece)):
                    image.write(piece, offset)
                image.flush()


def vhost_rows(place: Place, pairs: int, seconds: float, only: str) -> list[Row]:
    plan: list[tuple[str, Load, str, str]] = [
        ("vhost-user 4 KiB randread QD32", loads.vufe("randread", 32, 4096, SIZE, cpu=0), "2x", "3.5x"),
        ("vhost-user 4 KiB randwrite QD32", loads.vufe("randwrite", 32, 4096, SIZE, cpu=0), "2.5x", "4x"),
        ("vhost-user 4 KiB randread QD1", loads.vufe("randread", 1, 4096, SIZE, cpu=0), "1.25x", "2.5x"),
        ("vhost-user 4 KiB randread QD1, polling", loads.vufe("randread", 1, 4096, SIZE, 0, True), "1.4x", "2.2x"),
        ("vhost-user 1 MiB read QD4", loads.vufe("read", 4, MIB, SIZE, cpu=0), "1x", "1.3x"),
        ("vhost-user 1 MiB write QD4", loads.vufe("write", 4, MIB, SIZE, cpu=0), "1x", "1.3x"),
    ]
    rows = []
    for name, load, must, aim in plan:
        if only not in name:
            continue
        with (
            servers.ours("vhost", place.folder, place.store, IMAGE, {1}) as ours,
            servers.storage_daemon(place.folder, place.raw, {1}) as theirs,
        ):
            rows.append(measure(Row(name, theirs.name, must, aim), ours, theirs, load, pairs, seconds))
            print(report.line(rows[-1]), flush=True)
    return rows


def nbd_rows(place: Place, pairs: int, seconds: float, only: str) -> list[Row]:
    def fio(mode: str, depth: int, block: int = 4096, jobs: int = 1) -> Load:
        return loads.fio_nbd(mode, depth, block, SIZE, cpu=0, jobs=jobs)

    def raw(mode: str, depth: int, connections: int = 1) -> Load:
        return loads.raw_nbd(mode, depth, 4096, cpu=0, connections=connections)

    def copy(out: bool) -> Load:
        return loads.nbdcopy(place.raw, out, SIZE, cpu=0)

    def peer(kind: str) -> servers.Server:
        if kind == "qemu-nbd":
            return servers.qemu_nbd(place.folder, place.raw, {1})
        return servers.nbdkit(place.folder, place.raw, {1}, tcp=kind == "nbdkit, TCP")

    plan: list[tuple[str, str, Load, str, str]] = [
        ("NBD 4 KiB randread QD32, fio", "nbdkit", fio("randread", 32), "1.25x", "1.7x"),
        ("NBD 4 KiB randread QD32, raw client", "nbdkit", raw("read", 32), "1.25x", "1.7x"),
        ("NBD 4 KiB randwrite QD32, fio", "nbdkit", fio("randwrite", 32), "1.25x", "1.7x"),
        ("NBD 4 KiB randwrite QD32, raw client", "nbdkit", raw("write", 32), "1.25x", "1.7x"),
        ("NBD 4 KiB randread QD1, fio", "nbdkit", fio("randread", 1), "1.3x", "2x"),
        ("NBD 4 KiB randread QD1, raw client", "nbdkit", raw("read", 1), "1.3x", "2x"),
        ("NBD 4 KiB randread QD32, fio", "qemu-nbd", fio("randread", 32), "3x", "5x"),
        ("NBD 4 KiB randread QD32, raw client", "qemu-nbd", raw("read", 32), "3x", "5x"),
        ("NBD 4 KiB randread QD1, fio", "qemu-nbd", fio("randread", 1), "2x", "4x"),
        ("NBD 4 KiB randread QD1, raw client", "qemu-nbd", raw("read", 1), "2x", "4x"),
        ("NBD 4 connections, 4 KiB randread QD8 each, fio", "nbdkit", fio("randread", 8, jobs=4), "1.25x", "1.7x"),
        ("NBD 4 connections, 4 KiB randread QD8 each, raw client", "nbdkit", raw("read", 8, 4), "1.25x", "1.7x"),
        ("NBD 4 KiB read QD32, QEMU's client", "nbdkit", loads.qemu_img(32, 4096, cpu=0), "1.25x", "1.7x"),
        ("NBD 4 KiB read QD32, QEMU's client", "qemu-nbd", loads.qemu_img(32, 4096, cpu=0), "", ""),
        ("NBD 4 KiB read QD1, QEMU's client", "qemu-nbd", loads.qemu_img(1, 4096, cpu=0), "", ""),
        ("NBD 1 MiB read QD4, fio", "nbdkit", fio("read", 4, MIB), "1x", "1.4x"),
        ("NBD 1 MiB read QD4, fio", "qemu-nbd", fio("read", 4, MIB), "1x", "1.4x"),
        ("NBD nbdcopy, whole image out", "nbdkit", copy(True), "1.1x", "1.4x"),
        ("NBD nbdcopy, whole image in", "nbdkit", copy(False), "1.1x", "1.4x"),
        ("NBD over TCP 4 KiB randread QD32, fio", "nbdkit, TCP", fio("randread", 32), "1.25x", "1.7x"),
        ("NBD over TCP 4 KiB randread QD32, raw client", "nbdkit, TCP", raw("read", 32), "1.25x", "1.7x"),
        ("NBD over TCP 4 KiB randread QD1, raw client", "nbdkit, TCP", raw("read", 1), "1.3x", "2x"),
    ]
    rows = []
    for name, kind, load, must, aim in plan:
        if only not in name:
            continue
        with (
            servers.ours("tcp" if "TCP" in kind else "nbd", place.folder, place.store, IMAGE, {1}) as ours,
            peer(kind) as theirs,
        ):
            rows.append(measure(Row(name, theirs.name, must, aim), ours, theirs, load, pairs, seconds))
            print(report.line(rows[-1]), flush=True)
    return rows


def null_rows(place: Place, pairs: int, seconds: float, only: str) -> list[Row]:
    """No store on either side: the transports, and where the load generators end."""
    plan: list[tuple[str, str, Load, str, str]] = [
        ("null store, vhost-user 4 KiB read QD32", "vhost", loads.vufe("randread", 32, 4096, SIZE, cpu=0), "2x", "4x"),
        ("null store, NBD 4 KiB read QD32, raw client", "nbd", loads.raw_nbd("read", 32, 4096, cpu=0), "", ""),
        ("null store, NBD 4 KiB read QD32, fio", "nbd", loads.fio_nbd("randread", 32, 4096, SIZE, cpu=0), "", ""),
    ]
    rows = []
    for name, kind, load, must, aim in plan:
        if only not in name:
            continue
        start = servers.storage_daemon if kind == "vhost" else servers.nbdkit
        with servers.ours_null(kind, place.folder, {1}) as ours, start(place.folder, None, {1}) as theirs:
            rows.append(measure(Row(name, theirs.name, must, aim), ours, theirs, load, pairs, seconds))
            print(report.line(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--only", default="", help="only rows whose name holds this")
    parser.add_argument("--write", action="store_true", help="replace the table and picture in tests/bench/results")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rbdpy-bench-", dir=os.environ.get("TMPDIR", "/tmp")))
    try:
        place = Place(folder)
        rows = vhost_rows(place, options.pairs, options.seconds, options.only)
        rows += nbd_rows(place, options.pairs, options.seconds, options.only)
        rows += null_rows(place, options.pairs, options.seconds, options.only)
        facts = scale.measure(folder, options.only)
        text = report.table(rows, facts)
        print(text)
        if options.write:
            report.write(text, rows)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

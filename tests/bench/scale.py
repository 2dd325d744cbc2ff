"""What is no pair of servers: many images in one process, idle cost, flush over many dirty objects."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from librbd_py import rados, rbd

MIB = 1 << 20
IMAGES = 1000


@dataclass(frozen=True)
class Fact:
    name: str
    text: str
    must: str
    aim: str
    reached: bool


def rss_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise RuntimeError("no VmRSS")


def measure(folder: Path, only: str) -> list[Fact]:
    facts: list[Fact] = []
    if only in "open 1000 images":
        with rados.Rados(conf={"rbdpy_store": str(folder / "many")}) as cluster:
            facts += many_images(cluster, IMAGES, "embedded")
    if only in "flush over 64 dirty objects":
        facts.append(flush(folder / "flush"))
    return facts


def many_images(cluster: rados.Rados, count: int, where: str) -> list[Fact]:
    """Opens `count` images read-write, watch included, as the daemon does, in one process."""
    with cluster.open_ioctx("rbd") as ioctx:
        for number in range(count):
            rbd.RBD().create(ioctx, f"image{number}", 1 << 30)
        with rbd.Image(ioctx, "image0"):
            pass  # what the first open of a process costs is not an image's cost
        threads, before, begin = len(os.listdir("/proc/self/task")), rss_kib(), time.monotonic()
        images = [rbd.Image(ioctx, f"image{number}") for number in range(count)]
        took = time.monotonic() - begin
        more, memory = len(os.listdir("/proc/self/task")) - threads, (rss_kib() - before) / count
        for image in images:
            image.close()
    return [
        Fact(f"open {count} images, {where}", f"{took:.2f} s", "3 s", "1 s", took <= 3),
        Fact(f"threads of {count} idle images", str(more), "0", "0", more <= 0),
        Fact("memory of an idle image", f"{memory:.0f} KiB", "512 KiB", "128 KiB", memory <= 512),
    ]


def flush(store: Path) -> Fact:
    """One FLUSH with 64 dirty objects, against 64 files of 4 MiB synced one after another."""
    files = []
    for number in range(64):
        path = store.with_name(f"serial{number}")
        path.write_bytes(bytes(4 * MIB))
        files.append(os.open(path, os.O_RDWR))
    os.sync()
    ratios: list[float] = []
    with rados.Rados(conf={"rbdpy_store": str(store)}) as cluster, cluster.open_ioctx("rbd") as ioctx:
        rbd.RBD().create(ioctx, "image", 256 * MIB)
        with rbd.Image(ioctx, "image") as image:
            for number in range(64):
                image.write(bytes(4 * MIB), number * 4 * MIB)
            image.flush()
            for turn in range(15):
                data = bytes([turn + 1]) * 4096
                for number in range(64):
                    image.write(data, number * 4 * MIB)
                begin = time.monotonic()
                image.flush()
                ours = time.monotonic() - begin
                for fd in files:
                    os.pwrite(fd, data, 0)
                begin = time.monotonic()
                for fd in files:
                    os.fdatasync(fd)
                ratios.append(ours / (time.monotonic() - begin))
    for fd in files:
        os.close(fd)
    ratio = statistics.median(ratios)
    return Fact("FLUSH over 64 dirty objects / 64 serial fdatasync", f"{ratio:.2f}x", "0.35x", "0.15x", ratio <= 0.35)

"""What commands cost: `python tests/bench/cli.py [FOLDER]` prints a row each, the median of several runs, and its goal.

FOLDER (default: a temporary one) is where the embedded store and the files lie, on the disk to be measured. With
RBDPY_TEST_CEPH_CONF set, starting up is measured against that cluster too, beside Ceph's own `rbd`.
"""

from __future__ import annotations

import compileall
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import librbd_py
from librbd_py import rados, rbd

RUNS = 5
MIB = 1 << 20
FULL = 1024 * MIB  # bytes of the image that is imported and exported
RBDPY = [sys.executable, "-m", "librbd_py.cli.main"]


def row(name: str, seconds: list[float], goal: str) -> None:
    print(f"{name:<52} {statistics.median(seconds) * 1000:9.1f} ms   {goal}", flush=True)


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def command(*argv: str | Path) -> Callable[[], object]:
    return lambda: subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def snapshots(ioctx: rados.Ioctx) -> None:
    rbd.RBD().create(ioctx, "snapshots", FULL)
    with rbd.Image(ioctx, "snapshots") as image:
        taken = timed(lambda: [image.create_snap(f"s{number}") for number in range(1000)])
    row("1000 snapshots created", [taken], "<= 3000")

    def listed() -> None:
        with rbd.Image(ioctx, "snapshots", read_only=True) as image:
            assert len(list(image.list_snaps())) == 1000

    row("1000 snapshots listed, the image opened", [timed(listed) for _ in range(RUNS)], "<= 50")


def images(ioctx: rados.Ioctx, store: list[str]) -> None:
    for number in range(1000):
        rbd.RBD().create(ioctx, f"image{number:04}", FULL)
    listing = command(*RBDPY, *store, "ls", "-l")
    row("ls -l of 1000 images, the whole command", [timed(listing) for _ in range(RUNS)], "<= 500")


def diffs(ioctx: rados.Ioctx) -> None:
    rbd.RBD().create(ioctx, "large", 1 << 40)
    with rbd.Image(ioctx, "large") as image:
        image.create_snap("before")
        for offset in range(0, 1 << 40, 1 << 35):
            image.write(b"x" * 4096, offset)
        found: list[int] = []

        def differ(start: str | None) -> Callable[[], object]:
            return lambda: image.diff_iterate(0, 1 << 40, start, lambda *at: found.append(at[0]), whole_object=True)

        for start in (None, "before"):
            seconds = [timed(differ(start)) for _ in range(RUNS)]
            row(f"diff of 1 TiB with fast-diff, from {start or 'nothing'}", seconds, "<= 50")
    assert len(found) == 2 * RUNS * 32


def copies(folder: Path, store: list[str]) -> None:
    raw, copy, out = folder / "raw", folder / "copy", folder / "out"
    with raw.open("wb") as file:
        for _ in range(FULL // (64 * MIB)):
            file.write(os.urandom(64 * MIB))
    os.sync()
    rows: dict[str, list[float]] = {"cp": [], "cp and sync": [], "import": [], "export": []}
    for _ in range(RUNS):
        rows["cp"].append(timed(command("cp", "--reflink=never", raw, copy)))
        copy.unlink()
        rows["cp and sync"].append(timed(command("sh", "-c", f"cp --reflink=never {raw} {copy} && sync {copy}")))
        copy.unlink()
        rows["import"].append(timed(command(*RBDPY, *store, "import", raw, "full", "--no-progress")))
        rows["export"].append(timed(command(*RBDPY, *store, "export", "full", out, "--no-progress")))
        command("cmp", raw, out)()
        out.unlink()
        command(*RBDPY, *store, "rm", "full", "--no-progress")()
    names = {"import": "import (ends with a sync)"}
    for name, seconds in rows.items():
        goal = f"{statistics.median(rows['cp']) / statistics.median(seconds):.2f} x cp, goal >= 0.8"
        row(f"{names.get(name, name)}, {FULL // MIB} MiB", seconds, goal if name in ("import", "export") else "")


def starting(store: list[str]) -> None:
    """With compiled modules, as an installed package has them."""
    compileall.compile_dir(str(Path(librbd_py.__file__).parent), quiet=1)
    row("ls, embedded store", [timed(command(*RBDPY, *store, "ls")) for _ in range(3 * RUNS)], "<= 150")
    conf = os.environ.get("RBDPY_TEST_CEPH_CONF")
    if conf:
        for name, argv in (("rbdpy", [*RBDPY, "--conf", conf]), ("rbd", ["rbd", "--conf", conf])):
            row(f"{name} ls, Ceph", [timed(command(*argv, "ls")) for _ in range(3 * RUNS)], "<= 150")


def main() -> None:
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None))
    url = f"embedded:{folder / 'store'}"
    try:
        starting(["--store", url])
        with rados.Rados(conf={"rbdpy_store": url}) as cluster, cluster.open_ioctx("rbd") as ioctx:
            snapshots(ioctx)
            images(ioctx, ["--store", url])
            diffs(ioctx)
        copies(folder, ["--store", url])
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

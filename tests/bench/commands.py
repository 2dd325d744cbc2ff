"""What whole commands take, each beside its peer: `rbdpy` and `rbd` on a scratch cluster, `rbdpy` and `cp` on a folder.

    python -m tests.bench.commands [--pairs N] [--mib N] [--folder FOLDER] [--write]

Pairs are interleaved, who comes first changes from pair to pair, and the ratio of a pair is theirs / ours: above 1 we
are faster. Before a command that fills the page cache as much memory is taken and given back: a virtual machine gets
memory from its host page by page, and whoever is first to use what was given back to it would pay for that.
"""

from __future__ import annotations

import argparse
import compileall
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import _cffi_backend

import librbd_py
from librbd_py import rados, rbd
from librbd_py.devcluster import Options, scratch

MIB = 1 << 20
RESULTS = Path(__file__).parent / "results" / "commands.md"
RBDPY: list[str] = []  # as an installed package has it: see installed()
SECONDS = 120  # of a command, at most
IMAGES = 50
Argv = list[str]


@dataclass
class Row:
    name: str
    peer: str
    goal: float  # of the median ratio
    ours: list[float] = field(default_factory=list)  # seconds
    theirs: list[float] = field(default_factory=list)

    def text(self) -> str:
        ratios = [b / a for a, b in zip(self.ours, self.theirs, strict=True)]
        middle = statistics.median(ratios)
        cells = [
            self.name,
            f"{statistics.median(self.ours) * 1000:.0f}",
            f"{statistics.median(self.theirs) * 1000:.0f}",
        ]
        cells += [self.peer, f"**{middle:.2f}x**", f"{min(ratios):.2f}..{max(ratios):.2f}", f">= {self.goal}x"]
        return "| " + " | ".join([*cells, "" if middle >= self.goal else "**missed**"]) + " |"


HEAD = "| command | ours, ms | theirs, ms | peer | ratio | min..max | goal | |\n|---|---|---|---|---|---|---|---|"


def timed(argv: Argv) -> float:
    """Seconds. Not subprocess.run(timeout=), which looks every 50 ms only."""
    started = time.perf_counter()
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        limit = threading.Timer(SECONDS, process.kill)
        limit.start()
        code = process.wait()
        seconds = time.perf_counter() - started
        limit.cancel()
    if code:
        raise subprocess.CalledProcessError(code, argv)
    return seconds


def pairs(row: Row, count: int, ours: Argv, theirs: Argv, prepare: Callable[[], object], after: list[Argv]) -> Row:
    for number in range(count):
        for mine in (number % 2 == 0, number % 2 == 1):
            prepare()
            (row.ours if mine else row.theirs).append(timed(ours if mine else theirs))
            for argv in after:
                subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=SECONDS)
    print(row.text(), flush=True)
    return row


def memory(folder: Path, size: int) -> Callable[[], object]:
    def touch() -> None:
        file = folder / "memory"
        with file.open("wb") as out:
            piece = bytes(64 << 10)
            for _ in range(size // len(piece) * 5 // 4):
                out.write(piece)
        file.unlink()

    return touch


def installed(folder: Path) -> list[str]:
    """The command in a virtual environment of its own. One in which this package is editable loads finders and hooks of
    the tools in it when Python starts, which takes as long as all else that `rbdpy ls` imports."""
    compileall.compile_dir(str(Path(librbd_py.__file__).parent), quiet=1)
    venv.create(folder / "venv", with_pip=False)
    site = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
    backend = Path(_cffi_backend.__file__)
    (site / backend.name).symlink_to(backend)
    (site / "rbdpy.pth").write_text(f"{Path(librbd_py.__file__).parent.parent}\n")
    script = folder / "venv" / "bin" / "rbdpy"
    python = folder / "venv" / "bin" / "python"
    script.write_text(f"#!{python}\nfrom librbd_py.cli.start import entry\nentry()\n")
    script.chmod(0o755)
    return [str(script)]


def nothing() -> None:
    pass


def random_file(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
    os.sync()


def on_a_folder(folder: Path, size: int, count: int) -> list[Row]:
    raw, copy, out = (str(folder / name) for name in ("raw", "copy", "out"))
    random_file(Path(raw), size)
    store = [*RBDPY, "--store", f"embedded:{folder / 'store'}"]
    timed([*store, "import", raw, "full", "--no-progress"])
    cp, cp_sync = (
        ["cp", "--reflink=never", raw, copy],
        ["sh", "-c", f"cp --reflink=never '{raw}' '{copy}' && sync '{copy}'"],
    )
    drop = [["sh", "-c", f"rm -f '{copy}' '{out}'; {' '.join(store)} rm new --no-progress || true"]]
    touch, text = memory(folder, size), f"{size // MIB} MiB"
    into = [*store, "import", raw, "new", "--no-progress"]
    rows = [
        pairs(
            Row(f"export, {text}", "cp", 0.8), count, [*store, "export", "full", out, "--no-progress"], cp, touch, drop
        ),
        pairs(Row(f"import, {text}, ends with a sync", "cp", 0.8), count, into, cp, touch, drop),
        pairs(Row(f"import, {text}, ends with a sync", "cp and sync", 0.8), count, into, cp_sync, touch, drop),
    ]
    subprocess.run([*store, "export", "full", out, "--no-progress"], check=True)
    subprocess.run(["cmp", raw, out], check=True)
    Path(out).unlink()
    return rows


def on_ceph(folder: Path, size: int, count: int, only: str) -> list[Row]:
    raw, out, diff = (str(folder / name) for name in ("raw256", "out", "diff"))
    random_file(Path(raw), size)
    with scratch(Options(mgr=True), folder) as cluster:
        conf = str(cluster.conf)
        with rados.Rados(conffile=conf) as connection:
            if "rbd" not in connection.list_pools():
                connection.create_pool("rbd")
            with connection.open_ioctx("rbd") as ioctx:
                rbd.RBD().pool_init(ioctx, True)
                for number in range(IMAGES):
                    rbd.RBD().create(ioctx, f"image{number}", 64 * MIB)
        ours, theirs = [*RBDPY, "--conf", conf], ["rbd", "--conf", conf]
        subprocess.run([*theirs, "import", raw, "full", "--no-progress"], check=True, timeout=SECONDS)
        subprocess.run([*theirs, "snap", "create", "full@s", "--no-progress"], check=True, timeout=SECONDS)
        subprocess.run(
            [*theirs, "bench", "--io-type", "write", "--io-total", "16M", "--io-pattern", "rand", "full"],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=SECONDS,
        )
        quiet, text = ["--no-progress"], f"{size // MIB} MiB"
        new, gone = [*theirs, "rm", "new", *quiet], [["rm", "-f", out]]
        table: list[tuple[str, Argv, list[Argv], list[Argv]]] = [
            ("ls", ["ls"], [], []),
            (f"ls -l, {IMAGES} images", ["ls", "-l"], [], []),
            ("info", ["info", "full"], [], []),
            ("create", ["create", "new", "--size", "1G"], [], [new]),
            ("rm", ["rm", "new", *quiet], [[*theirs, "create", "new", "--size", "1G"]], []),
            ("snap create", ["snap", "create", "full@new", *quiet], [], [[*theirs, "snap", "rm", "full@new", *quiet]]),
            ("snap ls", ["snap", "ls", "full"], [], []),
            ("du", ["du"], [], []),
            ("diff", ["diff", "full"], [], []),
            ("diff from a snapshot", ["diff", "--from-snap", "s", "full"], [], []),
            (f"export, {text}", ["export", "full", out, *quiet], [], gone),
            (f"export to a pipe, {text}", ["export", "full", "-", *quiet], [], []),
            (f"import, {text}", ["import", raw, "new", *quiet], [], [new]),
            ("export-diff", ["export-diff", "--from-snap", "s", "full", diff, *quiet], [], [["rm", diff]]),
            (f"cp, {text}", ["cp", "full", "new", *quiet], [], [new]),
            (f"deep cp, {text}, a snapshot", ["deep", "cp", "full", "new", *quiet], [],
             [[*theirs, "snap", "purge", "new", *quiet], new]),
        ]  # fmt: skip
        rows = []
        for name, argv, before, after in table:
            if not name.startswith(only):
                continue

            def prepare(before: list[Argv] = before) -> None:
                for words in before:
                    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

            row = Row(f"{name}, Ceph", "rbd", 1.0)
            rows.append(pairs(row, count, [*ours, *argv], [*theirs, *argv], prepare, after))
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--mib", type=int, default=1024, help="of the image on the embedded store; on Ceph a quarter")
    parser.add_argument("--folder", help="on the disk to be measured; default: a temporary one")
    parser.add_argument("--only", default="", help="rows on Ceph whose names begin so")
    parser.add_argument("--write", action="store_true", help=f"to {RESULTS.name}, too")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        RBDPY[:] = installed(folder)
        print(HEAD, flush=True)
        rows = [] if options.only else on_a_folder(folder, options.mib * MIB, options.pairs)
        rows += on_ceph(folder, options.mib // 4 * MIB, options.pairs, options.only)
    finally:
        shutil.rmtree(folder)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    if options.write:
        note = (
            f"\n\n{options.pairs} interleaved pairs each; load averages at the end {load} on {os.cpu_count()} CPUs.\n"
        )
        RESULTS.write_text("\n".join([HEAD, *(row.text() for row in rows)]) + note)


if __name__ == "__main__":
    main()

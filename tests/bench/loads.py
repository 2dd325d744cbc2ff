"""Load generators: fio's nbd engine, and two of our own in C: `rawnbd`, and the vhost-user front end `vufe`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.bench.pairs import Load, Sample
from tests.bench.servers import Server

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "bench"


def tool(name: str) -> Path:
    """Compiles native/bench/<name>.c when it is newer than what was built."""
    source, target = ROOT / f"native/bench/{name}.c", BUILD / name
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        command = [
            "cc",
            "-std=gnu11",
            "-O2",
            "-pthread",
            "-I",
            str(ROOT / "native"),
            "-o",
            str(target),
            str(source),
            "-lm",
        ]
        subprocess.run(command, check=True)
    return target


def pinned(cpu: int | None) -> list[str]:
    return ["taskset", "-c", str(cpu)] if cpu is not None else []


def fio_nbd(mode: str, depth: int, block: int, size: int, export: str, cpu: int | None = None, jobs: int = 1) -> Load:
    """`mode` as fio's rw=. `export`: name of the NBD export on our server; peers use the default one."""

    def load(server: Server, seconds: float) -> Sample:
        name = export if server.name.startswith("librbd-py") else ""
        uri = f"nbd+unix:///{name}?socket={server.socket}"
        command = [*pinned(cpu), "fio", "--name=b", "--ioengine=nbd", f"--uri={uri}", f"--rw={mode}", f"--bs={block}"]
        command += [
            f"--iodepth={depth}",
            f"--size={size}",
            "--time_based",
            f"--runtime={seconds}",
            "--output-format=json",
        ]
        command += [f"--numjobs={jobs}", "--group_reporting", "--randrepeat=0", "--norandommap"]
        before = server.cpu_ns()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        used = server.cpu_ns() - before
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        side = job["write" if "write" in mode else "read"]
        count = side["total_ios"]
        percentile = side["clat_ns"]["percentile"]
        return Sample(
            iops=side["iops"],
            p50_us=percentile["50.000000"] / 1000,
            p99_us=percentile["99.000000"] / 1000,
            cpu_us=used / 1000 / count,
        )

    return load


def raw_nbd(mode: str, depth: int, block: int, export: str, cpu: int | None = None) -> Load:
    """`rawnbd`, the cheapest NBD client there can be, so that the server is what is measured. `mode`: read or write, at
    random offsets."""

    def load(server: Server, seconds: float) -> Sample:
        name = export if server.name.startswith("librbd-py") else ""
        command = [
            *pinned(cpu),
            str(tool("rawnbd")),
            str(server.socket),
            mode,
            str(depth),
            str(block),
            str(seconds),
            name,
        ]
        before = server.cpu_ns()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        used = server.cpu_ns() - before
        result = json.loads(done.stdout)
        return Sample(result["iops"], result["p50_us"], result["p99_us"], used / 1000 / result["requests"])

    return load


def vufe(mode: str, depth: int, block: int, size: int, cpu: int | None = None, polling: bool = False) -> Load:
    """`mode`: read, write, randread or randwrite."""

    def load(server: Server, seconds: float) -> Sample:
        command = [
            *pinned(cpu),
            str(tool("vufe")),
            str(server.socket),
            f"mode={mode.removeprefix('rand')}",
            f"qd={depth}",
        ]
        command += [
            f"bs={block}",
            f"span={size}",
            f"seconds={seconds}",
            "warmup=0",
            f"wait={'poll' if polling else 'event'}",
        ]
        command += [f"seq={int(not mode.startswith('rand'))}"]
        before = server.cpu_ns()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        used = server.cpu_ns() - before
        result = json.loads(done.stdout)
        return Sample(result["iops"], result["p50_us"], result["p99_us"], used / 1000 / result["ios"])

    return load

"""Load generators: fio, nbdcopy, qemu-img, and two of our own in C: `rawnbd` and the vhost-user front end `vufe`."""

from __future__ import annotations

import json
import resource
import subprocess
import time
from pathlib import Path

from tests.bench.pairs import Load, Sample
from tests.bench.servers import Server

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "bench"
COPY_BLOCK = 256 << 10  # bytes of one of nbdcopy's requests


def tool(name: str) -> Path:
    """Compiles native/bench/<name>.c when it is newer than what was built."""
    source, target = ROOT / f"native/bench/{name}.c", BUILD / name
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        command = ["cc", "-std=gnu11", "-O2", "-pthread", "-I", str(ROOT / "native")]
        subprocess.run([*command, "-o", str(target), str(source), "-lm"], check=True)
    return target


def image_tool() -> Path:
    """Compiles native/bench/imgload.c together with the engine and the stores."""
    sources = [ROOT / "native/bench/imgload.c"]
    for folder in ("striping", "store", "engine"):
        sources += sorted((ROOT / "native" / folder).glob("*.c"))
    target = BUILD / "imgload"
    if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        BUILD.mkdir(parents=True, exist_ok=True)
        command = ["cc", "-std=gnu11", "-O2", "-fPIC", "-pthread", "-I", str(ROOT / "native"), "-o", str(target)]
        subprocess.run([*command, *map(str, sources), "-ldl"], check=True)
    return target


def pinned(cpu: int | None) -> list[str]:
    return ["taskset", "-c", str(cpu)] if cpu is not None else []


def children_cpu_us() -> float:
    """Of programs run and ended so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime) * 1e6


def fio_nbd(mode: str, depth: int, block: int, size: int, cpu: int | None = None, jobs: int = 1) -> Load:
    """`mode` as fio's rw=. `jobs`: processes, each with a connection of its own and `depth` requests in flight."""

    def load(server: Server, seconds: float) -> Sample:
        command = [*pinned(cpu), "fio", "--name=b", "--ioengine=nbd", f"--uri={server.uri}", f"--rw={mode}"]
        command += [f"--bs={block}", f"--iodepth={depth}", f"--size={size}", "--time_based", f"--runtime={seconds}"]
        command += ["--output-format=json", f"--numjobs={jobs}", "--group_reporting", "--randrepeat=0", "--norandommap"]
        before = server.cpu_ns()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        used = server.cpu_ns() - before
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        side = job["write" if "write" in mode else "read"]
        percentile = side["clat_ns"]["percentile"]
        return Sample(
            iops=side["iops"],
            p50_us=percentile["50.000000"] / 1000,
            p99_us=percentile["99.000000"] / 1000,
            cpu_us=used / 1000 / side["total_ios"],
            client_cpu_us=jobs * (job["usr_cpu"] + job["sys_cpu"]) / 100 * 1e6 / side["iops"],
        )

    return load


def raw_nbd(mode: str, depth: int, block: int, cpu: int | None = None, connections: int = 1) -> Load:
    """`rawnbd`, the cheapest NBD client there can be, so that the server is what is measured. `mode`: read or write, at
    random offsets. `depth`: on each connection."""

    def load(server: Server, seconds: float) -> Sample:
        command = [*pinned(cpu), str(tool("rawnbd")), server.address, mode, str(depth), str(block), str(seconds)]
        before = server.cpu_ns()
        done = subprocess.run([*command, server.export, str(connections)], check=True, capture_output=True, text=True)
        used = server.cpu_ns() - before
        result = json.loads(done.stdout)
        cpu_us = used / 1000 / result["requests"]
        return Sample(result["iops"], result["p50_us"], result["p99_us"], cpu_us, result["client_cpu_us"])

    return load


def nbdcopy(raw: Path, out: bool, size: int, cpu: int | None = None) -> Load:
    """The whole image, again and again: to nowhere (`out`), or from `raw`. An I/O is a request of 256 KiB; p50 and p99
    are of a whole copy."""

    def load(server: Server, seconds: float) -> Sample:
        ends = [server.uri, "null:"] if out else [str(raw), server.uri]
        before, before_client = server.cpu_ns(), children_cpu_us()
        begin = last = time.monotonic()
        took: list[float] = []
        while last - begin < seconds:
            subprocess.run([*pinned(cpu), "nbdcopy", *ends], check=True)
            now = time.monotonic()
            took.append(now - last)
            last = now
        count = len(took) * size / COPY_BLOCK
        took.sort()
        return Sample(
            iops=count / (last - begin),
            p50_us=took[len(took) // 2] * 1e6,
            p99_us=took[-1] * 1e6,
            cpu_us=(server.cpu_ns() - before) / 1000 / count,
            client_cpu_us=(children_cpu_us() - before_client) / count,
        )

    return load


def qemu_img(depth: int, block: int, cpu: int | None = None) -> Load:
    """`qemu-img bench`, reading: the NBD client that guests' disks have. Its latencies are means."""
    count = 2000 * depth
    stride = 17 * block  # never the block that was read ahead

    def load(server: Server, seconds: float) -> Sample:
        command = [*pinned(cpu), "qemu-img", "bench", "-f", "raw", "-t", "none", "-c", str(count), "-d", str(depth)]
        command += ["-s", str(block), "-S", str(stride), server.uri]
        before, before_client = server.cpu_ns(), children_cpu_us()
        took, runs = 0.0, 0
        while took < seconds:
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            took += float(done.stdout.split("completed in ")[1].split()[0])
            runs += 1
        latency = took / (runs * count) * depth * 1e6
        return Sample(
            iops=runs * count / took,
            p50_us=latency,
            p99_us=latency,
            cpu_us=(server.cpu_ns() - before) / 1000 / (runs * count),
            client_cpu_us=(children_cpu_us() - before_client) / (runs * count),
        )

    return load


def vufe(mode: str, depth: int, block: int, size: int, cpu: int | None = None, polling: bool = False) -> Load:
    """`mode`: read, write, randread or randwrite."""

    def load(server: Server, seconds: float) -> Sample:
        command = [*pinned(cpu), str(tool("vufe")), server.address, f"mode={mode.removeprefix('rand')}", f"qd={depth}"]
        command += [f"bs={block}", f"span={size}", f"seconds={seconds}", "warmup=0"]
        command += [f"wait={'poll' if polling else 'event'}", f"seq={int(not mode.startswith('rand'))}"]
        before = server.cpu_ns()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        used = server.cpu_ns() - before
        result = json.loads(done.stdout)
        return Sample(result["iops"], result["p50_us"], result["p99_us"], used / 1000 / result["ios"])

    return load

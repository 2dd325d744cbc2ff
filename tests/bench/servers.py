"""Servers under test: ours and the named peers, each on the same file system with the same content."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

START_DEADLINE = 20.0
HOST = "127.0.0.1"


class Server:
    """One server process. `address`, a unix socket's path or "127.0.0.1:PORT", is ready when the constructor returns.
    `export`: the NBD export's name. Always close()."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        address: str | Path,
        cpus: set[int] | None,
        *,
        export: str = "",
        log: Path | None = None,
    ) -> None:
        self.name = name
        self.address = str(address)
        self.export = export
        self.log = log or Path(address).with_suffix(".log")
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=(lambda: os.sched_setaffinity(0, cpus)) if cpus else None,
            )
        limit = time.monotonic() + START_DEADLINE
        while not self._listening():
            if self._process.poll() is not None or time.monotonic() > limit:
                self.close()
                raise RuntimeError(f"{name} did not start: {self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)

    @property
    def inet(self) -> bool:
        return "/" not in self.address

    @property
    def uri(self) -> str:
        """For libnbd."""
        if self.inet:
            return f"nbd://{self.address}/{self.export}"
        return f"nbd+unix:///{self.export}?socket={self.address}"

    def _listening(self) -> bool:
        """A connection is made and dropped: every server here takes another one afterwards."""
        with socket.socket(socket.AF_INET if self.inet else socket.AF_UNIX) as sock:
            try:
                sock.connect((HOST, int(self.address.rpartition(":")[2])) if self.inet else self.address)
            except OSError:
                return False
            return True

    @property
    def pid(self) -> int:
        return self._process.pid

    def cpu_ns(self) -> int:
        """Time on a CPU of all threads so far, ended ones included (some servers start threads per connection)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))

    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))

    def rss_kib(self) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise RuntimeError("no VmRSS")

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        if not self.inet:
            Path(self.address).unlink(missing_ok=True)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def free_port() -> int:
    with socket.socket(socket.AF_INET) as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


def ours(kind: str, folder: Path, store: Path, image: str, cpus: set[int] | None) -> Server:
    """`kind`: "vhost", "nbd" or "tcp" (NBD over it)."""
    address = f"{HOST}:{free_port()}" if kind == "tcp" else str(folder / f"ours-{kind}.sock")
    command = [sys.executable, "-m", "librbd_py.cli.main", "--store", str(store), "export", image]
    command += ["--vhost-user" if kind == "vhost" else "--nbd", address]
    return Server(f"librbd-py {kind}", command, address, cpus, export=image, log=folder / f"ours-{kind}.log")


def ours_null(kind: str, folder: Path, cpus: set[int] | None) -> Server:
    path = folder / f"null-{kind}.sock"
    command = [sys.executable, "-m", "tests.bench.null_server", kind, str(path)]
    return Server(f"librbd-py {kind}, null store", command, path, cpus)


def storage_daemon(folder: Path, raw: Path | None, cpus: set[int] | None) -> Server:
    """qemu-storage-daemon's vhost-user-blk export of a raw file (buffered, io_uring), or of null-co without one."""
    path = folder / "qsd.sock"
    node = (
        f"driver=file,node-name=f,filename={raw},aio=io_uring" if raw else "driver=null-co,node-name=f,size=1073741824"
    )
    command = ["qemu-storage-daemon", "--blockdev", node]
    command += ["--export", f"type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={path},writable=on"]
    return Server("qemu-storage-daemon" + (" null-co" if raw is None else ""), command, path, cpus)


def nbdkit(folder: Path, raw: Path | None, cpus: set[int] | None, *, tcp: bool = False) -> Server:
    """nbdkit's file plugin, or its null plugin without a file."""
    port = free_port() if tcp else 0
    address = f"{HOST}:{port}" if tcp else str(folder / "nbdkit.sock")
    where = ["-i", HOST, "-p", str(port)] if tcp else ["-U", address]
    plugin = ["file", str(raw)] if raw else ["null", "1G"]
    name = "nbdkit file" if raw else "nbdkit null"
    return Server(name, ["nbdkit", "-f", *where, *plugin], address, cpus, log=folder / "nbdkit.log")


def qemu_nbd(folder: Path, raw: Path, cpus: set[int] | None) -> Server:
    path = folder / "qemu-nbd.sock"
    command = ["qemu-nbd", "-k", str(path), "-t", "-e", "8", "-f", "raw", "--cache=writeback", "--aio=io_uring"]
    return Server("qemu-nbd", [*command, str(raw)], path, cpus)

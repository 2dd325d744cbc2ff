"""Hosts side by side on one machine: each has its own mounts, network and host name, a libvirtd and a host service.

What a host keeps in /etc/libvirt, /var/lib/libvirt, /run/libvirt, /run/rbdpy ... lies in its folder and is mounted in
place inside its namespaces. Sockets are reachable from outside by their path in the folder. The hosts' network is a
bridge, on which the machine itself has an address, too: a cluster for all of them listens there.

Everything ends with `Machine.close()`, and with the process that made it in whatever way (`guard.py`).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.libvirt.guard import end_namespace

DEADLINE = 60.0  # seconds for any one step; the machine may be busy
LIBVIRT = ("etc/libvirt", "var/lib/libvirt", "var/log/libvirt", "var/cache/libvirt", "run/libvirt")
MOUNTS = (*LIBVIRT, "etc/rbdpy", "etc/systemd/system", "etc/tmpfiles.d", "run/rbdpy", "var/lib/rbdpy-host")
REPOSITORY = Path(__file__).resolve().parents[2]


class HostError(AssertionError):
    """A command on a host failed; the text has what it printed."""


def wait_for(holds: Callable[[], Any], what: str, seconds: float = DEADLINE) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)


def run(*argv: str | Path, timeout: float = DEADLINE, **options: Any) -> str:
    """What the command prints. HostError when it fails or takes too long."""
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, **options
        )
    except subprocess.TimeoutExpired as late:
        raise HostError(f"{' '.join(words)} did not end in {timeout:.0f} s: {late.stderr or late.stdout}") from None
    if done.returncode:
        raise HostError(f"{' '.join(words)} ({done.returncode}): {done.stderr or done.stdout}")
    return done.stdout


class Host:
    """One of them. States: up (made by Machine.host) -> down."""

    def __init__(self, machine: Machine, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self.address = f"{machine.network}.{number + 1}"
        self.folder = machine.folder / name
        self.uri = f"qemu+unix:///system?socket={self.folder}/sock/libvirt-sock"
        self._machine = machine
        self._processes: list[subprocess.Popen[bytes]] = []
        self.libvirtd: subprocess.Popen[bytes] | None = None
        self._make_folders()
        ready = self.folder / "ready"
        mounts = "".join(f"mkdir -p /{path}; mount --bind {self.folder}/{path} /{path}\n" for path in MOUNTS)
        script = (
            f"set -e; hostname {name}; ip link set lo up\n{mounts}"
            f"mount --bind {self.folder}/kvm /dev/kvm; touch {ready}; exec sleep infinity"
        )
        argv = ["unshare", "-m", "-n", "-u", "--propagation", "private", "bash", "-c", script]
        with open(self.folder / "log/anchor", "wb") as log:
            self._anchor = self._start_outside(argv, log)
        wait_for(lambda: ready.exists() or self._anchor.poll() is not None, f"the namespaces of {name}")
        if self._anchor.poll() is not None:
            raise HostError((self.folder / "log/anchor").read_text())
        self._connect()

    def _make_folders(self) -> None:
        for path in (*MOUNTS, "sock", "log"):
            (self.folder / path).mkdir(parents=True, exist_ok=True)
        for path in ("etc/libvirt", "var/lib/libvirt"):
            shutil.copytree(f"/{path}", self.folder / path, dirs_exist_ok=True, symlinks=True)
        shutil.rmtree(self.folder / "etc/libvirt/qemu/networks/autostart", ignore_errors=True)
        cache = self._machine.capabilities
        if cache.exists():
            shutil.copytree(cache, self.folder / "var/cache/libvirt", dirs_exist_ok=True)
        # libvirt asks KVM anew, for a minute, at every look when QEMU's user may not open the device it sees.
        kvm = self.folder / "kvm"
        os.mknod(kvm, 0o20666, os.makedev(10, 232))
        os.chmod(kvm, 0o666)
        sock, log = self.folder / "sock", self.folder / "log"
        (self.folder / "etc/libvirt/libvirtd.conf").write_text(
            f'unix_sock_dir = "{sock}"\nauth_unix_rw = "none"\nauth_unix_ro = "none"\nunix_sock_group = "root"\n'
            f'host_uuid = "{0xAA00 + self.number:08x}-0000-4000-8000-{self.number:012x}"\n'
            f'log_outputs = "2:file:{log}/libvirtd.log"\n'
        )
        (self.folder / "etc/libvirt/qemu.conf").write_text(
            'stdio_handler = "file"\nuser = "root"\ngroup = "root"\nsecurity_driver = "none"\n'
            "cgroup_controllers = [ ]\n"
        )

    def _connect(self) -> None:
        """A veth pair from its network namespace to the bridge."""
        outside, inside = f"{self._machine.bridge}{self.number}", "eth0"
        pid = str(self._anchor.pid)
        run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", pid)
        run("ip", "link", "set", outside, "master", self._machine.bridge, "up")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", inside)
        self.run("ip", "link", "set", inside, "up")

    # --- programs on it

    def argv(self, *argv: str | Path) -> list[str]:
        """A command that runs inside."""
        return ["nsenter", "-t", str(self._anchor.pid), "-m", "-n", "-u", "--", *(str(word) for word in argv)]

    def run(self, *argv: str | Path, timeout: float = DEADLINE) -> str:
        return run(*self.argv(*argv), timeout=timeout)

    def rbdpy(self, *argv: str | Path, timeout: float = DEADLINE) -> str:
        """This installation's `rbdpy`, as root of the host."""
        return self.run(sys.executable, "-m", "librbd_py.cli.main", *argv, timeout=timeout)

    def virsh(self, *argv: str | Path, timeout: float = DEADLINE) -> str:
        return run("virsh", "-q", "-c", self.uri, *argv, timeout=timeout)

    def start(self, *argv: str | Path, log: str) -> subprocess.Popen[bytes]:
        """A process inside that goes on; its output is appended to log/`log` in the host's folder."""
        with open(self.folder / "log" / log, "ab") as output:
            process = self._start_outside(self.argv(*argv), output)
        self._processes.append(process)
        return process

    def _start_outside(self, argv: list[str], output: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd=REPOSITORY
        )

    # --- libvirtd

    def start_libvirtd(self) -> None:
        """Returns when it answers. Hooks that it finds now are called from then on. HostError: one runs."""
        if self.libvirtd is not None and self.libvirtd.poll() is None:
            raise HostError(f"{self.name} has a libvirtd")
        config = "/etc/libvirt/libvirtd.conf"
        self.libvirtd = self.start("libvirtd", "-f", config, "-p", "/run/libvirt/libvirtd.pid", log="libvirtd.out")
        socket = self.folder / "sock/libvirt-sock"
        wait_for(lambda: socket.exists() or self.libvirtd.poll() is not None, "libvirt's socket")
        if self.libvirtd.poll() is not None:
            raise HostError(self.log("libvirtd.out"))
        self.virsh("list")
        if not self._machine.capabilities.exists():
            self.virsh("domcapabilities", "--virttype", "qemu")  # asks QEMU once, for all hosts
            shutil.copytree(self.folder / "var/cache/libvirt", self._machine.capabilities)

    # --- the host service

    def set_up(self, store: str) -> None:
        """What an administrator does once. Before libvirtd starts, which reads then which hooks there are."""
        self.rbdpy("host", "setup", "--store", store, "--libvirt", self.uri)

    def start_service(self) -> None:
        """Returns when it serves."""
        self.service = self.start(sys.executable, "-m", "librbd_py.cli.main", "host", "serve", log="service.log")
        wait_for(lambda: self.serves() or self.service.poll() is not None, f"the service of {self.name}")
        if self.service.poll() is not None:
            raise HostError(self.log("service.log"))

    @property
    def qmp(self) -> Path:
        """The service's control socket."""
        return self.folder / "run/rbdpy/rbdpyd.sock"

    def serves(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.qmp))
            except OSError:
                return False
        return True

    def kill_service(self) -> None:
        """As a crash."""
        self.service.kill()
        self.service.wait()

    def in_order(self) -> None:
        """Service and libvirtd run and answer, whatever a test did to them."""
        for process in (self.service, self.libvirtd):
            process.send_signal(signal.SIGCONT)
        if self.service.poll() is not None:
            self.start_service()
        if self.libvirtd.poll() is not None:
            self.start_libvirtd()
        self.virsh("list")

    def kill_libvirtd(self) -> None:
        """As a crash: domains run on."""
        self.libvirtd.kill()
        self.libvirtd.wait()
        (self.folder / "sock/libvirt-sock").unlink(missing_ok=True)

    def state(self, domain: str) -> str | None:
        """As libvirt has it: "running", "paused" ...; None: it knows no such domain."""
        try:
            return self.virsh("domstate", domain).strip()
        except HostError:
            return None

    def pid_of(self, domain: str) -> int | None:
        """The QEMU of a running domain."""
        try:
            return int((self.folder / f"run/libvirt/qemu/{domain}.pid").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def log(self, name: str, size: int = 3000) -> str:
        """The end of a log, for messages of failed tests."""
        file = self.folder / "log" / name
        return file.read_text(errors="replace")[-size:] if file.exists() else ""

    def close(self) -> None:
        """Ends every process inside, by their UTS namespace, and so the namespaces. Idempotent."""
        if self._anchor.poll() is None:
            end_namespace(self.namespace)
        for process in (self._anchor, *self._processes):
            process.wait(DEADLINE)

    @property
    def namespace(self) -> int:
        """Number of its UTS namespace."""
        return os.stat(f"/proc/{self._anchor.pid}/ns/uts").st_ino


class Machine:
    """What the hosts share: a folder and a bridge. Needs root. Use as a context manager."""

    def __init__(self, folder: Path, capabilities: Path) -> None:
        """`capabilities`: libvirt's knowledge of QEMU, kept from run to run: it takes seconds to collect."""
        self.folder = folder
        self.capabilities = capabilities
        self.hosts: list[Host] = []
        number = os.getpid() % 4096
        self.bridge = f"rbdpy{number}-"
        self.network = f"10.{200 + number // 256}.{number % 256}"
        self.address = f"{self.network}.1"
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "tests.libvirt.guard", self.bridge],
            stdin=subprocess.PIPE,
            start_new_session=True,
            cwd=REPOSITORY,
        )
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "address", "add", f"{self.address}/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")

    def host(self, name: str) -> Host:
        host = Host(self, name, len(self.hosts) + 1)
        self.hosts.append(host)
        assert self._guard.stdin is not None
        self._guard.stdin.write(b"%d\n" % host.namespace)
        self._guard.stdin.flush()
        return host

    def close(self) -> None:
        try:
            for host in self.hosts:
                host.close()
        finally:
            assert self._guard.stdin is not None
            self._guard.stdin.close()  # which ends what is left, and removes the bridge
            self._guard.wait(DEADLINE)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

"""The runtime folder of VMs, and one folder in it for each: record, lock, processes, sockets.

RUN/NAME/vm.json         what the VM is and which generation of QEMU runs it
RUN/NAME/lock            held by the command that changes the VM; free with a state other than "running": that command
died RUN/NAME/s/              its own rbdpyd: QMP, sockets of the disks, state, log
RUN/NAME/N/              QEMU's generation N (a migration on the same host makes a new one): sockets, log, pid
RUN/NAME/console.*       the relay of the serial console
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from librbd_py.devcluster.processes import Daemon
from qemu_glue.qmp import MachineError
from qemu_glue.sockets import SUN_PATH
from qemu_glue.vm.spec import VMSpec, check_name

RECORD_LIMIT = 1 << 16
STATES = ("starting", "running", "migrating", "receiving", "stopping")


def default_run() -> Path:
    """$RBDPY_RUN, /run/rbdpy/vm for root, else $XDG_RUNTIME_DIR/rbdpy or /tmp/rbdpy-UID."""
    if chosen := os.environ.get("RBDPY_RUN"):
        return Path(chosen).absolute()
    if os.getuid() == 0:
        return Path("/run/rbdpy/vm")
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "rbdpy" if base else Path(f"/tmp/rbdpy-{os.getuid()}")


@dataclass(frozen=True)
class Record:
    spec: VMSpec
    state: str
    generation: int  # of the QEMU that has the machine
    next: int = 0  # in a migration on this host: the QEMU that shall have it; 0: none
    to: str = ""  # in a migration to another host: where

    def text(self) -> str:
        values = {"version": 1, "state": self.state, "generation": self.generation, "next": self.next, "to": self.to}
        return json.dumps(values | {"spec": self.spec.to_dict()}, indent=1)

    @classmethod
    def parse(cls, text: str) -> Record:
        """MachineError EINVAL."""
        try:
            value = json.loads(text)
            generation, following, to = value["generation"], value["next"], value["to"]
            right = type(generation) is int and type(following) is int and isinstance(to, str)
            if value["version"] != 1 or value["state"] not in STATES or not right:
                raise ValueError("unknown version or state")
            return cls(VMSpec.from_dict(value["spec"]), value["state"], generation, following, to)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise MachineError(errno.EINVAL, f"the VM's record cannot be read: {error!s:.200}") from None


class Folder:
    """One VM's folder; nothing in it need exist."""

    def __init__(self, run: Path, name: str) -> None:
        check_name(name)
        self.name = name
        self.path = run / name
        longest = len(os.fsencode(self.service_place / ("u" * 36) / "vda.sock.1234567"))
        if longest > SUN_PATH:
            raise MachineError(errno.ENAMETOOLONG, f"the runtime folder {run} has too long a name (set RBDPY_RUN)")

    @property
    def service_place(self) -> Path:
        return self.path / "s"  # short, because the paths of sockets must be

    @property
    def exists(self) -> bool:
        return self.path.is_dir()

    def make(self) -> None:
        """The run folder and this one, for this user alone. EPERM: another user's."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = self.path.parent.stat()
        if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o022:
            raise MachineError(errno.EPERM, f"{self.path.parent} belongs to another user or may be written by others")
        self.path.mkdir(mode=0o700, exist_ok=True)

    # --- record

    def read(self) -> Record | None:
        """None when there is none. MachineError EINVAL."""
        try:
            with (self.path / "vm.json").open() as file:
                return Record.parse(file.read(RECORD_LIMIT))
        except FileNotFoundError:
            return None

    def write(self, record: Record) -> None:
        temporary = self.path / f".vm.json.{os.getpid()}"
        temporary.write_text(record.text())
        os.replace(temporary, self.path / "vm.json")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """EBUSY: another command changes the VM."""
        try:
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            raise MachineError(errno.ENOENT, f"there is no VM {self.name}") from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise MachineError(errno.EBUSY, f"another command is at work on the VM {self.name}") from None
            yield
        finally:
            os.close(lock)

    # --- what is in it

    def generation(self, number: int) -> Path:
        return self.path / str(number)

    def qemu(self, number: int) -> Daemon:
        place = self.generation(number)
        return Daemon(f"QEMU of {self.name}", place / "pid", place / "qemu.log")

    def monitor(self, number: int) -> Path:
        """The monitor that commands of `rbdpy` use; `qmp.sock` beside it is for everybody else."""
        return self.generation(number) / "control.sock"

    def service(self) -> Daemon:
        place = self.service_place
        return Daemon(f"rbdpyd of {self.name}", place / "pid", place / "rbdpyd.log")

    def console(self) -> Daemon:
        return Daemon(f"console of {self.name}", self.path / "console.pid", self.path / "console.err")

    def remove(self) -> None:
        """Everything; the processes must be gone."""
        shutil.rmtree(self.path, ignore_errors=True)


def folders(run: Path) -> list[Folder]:
    """Every VM's, by name."""
    try:
        names = sorted(entry.name for entry in run.iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []
    found = []
    for name in names:
        try:
            found.append(Folder(run, name))
        except MachineError:
            continue  # not ours
    return found


def python(module: str, *arguments: str) -> list[str]:
    """The command line of a program of this installation."""
    return [sys.executable, "-m", module, *arguments]


def environment() -> dict[str, str]:
    """As ours; a checkout that is not installed finds its packages, too."""
    here = str(Path(__file__).resolve().parents[2])
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}

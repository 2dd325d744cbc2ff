"""Start, stop and look at a scratch cluster.

Its folder (mode 0700) holds everything: devcluster.json (what it is), ceph.conf and keyring for clients, run/ (records
of the processes, admin sockets), log/, and the daemons' data.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import gateway, ports, programs
from .faults import Faults
from .options import MGR, MON, Options, configuration, keyring, mon_address, new_key
from .processes import Daemon

MARK = "devcluster.json"
MAX_FOLDER = 80  # bytes: sockets lie in it, and their names are short
START_DEADLINE = 90.0  # seconds; a busy machine takes ten times what an idle one does
ATTEMPTS = 3  # when somebody else takes the ports


@dataclass(frozen=True)
class Status:
    """`daemons`: name -> running, frozen or absent."""

    folder: Path
    url: str
    options: Options
    daemons: dict[str, str]

    @property
    def running(self) -> bool:
        return any(state != "absent" for state in self.daemons.values())


def default_folder() -> Path:
    """For `rbdpy devcluster` without --dir."""
    return Path(tempfile.gettempdir()) / f"rbdpy-devcluster-{os.getuid()}"


class DevCluster:
    """The cluster in a folder, which need not exist yet. Any process of the same user may start, change and stop it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.faults = Faults(self)

    @property
    def conf(self) -> str:
        return str(self.folder / "ceph.conf")

    @property
    def url(self) -> str:
        """For --store."""
        return f"ceph:{self.conf}"

    def options(self) -> Options:
        """ENOENT when there is no cluster in the folder, EINVAL when something else is."""
        try:
            values = json.loads((self.folder / MARK).read_text())
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, f"no scratch cluster in {self.folder}") from None
        except ValueError:
            raise OSError(errno.EINVAL, f"{self.folder / MARK} is damaged") from None
        if not isinstance(values, dict):
            raise OSError(errno.EINVAL, f"{self.folder / MARK} is damaged")
        return Options.from_json(values)

    def daemon(self, name: str) -> Daemon:
        """`mon.a`, `mgr.x`, `osd.0`, ..."""
        return Daemon(name, self.folder / "run" / f"{name}.process", self.folder / "log" / f"{name}.out")

    def status(self) -> Status:
        """ENOENT, EINVAL as options()."""
        options = self.options()
        names = [*options.daemons, *([gateway.NAME] if self.s3 else [])]
        return Status(self.folder, self.url, options, {name: self.daemon(name).state for name in names})

    # --- S3

    @property
    def s3(self) -> gateway.S3Access | None:
        """Its S3 gateway; None: it has none."""
        return gateway.access(self)

    def start_s3(self) -> gateway.S3Access:
        """Starts one, or starts it again; what gateway.start() raises."""
        return gateway.start(self)

    # --- start

    def start(self, options: Options | None = None) -> None:
        """Returns when its pools take writes. ENOPKG without Ceph's programs, EEXIST when it runs already, ENOTEMPTY
        for a folder with other things in it, ETIMEDOUT, EIO with what a daemon said before it ended. Nothing is left
        running after an error; the logs stay."""
        options = options or Options()
        names = ["ceph-mon", "ceph-osd", "monmaptool", *(["ceph-mgr"] if options.mgr else [])]
        found = programs.find(names)
        self._make_folder()
        for attempt in range(ATTEMPTS):
            try:
                self._start(options, found)
                return
            except BaseException as failure:
                self._end_all(options)
                if attempt == ATTEMPTS - 1 or not isinstance(failure, OSError) or not self._port_was_taken(options):
                    raise
                self._clear()

    def _port_was_taken(self, options: Options) -> bool:
        """Whether a daemon said so: somebody was faster."""
        logs = [self.folder / "log" / f"{name}.{end}" for name in options.daemons for end in ("log", "out")]
        return any(b"unable to bind" in log.read_bytes() for log in logs if log.exists())

    def _make_folder(self) -> None:
        if len(os.fsencode(self.folder)) > MAX_FOLDER:
            raise OSError(errno.ENAMETOOLONG, f"{self.folder}: more than {MAX_FOLDER} bytes leave no room for sockets")
        if any(c in str(self.folder) for c in "\n\r;#$,\"' "):
            raise OSError(errno.EINVAL, f"{self.folder}: a ceph.conf cannot hold such a name")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.lstat(self.folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise OSError(errno.EPERM, f"{self.folder} is not a folder of this user")
        os.chmod(self.folder, 0o700)
        if not os.listdir(self.folder):
            return
        if not (self.folder / MARK).exists():
            raise OSError(errno.ENOTEMPTY, f"{self.folder} holds other things than a scratch cluster")
        if self.status().running:
            raise FileExistsError(errno.EEXIST, f"a cluster runs in {self.folder} already: --store {self.url}")
        self._clear()

    def _clear(self) -> None:
        """All but the mark, which must be there as long as anything is."""
        for entry in self.folder.iterdir():
            if entry.name == MARK:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _start(self, options: Options, found: dict[str, str]) -> None:
        end = time.monotonic() + START_DEADLINE
        fsid = str(uuid.uuid4())
        mon_ports, osd_ports = ports.choose(options.address)
        self._write_files(options, fsid, mon_ports, osd_ports)
        osds = [(number, str(uuid.uuid4())) for number in range(options.osds)]
        making = [self._make_osd(found["ceph-osd"], number, name) for number, name in osds]
        try:
            self._make_mon(found, fsid, mon_address(options.address, mon_ports))
            self.spawn(MON)
            self._wait(lambda: ports.listens(self.daemon(MON), mon_ports[0]), end, [MON], "the monitor to listen")
            if options.mgr:
                self.spawn(MGR)
            from .admin import Admin  # late: to look at or stop a cluster needs no librados

            with Admin(self.conf) as admin:
                for number, name in osds:
                    admin.mon("osd new", uuid=name, id=number)
                for (number, _), process in zip(osds, making, strict=True):
                    self._finish(process, f"osd.{number}", end)
                    self.spawn(f"osd.{number}")
                up = f"{options.osds} OSDs to come up"
                self._wait(lambda: admin.mon("osd stat")["num_up_osds"] == options.osds, end, options.daemons, up)
                for pool in options.pools:
                    admin.mon("osd pool create", pool=pool)
                    admin.mon("osd pool application enable", pool=pool, app="rbd")
                    admin.write_once(pool)
        finally:
            for process in making:
                process.kill()
                process.wait()

    def _write_files(self, options: Options, fsid: str, mon_ports: tuple[int, int], osd_ports: range) -> None:
        self._write(MARK, json.dumps(options.to_json(), indent=1) + "\n")
        for name in ("run", "log", "mon", "mgr", *(f"osd{number}" for number in range(options.osds))):
            (self.folder / name).mkdir(mode=0o700)
        keys = {name: new_key() for name in ("mon.", "client.admin", *options.daemons[1:])}
        self._write("mon.keyring", keyring(keys))
        self._write("keyring", keyring({"client.admin": keys["client.admin"]}))
        for name in options.daemons[1:]:
            kind, _, number = name.partition(".")
            where = "mgr" if kind == "mgr" else f"osd{number}"
            self._write(f"{where}/keyring", keyring({name: keys[name]}))
        self._write("ceph.conf", configuration(options, self.folder, fsid, mon_ports, osd_ports))

    def _write(self, name: str, text: str) -> None:
        with open(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)

    def _make_mon(self, found: dict[str, str], fsid: str, address: str) -> None:
        monmap = str(self.folder / "monmap")
        self._run([found["monmaptool"], "--create", "--clobber", "--addv", "a", address, "--fsid", fsid, monmap])
        argv = [found["ceph-mon"], "-i", "a", "-c", self.conf, "--mkfs", "--monmap", monmap]
        self._run([*argv, "--keyring", str(self.folder / "mon.keyring")])

    def _run(self, argv: list[str]) -> None:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=programs.environment(),
            timeout=START_DEADLINE,
        )
        if done.returncode:
            raise OSError(errno.EIO, f"{' '.join(argv)}: {(done.stderr or done.stdout)[-1500:].strip()}")

    def _make_osd(self, program: str, number: int, name: str) -> subprocess.Popen[bytes]:
        argv = [program, "-i", str(number), "-c", self.conf, "--mkfs", "--osd-uuid", name, "--no-mon-config"]
        with open(self.folder / "log" / f"osd.{number}.out", "ab") as output:
            return subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=programs.environment()
            )

    def _finish(self, process: subprocess.Popen[bytes], name: str, end: float) -> None:
        if process.wait(max(0.1, end - time.monotonic())):
            raise OSError(errno.EIO, f"{name} could not be made: {self.daemon(name).tail()}")

    def spawn(self, name: str) -> None:
        """Starts a daemon that is absent. EEXIST otherwise."""
        daemon = self.daemon(name)
        if daemon.state != "absent":
            raise FileExistsError(errno.EEXIST, f"{name} runs already")
        kind, _, number = name.partition(".")
        program = programs.find([f"ceph-{kind}"])[f"ceph-{kind}"]
        daemon.spawn([program, "-f", "-i", number, "-c", self.conf], programs.environment())

    def _wait(self, holds: Any, end: float, daemons: list[str], what: str) -> None:
        while not holds():
            for name in daemons:
                daemon = self.daemon(name)
                if daemon.state == "absent":
                    raise OSError(errno.EIO, f"{name} ended: {daemon.tail() or 'see ' + str(self.folder / 'log')}")
            if time.monotonic() > end:
                raise TimeoutError(errno.ETIMEDOUT, f"waited {START_DEADLINE:.0f} s for {what}: see {self.folder}/log")
            time.sleep(0.02)

    # --- stop

    def stop(self, *, keep: bool = False) -> bool:
        """Ends all its processes and removes the folder, unless `keep`. False when there was no cluster. Only what
        start() made is touched."""
        if not (self.folder / MARK).exists():
            if self.folder.is_dir() and not os.listdir(self.folder):
                self.folder.rmdir()
            return False
        self._end_all(self.options())
        if not keep:
            self._clear()
            (self.folder / MARK).unlink()
            self.folder.rmdir()
        return True

    def _end_all(self, options: Options) -> None:
        """SIGKILL: on SIGTERM an OSD first waits five seconds for its monitor."""
        for name in (gateway.NAME, *reversed(options.daemons)):
            self.daemon(name).kill()

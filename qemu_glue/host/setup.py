"""What the host service needs on a machine, put there and taken away: files that say who wrote them.

Run again it changes only what differs. A file of the same name that somebody else wrote is left alone and named.
"""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import qemu_glue
from qemu_glue.host.config import CONFIG, Config

MARK = "written by rbdpy host setup"
HOOK = "/etc/libvirt/hooks/qemu.d/rbdpy"
UNIT = "/etc/systemd/system/rbdpyd.service"
TMPFILES = "/etc/tmpfiles.d/rbdpy.conf"
INTERPRETER_MAX = 127  # bytes of a script's first line that older kernels read
SYSTEMD = "/run/systemd/system"  # is there while systemd runs

Say = Callable[[str], None]


@dataclass(frozen=True)
class File:
    path: str
    text: str
    mode: int = 0o644


@dataclass(frozen=True)
class Folder:
    path: str
    mode: int


def plan(config: Config) -> list[File | Folder]:
    """Everything there shall be."""
    python = sys.executable
    hook = hook_program(python, str(Path(qemu_glue.__file__).parent.parent))
    unit = f"""# {MARK}
[Unit]
Description=RBD disks for virtual machines
Before=libvirtd.service virtqemud.service
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
ExecStart={python} -m librbd_py.cli.main host serve
Restart=always
RestartSec=100ms
# A guest waits while its requests are finished; what takes longer is taken up by the next incarnation.
TimeoutStopSec=90s
KillMode=mixed
LimitNOFILE=1048576
OOMScoreAdjust=-900

[Install]
WantedBy=multi-user.target
"""
    return [
        Folder(str(Path(CONFIG).parent), 0o755),
        File(CONFIG, config.text()),
        Folder(config.run, 0o755),
        Folder(config.state, 0o700),
        File(TMPFILES, f"# {MARK}\nd {config.run} 0755 root root -\n"),
        File(UNIT, unit),
        File(HOOK, hook, 0o755),
    ]


def hook_program(python: str, place: str) -> str:
    """The hook's text. -IS: nothing but the standard library and this package, found in `place`, in half the time."""
    work = f"import sys\nsys.path.insert(0, {place!r})\nfrom qemu_glue.libvirt.hook import main\nsys.exit(main())\n"
    first = f"#!{python} -IS\n"
    if len(os.fsencode(first)) <= INTERPRETER_MAX and " " not in python:
        return f"{first}# {MARK}\n{work}"
    return f'#!/bin/sh\n# {MARK}\nexec {shlex.quote(python)} -IS -c {shlex.quote(work)} "$@"\n'


def set_up(config: Config, say: Say, *, dry_run: bool = False, prefix: str = "") -> None:
    """Makes what is missing or differs, and says so. `prefix`: a folder to put it all in, for packages. EEXIST:
    somebody else's file is in the way; nothing was changed."""
    wanted = plan(config)
    for entry in wanted:
        if isinstance(entry, File) and entry.path != CONFIG and _foreign(Path(prefix + entry.path)):
            raise FileExistsError(errno.EEXIST, f"{prefix}{entry.path} is there and was not written by rbdpy")
    hooks = Path(prefix + HOOK).parent.parent
    first_hook = not any(path.is_file() for path in (hooks / "qemu", *hooks.glob("qemu.d/*")))
    changed = [entry for entry in wanted if _make(entry, prefix, say, dry_run)]
    if not changed:
        say("nothing to do: all is there")
    if any(entry.path == HOOK for entry in changed) and first_hook:
        say("libvirtd looks for hooks when it starts: restart it once (guests keep running)")
    if prefix or dry_run:
        return
    if os.path.isdir(SYSTEMD):
        if any(entry.path in (UNIT, CONFIG) for entry in changed):
            _systemctl("daemon-reload")
        _systemctl("enable", "--now", "rbdpyd.service")
        say("rbdpyd.service runs")
    else:
        say("systemd does not run here: start the service with  rbdpy host serve")


def remove(config: Config, say: Say, *, dry_run: bool = False, prefix: str = "") -> None:
    """The opposite. What the service remembers (its state folder) goes when it is empty; images are never touched."""
    if not prefix and not dry_run and os.path.isdir(SYSTEMD) and os.path.exists(UNIT):
        _systemctl("disable", "--now", "rbdpyd.service")
    for entry in reversed(plan(config)):
        path = Path(prefix + entry.path)
        if isinstance(entry, Folder):
            if path.is_dir() and not any(path.iterdir()):
                say(f"remove {path}/")
                if not dry_run:
                    path.rmdir()
        elif path.exists() and (entry.path == CONFIG or not _foreign(path)):
            say(f"remove {path}")
            if not dry_run:
                path.unlink()
    if not prefix and not dry_run and os.path.isdir(SYSTEMD):
        _systemctl("daemon-reload")


def _foreign(path: Path) -> bool:
    try:
        return MARK not in path.read_text(errors="replace")
    except FileNotFoundError:
        return False


def _make(entry: File | Folder, prefix: str, say: Say, dry_run: bool) -> bool:
    path = Path(prefix + entry.path)
    if isinstance(entry, Folder):
        if path.is_dir() and path.stat().st_mode & 0o7777 == entry.mode:
            return False
        say(f"make {path}/ (mode {entry.mode:o})")
        if not dry_run:
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(entry.mode)
        return True
    if path.exists() and path.read_text(errors="replace") == entry.text and path.stat().st_mode & 0o777 == entry.mode:
        return False
    say(f"{'change' if path.exists() else 'write'} {path}")
    if not dry_run:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.write_text(entry.text)
        new.chmod(entry.mode)
        os.rename(new, path)
    return True


def _systemctl(*words: str) -> None:
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise OSError(errno.EIO, f"systemctl {' '.join(words)}: {done.stderr.strip()}")

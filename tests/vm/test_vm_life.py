"""`rbdpy vm` from boot to stop, with real guests: what it says, what it leaves, and what it cleans up."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from qemu_glue.vm.folder import Folder
from tests.vm.command import DEADLINE, Host, host
from tests.vm.rig import MIB

__all__ = ["host"]

pytestmark = pytest.mark.vm


class Terminal:
    """`rbdpy vm console` on a terminal of its own."""

    def __init__(self, host: Host, name: str) -> None:
        self.terminal, other = pty.openpty()
        words = [sys.executable, "-m", "librbd_py.cli.main", "vm", "console", name, "--run", str(host.run)]
        self.process = subprocess.Popen(words, stdin=other, stdout=other, stderr=other, start_new_session=True)
        os.close(other)

    def until(self, text: bytes) -> None:
        """Reads until it shows `text` once more."""
        seen, limit = b"", time.monotonic() + DEADLINE
        while text not in seen:
            ready, _, _ = select.select([self.terminal], [], [], max(0.0, limit - time.monotonic()))
            assert ready, seen
            seen += os.read(self.terminal, 4096)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)


def test_a_vm_boots_moves_twice_and_stops(host: Host) -> None:
    host.rig.create("disk", 32 * MIB)
    said = host.boot("disk", "--name", "one").stderr
    assert "one runs" in said
    host.ticks("one")
    assert host.states() == {"one": "running"}
    consoles = [Terminal(host, "one") for _ in range(2)]  # at once
    try:
        for console in consoles:
            console.until(b"GUEST-TICK")
        os.write(consoles[0].terminal, b"\x1d")
        consoles[0].until(b"one runs on")
        assert consoles[0].process.wait(DEADLINE) == 0
        consoles[1].until(b"GUEST-TICK")
    finally:
        for console in consoles:
            console.close()
    assert "is the VM one's" in host.boot("disk", "--name", "two", code=16).stderr
    assert host.states() == {"one": "running"}
    host("migrate", "one")  # to another QEMU on this host
    host.ticks("one")
    there = host.run.parent / "b"
    host("migrate", "one", "--to", str(there))
    assert host.states() == {}
    assert host.processes() == []
    other = Host(host.rig, there)
    assert other.states() == {"one": "running"}
    other.ticks("one")
    other("stop", "one")
    assert other.states() == {}
    assert other.processes() == []


SSH = """#!/bin/sh
# ssh to another runtime folder of this machine
case "$*" in
*-N*)
    while [ "$1" != -L ]; do shift; done
    ln -s "${2#*:}" "${2%%:*}" && exec sleep 60 ;;
esac
shift 2
RBDPY_RUN=@RUN@ exec @PYTHON@ -m librbd_py.cli.main "$@"
"""


def test_a_vm_goes_to_a_host_over_ssh(host: Host) -> None:
    host.rig.create("disk", 32 * MIB)
    host.boot("disk")
    host.ticks("disk")
    there, ssh = host.run.parent / "b", host.run.parent / "ssh"
    ssh.write_text(SSH.replace("@RUN@", str(there)).replace("@PYTHON@", sys.executable))
    ssh.chmod(0o700)
    host("migrate", "disk", "--to", "elsewhere", RBDPY_SSH=str(ssh))
    other = Host(host.rig, there)
    other.ticks("disk")
    assert other.states() == {"disk": "running"}
    assert host.processes() == []
    other("stop", "disk", "--force")


def test_killed_processes_leave_what_ls_and_stop_clean_up(host: Host) -> None:
    host.rig.create("disk", 32 * MIB)
    host.boot("disk", "--transport", "nbd")
    host.ticks("disk")
    place = Folder(host.run, "disk")
    place.console().kill()
    place.service().kill()
    assert host.states() == {"disk": "running"}  # which starts its service again
    assert place.service().state == "running"
    with subprocess.Popen(
        [sys.executable, "-m", "librbd_py.cli.main", "vm", "console", "disk", "--run", str(host.run)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as console:  # fmt: skip
        assert console.stdout is not None
        assert console.stdout.readline()
        assert place.qemu(1).send(signal.SIGKILL)
        console.communicate(timeout=DEADLINE)
        assert console.returncode == 0
    rows = json.loads(host("ls", "--format", "json").stdout)
    assert [row["state"] for row in rows] in (["dead"], [])
    assert host.states() == {}
    assert host.processes() == []
    host("stop", "disk", code=2)


def test_a_command_killed_in_a_migration_leaves_a_vm_that_runs(host: Host) -> None:
    host.rig.create("disk", 32 * MIB)
    host.boot("disk")
    host.ticks("disk")
    place = Folder(host.run, "disk")
    environment = {**os.environ, "RBDPY_RUN": str(host.run), "RBDPY_STORE": host.rig.url}
    words = [sys.executable, "-m", "librbd_py.cli.main", "vm", "migrate", "disk"]
    with subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL) as command:
        limit = time.monotonic() + DEADLINE
        while place.qemu(2).state == "absent":
            assert time.monotonic() < limit
            time.sleep(0.005)
        command.kill()
    assert host.states() == {"disk": "running"}
    host.ticks("disk")
    assert sum("qemu-system" in line for line in host.processes()) == 1
    host("stop", "disk", "--force")
    assert host.processes() == []


def test_what_is_wrong_is_said_and_leaves_nothing(host: Host) -> None:
    host.rig.create("disk", 32 * MIB)
    assert "there is no image rbd/none" in host.boot("none", code=2).stderr
    assert "MiB to spare" in host.boot("disk", "--memory", "900G", code=12).stderr
    assert "cannot be the name" in host.boot("disk", "--name", "a/b", code=22).stderr
    missing = host("boot", "disk", "--accel", "tcg", code=2, RBDPY_QEMU="qemu-that-is-not-there").stderr
    assert "apt-get install" in missing
    host("migrate", "disk", code=2)
    assert not host.run.exists() or not list(host.run.iterdir())
    assert host.processes() == []


def test_a_hostile_sender_gets_nothing(host: Host) -> None:
    async def run() -> None:
        path = host.run.parent / "l"
        for message in (
            b"nonsense\n",
            b'{"receive": 1, "spec": {"name": "../x"}}\n',
            b"[" * 5000 + b"\n",
            b"x" * 100000,
        ):
            words = ["librbd_py.cli.main", "vm", "receive", "--listen", f"unix:{path}", "--run", str(host.run)]
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", *words, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
            )
            assert process.stderr
            assert b"waiting" in await asyncio.wait_for(process.stderr.readline(), DEADLINE)
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(message)
            answer = await asyncio.wait_for(reader.read(4096), DEADLINE)
            assert b"error" in answer
            writer.close()
            assert await asyncio.wait_for(process.wait(), DEADLINE) != 0
            await process.stderr.read()
        assert not host.run.exists() or not list(host.run.iterdir())

    asyncio.run(run())

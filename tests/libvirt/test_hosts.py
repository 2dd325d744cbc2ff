"""The rig itself: two libvirt hosts on one machine."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.libvirt.guard import members
from tests.libvirt.hosts import REPOSITORY, Host, HostError, wait_for
from tests.libvirt.world import World

CRASH = """
import sys, os
from pathlib import Path
from tests.libvirt.hosts import Machine
machine = Machine(Path(sys.argv[1]), Path(sys.argv[1]) / "capabilities")
host = machine.host("gamma")
host.start("sleep", "1000", log="sleep")
print(host.namespace, machine.bridge, flush=True)
os.kill(os.getpid(), 9)
"""


def test_hosts_are_apart_and_reach_each_other(hosts: tuple[Host, Host]) -> None:
    alpha, beta = hosts
    assert [host.run("hostname").strip() for host in hosts] == ["alpha", "beta"]
    alpha.run("bash", "-c", f"exec 3<>/dev/udp/{beta.address}/9")
    (beta.folder / "run/rbdpy/mark").touch()
    beta.run("test", "-e", "/run/rbdpy/mark")
    with pytest.raises(HostError):
        alpha.run("test", "-e", "/run/rbdpy/mark")


def test_each_has_a_libvirt_of_its_own(world: World) -> None:
    identities = [host.virsh("capabilities").split("<uuid>")[1].split("<")[0] for host in world.hosts]
    assert len(set(identities)) == 2
    assert [host.virsh("hostname").strip() for host in world.hosts] == ["alpha", "beta"]
    with pytest.raises(HostError):
        world.alpha.start_libvirtd()  # it has one


def test_nothing_is_left_of_a_run_that_is_killed() -> None:
    with tempfile.TemporaryDirectory(prefix="rbdpy-lv-") as folder:
        done = subprocess.run(
            [sys.executable, "-c", CRASH, folder], capture_output=True, text=True, timeout=60, cwd=REPOSITORY
        )
        namespace, bridge = done.stdout.split()
        wait_for(lambda: not members(int(namespace)), "the processes to end")
        wait_for(lambda: not Path(f"/sys/class/net/{bridge}").exists(), "the bridge to go")

"""What a user of libvirt does with a VM whose disks the host service serves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from uuid import uuid4

import pytest

from tests.libvirt.domains import Domain
from tests.libvirt.hosts import Host, HostError, wait_for
from tests.libvirt.world import World

SIDES = [
    pytest.param("vhost-user", "embedded", id="vhost-user on a folder"),
    pytest.param("nbd", "embedded", id="nbd on a folder"),
    pytest.param("vhost-user", "ceph", id="vhost-user on Ceph"),
    pytest.param("nbd", "ceph", id="nbd on Ceph"),
]
HOOK_SECONDS = 10.0  # promised: 5; the machine may be busy
RECONNECT_SECONDS = 1.0  # between QEMU's attempts
GONE_SECONDS = 2.0  # promised: 1; virsh and looking take a while, too


@pytest.mark.parametrize(("transport", "store"), SIDES)
def test_a_vm_starts_migrates_there_and_back_and_is_destroyed(world: World, transport: str, store: str) -> None:
    domain = world.running(transport, store)
    assert domain.holder() == "alpha"
    for source, destination in (world.hosts, world.hosts[::-1]):
        world.migrate(domain, source, destination)
        world.check(domain, destination)
    world.alpha.virsh("destroy", domain.name)
    end = time.monotonic() + GONE_SECONDS
    wait_for(lambda: not domain.hosts_that_watch() and domain.holder() is None, "watch and lock to go", GONE_SECONDS)
    assert time.monotonic() < end


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("transport", "store"), SIDES)
def test_a_vm_moves_all_day(world: World, transport: str, store: str) -> None:
    domain = world.running(transport, store)
    for _ in range(25):
        for source, destination in (world.hosts, world.hosts[::-1]):
            world.migrate(domain, source, destination)
            world.check(domain, destination)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("store", ["embedded", "ceph"])
def test_the_service_dies_twenty_times_under_load(world: World, store: str) -> None:
    domain = world.running("vhost-user", store)
    for _ in range(20):
        world.alpha.kill_service()
        world.alpha.start_service()
        domain.wait_for_progress()
    world.check(domain, world.alpha)


def test_shutdown_ends_the_guest_and_frees_the_image(world: World) -> None:
    domain = world.running()
    world.alpha.virsh("shutdown", domain.name)
    wait_for(lambda: world.where(domain) == [], "the guest to shut down", 60)
    wait_for(lambda: not domain.hosts_that_watch(), "the watch to go")
    assert domain.holder() is None


def test_save_and_restore(world: World) -> None:
    domain = world.running()
    saved = world.alpha.folder / "saved"
    world.alpha.virsh("save", domain.name, saved)
    wait_for(lambda: not domain.hosts_that_watch(), "the watch to go")
    world.alpha.virsh("restore", saved)
    world.check(domain, world.alpha)
    world.alpha.virsh("managedsave", domain.name)
    wait_for(lambda: not domain.hosts_that_watch(), "the watch to go")
    world.alpha.virsh("start", domain.name)
    world.check(domain, world.alpha)


def start_refused(host: Host, name: str, why: str) -> None:
    begin = time.monotonic()
    with pytest.raises(HostError, match=why):
        host.virsh("start", name)
    assert time.monotonic() - begin < HOOK_SECONDS


@contextmanager
def twin_of(domain: Domain, hosts: tuple[Host, ...]) -> Iterator[Domain]:
    """Another VM with the same disk, defined on the hosts."""
    twin = copy(domain)
    twin.name, twin.uuid = f"{domain.name}-twin", str(uuid4())
    twin.console_file = domain.folder / f"{twin.name}.console"
    for host in hosts:
        twin.define(host)
    try:
        yield twin
    finally:
        for host in hosts:
            host.virsh("undefine", twin.name)


@pytest.mark.parametrize(("transport", "store"), [SIDES[0], SIDES[3]])
def test_a_vm_that_runs_elsewhere_does_not_start(world: World, transport: str, store: str) -> None:
    """Nor does another VM with its disk. The one that runs sees nothing of it, and migrates as ever; once it has ended,
    it starts at once."""
    domain = world.running(transport, store)
    domain.define(world.beta)
    start_refused(world.beta, domain.name, f"image rbd/{domain.images[0]} is in use by this very VM on host alpha")
    with twin_of(domain, world.hosts) as twin:
        start_refused(world.beta, twin.name, f"in use by VM {domain.name} .* on host alpha .* which owns its lock")
        start_refused(world.alpha, twin.name, f"in use by VM {domain.name} .* on this host")
        world.check(domain, world.alpha)
        world.migrate(domain, world.alpha, world.beta)
        world.check(domain, world.beta)
        at = len(domain.console)
        world.beta.virsh("suspend", domain.name)
        start_refused(world.alpha, twin.name, "on host beta")  # it stands still and is a VM all the same
    ended = domain.judge()
    assert ended.right, str(ended)
    world.beta.virsh("destroy", domain.name)
    domain.define(world.alpha)
    world.alpha.virsh("start", domain.name)
    domain.wait_for_console("GUEST-UP", at)
    world.check(domain, world.alpha)
    saved = world.alpha.folder / "twice"
    world.alpha.virsh("save", domain.name, saved)
    world.alpha.virsh("restore", saved)
    world.check(domain, world.alpha)


@pytest.mark.parametrize("store", ["embedded", "ceph"])
def test_a_host_that_crashed_keeps_no_vm_from_starting(world: World, store: str) -> None:
    """Its watch has not run out: the VM starts, and its first write waits until the dead one is fenced."""
    domain = world.running("vhost-user", store)
    domain.define(world.beta)
    at = len(domain.console)
    pid = world.alpha.pid_of(domain.name)
    assert pid is not None
    world.alpha.service.send_signal(signal.SIGSTOP)  # it is silent, and its kernel answers
    os.kill(pid, signal.SIGKILL)
    world.beta.virsh("start", domain.name)
    domain.wait_for_console("GUEST-UP", at)
    domain.wait_for_progress()
    assert domain.holder() == "beta"
    world.alpha.service.send_signal(signal.SIGCONT)
    world.alpha.kill_service()
    world.alpha.start_service()
    world.check(domain, world.beta)
    world.beta.virsh("suspend", domain.name)
    verdict = domain.judge()
    assert verdict.right, str(verdict)


def test_reset_boots_again(world: World) -> None:
    domain = world.running()
    at = len(domain.console)
    world.alpha.virsh("reset", domain.name)
    domain.wait_for_console("GUEST-UP", at)
    world.check(domain, world.alpha)


def test_a_domain_survives_libvirtd(world: World) -> None:
    domain = world.running()
    world.alpha.kill_libvirtd()
    domain.wait_for_progress()
    world.alpha.start_libvirtd()
    world.check(domain, world.alpha)
    world.migrate(domain, world.alpha, world.beta)
    world.check(domain, world.beta)


@pytest.mark.parametrize("store", ["embedded", "ceph"])
def test_a_domain_survives_the_service(world: World, store: str) -> None:
    """kill -9, started again at once: the guest sees a pause and no error."""
    domain = world.running("vhost-user", store)
    for _ in range(3):
        world.alpha.kill_service()
        at, begin = len(domain.console), time.monotonic()
        world.alpha.start_service()
        wait_for(lambda at=at: "STAMP-TICK" in domain.console[at:], "the load to go on", 15)
        assert time.monotonic() - begin < 10
        world.check(domain, world.alpha)


@pytest.mark.parametrize("store", ["embedded", "ceph"])
def test_a_suspended_domain_survives_the_service(world: World, store: str) -> None:
    """QEMU takes no notice of the new service before the guest is resumed."""
    domain = world.running("vhost-user", store)
    world.alpha.virsh("suspend", domain.name)
    world.alpha.kill_service()
    world.alpha.start_service()
    time.sleep(2 * RECONNECT_SECONDS)
    assert world.alpha.state(domain.name) == "paused"  # nobody resumed it meanwhile
    at = len(domain.console)
    world.alpha.virsh("resume", domain.name)
    wait_for(lambda: "STAMP-TICK" in domain.console[at:], "the load to go on", 20)
    world.check(domain, world.alpha)


def test_without_the_service_nothing_starts_and_nothing_that_runs_is_harmed(world: World) -> None:
    running = world.running()
    other = world.domain("vhost-user", "embedded")
    other.define(world.alpha)
    world.alpha.kill_service()
    begin = time.monotonic()
    with pytest.raises(HostError, match="rbdpy"):
        world.alpha.virsh("start", other.name)
    assert time.monotonic() - begin < 8
    world.alpha.kill_libvirtd()
    world.alpha.start_libvirtd()  # `reconnect` of the one that runs
    assert world.alpha.virsh("domstate", running.name).strip() == "running"
    world.alpha.start_service()
    world.check(running, world.alpha)
    world.alpha.virsh("start", other.name)
    other.wait_for_console("GUEST-UP")


def test_a_service_that_hangs_refuses_a_start_in_time(world: World) -> None:
    domain = world.domain("vhost-user", "embedded")
    domain.define(world.alpha)
    world.alpha.service.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(HostError, match="rbdpy"):
        world.alpha.virsh("start", domain.name)
    assert time.monotonic() - begin < 20
    world.alpha.service.send_signal(signal.SIGCONT)
    world.alpha.virsh("start", domain.name)
    domain.wait_for_console("GUEST-UP")

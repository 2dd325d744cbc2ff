"""A fault at each point of a live migration: the VM runs on exactly one side, the lock is with it, nothing is lost,
and the next migration works."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from librbd_py import rados, rbd
from tests.libvirt.domains import Domain
from tests.libvirt.hosts import Host, HostError, wait_for
from tests.libvirt.world import Events, World, slow

TRIES = 4  # of what has to happen within milliseconds
SOAK = bool(os.environ.get("RBDPY_SOAK"))


@pytest.fixture
def domain(world: World, request: pytest.FixtureRequest) -> Domain:
    return world.running("vhost-user", request.param)


def on(store: str) -> pytest.MarkDecorator:
    """The store of the test's domain; `make soak` takes both."""
    return pytest.mark.parametrize("domain", ["embedded", "ceph"] if SOAK else [store], indirect=True)


@contextmanager
def events_of(host: Host) -> Iterator[Events]:
    events = Events(host)
    try:
        yield events
    finally:
        events.close()


def goes_on(world: World, domain: Domain, host: Host) -> None:
    """On `host`, and a migration from there works."""
    world.check(domain, host)
    other = world.beta if host is world.alpha else world.alpha
    slow(host, domain, 0)
    world.migrate(domain, host, other)
    world.check(domain, other)


def kill_qemu(host: Host, domain: Domain) -> None:
    pid = host.pid_of(domain.name)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


@on("ceph")
def test_the_hook_of_the_destination_refuses(world: World, domain: Domain) -> None:
    world.beta.kill_service()
    with pytest.raises(HostError, match="rbdpy"):
        world.migrate(domain, world.alpha, world.beta)
    world.beta.start_service()
    goes_on(world, domain, world.alpha)


@on("embedded")
def test_the_service_of_the_destination_hangs(world: World, domain: Domain) -> None:
    world.beta.service.send_signal(signal.SIGSTOP)
    with pytest.raises(HostError):
        world.migrate(domain, world.alpha, world.beta)
    world.beta.service.send_signal(signal.SIGCONT)
    goes_on(world, domain, world.alpha)


@on("ceph")
def test_the_destination_dies_in_precopy(world: World, domain: Domain) -> None:
    slow(world.alpha, domain, 24)
    with world.migrating(domain, world.alpha, world.beta) as attempt:
        attempt.wait_for_part(0.2)
        kill_qemu(world.beta, domain)
    assert attempt.failure is not None
    goes_on(world, domain, world.alpha)


@on("embedded")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_it_is_cancelled(world: World, domain: Domain, share: float) -> None:
    slow(world.alpha, domain, 32)
    with world.migrating(domain, world.alpha, world.beta) as attempt:
        attempt.wait_for_part(share)
        try:
            world.alpha.virsh("domjobabort", domain.name)
        except HostError:
            assert attempt.ended or share > 0.9  # it was faster
    goes_on(world, domain, world.alpha if attempt.failure else world.beta)


@on("embedded")
def test_libvirtd_of_the_source_is_killed(world: World, domain: Domain) -> None:
    slow(world.alpha, domain, 24)
    with world.migrating(domain, world.alpha, world.beta) as attempt:
        attempt.wait_for_part(0.3)
        world.alpha.kill_libvirtd()
    assert attempt.failure is not None
    world.alpha.start_libvirtd()
    wait_for(lambda: len(world.where(domain)) == 1, "the VM to run on one host", 60)
    goes_on(world, domain, world.where(domain)[0])


@on("ceph")
def test_the_destination_dies_between_release_and_resume(world: World, domain: Domain) -> None:
    """The lock is offered, the VM stands still: the source goes on by itself and takes the lock back."""
    for _ in range(TRIES):
        with events_of(world.alpha) as events:
            events.at_once("RBD_HANDOFF_OFFERED", lambda: kill_qemu(world.beta, domain))
            with world.migrating(domain, world.alpha, world.beta) as attempt:
                pass
            if attempt.failure is not None:
                wait_for(lambda: events.named("RBD_HANDOFF_BACK"), "the lock to be taken back", 10)
                break
        # It had been taken over already: the VM died with its host, which is right, but not this test.
        wait_for(lambda: domain.holder() is None, "the dead host's lock to go", 10)
        world.alpha.virsh("start", domain.name)
        domain.wait_for_console("GUEST-UP", len(domain.console))
    else:
        pytest.fail("the destination was always faster")
    goes_on(world, domain, world.alpha)


@on("ceph")
def test_the_source_dies_after_the_destination_runs(world: World, domain: Domain) -> None:
    with events_of(world.beta) as events:
        events.at_once("RBD_HANDOFF_TAKEN", lambda: kill_qemu(world.alpha, domain))
        with world.migrating(domain, world.alpha, world.beta) as attempt:
            pass
        assert events.named("RBD_HANDOFF_TAKEN"), attempt.failure
    wait_for(lambda: world.where(domain), "the VM to run")
    goes_on(world, domain, world.beta)


@on("ceph")
def test_a_third_client_wants_the_lock_in_the_gap(world: World, domain: Domain) -> None:
    """It asks from the moment the lock is offered: it waits, gets it from the VM's next host, and gives it back."""
    failures: list[BaseException] = []

    def want() -> None:
        try:
            conf = {"rbdpy_store": domain.store}
            with rados.Rados(conf=conf) as cluster, cluster.open_ioctx("rbd") as ioctx:
                with rbd.Image(ioctx, domain.images[0]) as image:
                    image.write(b"third", image.size() - 512)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=want)
    with events_of(world.alpha) as events:
        events.at_once("RBD_HANDOFF_OFFERED", thread.start)
        world.migrate(domain, world.alpha, world.beta)
        assert events.named("RBD_HANDOFF_OFFERED")
    thread.join(60)
    assert not thread.is_alive() and not failures
    goes_on(world, domain, world.beta)


def test_somebody_breaks_the_lock_in_the_gap(world: World) -> None:
    """`rbd lock rm` fences the source and frees the lock: the destination refuses, and the VM's requests wait for a
    word."""
    domain = world.running("vhost-user", "ceph")
    world.beta.virsh("list")

    def grab() -> None:
        with rados.Rados(conf={"rbdpy_store": domain.store}) as cluster, cluster.open_ioctx("rbd") as ioctx:
            with rbd.Image(ioctx, domain.images[0]) as image:
                ((client, cookie, _),) = image.list_lockers()["lockers"]
                image.break_lock(client, cookie)

    for _ in range(TRIES):
        with events_of(world.alpha) as source, events_of(world.beta) as destination:
            source.at_once("RBD_HANDOFF_OFFERED", grab)
            with world.migrating(domain, world.alpha, world.beta):
                pass
            refused, taken = (destination.named(f"RBD_HANDOFF_{what}") for what in ("REFUSED", "TAKEN"))
        if refused:
            assert not taken
            at = len(domain.console)
            time.sleep(2)
            assert "STAMP-TICK" not in domain.console[at:], "the guest goes on without the lock"
            return
        world.alpha, world.beta = world.beta, world.alpha
    pytest.fail("the destination was always faster")


@on("ceph")
@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_service_is_killed_in_precopy(world: World, domain: Domain, side: str) -> None:
    slow(world.alpha, domain, 32)
    host = world.alpha if side == "source" else world.beta
    with world.migrating(domain, world.alpha, world.beta) as attempt:
        attempt.wait_for_part(0.3)
        host.kill_service()
        host.start_service()
    wait_for(lambda: len(world.where(domain)) == 1, "the VM to run on one host", 60)
    goes_on(world, domain, world.beta if attempt.failure is None else world.alpha)


def test_an_osd_stands_still_at_the_switch_over(world: World) -> None:
    domain = world.running("vhost-user", "ceph")
    osds = [world.cluster.daemon(name) for name in ("osd.0", "osd.1")]

    def freeze() -> None:
        for osd in osds:
            osd.send(signal.SIGSTOP)
        time.sleep(2)
        for osd in osds:
            osd.send(signal.SIGCONT)

    with events_of(world.alpha) as events:
        events.at_once("RBD_HANDOFF_OFFERED", freeze)
        with world.migrating(domain, world.alpha, world.beta):
            pass
    wait_for(lambda: len(world.where(domain)) == 1, "the VM to run on one host", 60)
    goes_on(world, domain, world.where(domain)[0])

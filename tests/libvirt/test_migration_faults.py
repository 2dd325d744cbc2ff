"""A fault at each point of a live migration: the VM runs on exactly one side, the lock is with it, what the guest was
told is written is there, and the next migration works.

The domains go on from test to test. After each, another client reads what the guest's ledger wrote (`ledger.py`).
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

import pytest

from librbd_py import rados, rbd
from librbd_py.image.handle import ImageHandle
from librbd_py.image.locks import watchers
from librbd_py.store import connect
from qemu_glue.host.ask import ask
from tests.libvirt.domains import Domain
from tests.libvirt.hosts import Host, HostError, run, wait_for
from tests.libvirt.world import Attempt, Events, World, patient, slow

GONE_SECONDS = 1.0
TRIES = 4  # of what has to happen within milliseconds
SOAK_ROUNDS = 5
FOLDER, CEPH, NBD_FOLDER, NBD_CEPH = "vhost-user/embedded", "vhost-user/ceph", "nbd/embedded", "nbd/ceph"
EVERYWHERE = (FOLDER, CEPH, NBD_FOLDER, NBD_CEPH)
SEEN = (FOLDER, CEPH)  # where the service sees the switch-over


def on(first: str, then: tuple[str, ...] = EVERYWHERE) -> pytest.MarkDecorator:
    """Transport and store of the domain: `first` in every run, all of `then`, several times, in long ones."""
    long = [pytest.param(each, marks=pytest.mark.soak, id=f"{each}-{n}") for n in range(SOAK_ROUNDS) for each in then]
    return pytest.mark.parametrize("trip", [first, *long], indirect=True)


@dataclass
class Trip:
    """A domain that is to go from one host to the other."""

    world: World
    domain: Domain
    source: Host
    destination: Host

    def migrate(self) -> None:
        """HostError when it fails."""
        self.world.migrate(self.domain, self.source, self.destination)

    def migrating(self) -> AbstractContextManager[Attempt]:
        return self.world.migrating(self.domain, self.source, self.destination)

    def goes_on(self, host: Host) -> None:
        """On `host`, and a migration from there works."""
        self.world.check(self.domain, host)
        other = self.destination if host is self.source else self.source
        slow(host, self.domain, 0)
        self.world.migrate(self.domain, host, other)
        self.world.check(self.domain, other)

    def goes_on_somewhere(self) -> None:
        wait_for(lambda: len(self.world.where(self.domain)) == 1, "the VM to run on one host", 60)
        self.goes_on(*self.world.where(self.domain))

    def starts_again(self, host: Host) -> None:
        """Its QEMU is dead: libvirt knows, its lock is gone, nothing of it is written any more, it boots."""
        domain = self.domain
        wait_for(lambda: self.world.where(domain) == [], "the domain's end to be noticed", 20)
        wait_for(lambda: domain.holder() is None, "the dead one's lock to go", 10)
        before, boots, at = domain.content(), domain.console.count("GUEST-UP"), len(domain.console)
        if host.state(domain.name) is None:
            domain.define(host)
        host.virsh("start", domain.name)
        domain.wait_for_console("GUEST-UP", at)
        domain.wait_for_progress(1)
        host.virsh("suspend", domain.name)
        verdict = domain.judge(before, ended=boots)
        assert verdict.right, str(verdict)
        host.virsh("resume", domain.name)


@pytest.fixture(scope="module", autouse=True)
def kept(shared_world: World) -> Iterator[None]:
    yield
    shared_world.drop_kept()


@pytest.fixture
def trip(world: World, request: pytest.FixtureRequest) -> Iterator[Trip]:
    """Its domain runs and writes."""
    failed = request.session.testsfailed
    made = Trip(world, *world.kept_running(*request.param.split("/")))
    yield made
    if request.session.testsfailed == failed:
        try:
            world.keep(made.domain)
        except BaseException:
            world.drop_kept(made.domain)
            raise
    else:
        world.drop_kept(made.domain)


@contextmanager
def events_of(host: Host) -> Iterator[Events]:
    events = Events(host)
    try:
        yield events
    finally:
        events.close()


def kill_qemu(host: Host, domain: Domain) -> None:
    pid = host.pid_of(domain.name)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


@on(FOLDER)
def test_the_hook_of_the_destination_refuses(trip: Trip) -> None:
    trip.destination.kill_service()
    with pytest.raises(HostError, match="rbdpy"):
        trip.migrate()
    trip.destination.start_service()
    trip.goes_on(trip.source)


@on(CEPH)
def test_the_service_of_the_destination_hangs(trip: Trip) -> None:
    trip.destination.service.send_signal(signal.SIGSTOP)
    with pytest.raises(HostError):
        trip.migrate()
    trip.destination.service.send_signal(signal.SIGCONT)
    trip.goes_on(trip.source)


@on(FOLDER, (FOLDER,))
def test_the_destination_does_not_have_the_image(trip: Trip) -> None:
    """Its service looks at another, empty store: the export is absent there."""
    right = trip.domain.store
    trip.destination.kill_service()
    trip.destination.set_up(f"embedded:{trip.destination.folder}/empty")
    trip.destination.start_service()
    try:
        with pytest.raises(HostError, match="rbdpy"):
            trip.migrate()
        trip.world.check(trip.domain, trip.source)
    finally:
        trip.destination.kill_service()
        trip.destination.set_up(right)
        trip.destination.start_service()
    trip.goes_on(trip.source)


@on(NBD_FOLDER)
def test_the_destination_dies_in_precopy(trip: Trip) -> None:
    slow(trip.source, trip.domain, 24)
    with trip.migrating() as attempt:
        attempt.wait_for_part(0.2)
        kill_qemu(trip.destination, trip.domain)
    assert attempt.failure is not None
    trip.goes_on(trip.source)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@on(CEPH)
def test_it_is_cancelled(trip: Trip, share: float) -> None:
    """Nearly all was sent, and the guest writes: without leave to stand still QEMU would send for ever.

    QEMU 7.2 shuts the connection down before it notes that it was cancelled (migrate_fd_cancel: the return path is the
    same socket), so a source that is just writing, and the destination, may report a broken connection instead.
    """
    slow(trip.source, trip.domain, 16)
    patient(trip.source, trip.domain, 1)
    try:
        with trip.migrating() as attempt:
            attempt.wait_for_part(share)
            trip.source.virsh("domjobabort", trip.domain.name)
    finally:
        patient(trip.source, trip.domain, 300)
    assert attempt.failure is not None
    said = str(attempt.failure)
    assert any(text in said for text in ("cancel", "Unable to write", "no longer running")), said
    trip.goes_on(trip.source)


@on(FOLDER)
def test_libvirtd_of_the_source_is_killed(trip: Trip) -> None:
    slow(trip.source, trip.domain, 24)
    with trip.migrating() as attempt:
        attempt.wait_for_part(0.3)
        trip.source.kill_libvirtd()
    assert attempt.failure is not None
    trip.source.start_libvirtd()
    trip.goes_on_somewhere()


@on(CEPH, SEEN)
def test_the_destination_dies_between_release_and_resume(trip: Trip) -> None:
    """The lock is offered, the VM stands still: the source goes on by itself and takes the lock back."""
    for _ in range(TRIES):
        with events_of(trip.source) as events:
            events.at_once("RBD_HANDOFF_OFFERED", lambda: kill_qemu(trip.destination, trip.domain))
            with trip.migrating() as attempt:
                pass
            if attempt.failure is not None:
                wait_for(lambda: events.named("RBD_HANDOFF_BACK"), "the lock to be taken back", 10)
                break
        # It had been taken over already: the VM died with its host, which is right, but not this test.
        trip.starts_again(trip.source)
    else:
        pytest.fail("the destination was always faster")
    trip.goes_on(trip.source)


@on(FOLDER, SEEN)
def test_the_source_dies_after_the_destination_runs(trip: Trip) -> None:
    with events_of(trip.destination) as events:
        events.at_once("RBD_HANDOFF_TAKEN", lambda: kill_qemu(trip.source, trip.domain))
        with trip.migrating() as attempt:
            pass
        assert events.named("RBD_HANDOFF_TAKEN"), attempt.failure
    wait_for(lambda: trip.world.where(trip.domain), "the VM to run")
    trip.goes_on(trip.destination)


@on(NBD_CEPH)
def test_the_vm_dies_after_it_has_moved(trip: Trip) -> None:
    """With its destination; the one that left does not write any more, and the domain starts where it was."""
    trip.migrate()
    trip.world.check(trip.domain, trip.destination)
    kill_qemu(trip.destination, trip.domain)
    trip.starts_again(trip.source)
    trip.goes_on(trip.source)


@pytest.mark.parametrize("who", ["librbd", "ours"])
@on(CEPH, (CEPH,))
def test_a_third_client_wants_the_lock_in_the_gap(trip: Trip, who: str) -> None:
    """It asks from the moment the lock is offered: it waits, gets it from the VM's next host, and gives it back."""
    failures: list[BaseException] = []

    def want() -> None:
        try:
            write_as(who, trip.domain)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=want)
    with events_of(trip.source) as events:
        events.at_once("RBD_HANDOFF_OFFERED", thread.start)
        trip.migrate()
        assert events.named("RBD_HANDOFF_OFFERED")
    thread.join(60)
    assert not thread.is_alive() and not failures
    trip.goes_on(trip.destination)


def write_as(who: str, domain: Domain) -> None:
    """Behind the guest's ledger."""
    if who == "librbd":
        conf = domain.store.removeprefix("ceph:")
        run("/usr/bin/python3", "-c", LIBRBD, conf, domain.images[0])
        return
    with rados.Rados(conf={"rbdpy_store": domain.store}) as cluster, cluster.open_ioctx("rbd") as ioctx:
        with rbd.Image(ioctx, domain.images[0]) as image:
            image.write(b"third", image.size() - 512)


LIBRBD = """
import rados, rbd, sys
with rados.Rados(conffile=sys.argv[1]) as cluster, cluster.open_ioctx("rbd") as ioctx:
    with rbd.Image(ioctx, sys.argv[2]) as image:
        image.write(b"third", image.size() - 512)
"""


@pytest.mark.parametrize("then", ["forced", "destroyed"])
def test_somebody_breaks_the_lock_in_the_gap(world: World, then: str) -> None:
    """`rbd lock rm` fences the source and frees the lock: the destination refuses, and the VM's requests wait for a
    word, or end with it. A service that is fenced is fenced for all its VMs."""
    world.drop_kept()
    source, destination = world.hosts
    for _ in range(TRIES):
        domain = world.running("vhost-user", "ceph")
        with rados.Rados(conf={"rbdpy_store": domain.store}) as cluster, cluster.open_ioctx("rbd") as ioctx:
            with rbd.Image(ioctx, domain.images[0]) as image:
                broken = threading.Event()

                def grab(image: rbd.Image = image, broken: threading.Event = broken) -> None:
                    ((client, cookie, _),) = image.list_lockers()["lockers"]
                    with suppress(rbd.ImageNotFound):  # the destination was faster, the lock is another
                        image.break_lock(client, cookie)
                    broken.set()

                with events_of(source) as left, events_of(destination) as came:
                    left.at_once("RBD_HANDOFF_OFFERED", grab)
                    with world.migrating(domain, source, destination):
                        pass
                    assert broken.wait(30)
                    wait_for(lambda: came.named("RBD_HANDOFF_REFUSED") or came.named("RBD_HANDOFF_TAKEN"), "an end", 30)
                    refused, taken = (came.named(f"RBD_HANDOFF_{what}") for what in ("REFUSED", "TAKEN"))
        try:
            if refused:
                assert not taken
                at = len(domain.console)
                time.sleep(2)
                assert "STAMP-TICK" not in domain.console[at:], "the guest goes on without the lock"
                assert "refused" in destination.rbdpy("host", "status")
                if then == "destroyed":
                    seconds = watched_after_end(destination, domain)
                    assert seconds < GONE_SECONDS, f"watched for {seconds:.2f} s after the end of its QEMU"
                    assert domain.holder() is None
                    return
                destination.rbdpy("host", "force", domain.name)
                domain.wait_for_progress()
                assert domain.holder() == destination.name
                with pytest.raises(HostError, match="no disk of that VM waits"):
                    destination.rbdpy("host", "force", domain.uuid)
                return
        finally:
            for host in world.hosts:
                if host.state(domain.name) in ("running", "paused"):
                    host.virsh("destroy", domain.name)
                host.kill_service()
                host.start_service()
    pytest.fail("the destination was always faster")


def watched_after_end(host: Host, domain: Domain) -> float:
    """Destroys the VM: how long its disk is watched after its QEMU has ended."""
    (mine,) = [each for each in domain.ownership().others if each.answer and each.answer.host == host.name]
    store = connect(domain.store)
    pid = host.pid_of(domain.name)
    assert pid is not None
    process = os.pidfd_open(pid)
    destroy = threading.Thread(target=host.virsh, args=("destroy", domain.name))
    try:
        with ImageHandle.open(store.open("rbd"), domain.images[0], read_only=True) as handle:
            destroy.start()
            poll = select.poll()
            poll.register(process, select.POLLIN)
            assert poll.poll(30_000), "QEMU does not end"
            ended = time.monotonic()
            mark = (mine.gid, mine.handle)
            wait_for(lambda: mark not in {(row.gid, row.cookie) for row in watchers(handle)}, "the watch to go", 30)
            return time.monotonic() - ended
    finally:
        os.close(process)
        destroy.join(60)
        store.close()


@on(FOLDER)
def test_the_service_of_the_source_is_killed_in_precopy(trip: Trip) -> None:
    service_is_killed(trip, trip.source)


@on(CEPH)
def test_the_service_of_the_destination_is_killed_in_precopy(trip: Trip) -> None:
    service_is_killed(trip, trip.destination)


@on(FOLDER, (FOLDER,))
def test_the_service_of_the_destination_is_killed_as_the_vm_arrives(trip: Trip) -> None:
    """QEMU finds nobody to start the disk with, and does not try again before it is stopped and continued."""
    with events_of(trip.source) as events:
        events.at_once("RBD_HANDOFF_OFFERED", trip.destination.kill_service)
        with trip.migrating() as attempt:
            pass
    assert attempt.failure is None
    trip.destination.start_service()
    trip.goes_on(trip.destination)


def service_is_killed(trip: Trip, host: Host) -> None:
    """Long enough before the switch-over that QEMU, which tries once a second, is connected again: without its back end
    QEMU 7.2 moves a guest all the same, and forgets which requests were in flight."""
    slow(trip.source, trip.domain, 6)
    with trip.migrating() as attempt:
        attempt.wait_for_part(0.3)
        host.kill_service()
        host.start_service()
    trip.goes_on_somewhere()
    assert attempt.ended


@on(CEPH, (CEPH, NBD_CEPH))
def test_an_osd_stands_still_at_the_switch_over(trip: Trip) -> None:
    osds = [trip.world.cluster.daemon(name) for name in ("osd.0", "osd.1")]

    def freeze() -> None:
        for osd in osds:
            osd.send(signal.SIGSTOP)
        time.sleep(2)
        for osd in osds:
            osd.send(signal.SIGCONT)

    with events_of(trip.source) as events:
        events.at_once("RBD_HANDOFF_OFFERED", freeze)
        with trip.migrating():
            pass
    trip.goes_on_somewhere()


@on(CEPH, (CEPH,))
def test_an_osd_stands_still_at_the_take_over(trip: Trip) -> None:
    """From the offer until the next host has tried to take the lock for two seconds: requests wait, and go on."""
    osds = [trip.world.cluster.daemon(name) for name in ("osd.0", "osd.1")]
    still: list[float] = []

    def freeze() -> None:
        for osd in osds:
            osd.send(signal.SIGSTOP)
        try:
            wait_for(lambda: hand_off(trip.destination, trip.domain) == "taking-over", "the take-over", 20)
            begun = time.monotonic()
            time.sleep(2)
            assert hand_off(trip.destination, trip.domain) == "taking-over"
            still.append(time.monotonic() - begun)
        finally:
            for osd in osds:
                osd.send(signal.SIGCONT)

    with events_of(trip.source) as offers, events_of(trip.destination) as events:
        offers.at_once("RBD_HANDOFF_OFFERED", freeze)
        trip.migrate()
        wait_for(lambda: events.named("RBD_HANDOFF_TAKEN"), "the lock to be taken", 30)
        (taken,) = events.named("RBD_HANDOFF_TAKEN")
        assert still and taken["seconds"] >= still[0]
        assert not events.named("RBD_HANDOFF_REFUSED")
    trip.goes_on(trip.destination)


def hand_off(host: Host, domain: Domain) -> str:
    """What the service does about the lock of its disk."""
    (vm,) = ask(str(host.qmp), "rbd-vm-query", {"uuid": domain.uuid}, 10)
    return str(vm["disks"][0].get("hand-off", ""))


@on(CEPH, SEEN)
def test_the_service_of_the_source_stands_still_after_the_offer(trip: Trip) -> None:
    """The VM's next host needs no word of it, neither for the lock nor for its load."""
    with events_of(trip.source) as events:
        events.at_once("RBD_HANDOFF_OFFERED", lambda: trip.source.service.send_signal(signal.SIGSTOP))
        trip.migrate()
        assert events.named("RBD_HANDOFF_OFFERED")
    try:
        wait_for(lambda: trip.world.where(trip.domain) == [trip.destination], "the VM to run there alone", 30)
        for _ in range(3):
            trip.domain.wait_for_progress()
        assert trip.domain.holder() == trip.destination.name
    finally:
        trip.source.service.send_signal(signal.SIGCONT)
    trip.goes_on(trip.destination)

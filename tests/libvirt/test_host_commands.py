"""What an administrator types: attach an image, convert a domain by its name, put a new service in place."""

from __future__ import annotations

import re
import time

import pytest

from librbd_py import rados, rbd
from qemu_glue.host.ask import ask
from tests.libvirt.domains import Domain
from tests.libvirt.hosts import HostError, wait_for
from tests.libvirt.world import World

MIB = 1 << 20


def served(world: World, domain: Domain) -> set[str]:
    """Images that the VM has open on alpha."""
    (vm,) = ask(str(world.alpha.qmp), "rbd-vm-query", {"uuid": domain.uuid}, 10)
    assert vm["name"] == domain.name
    return {disk["image"] for disk in vm["disks"] if disk["clients"]}


@pytest.mark.parametrize("transport", ["vhost-user", "nbd"])
def test_an_image_is_attached_and_detached(world: World, transport: str) -> None:
    domain = world.running()
    image = f"{domain.name}-more"
    with rados.Rados(conf={"rbdpy_store": domain.store}) as cluster, cluster.open_ioctx("rbd") as ioctx:
        rbd.RBD().create(ioctx, image, 16 * MIB)
        domain.images += (image,)  # removed with the others
    disk = world.alpha.folder / "disk.xml"
    disk.write_text(world.alpha.rbdpy("libvirt", "disk", image, "vdk", "--transport", transport))
    world.alpha.virsh("attach-device", domain.name, disk)
    wait_for(lambda: served(world, domain) == {f"rbd/{name}" for name in domain.images}, "the image to be open")
    world.alpha.virsh("detach-device", domain.name, disk)
    wait_for(lambda: served(world, domain) == {f"rbd/{domain.images[0]}"}, "the image to be closed")
    world.check(domain, world.alpha)


def test_no_disk_of_what_is_not_there(world: World) -> None:
    with pytest.raises(HostError, match="disk: image rbd/none"):
        world.alpha.rbdpy("libvirt", "disk", "none", "vdk")
    with pytest.raises(HostError, match="no disk name"):
        world.alpha.rbdpy("libvirt", "disk", "none", "../x")


def test_a_domain_is_converted_by_name_and_back(world: World) -> None:
    domain = world.domain("vhost-user", "ceph")
    plain = world.alpha.folder / "plain.xml"
    plain.write_text(domain.xml())
    world.alpha.virsh("define", plain)
    before = world.alpha.virsh("dumpxml", "--inactive", domain.name)
    world.alpha.rbdpy("libvirt", "convert", domain.name, "--connect", world.alpha.uri, "--define")
    made = world.alpha.virsh("dumpxml", "--inactive", domain.name)
    assert "type='vhostuser'" in made
    assert "protocol='rbd'" not in re.sub(r"<metadata>.*</metadata>", "", made, flags=re.S)
    world.alpha.rbdpy("libvirt", "convert", domain.uuid, "--connect", world.alpha.uri, "--define", "--revert")
    after = world.alpha.virsh("dumpxml", "--inactive", domain.name)
    assert "vhostuser" not in after
    assert sorted(after.split()) == sorted(before.split())
    with pytest.raises(HostError, match="no domain with matching name"):
        world.alpha.rbdpy("libvirt", "convert", "nobody", "--connect", world.alpha.uri)


@pytest.mark.parametrize("transport", ["vhost-user", "nbd"])
def test_a_domain_is_converted_to_another_store_and_back(world: World, transport: str) -> None:
    """To a folder that the service has not as its own, by a name that needs escapes; the VM runs on it and migrates."""
    store = f"embedded:{world.machine.folder}/an 'other' & <store>"
    domain = world.domain(transport, "embedded", url=store)
    plain = world.alpha.folder / "plain.xml"
    plain.write_text(domain.xml())
    world.alpha.virsh("define", plain)
    before = world.alpha.virsh("dumpxml", "--inactive", domain.name)
    words = ("libvirt", "convert", domain.name, "--connect", world.alpha.uri, "--define")
    world.alpha.rbdpy("--store", store, *words, "--transport", transport)
    world.alpha.virsh("start", domain.name)
    domain.wait_for_console("GUEST-UP")
    world.check(domain, world.alpha)
    world.migrate(domain, world.alpha, world.beta)
    world.check(domain, world.beta)
    world.beta.virsh("destroy", domain.name)
    world.alpha.rbdpy(*words, "--revert")
    after = world.alpha.virsh("dumpxml", "--inactive", domain.name)
    assert sorted(after.split()) == sorted(before.split())


def test_the_service_is_upgraded_under_a_guest(world: World) -> None:
    domain = world.running()
    try:
        at = len(domain.console)
        said = world.alpha.rbdpy("host", "upgrade")
        assert "1 disk of guests" in said
        assert world.alpha.service.wait(10) == 0
        wait_for(lambda: "STAMP-TICK" in domain.console[at:], "the load to go on")
        world.check(domain, world.alpha)
        assert domain.name in world.alpha.rbdpy("host", "status")
    finally:
        if world.alpha.service.poll() is not None:  # the new one is nobody's child
            ask(str(world.alpha.qmp), "quit", {}, 10)
            wait_for(lambda: not world.alpha.serves(), "the new service to end")
            world.alpha.start_service()
    world.check(domain, world.alpha)


def test_a_guest_on_nbd_is_resumed(world: World) -> None:
    """QEMU's NBD client cannot wait: the guest stands still, unharmed, and goes on when the service is back."""
    domain = world.running("nbd")
    world.alpha.kill_service()
    wait_for(lambda: world.alpha.virsh("domstate", domain.name).strip() == "paused", "the guest to stand still")
    assert "I/O error" in world.alpha.virsh("domstate", "--reason", domain.name)
    at, begin = len(domain.console), time.monotonic()
    world.alpha.start_service()
    wait_for(lambda: "STAMP-TICK" in domain.console[at:], "the guest to go on", 60)
    assert time.monotonic() - begin < 60
    world.check(domain, world.alpha)

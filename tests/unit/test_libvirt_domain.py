"""Domain XML: disks converted to served ones and back, and XML nobody should believe."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from librbd_py.cli.main import main
from qemu_glue.libvirt import domain
from qemu_glue.libvirt.xml import DEPTH_MAX, SIZE_MAX, DomainXMLError, parse

UUID = "0d3c0c51-9b5c-4b6b-8f0b-8b0fd1b2a1aa"
DISK = """<disk type='network' device='disk'>
      <driver name='qemu' type='raw' cache='writeback' discard='unmap' queues='4'/>
      <auth username='vm'><secret type='ceph' uuid='{uuid}'/></auth>
      <source protocol='rbd' name='{name}'>
        <host name='192.0.2.1' port='6789'/>
        <config file='/etc/ceph/other.conf'/>
      </source>
      <target dev='{target}' bus='{bus}'/>
      <iotune><total_iops_sec>500</total_iops_sec></iotune>
      <serial>s-{target}</serial>
      <boot order='1'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
    </disk>"""
PLAIN = """<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>vm &amp; more</name>
  <uuid>{uuid}</uuid>
  <!-- a comment that stays -->
  {memory}<memory unit='MiB'>192</memory>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {disks}
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>
    <interface type='network'><source network='default'/></interface>
  </devices>
  <qemu:commandline><qemu:arg value='-name'/></qemu:commandline>
</domain>
"""


def disk(target: str = "vda", name: str = "rbd/vm1", bus: str = "virtio") -> str:
    return DISK.format(uuid=UUID, target=target, name=name, bus=bus)


def xml(*disks: str, memory: str = "") -> str:
    return PLAIN.format(uuid=UUID, disks="\n    ".join(disks or (disk(),)), memory=memory)


def canonical(text: str) -> str:
    return ElementTree.canonicalize(text, strip_text=True)


def served(text: str) -> list[domain.ServedDisk]:
    return domain.served_disks(parse(text))


def elements(text: str, path: str) -> Iterable[ElementTree.Element]:
    return ElementTree.fromstring(text).iterfind(path)


@pytest.mark.parametrize("transport", domain.TRANSPORTS)
def test_what_is_converted_and_reverted_is_as_it_was(transport: str) -> None:
    before = xml(disk("vda"), disk("vdb", "pool/name/image"))
    assert canonical(domain.revert(domain.convert(before, transport))) == canonical(before)


@pytest.mark.parametrize(
    "memory",
    [
        "<memoryBacking><hugepages/></memoryBacking>",
        "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
        "<memoryBacking><locked/></memoryBacking>",
        "<metadata><a:b xmlns:a='urn:a'>c</a:b></metadata>",
    ],
)
def test_memory_and_metadata_of_others_survive(memory: str) -> None:
    before = xml(memory=memory)
    converted = domain.convert(before)
    [access] = elements(converted, "memoryBacking/access")
    assert access.get("mode") == "shared"
    assert canonical(domain.revert(converted)) == canonical(before)


def test_a_vhost_user_disk_connects_to_the_service() -> None:
    converted = domain.convert(xml())
    [made] = [d for d in elements(converted, "devices/disk") if d.get("type") == "vhostuser"]
    source = made.find("source")
    assert source is not None
    assert source.get("path") == f"/run/rbdpy/{UUID}/vda.sock"
    assert source.find("reconnect[@enabled='yes']") is not None
    # libvirt 9.0 refuses each of these on a vhost-user disk
    assert not {"serial", "iotune", "readonly", "auth"} & {part.tag for part in made}
    driver = made.find("driver")
    assert driver is not None and dict(driver.attrib) == {"name": "qemu", "type": "raw", "queues": "4"}
    assert made.find("boot[@order='1']") is not None
    assert made.find("address[@bus='0x04']") is not None
    assert served(converted) == [
        domain.ServedDisk("vda", "vhost-user", "rbd", "vm1", store="ceph:/etc/ceph/other.conf?user=vm", queues=4)
    ]
    assert "192.0.2.1" not in "".join(part.get("name", "") for part in made.iter())


def test_an_nbd_disk_keeps_what_nbd_can() -> None:
    converted = domain.convert(xml(disk(bus="scsi")), "nbd")
    [made] = [d for d in elements(converted, "devices/disk") if d.find("source[@protocol='nbd']") is not None]
    host = made.find("source/host")
    assert host is not None and host.get("socket") == f"/run/rbdpy/{UUID}/vda.sock"
    assert made.findtext("serial") == "s-vda"
    assert made.findtext("iotune/total_iops_sec") == "500"
    assert not list(elements(converted, "memoryBacking"))


def test_a_snapshot_and_a_namespace_are_served_read_only() -> None:
    text = disk("vda", "pool/space/image").replace("<config", "<snapshot name='s1'/><config")
    [found] = served(domain.convert(xml(text)))
    assert (found.spec, found.read_only) == ("pool/space/image@s1", True)


def test_one_disk_of_two() -> None:
    before = xml(disk("vda"), disk("vdb"))
    one = domain.convert(before, targets={"vdb"})
    assert [d.target for d in served(one)] == ["vdb"]
    both = domain.convert(one)
    assert [d.target for d in served(both)] == ["vdb", "vda"]
    assert [d.target for d in served(domain.revert(both, {"vdb"}))] == ["vda"]
    assert canonical(domain.revert(both)) == canonical(before)
    with pytest.raises(DomainXMLError, match="vdz"):
        domain.convert(before, targets={"vdz"})
    with pytest.raises(DomainXMLError, match="vdz"):
        domain.revert(both, {"vdz"})


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (disk(bus="scsi"), "virtio"),
        (disk(name="justone"), "pool/image"),
        (disk(name="a/b/c/d"), "pool/image"),
        (disk(name="rbd/x@y"), "cannot be a name"),
        (disk("../../etc"), "no disk name"),
        (disk("vda" * 30), "no disk name"),
        (disk().replace("type='raw'", "type='qcow2'"), "qcow2"),
        (disk().replace("queues='4'", "queues='4000'"), "4000"),
        (disk().replace("<config", "<encryption format='luks'/><config"), "encrypted"),
    ],
)
def test_disks_that_cannot_be_served_are_refused(bad: str, why: str) -> None:
    with pytest.raises(DomainXMLError, match=why):
        domain.convert(xml(bad))


def test_private_memory_is_refused_for_vhost_user_only() -> None:
    text = xml(memory="<memoryBacking><access mode='private'/></memoryBacking>")
    with pytest.raises(DomainXMLError, match="shared"):
        domain.convert(text)
    domain.convert(text, "nbd")


BOMB = "<!DOCTYPE d [<!ENTITY a 'aaaaaaaaaa'>" + "".join(
    f"<!ENTITY {chr(98 + n)} '{('&' + chr(97 + n) + ';') * 10}'>" for n in range(9)
)


@pytest.mark.parametrize(
    ("hostile", "why"),
    [
        (BOMB + "]><domain>&j;</domain>", "DOCTYPE"),
        ("<!DOCTYPE d SYSTEM 'file:///etc/passwd'><domain/>", "DOCTYPE"),
        ("<!DOCTYPE d [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><domain>&x;</domain>", "DOCTYPE"),
        ("<domain>" + "<a>" * DEPTH_MAX + "</a>" * DEPTH_MAX + "</domain>", "deeper"),
        ("<domain>" + "<a>" * 200_000, "deeper"),
        ("<network/>", "not <domain>"),
        ("", "no element"),
        ("<domain>&undefined;</domain>", "undefined"),
        ("<domain><a></domain>", "mismatched"),
        ("<?xml version='1.0' encoding='klingon'?><domain/>", "encoding"),
        ("<domain>\x00</domain>", "token"),
        ("<domain>" + " " * SIZE_MAX + "</domain>", "more than"),
        ("<domain><uuid>../../../x</uuid></domain>", "uuid"),
    ],
)
def test_hostile_xml_is_refused_at_once(hostile: str, why: str) -> None:
    began = time.monotonic()
    with pytest.raises(DomainXMLError, match=why):
        domain.convert(hostile)
    with pytest.raises(DomainXMLError, match=why):
        domain.convert(hostile, store="embedded:/srv/rbd")
    if why != "uuid":  # the way back needs none
        with pytest.raises(DomainXMLError, match=why):
            domain.revert(hostile)
    assert time.monotonic() - began < 5  # not the hours an entity bomb takes


def metadata(*rows: str) -> str:
    inner = "".join(f"<r:disk {row}/>" for row in rows)
    return xml(memory=f"<metadata><r:disks xmlns:r='{domain.NAMESPACE}'>{inner}</r:disks></metadata>")


def test_metadata_written_by_hand() -> None:
    assert served(metadata("target='vdc' pool='p' image='i'")) == [domain.ServedDisk("vdc", "vhost-user", "p", "i")]
    # another namespace is none of ours
    assert not served(metadata("target='../x' pool='p' image='i'").replace(domain.NAMESPACE, "urn:other"))


@pytest.mark.parametrize(
    "rows",
    [
        ("target='vda' pool='p' image='i'", "target='vda' pool='p' image='j'"),
        ("target='vda' pool='p'",),
        ("target='vda' image='i'",),
        ("target='vda' pool='p' image='../i'",),
        ("target='vda' pool='p' image='i' transport='iscsi'",),
        ("target='vda' pool='p' image='i' queues='-1'",),
        ("target='vda' pool='p' image='i' store='a&#10;b'",),
        ("target='' pool='p' image='i'",),
    ],
)
def test_metadata_that_lies_is_refused(rows: tuple[str, ...]) -> None:
    with pytest.raises(DomainXMLError):
        served(metadata(*rows))


STORES = {
    "embedded:/srv/rbd": "embedded:/srv/rbd",
    "/srv/rbd": "embedded:/srv/rbd",
    "embedded:rbd": "embedded:{cwd}/rbd",
    "ceph": "ceph",
    "ceph:/etc/ceph/b.conf?user=vm&keyring=/k": "ceph:/etc/ceph/b.conf?user=vm&keyring=/k",
    "{cwd}/file.conf": "ceph:{cwd}/file.conf",
    "embedded:/srv/a&b \"c\" <d> 'e'; ${{f}} %41 ?g=h": "embedded:/srv/a&b \"c\" <d> 'e'; ${{f}} %41 ?g=h",
}


@pytest.mark.parametrize("transport", domain.TRANSPORTS)
@pytest.mark.parametrize("store", STORES)
def test_the_images_are_in_another_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, transport: str
) -> None:
    """Whatever cluster the XML names; other programs with other working folders find it, and all of it is kept."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.conf").touch()
    before = xml(disk("vda"), disk("vdb", "pool/name/image"))
    converted = domain.convert(before, transport, store=store.format(cwd=tmp_path))
    url = STORES[store].format(cwd=tmp_path)
    assert [(d.spec, d.store) for d in served(converted)] == [("rbd/vm1", url), ("pool/name/image", url)]
    assert canonical(domain.revert(converted)) == canonical(before)
    again = domain.convert(domain.revert(converted), transport)
    assert [d.store for d in served(again)] == ["ceph:/etc/ceph/other.conf?user=vm"] * 2


@pytest.mark.parametrize("store", ["memory:x", "", "embedded:", "embedded:/a\nb", "http:x", "embedded:/" + "a" * 5000])
def test_stores_that_nobody_could_open(store: str) -> None:
    with pytest.raises(OSError, match="store") as caught:
        domain.convert(xml(), store=store)
    assert caught.value.errno == errno.EINVAL


def test_from_the_shell(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(str(tmp_path)) / "vm.xml"
    file.write_text(xml())
    assert main(["libvirt", "convert", str(file)]) == 0
    converted = capsys.readouterr().out
    assert served(converted)
    file.write_text(converted)
    assert main(["libvirt", "convert", "--revert", str(file)]) == 0
    assert canonical(capsys.readouterr().out) == canonical(xml())
    file.write_text(xml())
    assert main(["--store", f"embedded:{tmp_path}/store", "libvirt", "convert", str(file)]) == 0
    assert [d.store for d in served(capsys.readouterr().out)] == [f"embedded:{tmp_path}/store"]
    assert not (file.parent / "store").exists()
    file.write_text("<!DOCTYPE x>")
    assert main(["libvirt", "convert", str(file)]) == 22
    assert "DOCTYPE" in capsys.readouterr().err

"""The RBD disks of a libvirt domain: those QEMU opens itself (<disk type='network'> with protocol rbd) and those this
service serves (vhost-user or NBD), and the way from the one to the other and back.

What libvirt has no place for in a served disk stands in <metadata>, in our namespace, one <disk> for each target:

    <rbdpy:disks xmlns:rbdpy='urn:librbd-py:disks:1' memory='added'>
      <rbdpy:disk target='vda' transport='vhost-user' pool='rbd' image='vm1' store='ceph:/etc/ceph/ceph.conf?user=vm'>
        ...the <disk> as it was, when it was converted...
      </rbdpy:disk>
    </rbdpy:disks>

The hook and the service believe this list and nothing else. A served disk loses what libvirt refuses there (cache mode,
serial, iotune; seen with 9.0.0), which is why the disk as it was is kept whole: `revert` puts it back.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from urllib.parse import quote
from xml.dom.minidom import Document, Element

from librbd_py.store import is_ceph
from qemu_glue.libvirt.xml import (
    SIZE_MAX,
    DomainXMLError,
    add,
    child,
    children,
    copied,
    parse,
    remove,
    replace,
    serialize,
    text_of,
)

NAMESPACE = "urn:librbd-py:disks:1"
RUN = "/run/rbdpy"  # where the service's sockets are
TRANSPORTS = ("vhost-user", "nbd")
DISKS_MAX = 1024  # of one domain
SIZE_LIMIT = SIZE_MAX + 1  # bytes worth reading of a file: one more is too many
_TARGET = re.compile(r"[a-z]{1,8}[0-9]{0,4}\Z")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_NAME_MAX = 4096  # bytes of a pool, namespace or image name


@dataclass(frozen=True)
class ServedDisk:
    """One disk that the service serves to a domain."""

    target: str  # vda, ...; unique in a domain
    transport: str  # one of TRANSPORTS
    pool: str
    image: str
    namespace: str = ""
    snapshot: str = ""
    store: str = ""  # a store URL; empty: the service's own
    read_only: bool = False
    queues: int = 1

    @property
    def spec(self) -> str:
        """pool/[namespace/]image[@snapshot]"""
        place = f"{self.pool}/{self.namespace}/" if self.namespace else f"{self.pool}/"
        return place + self.image + (f"@{self.snapshot}" if self.snapshot else "")


def socket_path(uuid: str, target: str, run: str = RUN) -> str:
    """Where the service listens for a domain's disk: the uuid, because names may be long and have any character."""
    return f"{run}/{uuid}/{target}.sock"


def uuid_of(document: Document) -> str:
    """DomainXMLError: none, or not one."""
    assert document.documentElement is not None
    uuid = text_of(child(document.documentElement, "uuid")).strip().lower()
    if not _UUID.match(uuid):
        raise DomainXMLError(f"<uuid> {uuid!r} is none")
    return uuid


def name_of(document: Document) -> str:
    assert document.documentElement is not None
    return text_of(child(document.documentElement, "name"))


def served_disks(document: Document) -> list[ServedDisk]:
    """What <metadata> says the service has to serve. DomainXMLError: a disk twice, or one that is none."""
    disks: dict[str, ServedDisk] = {}
    for element in _entries(document):
        disk = checked(
            ServedDisk(
                target=element.getAttribute("target"),
                transport=element.getAttribute("transport") or "vhost-user",
                pool=element.getAttribute("pool"),
                image=element.getAttribute("image"),
                namespace=element.getAttribute("namespace"),
                snapshot=element.getAttribute("snapshot"),
                store=element.getAttribute("store"),
                read_only=_yes(element.getAttribute("readonly")),
                queues=_number(element.getAttribute("queues") or "1", "queues", 1, 256),
            )
        )
        if disk.target in disks:
            raise DomainXMLError(f"disk {disk.target} is named twice")
        if len(disks) == DISKS_MAX:
            raise DomainXMLError(f"more than {DISKS_MAX} disks")
        disks[disk.target] = disk
    return list(disks.values())


def convert(
    text: str | bytes,
    transport: str = "vhost-user",
    targets: set[str] | None = None,
    run: str = RUN,
    store: str | None = None,
) -> str:
    """The domain with its rbd disks (all, or those of `targets`) served by this service. Everything else stays.

    `store`: the URL of the store that has the images, an embedded one for example; None: the cluster that the XML
    names.

    DomainXMLError: hostile or unknown XML; a target that is no rbd disk; a disk that cannot be served this way (a
    vhost-user disk needs bus virtio). EINVAL: a store or transport that cannot be served.
    """
    url = None if store is None else lasting(store)
    if transport not in TRANSPORTS:
        raise OSError(errno.EINVAL, f"transport {transport!r} is none of {', '.join(TRANSPORTS)}")
    document = parse(text)
    uuid = uuid_of(document)
    wanted = dict(_rbd_disks(document))
    unknown = (targets or set()) - wanted.keys()
    if unknown:
        raise DomainXMLError(f"no disk with protocol rbd has the target {', '.join(sorted(unknown))}")
    known = {disk.target for disk in served_disks(document)}
    for target, element in wanted.items():
        if targets is not None and target not in targets:
            continue
        if target in known:
            raise DomainXMLError(f"disk {target} is served already")
        disk = checked(_from_rbd(target, transport, element, url))
        served = _serving(document, disk, element, socket_path(uuid, target, run))
        replace(element, served)
        _remember(document, disk, element)
    if transport == "vhost-user" and wanted:
        _share_memory(document)
    return serialize(document)


def revert(text: str | bytes, targets: set[str] | None = None) -> str:
    """The domain as it was before `convert`. DomainXMLError also for a target that was not converted."""
    document = parse(text)
    assert document.documentElement is not None
    entries = {element.getAttribute("target"): element for element in _entries(document)}
    unknown = (targets or set()) - entries.keys()
    if unknown:
        raise DomainXMLError(f"not served: {', '.join(sorted(unknown))}")
    devices = child(document.documentElement, "devices")
    for target, entry in entries.items():
        original = child(entry, "disk")
        if (targets is not None and target not in targets) or original is None or devices is None:
            continue
        for element in children(devices, "disk"):
            if _target(element) == target:
                replace(element, copied(original))
        remove(entry)
    _forget_if_empty(document)
    return serialize(document)


def attachable(path: str, target: str, transport: str = "vhost-user") -> str:
    """The <disk> to attach an image by the socket the service has for it. DomainXMLError: no such target."""
    if not _TARGET.match(target):
        raise DomainXMLError(f"target {target!r} is no disk name")
    made = Document().createElement("disk")
    made.setAttribute("device", "disk")
    _connect(made, transport, path, "")
    add(made, "target", dev=target, bus="virtio")
    return str(made.toprettyxml(indent="  "))


def _connect(made: Element, transport: str, path: str, name: str, queues: int = 1) -> None:
    """Type, <driver> and <source> of a served <disk>."""
    driver = add(made, "driver", name="qemu", type="raw")
    if transport == "vhost-user":
        made.setAttribute("type", "vhostuser")
        if queues > 1:
            driver.setAttribute("queues", str(queues))
        # Without it a restarted service is never connected to again; with it QEMU waits for a socket that is not there,
        # so the hook's `prepare` answers only when it listens.
        add(add(made, "source", type="unix", path=path), "reconnect", enabled="yes", timeout="1")
    else:
        made.setAttribute("type", "network")
        driver.setAttribute("cache", "none")
        # libvirt drops NBD's reconnect delay: an outage stops the guest's request instead of failing it.
        driver.setAttribute("error_policy", "stop")
        driver.setAttribute("rerror_policy", "stop")
        add(add(made, "source", protocol="nbd", name=name), "host", transport="unix", socket=path)


def _rbd_disks(document: Document) -> list[tuple[str, Element]]:
    assert document.documentElement is not None
    devices = child(document.documentElement, "devices")
    found = []
    for element in children(devices, "disk") if devices is not None else ():
        source = child(element, "source")
        if (
            element.getAttribute("type") == "network"
            and source is not None
            and source.getAttribute("protocol") == "rbd"
        ):
            found.append((_target(element), element))
    return found


def lasting(store: str) -> str:
    """The URL as other programs with other working folders understand it. EINVAL: there is none."""
    kind, colon, rest = store.partition(":")
    if is_ceph(store):
        if kind in ("ceph", "rados"):
            return store
        return "ceph:" + quote(os.path.abspath(store))
    path = rest if colon and kind == "embedded" else store
    if not path or (colon and kind != "embedded" and "/" not in kind):
        raise OSError(errno.EINVAL, f"store {store!r} is no folder and no cluster that the host service could open")
    return "embedded:" + os.path.abspath(path)


def _from_rbd(target: str, transport: str, element: Element, store: str | None) -> ServedDisk:
    """What QEMU's own driver would open, or the image of that name in `store`. A name is pool/[namespace/]image, as
    QEMU's rbd driver splits it."""
    source = child(element, "source")
    assert source is not None
    parts = source.getAttribute("name").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise DomainXMLError(f"disk {target}: source name {source.getAttribute('name')!r} is not pool/image")
    driver = child(element, "driver")
    kind = driver.getAttribute("type") if driver is not None else "raw"
    if kind not in ("", "raw"):
        raise DomainXMLError(f"disk {target} holds {kind}; only raw disks can be served")
    at = child(element, "target")
    if transport == "vhost-user" and at is not None and at.getAttribute("bus") not in ("", "virtio"):
        raise DomainXMLError(f"disk {target}: vhost-user needs bus='virtio'; use nbd")
    if child(element, "encryption") is not None or child(source, "encryption") is not None:
        raise DomainXMLError(f"disk {target} is encrypted by QEMU; such a disk is not served")
    snapshot = child(source, "snapshot")
    return ServedDisk(
        target,
        transport,
        pool=parts[0],
        image=parts[-1],
        namespace=parts[1] if len(parts) == 3 else "",
        snapshot=snapshot.getAttribute("name") if snapshot is not None else "",
        store=_store_of(source, element) if store is None else store,
        read_only=child(element, "readonly") is not None or snapshot is not None,
        queues=_number(driver.getAttribute("queues") or "1", "queues", 1, 256) if driver is not None else 1,
    )


def _store_of(source: Element, element: Element) -> str:
    """ceph:CONF?user=NAME. Monitors and secrets in the XML are not taken over: the cluster's own configuration and the
    user's keyring on this host are, because a secret has no business in metadata."""
    config = child(source, "config")
    auth = child(source, "auth") or child(element, "auth")
    path = config.getAttribute("file") if config is not None else ""
    user = auth.getAttribute("username") if auth is not None else ""
    return "ceph" + (f":{quote(path)}" if path else "") + (f"?user={quote(user)}" if user else "")


def _serving(document: Document, disk: ServedDisk, was: Element, path: str) -> Element:
    """The <disk> that connects to the service's socket. Target, boot order, address and alias are kept."""
    target = child(was, "target")
    assert target is not None  # its name was checked
    made = document.createElement("disk")
    made.setAttribute("device", was.getAttribute("device") or "disk")
    _connect(made, disk.transport, path, disk.target, disk.queues)
    if disk.transport == "vhost-user":
        kept = {"boot", "alias", "address"}
    else:
        kept = {"boot", "alias", "address", "serial", "wwn", "vendor", "product", "iotune", "readonly", "shareable"}
    made.appendChild(copied(target))
    for element in children(was):
        if element.tagName in kept:
            made.appendChild(copied(element))
    return made


def _share_memory(document: Document) -> None:
    """vhost-user needs guest memory that another process can map: memfd, shared. What was there is kept or refused."""
    root = document.documentElement
    assert root is not None
    backing = child(root, "memoryBacking")
    made = backing is None
    if backing is None:
        backing = add(root, "memoryBacking")
    access = child(backing, "access")
    if access is not None and access.getAttribute("mode") == "shared":
        return
    if access is not None:
        raise DomainXMLError("memoryBacking has private access; vhost-user needs mode='shared', or use nbd")
    if child(backing, "source") is None and child(backing, "hugepages") is None:
        add(backing, "source", type="memfd")
    add(backing, "access", mode="shared")
    _holder(document).setAttribute("memory", "made" if made else "added")


def _forget_if_empty(document: Document) -> None:
    """The last disk that went takes our <metadata> with it, and the shared memory when that came with us."""
    root = document.documentElement
    assert root is not None
    metadata = child(root, "metadata")
    holder = _find_holder(metadata)
    if metadata is None or holder is None or any(children(holder)):
        return
    backing = child(root, "memoryBacking")
    how = holder.getAttribute("memory")
    if backing is not None and how == "made":
        remove(backing)
    elif backing is not None and how == "added":
        for name in ("access", "source"):
            element = child(backing, name)
            if element is not None and (name == "access" or element.getAttribute("type") == "memfd"):
                remove(element)
    remove(holder)
    if not any(children(metadata)):
        remove(metadata)


def _remember(document: Document, disk: ServedDisk, was: Element) -> None:
    entry = document.createElementNS(NAMESPACE, "rbdpy:disk")
    fields = {
        "target": disk.target,
        "transport": disk.transport,
        "pool": disk.pool,
        "namespace": disk.namespace,
        "image": disk.image,
        "snapshot": disk.snapshot,
        "store": disk.store,
        "readonly": "yes" if disk.read_only else "",
        "queues": str(disk.queues) if disk.queues > 1 else "",
    }
    for name, value in fields.items():
        if value:
            entry.setAttribute(name, value)
    entry.appendChild(copied(was))
    _holder(document).appendChild(entry)


def _holder(document: Document) -> Element:
    """Our element in <metadata>, made when missing."""
    root = document.documentElement
    assert root is not None
    metadata = child(root, "metadata")
    if metadata is None:
        metadata = document.createElement("metadata")
        devices = child(root, "devices")
        root.insertBefore(metadata, devices)
    holder = _find_holder(metadata)
    if holder is None:
        holder = document.createElementNS(NAMESPACE, "rbdpy:disks")
        holder.setAttributeNS("http://www.w3.org/2000/xmlns/", "xmlns:rbdpy", NAMESPACE)
        metadata.appendChild(holder)
    return holder


def _find_holder(metadata: Element | None) -> Element | None:
    for element in children(metadata) if metadata is not None else ():
        if element.namespaceURI == NAMESPACE and element.localName == "disks":
            return element
    return None


def _entries(document: Document) -> list[Element]:
    assert document.documentElement is not None
    holder = _find_holder(child(document.documentElement, "metadata"))
    return [
        element
        for element in (children(holder) if holder is not None else ())
        if element.namespaceURI == NAMESPACE and element.localName == "disk"
    ]


def _target(element: Element) -> str:
    target = child(element, "target")
    return target.getAttribute("dev") if target is not None else ""


def _yes(text: str) -> bool:
    return text in ("yes", "on", "true", "1")


def _number(text: str, what: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        raise DomainXMLError(f"{what} {text!r} is not a number from {low} to {high}")
    return int(text)


def checked(disk: ServedDisk) -> ServedDisk:
    """Names become paths and command lines further on: here is where they are looked at."""
    if not _TARGET.match(disk.target):
        raise DomainXMLError(f"target {disk.target!r} is no disk name")
    if disk.transport not in TRANSPORTS:
        raise DomainXMLError(f"disk {disk.target}: transport {disk.transport!r} is none of {', '.join(TRANSPORTS)}")
    for what, value, needed in (
        ("pool", disk.pool, True),
        ("image", disk.image, True),
        ("namespace", disk.namespace, False),
        ("snapshot", disk.snapshot, False),
    ):
        bad = "/" in value or "@" in value or not value.isprintable() or len(value.encode(errors="replace")) > _NAME_MAX
        if bad or (needed and not value):
            raise DomainXMLError(f"disk {disk.target}: {what} {value[:80]!r} cannot be a name")
    if not disk.store.isprintable() or len(disk.store) > _NAME_MAX:
        raise DomainXMLError(f"disk {disk.target}: the store cannot be a URL")
    return disk

"""The arguments of the host service's QMP commands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qemu_glue.arguments import Field, check
from qemu_glue.libvirt.domain import DISKS_MAX, TRANSPORTS, ServedDisk, checked
from qemu_glue.libvirt.xml import DomainXMLError
from qemu_glue.qmp_wire import QMPError

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")

DISK = {
    "target": Field(str, required=True, max_length=12),
    "transport": Field(str, default="vhost-user", choices=TRANSPORTS),
    "pool": Field(str, required=True),
    "namespace": Field(str, default=""),
    "image": Field(str, required=True),
    "snapshot": Field(str, default=""),
    "store": Field(str, default=""),
    "read-only": Field(bool, default=False),
    "queues": Field(int, default=1, low=1, high=256),
}
PREPARE = {
    "uuid": Field(str, required=True, max_length=36),
    "name": Field(str, default=""),
    "incoming": Field(bool, default=False),
    "disks": Field(list, required=True),
    "sockets": Field(list, default=[]),  # image sockets that the VM uses beside: must be there too
}
VM = {"uuid": Field(str, required=True, max_length=36)}
RECONNECT = {**VM, "name": Field(str, default=""), "disks": Field(list), "sockets": Field(list, default=[])}
QUERY = {"uuid": Field(str, max_length=36)}
IMAGE_SOCKET = {
    "pool": Field(str, required=True),
    "namespace": Field(str, default=""),
    "image": Field(str, required=True),
    "transport": Field(str, default="vhost-user", choices=TRANSPORTS),
    "queues": Field(int, default=1, low=1, high=256),
}


def uuid_in(text: str) -> str:
    uuid = text.lower()
    if not _UUID.match(uuid):
        raise QMPError(f"Parameter 'uuid' does not accept value '{text}'")
    return uuid


def disks_in(value: list[Any]) -> list[ServedDisk]:
    """QMPError: one that is none, twice the same target, too many."""
    if len(value) > DISKS_MAX:
        raise QMPError(f"more than {DISKS_MAX} disks")
    disks: dict[str, ServedDisk] = {}
    for item in value:
        if not isinstance(item, dict):
            raise QMPError("Invalid parameter type for 'disks', expected: array of objects")
        disk = disk_in(item)
        if disk.target in disks:
            raise QMPError(f"disk {disk.target} is named twice")
        disks[disk.target] = disk
    return list(disks.values())


def disk_in(item: Mapping[str, Any]) -> ServedDisk:
    said = check(item, DISK, "disks.")
    try:
        return checked(
            ServedDisk(
                target=said["target"],
                transport=said["transport"],
                pool=said["pool"],
                image=said["image"],
                namespace=said["namespace"],
                snapshot=said["snapshot"],
                store=said["store"],
                read_only=said["read-only"],
                queues=said["queues"],
            )
        )
    except DomainXMLError as error:
        raise QMPError(str(error.strerror).removeprefix("domain XML: ")) from None


def disk_out(disk: ServedDisk) -> dict[str, Any]:
    """What disk_in() reads."""
    return {
        "target": disk.target,
        "transport": disk.transport,
        "pool": disk.pool,
        "namespace": disk.namespace,
        "image": disk.image,
        "snapshot": disk.snapshot,
        "store": disk.store,
        "read-only": disk.read_only,
        "queues": disk.queues,
    }


def paths_in(value: list[Any]) -> list[str]:
    if len(value) > DISKS_MAX or not all(isinstance(p, str) and 0 < len(p) < 4096 and "\0" not in p for p in value):
        raise QMPError("Invalid parameter type for 'sockets', expected: array of paths")
    return value

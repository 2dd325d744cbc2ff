"""libvirt's hook for QEMU domains: one question to the host service, and the exit code that libvirt understands.

    hook NAME OPERATION SUB-OPERATION -      the domain's XML on standard input

Only `prepare` may refuse, which keeps a VM from starting or from coming here. Everything else answers 0 whatever
happens: a failing `started` or `reconnect` would kill a guest that runs. Nothing is ever printed on standard output,
which libvirt takes for a new XML in some operations, and libvirt is never called: it waits for this program. Domains
that use none of our sockets are none of our business, also when the service is down.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from xml.dom.minidom import Document

    from qemu_glue.libvirt import domain

# What is imported later costs as much as starting Python, and most hooks are for domains that are not ours.
CONFIG = "/etc/rbdpy/host.json"
OURS = (b"urn:librbd-py:disks:1", b"/image/")  # one of them is in every domain that uses our sockets
SIZE_LIMIT = (4 << 20) + 1  # bytes read; one more than is accepted
SECONDS = 5.0  # for the service to answer
HARD_SECONDS = 20.0  # whatever happens, this program ends
REFUSES = "prepare"
VERBS = {
    "migrate": "rbd-vm-incoming",  # on the destination, just before `prepare`
    "prepare": "rbd-vm-prepare",
    "started": "rbd-vm-started",
    "stopped": "rbd-vm-stopped",
    "release": "rbd-vm-release",
    "reconnect": "rbd-vm-reconnect",
}


def main(argv: list[str] | None = None, config: str = CONFIG, hard_seconds: float = HARD_SECONDS) -> int:
    words = sys.argv[1:] if argv is None else argv
    operation = words[1] if len(words) > 1 else ""
    code = 1 if operation == REFUSES else 0
    if operation not in VERBS:
        return 0
    signal.signal(signal.SIGALRM, lambda *_: _end(code, f"no end after {hard_seconds:g} seconds"))
    signal.setitimer(signal.ITIMER_REAL, hard_seconds)
    try:
        text = sys.stdin.buffer.read(SIZE_LIMIT)
        if not any(mark in text for mark in OURS):
            return 0
        return code if _tell(operation, text, config) else 0
    except Exception as failure:  # a defect must not end a guest either
        _say(f"{operation}: {failure!r}")
        return code
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _tell(operation: str, text: bytes, config: str) -> bool:
    """True when it was refused, or nobody could be asked; the reason was said."""
    from qemu_glue.host.ask import ServiceError, ask
    from qemu_glue.host.config import load
    from qemu_glue.libvirt import domain
    from qemu_glue.libvirt.xml import DomainXMLError, parse

    try:
        settings = load(config)
    except OSError as error:
        _say(str(error.strerror))
        return True
    try:
        document = parse(text)
        disks = domain.served_disks(document)
        sockets = image_sockets(document, settings.run)
        uuid, name = domain.uuid_of(document), domain.name_of(document)
    except DomainXMLError as error:
        if OURS[0] not in text and f"{settings.run}/image/".encode() not in text:
            return False  # not ours
        _say(str(error.strerror))
        return True
    if not disks and not sockets:
        return False
    arguments: dict[str, object] = {"uuid": uuid}
    if operation in ("prepare", "reconnect"):
        arguments |= {"name": name[:256], "disks": [described(disk) for disk in disks], "sockets": sockets}
    try:
        ask(settings.qmp, VERBS[operation], arguments, SECONDS)
    except ServiceError as error:
        _say(f"{name[:256]}: {error.strerror}")
    except TimeoutError:
        _say(f"the host service does not answer within {SECONDS:g} seconds ({settings.qmp})")
    except (FileNotFoundError, ConnectionRefusedError):
        _say(f"the host service does not run ({settings.qmp}): systemctl start rbdpyd, or rbdpy host serve")
    except OSError as error:
        _say(f"the host service cannot be asked ({settings.qmp}): {error.strerror or error}")
    else:
        return False
    return True


def described(disk: domain.ServedDisk) -> dict[str, object]:
    """As the service's commands have it."""
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


def image_sockets(document: Document, run: str) -> list[str]:
    """Sockets of images that disks of the domain use: attached without a hook, and there when it starts again."""
    from qemu_glue.libvirt.xml import child, children

    root = document.documentElement
    devices = child(root, "devices") if root is not None else None
    found = []
    for disk in children(devices, "disk") if devices is not None else ():
        source = child(disk, "source")
        if source is None:
            continue
        host = child(source, "host")
        for path in (source.getAttribute("path"), host.getAttribute("socket") if host is not None else ""):
            if path.startswith(f"{run}/image/"):
                found.append(path)
    return found


def _say(text: str) -> None:
    print(f"rbdpy: {text}", file=sys.stderr, flush=True)


def _end(code: int, text: str) -> NoReturn:
    _say(text)
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())

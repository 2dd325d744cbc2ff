"""The few things asked of libvirt, each by a process of its own that uses libvirt's Python binding: a libvirtd that
hangs is a timeout of ours and no thread that never ends.

    python -m qemu_glue.libvirt.client OPERATION URI DOMAIN      (define: the XML on standard input)
"""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from typing import Any

from qemu_glue.libvirt.domain import SIZE_LIMIT

URI = "qemu:///system"
SECONDS = 30.0
MISSING = "libvirt's Python binding is not installed: pip install 'librbd-py[host]' (needs libvirt-dev)"


def domain_xml(uri: str, domain: str) -> bytes:
    """The persistent XML of a domain given by name, number or uuid; secrets included, so that `define` keeps them."""
    return _ask("xml", uri, domain).encode()[:SIZE_LIMIT]


def define(uri: str, text: str) -> None:
    """Takes effect when the domain starts next."""
    _ask("define", uri, "", text)


def paused_by_an_error(uri: str, domain: str, seconds: float) -> bool:
    """Whether the domain stands still because a disk failed a request."""
    return _ask("paused-by-error", uri, domain, seconds=seconds) == "yes"


def running(uri: str, domain: str, seconds: float) -> bool:
    return _ask("running", uri, domain, seconds=seconds) == "yes"


def suspend(uri: str, domain: str, seconds: float) -> None:
    _ask("suspend", uri, domain, seconds=seconds)


def resume(uri: str, domain: str, seconds: float) -> None:
    _ask("resume", uri, domain, seconds=seconds)


def _ask(operation: str, uri: str, domain: str, text: str = "", seconds: float = SECONDS) -> str:
    """OSError: ETIMEDOUT; EIO with what libvirt complains of."""
    argv = [sys.executable, "-m", "qemu_glue.libvirt.client", operation, uri, domain]
    try:
        done = subprocess.run(argv, input=text.encode(), capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise OSError(errno.ETIMEDOUT, f"libvirt ({uri}) does not answer within {seconds:g} seconds") from None
    if done.returncode:
        raise OSError(errno.EIO, done.stderr.decode(errors="replace").strip())
    return done.stdout.decode(errors="replace")


def main(operation: str, uri: str, name: str) -> int:
    try:
        import libvirt
    except ImportError:
        print(MISSING, file=sys.stderr)
        return 1
    libvirt.registerErrorHandler(lambda *_: None, None)  # else it prints what we print
    try:
        connection = libvirt.open(uri)
        if operation == "define":
            connection.defineXML(sys.stdin.read(SIZE_LIMIT))
            return 0
        domain = find(connection, name)
        if operation == "xml":
            flags = libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_INACTIVE
            sys.stdout.write(domain.XMLDesc(flags))
        elif operation == "paused-by-error":
            sys.stdout.write("yes" if stands_for_an_error(domain) else "no")
        elif operation == "running":
            sys.stdout.write("yes" if domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING else "no")
        elif operation == "suspend":
            domain.suspend()
        elif operation == "resume":
            domain.resume()
    except libvirt.libvirtError as error:
        print(error.get_error_message() or error, file=sys.stderr)
        return 1
    return 0


def stands_for_an_error(domain: Any) -> bool:
    """libvirt gives another reason for a guest that stopped while it arrived by migration; QEMU still says which disk
    failed a request since the guest was last continued."""
    import libvirt

    state, reason = domain.state()
    if state != libvirt.VIR_DOMAIN_PAUSED:
        return False
    if reason in (libvirt.VIR_DOMAIN_PAUSED_USER, libvirt.VIR_DOMAIN_PAUSED_UNKNOWN):
        return bool(domain.diskErrors())
    return bool(reason == libvirt.VIR_DOMAIN_PAUSED_IOERROR)


def find(connection: Any, name: str) -> Any:
    """By number, uuid or name, as virsh does."""
    import libvirt

    if name.isdigit():
        try:
            return connection.lookupByID(int(name))
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
    if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", name):
        return connection.lookupByUUIDString(name)
    return connection.lookupByName(name)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))

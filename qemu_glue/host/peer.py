"""Who connected: the process at the other end of a Unix socket, and what its command line says of its VM.

What a command line says is the process's own word: it names things in logs and tells a migration's destination from
its source. It gives no rights: who may connect is decided by the socket's mode and the kernel's word for the uid.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import socket
import struct
from dataclasses import dataclass

SO_PEERPIDFD = 77  # Linux 6.5
COMMAND_LINE_MAX = 1 << 20  # bytes read of /proc/PID/cmdline; libvirt's for a hundred disks are 60 KiB
NAME_MAX = 256  # characters kept of a VM's name
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_CREDENTIALS = struct.Struct("iII")  # struct ucred


@dataclass(frozen=True)
class Identity:
    """What a QEMU's command line says. Empty: it does not say."""

    uuid: str = ""
    name: str = ""
    incoming: bool = False

    @property
    def key(self) -> str:
        """The VM as a hand-off of the exclusive lock names it; "*" when unknown."""
        return f"uuid:{self.uuid}" if self.uuid else f"name:{self.name}" if self.name else "*"


@dataclass(frozen=True)
class Peer:
    """The connected process. `pidfd` is open until close(); -1 when the process is out of sight (another pid
    namespace)."""

    pid: int
    uid: int
    gid: int
    pidfd: int
    identity: Identity
    elder: bool = False  # it ran before this process: what its command line says of its start may be long past

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)


def peer_of(sock: socket.socket) -> Peer:
    """ESRCH: it is gone already."""
    pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if pid <= 0:
        return Peer(0, uid, gid, -1, Identity())
    pidfd = _pidfd(sock, pid)
    try:
        identity = identity_of(pid)
        elder = started(pid) < started(os.getpid())
        if _dead(pidfd):  # then the pid may be somebody else's by now
            raise OSError(errno.ESRCH, f"process {pid} is gone")
    except BaseException:
        os.close(pidfd)
        raise
    return Peer(pid, uid, gid, pidfd, identity, elder)


def _pidfd(sock: socket.socket, pid: int) -> int:
    with contextlib.suppress(OSError):
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    pidfd = os.pidfd_open(pid)
    # Without the kernel's own pidfd: as long as nobody hung up, the process that connected has most likely not gone.
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    if any(events & (select.POLLHUP | select.POLLRDHUP) for _, events in poll.poll(0)):
        os.close(pidfd)
        raise OSError(errno.ESRCH, f"process {pid} is gone")
    return pidfd


def _dead(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def identity_of(pid: int) -> Identity:
    """From /proc/PID/cmdline. Nothing known of a process that is gone or may not be looked at."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return parse_command_line(file.read(COMMAND_LINE_MAX))
    except OSError:
        return Identity()


def started(pid: int) -> int:
    """When a process began, in clock ticks since the machine did; 0: it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read(4096).rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def parse_command_line(line: bytes) -> Identity:
    """QEMU's options -uuid, -name [guest=]NAME,... and -incoming, with one dash or two. The last one counts."""
    uuid = name = ""
    incoming = False
    words = iter(line.split(b"\0"))
    next(words)  # the program
    for word in words:
        option = word[1:] if word.startswith(b"--") else word
        if option == b"-uuid":
            said = next(words, b"").decode("ascii", "replace").lower()
            uuid = said if _UUID.match(said) else ""
        elif option == b"-name":
            name = _guest_name(next(words, b"").decode("utf-8", "replace"))
        elif option == b"-incoming":
            incoming = bool(next(words, b""))
    return Identity(uuid, name, incoming)


def _guest_name(value: str) -> str:
    """QEMU's option list: the first item may stand without its key; a comma in a value is doubled."""
    for number, item in enumerate(value.replace(",,", "\0").split(",")):
        key, equals, rest = item.partition("=")
        if key == "guest" and equals:
            return _shown(rest.replace("\0", ","))
        if number == 0 and not equals:
            return _shown(item.replace("\0", ","))
    return ""


def _shown(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name[:NAME_MAX])


def vms_running() -> set[str]:
    """The uuids of all QEMU processes of this host (of its UTS namespace: several stand-in hosts share a process
    table). Milliseconds."""
    here = _uts("self")
    found = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                line = file.read(COMMAND_LINE_MAX)
        except OSError:
            continue
        if b"-uuid\0" in line:
            uuid = parse_command_line(line).uuid
            if uuid and _uts(entry) == here:
                found.add(uuid)
    return found


def _uts(pid: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/uts")
    except OSError:
        return ""

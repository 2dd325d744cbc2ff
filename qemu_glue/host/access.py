"""Who may connect to a disk's socket: the user libvirt runs QEMU as, and root.

libvirt neither chowns nor relabels the sockets of vhost-user and NBD disks, so they are given to QEMU's group. A socket
that QEMU cannot reach makes `virsh start` wait for ever (the chardev tries again and again), so it is checked
beforehand.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import stat
from dataclasses import dataclass
from pathlib import Path

QEMU_CONF = "/etc/libvirt/qemu.conf"
_SETTING = re.compile(r"""\s*(user|group)\s*=\s*"([^"]*)"\s*(#.*)?\Z""")
# Debian's and Ubuntu's, then Fedora's, SUSE's and Arch's.
DEFAULTS = (("libvirt-qemu", "kvm"), ("qemu", "qemu"), ("nobody", "kvm"))


@dataclass(frozen=True)
class Allowed:
    """The user whose QEMU may connect. `gid` is the group that sockets get."""

    uid: int
    gid: int
    groups: frozenset[int]  # all of that user's

    def admits(self, uid: int) -> bool:
        return uid in (0, os.geteuid(), self.uid)


def qemu_user(user: str | None = None, group: str | None = None, conf: str = QEMU_CONF) -> Allowed:
    """By the arguments, else by qemu.conf, else what the distribution's libvirt uses, else this process's own. ENOENT:
    a user or group that is not there."""
    said = _settings(conf)
    user, group = user or said.get("user"), group or said.get("group")
    if user is None and group is None:
        for known, its in DEFAULTS:
            try:
                uid = pwd.getpwnam(known).pw_uid
                return _allowed(uid, grp.getgrnam(its).gr_gid, known)
            except KeyError:
                continue
    try:
        entry = _user(user) if user is not None else None
        gid = _group(group) if group is not None else entry.pw_gid if entry is not None else os.getegid()
        return _allowed(entry.pw_uid if entry is not None else os.geteuid(), gid, entry.pw_name if entry else None)
    except KeyError as error:
        raise OSError(errno.ENOENT, f"QEMU's user or group is not there: {error}") from None


def _allowed(uid: int, gid: int, name: str | None) -> Allowed:
    groups = os.getgrouplist(name, gid) if name is not None else os.getgroups()
    return Allowed(uid, gid, frozenset((gid, *groups)))


def _user(text: str) -> pwd.struct_passwd:
    """A name, a number, or a number with libvirt's "+" before it."""
    number = text.removeprefix("+")
    return pwd.getpwuid(int(number)) if number.isdigit() else pwd.getpwnam(text)


def _group(text: str) -> int:
    number = text.removeprefix("+")
    return int(number) if number.isdigit() else grp.getgrnam(text).gr_gid


def _settings(conf: str) -> dict[str, str]:
    try:
        lines = Path(conf).read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return {found[1]: found[2] for line in lines if (found := _SETTING.match(line)) and found[2]}


def check_reachable(path: str, who: Allowed) -> None:
    """EACCES, with what is in the way, unless that user can connect to the socket."""
    if who.uid == 0:
        return
    for folder in reversed(Path(path).parents):
        if not _may(os.stat(folder), who, stat.S_IXOTH):
            raise OSError(errno.EACCES, f"QEMU's user (uid {who.uid}) cannot enter {folder}")
    if not _may(os.stat(path), who, stat.S_IROTH | stat.S_IWOTH):
        raise OSError(errno.EACCES, f"QEMU's user (uid {who.uid}) cannot connect to {path}")


def _may(info: os.stat_result, who: Allowed, bits: int) -> bool:
    """`bits` as for others; the class that fits first decides, as in the kernel."""
    if info.st_uid == who.uid:
        bits <<= 6
    elif info.st_gid in who.groups:
        bits <<= 3
    return info.st_mode & bits == bits

"""Listening Unix sockets for exports and monitors: safe to re-create over a dead one, with the wanted permissions."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

SUN_PATH = 107  # bytes a Unix socket path may have


def listen_unix(path: str, mode: int = 0o660, group: int = -1, backlog: int = 64) -> socket.socket:
    """Binds and listens. A socket left behind by a dead process is replaced; EADDRINUSE when somebody listens on it;
    EEXIST when the path is something else; ENAMETOOLONG. `mode` and `group` are set before anybody can connect."""
    if len(os.fsencode(path)) > SUN_PATH:
        raise OSError(errno.ENAMETOOLONG, f"the socket path {path} is longer than {SUN_PATH} bytes")
    _remove_dead(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # Bound under a private name first: the final name appears with its permissions, listening, in one step.
    temporary = f"{path}.{os.getpid()}"
    if len(os.fsencode(temporary)) > SUN_PATH:
        temporary = path
    try:
        old = os.umask(0o177)
        try:
            sock.bind(temporary)
        finally:
            os.umask(old)
        if group != -1:
            os.chown(temporary, -1, group)
        os.chmod(temporary, mode)
        sock.listen(backlog)
        if temporary != path:
            os.rename(temporary, path)
    except OSError as error:
        sock.close()
        if temporary != path:
            Path(temporary).unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot listen on {path}: {error.strerror}") from None
    return sock


def _remove_dead(path: str) -> None:
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(info.st_mode):
        raise OSError(errno.EEXIST, f"{path} exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            Path(path).unlink(missing_ok=True)
            return
        except OSError:
            pass  # a full backlog, say: somebody is there
    raise OSError(errno.EADDRINUSE, f"somebody listens on {path}")


def remove(path: str) -> None:
    """Removes a socket we bound; nothing when it is gone or no socket."""
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    except FileNotFoundError:
        pass

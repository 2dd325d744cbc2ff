"""Room that the store keeps for itself: a file that is given up when the disk is full, so that one can still connect
and remove images. Guests fill disks; the metadata's log, and SQLite's other files, go when the last client does.

What was given up is for removing: until there is room again, and the file with it, nothing that adds metadata is done.
"""

from __future__ import annotations

import errno
import os

from librbd_py.format.logs import logger

from .folder import Folder

NAME = "reserve"
SIZE = 8 << 20  # bytes: the logs of both databases, and what the larger one has to copy
PLENTY = 2 * SIZE  # bytes that must be free for it to be made; less is little
SPARE = 256 << 10  # bytes that stay free when little is left
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # EIO: how SQLite says it of some of its files

log = logger(__name__)


def keep(root: Folder) -> None:
    """Makes it, when there is plenty of room."""
    there = root.stat(NAME)
    if (there is None or there.st_size < SIZE) and _free(root) >= PLENTY:
        _make(root, SIZE)


def keep_again(root: Folder) -> None:
    """What was given up and is not needed now, for a client has gone: as much as there is. Still it counts as spent."""
    if spent(root) and not _held(root):
        size = min(_free(root), SIZE) - SPARE
        if size > 0:
            _make(root, size)


def _make(root: Folder, size: int) -> None:
    try:
        fd = root.open_file(NAME, os.O_WRONLY | os.O_CREAT)
        try:
            os.posix_fallocate(fd, 0, size)
        except BaseException:
            os.ftruncate(fd, 0)
            raise
        finally:
            os.close(fd)
    except OSError as error:  # the next one tries again
        log.info("no room is kept for a full disk: %s", error)


def give_up(root: Folder) -> bool:
    """True: there is more room now. The file stays, shorter, to say so."""
    if not _held(root):
        return False
    fd = root.open_file(NAME, os.O_WRONLY)
    try:
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)
    log.warning("the disk under %s is full: using the room that was kept for that", root.path)
    return True


def spent(root: Folder) -> bool:
    """It was given up, and there is no room to make it again."""
    there = root.stat(NAME)
    return there is not None and there.st_size < SIZE and _free(root) < PLENTY


def _held(root: Folder) -> bool:
    there = root.stat(NAME)
    return there is not None and there.st_blocks > 0


def full(root: Folder, error: OSError) -> bool:
    """Whether that is why."""
    return error.errno in FULL and _free(root) < SIZE


def _free(root: Folder) -> int:
    status = os.fstatvfs(root.fd)
    return status.f_bavail * status.f_frsize

"""Access to the store's folder through directory descriptors: symbolic links are refused everywhere.

A folder of the store belongs to us and nobody else may enter it (0700), so what happens inside is done by processes of
the same user only. What the checks keep out is a folder that was prepared by somebody else, and links that lead away.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
SMALL_FILE = 64 << 10  # bytes; larger control files are refused


class Folder:
    """An open directory. `path` is for messages only."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path

    @classmethod
    def open(cls, path: str, *, create: bool = False) -> Folder:
        """ELOOP for a symbolic link, EACCES for a folder that others own or may enter, ENOENT, ENOTDIR. With `create`
        one that is not there is made, and our own empty one is closed to others."""
        return cls._open(path, path, None, create)

    @classmethod
    def _open(cls, name: str, path: str, parent: int | None, create: bool) -> Folder:
        made = False
        if create:
            try:
                os.mkdir(name, 0o700, dir_fd=parent)
                made = True
            except FileExistsError:
                pass
        try:
            fd = os.open(name, DIRECTORY, dir_fd=parent)
        except OSError as error:
            raise _explained(error, name, path, parent) from None
        folder = cls(fd, path)
        try:
            if made:
                os.fchmod(fd, 0o700)  # whatever the umask says
                sync_parent = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
                try:
                    os.fsync(sync_parent)
                finally:
                    os.close(sync_parent)
            elif create:
                folder._close_if_empty()
            folder._check_mine()
        except BaseException:
            folder.close()
            raise
        return folder

    def _close_if_empty(self) -> None:
        """What mkdir made under the usual umask, and nobody has used: there is nothing in it to be trusted. What others
        put there before it is closed goes through the checks of every name, owner and mode."""
        status = os.fstat(self.fd)
        if status.st_uid == os.geteuid() and status.st_mode & 0o077 and not os.listdir(self.fd):
            os.fchmod(self.fd, 0o700)

    def _check_mine(self) -> None:
        status = os.fstat(self.fd)
        if status.st_uid != os.geteuid():
            raise OSError(
                errno.EACCES, f"{self.path} belongs to user {status.st_uid}, not to {os.geteuid()}: run as its owner"
            )
        if status.st_mode & 0o077:
            raise OSError(
                errno.EACCES,
                f"{self.path} has mode {stat.S_IMODE(status.st_mode):04o}, others may enter it: chmod 0700 it "
                "if its content can be trusted",
            )

    def sub(self, name: str, *, create: bool = False) -> Folder:
        return self._open(name, f"{self.path}/{name}", self.fd, create)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def identity(self) -> tuple[int, int]:
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino

    def names(self) -> list[str]:
        return os.listdir(self.fd)

    def stat(self, name: str) -> os.stat_result | None:
        """None when there is no such name. Links are not followed."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def check_file(self, name: str) -> bool:
        """True: a regular file of ours with one name. False: there is none. Anything else is EACCES or ELOOP."""
        status = self.stat(name)
        if status is None:
            return False
        path = f"{self.path}/{name}"
        if stat.S_ISLNK(status.st_mode):
            raise OSError(errno.ELOOP, f"{path} is a symbolic link: the store does not follow links")
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EACCES, f"{path} is not a regular file")
        if status.st_uid != os.geteuid() or status.st_nlink > 1:
            raise OSError(errno.EACCES, f"{path} belongs to another user or has a second name (hard link)")
        if status.st_mode & 0o022:
            raise OSError(errno.EACCES, f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):04o})")
        return True

    def create_file(self, name: str) -> bool:
        """An empty file, 0600, without opening it: closing a descriptor would drop SQLite's locks on that file."""
        try:
            os.mknod(name, 0o600 | stat.S_IFREG, dir_fd=self.fd)
        except FileExistsError:
            return False
        return True

    def open_file(self, name: str, flags: int = os.O_RDONLY) -> int:
        try:
            return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600, dir_fd=self.fd)
        except OSError as error:
            raise _explained(error, name, f"{self.path}/{name}", self.fd) from None

    def read_file(self, name: str) -> bytes:
        """A small control file. EFBIG above 64 KiB."""
        self.check_file(name)
        fd = self.open_file(name)
        try:
            data = os.read(fd, SMALL_FILE + 1)
        finally:
            os.close(fd)
        if len(data) > SMALL_FILE:
            raise OSError(errno.EFBIG, f"{self.path}/{name} is larger than {SMALL_FILE} bytes")
        return data

    def write_new(self, name: str, data: bytes) -> bool:
        """Puts a file under a free name, whole and durable, or not at all. False: the name is taken.

        By rename under the folder's lock: a hard link would give the file two names for a moment, which check_file
        refuses, and for ever when the process dies in that moment.
        """
        temporary = f"{name}.{os.urandom(8).hex()}.new"
        fd = self.open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            try:
                os.write(fd, data)
                os.fsync(fd)
            finally:
                os.close(fd)
            lock = lock_folder(self)
            try:
                if self.stat(name) is not None:
                    self.remove(temporary)
                    return False
                self.rename(temporary, name)
            finally:
                os.close(lock)
        except BaseException:
            self.remove(temporary)
            raise
        self.sync()
        return True

    def remove(self, name: str) -> bool:
        """A file, socket or link. False: there was none."""
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            return False
        return True

    def remove_folder(self, name: str) -> bool:
        """A folder with files in it (the store makes no deeper ones). False: there was none."""
        try:
            fd = os.open(name, DIRECTORY, dir_fd=self.fd)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _explained(error, name, f"{self.path}/{name}", self.fd) from None
        try:
            for child in os.listdir(fd):
                try:
                    os.unlink(child, dir_fd=fd)
                except FileNotFoundError:
                    pass  # somebody else is removing it too
        finally:
            os.close(fd)
        try:
            os.rmdir(name, dir_fd=self.fd)
        except FileNotFoundError:
            return False
        return True

    def rename(self, old: str, new: str) -> bool:
        try:
            os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except FileNotFoundError:
            return False
        return True

    def sync(self) -> None:
        os.fsync(self.fd)

    def proc_path(self, name: str) -> str:
        """A short path to a name in here: sockets allow 107 bytes."""
        return f"/proc/self/fd/{self.fd}/{name}"

    def real_path(self, name: str) -> str:
        """For libraries that want a path (SQLite names its other files after it). Checked to lead here."""
        folder = os.readlink(f"/proc/self/fd/{self.fd}")
        path = os.path.join(folder, name)
        there = os.lstat(path)
        here = self.stat(name)
        if here is None or (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
            raise OSError(errno.ESTALE, f"{path} is no longer the file in the open folder: was the store moved?")
        return path


def wait_lock(attempt: Callable[[], None], seconds: float, what: str) -> None:
    """Repeats a lock attempt that raises BlockingIOError or EACCES while the lock is held. ETIMEDOUT."""
    deadline = time.monotonic() + seconds
    pause = 0.0005
    while True:
        try:
            attempt()
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if time.monotonic() >= deadline:
            raise OSError(errno.ETIMEDOUT, f"{what} is locked by another process for more than {seconds:.0f} s")
        time.sleep(pause)
        pause = min(pause * 2, 0.02)


def lock_folder(folder: Folder, seconds: float = 30) -> int:
    """Exclusive among those who set the store up. Returns a descriptor; closing it unlocks."""
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder.fd)
    try:
        wait_lock(lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB), seconds, folder.path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _explained(error: OSError, name: str, path: str, parent: int | None) -> OSError:
    """O_NOFOLLOW together with O_DIRECTORY says ENOTDIR for a link; find out and say what it is."""
    code = error.errno or errno.EIO
    if code in (errno.ELOOP, errno.ENOTDIR):
        try:
            mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        except OSError:
            mode = 0
        if stat.S_ISLNK(mode):
            return OSError(errno.ELOOP, f"{path} is a symbolic link: the store does not follow links")
        if mode and not stat.S_ISDIR(mode):
            return OSError(errno.ENOTDIR, f"{path} is not a folder")
    return OSError(code, f"{path}: {os.strerror(code)}")

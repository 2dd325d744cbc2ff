"""What a daemon serves, remembered in a file: a journal of the commands that made it.

One record a line: the CRC-32 of the rest as 8 hex digits, a blank, JSON. A record remembers a command under a key or
forgets a key; replaying all of them gives the commands that count, in order. A record is appended and synced before
the command is answered; the tail that a crash tore off is dropped. Once most records are of no use the file is written
anew, beside the old one, and renamed. So a command costs the same with one export as with a thousand.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import threading
import time
import zlib
from pathlib import Path
from typing import Any

from qemu_glue.qmp_wire import QMPError

log = logging.getLogger(__name__)

SLACK = 256  # useless records that are not worth a rewrite
LOCK_LOOK = 0.02  # seconds between looks at a journal that another process has
SIZE_MAX = 64 << 20  # bytes; what is larger was not written by a daemon


class Journal:
    """`commands`: key -> the command remembered under it, oldest first. One process at a time (EBUSY as QMPError)."""

    def __init__(self, path: Path, patience: float = 0.0) -> None:
        """Opens or makes the file. QMPError for a file that is not a journal, or is damaged before its end; OSError.
        `patience`: seconds to wait for a process that is just ending to let go of it."""
        self._path = path
        self._patience = patience
        self.commands: dict[str, dict[str, Any]] = {}
        self._records = 0
        self._mutex = threading.Lock()
        self._fd = -1
        try:
            self._open()
            self._load()
            if not self._records:
                self._sync_folder()  # a new file: its name must be on the disk before what it remembers is counted on
        except BaseException:
            if self._fd >= 0:
                os.close(self._fd)
            raise

    def remember(self, key: str, command: dict[str, Any]) -> None:
        """Blocks until it is on the disk. Any thread."""
        with self._mutex:
            self._append({"remember": key, "command": command})
            self.commands[key] = command

    def forget(self, key: str) -> None:
        """Blocks until it is on the disk. A key that is not there is no error. Any thread."""
        with self._mutex:
            if key in self.commands:
                self._append({"forget": key})
                del self.commands[key]
                if self._records > 2 * len(self.commands) + SLACK:
                    try:
                        self._rewrite()
                    except OSError as error:  # the record is on the disk: no reason to fail the command
                        log.warning("%s stays long: %s", self._path, error)

    def close(self) -> None:
        os.close(self._fd)

    def _open(self) -> None:
        """Opens and locks the file that has the name: who waited for the lock may have waited at one that its owner has
        replaced meanwhile."""
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_APPEND
            self._fd = os.open(self._path, flags, 0o600)
            self._lock()
            if self._has_name(self._fd):
                return
            os.close(self._fd)
            self._fd = -1

    def _has_name(self, fd: int) -> bool:
        try:
            named = os.lstat(self._path)
        except FileNotFoundError:
            return False
        here = os.fstat(fd)
        return (named.st_dev, named.st_ino) == (here.st_dev, here.st_ino)

    def _lock(self) -> None:
        end = time.monotonic() + self._patience
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise QMPError(f"{self._path} is in use by another rbdpyd") from None
            time.sleep(LOCK_LOOK)

    def _load(self) -> None:
        if os.fstat(self._fd).st_size > SIZE_MAX:
            raise QMPError(f"{self._path} is not a state file of rbdpyd: larger than {SIZE_MAX} bytes")
        with open(self._fd, "rb", closefd=False) as file:
            data = file.read(SIZE_MAX)
        good, lines = 0, data.split(b"\n")
        for number, line in enumerate(lines[:-1], 1):
            try:
                self._replay(_parse(line))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if number == len(lines) - 1:
                    break  # the last line: half of it got to the disk
                raise QMPError(f"{self._path} is not a state file of rbdpyd: line {number}: {error}") from None
            self._records += 1
            good += len(line) + 1
        if good < len(data):
            if good == 0 and not _may_be_torn(data):
                raise QMPError(f"{self._path} is not a state file of rbdpyd")
            os.ftruncate(self._fd, good)

    def _replay(self, record: dict[str, Any]) -> None:
        if "forget" in record:
            self.commands.pop(record["forget"], None)
            return
        command = record["command"]
        self.commands[str(record["remember"])] = {
            "execute": str(command["execute"]),
            "arguments": dict(command["arguments"]),
        }

    def _append(self, record: dict[str, Any]) -> None:
        line = _line(record)
        end = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError(errno.ENOSPC, f"{self._path}: no room for what is served")
            os.fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, end)  # half a line must not stand before the next record
            raise
        self._records += 1

    def _rewrite(self) -> None:
        temporary = self._path.with_name(self._path.name + ".new")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_APPEND, 0o600)
        old = self._fd
        try:
            self._fd = fd
            self._lock()
            with open(fd, "wb", closefd=False) as file:
                file.writelines(_line({"remember": key, "command": c}) for key, c in self.commands.items())
            os.fsync(fd)
            if not self._has_name(old):  # taken away, and perhaps another daemon's by now
                raise OSError(errno.ESTALE, "it is no longer the file of that name")
            os.rename(temporary, self._path)
        except BaseException:
            self._fd = old
            os.close(fd)
            raise
        os.close(old)
        self._records = len(self.commands)
        self._sync_folder()

    def _sync_folder(self) -> None:
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> dict[str, Any]:
    """ValueError for a line that no journal wrote whole."""
    text = line[9:]
    if line[8:9] != b" " or line[:8] != b"%08x" % zlib.crc32(text):
        raise ValueError("the checksum is wrong")
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError("no record")
    return record


def _may_be_torn(data: bytes) -> bool:
    """Whether a file without one whole record can be the beginning of a journal, and not somebody's other file."""
    first = data[:9]
    return all(c in b"0123456789abcdef" for c in first[:8]) and first[8:] in (b"", b" ")

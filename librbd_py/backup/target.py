"""Where backups are kept: objects by key, in an S3 bucket or in a folder. What is put is there whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

from librbd_py.net.s3 import Bucket, Credentials

ATTEMPTS = 10  # of a request to S3: a server that is away for twenty seconds ends no backup
UNFINISHED = ".unfinished-"  # begins the name of a file that is being written


@dataclass(frozen=True)
class Found:
    key: str
    size: int


class Target(Protocol):
    """Keys have slashes; their parts are harmless file names. Any number of threads. OSError: ENOENT, EACCES, ENOSPC,
    ETIMEDOUT, ...; what fails for a moment has been tried again."""

    def put(self, key: str, data: bytes, digest: str) -> None:
        """Durable afterwards. `digest`: SHA-256 in hexadecimal."""

    def get(self, key: str, most: int) -> bytes:
        """ENOENT. EFBIG: more than `most` bytes."""

    def delete(self, key: str) -> None:
        """Of what is not there: nothing."""

    def list(self, prefix: str) -> Iterator[Found]:
        """By key; a prefix ends with a slash, or is empty."""

    def close(self) -> None: ...


class S3Target:
    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""

    def put(self, key: str, data: bytes, digest: str) -> None:
        self._bucket.put(self._prefix + key, data, digest=digest)

    def get(self, key: str, most: int) -> bytes:
        return self._bucket.get(self._prefix + key, most)

    def delete(self, key: str) -> None:
        self._bucket.delete(self._prefix + key)

    def list(self, prefix: str) -> Iterator[Found]:
        for row in self._bucket.list(self._prefix + prefix):
            yield Found(row.key.removeprefix(self._prefix), row.size)

    def close(self) -> None:
        self._bucket.close()


class FolderTarget:
    """A file is written beside its place, synced, and renamed."""

    def __init__(self, path: str) -> None:
        """Made when missing."""
        self._root = Path(path)
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, key: str, data: bytes, digest: str) -> None:
        path = self._root / key
        self._folder(path.parent)
        temporary = path.parent / f"{UNFINISHED}{os.getpid()}-{path.name}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        finally:
            os.close(fd)
        temporary.rename(path)
        _sync(path.parent)

    def _folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        self._folder(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            _sync(folder.parent)

    def get(self, key: str, most: int) -> bytes:
        with open(os.open(self._root / key, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, f"{self._root / key} is no file")
            data = file.read(most + 1)
        if len(data) > most:
            raise OSError(errno.EFBIG, f"{self._root / key} has more than {most} bytes")
        return data

    def delete(self, key: str) -> None:
        path = self._root / key
        with suppress(FileNotFoundError):
            path.unlink()
            _sync(path.parent)
        with suppress(OSError):
            path.parent.rmdir()  # when it was the last

    def list(self, prefix: str) -> Iterator[Found]:
        folder = self._root / prefix
        try:
            names = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in names:
            if entry.is_dir(follow_symlinks=False):
                yield from self.list(f"{prefix}{entry.name}/")
            else:
                with suppress(FileNotFoundError):
                    yield Found(prefix + entry.name, entry.stat(follow_symlinks=False).st_size)

    def close(self) -> None:
        pass


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_target(url: str) -> Target:
    """`file:PATH`, or `s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME&style=path|virtual&ca_file=PATH]`: without an
    endpoint $AWS_ENDPOINT_URL, else Amazon's; the keys from the environment (`Credentials`). EINVAL, EACCES."""
    if url.startswith("file:"):
        path = unquote(url.removeprefix("file:"))
        if path.startswith("//"):
            path = "/" + path.lstrip("/")
        if not path:
            raise OSError(errno.EINVAL, f"{url!r} names no folder")
        return FolderTarget(path)
    if not url.startswith("s3:"):
        raise OSError(errno.EINVAL, f"{url!r} is no place for backups: use s3://BUCKET/PREFIX or file:/PATH")
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = set(options) - {"endpoint", "region", "style", "ca_file"}
    style = options.get("style", "path")
    if not parts.netloc or unknown or style not in ("path", "virtual"):
        what = f"it has no {unknown.pop()}" if unknown else "use s3://BUCKET/PREFIX?style=path|virtual"
        raise OSError(errno.EINVAL, f"{url!r} is no place for backups: {what}")
    keys = Credentials.from_environment(options.get("region"))
    endpoint = (
        options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL") or f"https://s3.{keys.region}.amazonaws.com"
    )
    bucket = Bucket(
        endpoint,
        parts.netloc,
        keys,
        virtual_host=style == "virtual",
        ca_file=options.get("ca_file"),
        attempts=ATTEMPTS,
    )
    return S3Target(bucket, unquote(parts.path).strip("/"))

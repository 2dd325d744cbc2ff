"""The `nbd` stream: an export of an NBD server."""

from __future__ import annotations

import errno
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from librbd_py.net.client import tls_context

from .api import DATA, Extent
from .checks import bounded
from .nbd_wire import ZERO, Address, Refused, Wire
from .spec_values import optional_text, text

MAX_PIECE = 4 << 20  # bytes of one read
MAX_STATUS = 1 << 30  # bytes that one status is asked for
ATTEMPTS = 4
TRY_SECONDS = 60.0  # for one attempt
FIRST_PAUSE = 0.1  # seconds between attempts, doubled each time

T = TypeVar("T")


class NbdStream:
    """Spec: {"type": "nbd", "uri": URI}: nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH, nbds://... with TLS;
    ours besides: "ca_file".

    There is one connection, because servers may take no second one; requests of several threads follow each other. A
    connection that is lost is made anew, and the export must have the size it had (ESTALE)."""

    def __init__(
        self, uri: str, *, ca_file: str | None = None, attempts: int = ATTEMPTS, try_seconds: float = TRY_SECONDS
    ) -> None:
        self._address = Address.parse(uri)
        self._context = tls_context(ca_file) if self._address.tls else None
        self._attempts, self._try_seconds = attempts, try_seconds
        self._guard = threading.Lock()
        self._wire: Wire | None = None
        self._closed = False
        self._size = -1
        self._size = self._do(lambda wire, _: bounded(wire.size, uri))

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> NbdStream:
        return cls(text(spec, "uri", "the stream"), ca_file=optional_text(spec, "ca_file", "the stream"))

    @property
    def size(self) -> int:
        return self._size

    def _do(self, call: Callable[[Wire, float], T]) -> T:
        pause = FIRST_PAUSE
        for attempt in range(1, self._attempts + 1):
            with self._guard:
                deadline = time.monotonic() + self._try_seconds
                try:
                    return call(self._connected(deadline), deadline)
                except Refused as failure:
                    raise OSError(failure.errno, f"{self._address.text}: {failure.strerror}") from None
                except OSError as failure:
                    self._lose()
                    problem = self._named(failure)
                    final = (errno.EPROTO, errno.EBADF, errno.ENOENT, errno.EACCES, errno.EOPNOTSUPP, errno.ESTALE,
                             errno.EFBIG, errno.EINVAL)  # fmt: skip
                    if attempt == self._attempts or problem.errno in final:
                        raise problem from None
            time.sleep(pause)
            pause *= 2
        raise AssertionError("the last attempt returns or raises")

    def _named(self, failure: OSError) -> OSError:
        code, words = failure.errno or errno.ECONNRESET, failure.strerror or str(failure)
        if isinstance(failure, TimeoutError):
            code, words = errno.ETIMEDOUT, "no answer in time"
        elif isinstance(failure, socket.gaierror):
            code = errno.EHOSTUNREACH
        elif isinstance(failure, ssl.SSLError):
            code, words = errno.EPROTO, f"TLS failed: {failure.reason or failure}"
        return OSError(code, f"{self._address.text}: {words}")

    def _connected(self, deadline: float) -> Wire:
        if self._closed:
            raise OSError(errno.EBADF, "closed")
        if self._wire is None:
            wire = Wire(self._address, self._context, deadline)
            if self._size >= 0 and wire.size != self._size:
                wire.close()
                raise OSError(errno.ESTALE, f"the export has {wire.size} bytes now, it had {self._size}")
            self._wire = wire
        return self._wire

    def _lose(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        while length:
            part = self._do(lambda wire, deadline, at=offset, left=length: self._part(wire, at, left, deadline))  # type: ignore[misc]
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _part(self, wire: Wire, offset: int, length: int, deadline: float) -> bytes:
        """The first bytes of a range, asked for in whole blocks of the server's."""
        start, end = self._aligned(wire, offset, offset + length, min(MAX_PIECE, wire.block[1]))
        return wire.read(start, end - start, deadline)[offset - start :][:length]

    def _aligned(self, wire: Wire, start: int, end: int, most: int) -> tuple[int, int]:
        least = wire.block[0]
        start -= start % least
        return start, min(-(-end // least) * least, start + max(most - most % least, least), self._size)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What the server calls zeros is left out; holes that it does not call so may hold anything."""
        end = offset + length
        start: int | None = None  # of data before `offset`
        while offset < end:
            size, zero = self._do(lambda wire, deadline, at=offset: self._run(wire, at, end, deadline))  # type: ignore[misc]
            if zero and start is not None:
                yield Extent(start, offset - start, DATA)
                start = None
            elif not zero and start is None:
                start = offset
            offset += size
            if start is not None and (offset - start >= MAX_STATUS or offset == end):
                yield Extent(start, offset - start, DATA)
                start = None

    def _run(self, wire: Wire, offset: int, end: int, deadline: float) -> tuple[int, bool]:
        """How many bytes from `offset` on are alike, and whether they are zeros: data, if the server does not say."""
        if not wire.has_status:
            return end - offset, False
        start, stop = self._aligned(wire, offset, end, MAX_STATUS)
        try:
            rows = wire.status(start, stop - start, deadline)
        except Refused:
            return min(end - offset, MAX_STATUS), False
        at, found, zero = start, offset, False
        for size, flags in rows:
            at += size
            if at <= offset:
                continue
            if found == offset:
                zero = bool(flags & ZERO)
            elif bool(flags & ZERO) != zero:
                break
            found = at
        if found == offset:
            raise OSError(errno.EPROTO, "the NBD server's status covers less than a block")
        return min(found, end) - offset, zero

    def close(self) -> None:
        with self._guard:
            self._closed = True
            self._lose()

"""Requests to one web server: connections are kept and shared, what fails for a moment is tried again."""

from __future__ import annotations

import errno
import http.client
import random
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .connection import Connection, Url, failures

ATTEMPTS = 5
TRY_SECONDS = 60.0  # for one attempt, from first to last byte
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between attempts, doubled each time
IDLE = 8  # connections that are kept
MAX_WORDS = 64 << 10  # bytes of the body of an error
PIECE = 256 << 10

AGAIN = frozenset({408, 429, 500, 502, 503, 504})  # statuses after which the same request may succeed
_CODES = {
    400: errno.EINVAL, 401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 405: errno.EOPNOTSUPP,
    408: errno.ETIMEDOUT, 409: errno.EBUSY, 410: errno.ENOENT, 411: errno.EPROTO, 412: errno.ESTALE,
    413: errno.EFBIG, 416: errno.ERANGE, 429: errno.EAGAIN, 501: errno.EOPNOTSUPP, 504: errno.ETIMEDOUT,
    507: errno.ENOSPC,
}  # fmt: skip
_LOST = frozenset(
    {errno.ECONNRESET, errno.ECONNREFUSED, errno.EPIPE, errno.ETIMEDOUT, errno.ECONNABORTED, errno.EHOSTUNREACH,
     errno.ENETUNREACH, errno.EIO, errno.EAGAIN}
)  # fmt: skip

Headers = Mapping[str, str]
MakeHeaders = Callable[[], dict[str, str]]  # anew for each attempt: signatures have a time in them


@dataclass(frozen=True)
class Answer:
    """`headers` has lower-case names."""

    status: int
    headers: dict[str, str]
    body: bytes

    def length(self) -> int | None:
        """Content-Length; None: none that is a number."""
        value = self.headers.get("content-length", "")
        return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else None


def tls_context(ca_file: str | None = None) -> ssl.SSLContext:
    """Certificates and names are verified, against the system's authorities or those in `ca_file`."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as failure:
        raise OSError(errno.EINVAL, f"{ca_file}: no certificates: {failure.reason or failure}") from None


def code_of(status: int) -> int:
    """The errno for a status that is an error."""
    return _CODES.get(status, errno.EIO)


class Client:
    """Any number of threads. Failures are OSError; statuses are the caller's business, but for those after which it has
    been tried again in vain."""

    def __init__(
        self, url: Url, *, ca_file: str | None = None, attempts: int = ATTEMPTS, try_seconds: float = TRY_SECONDS
    ) -> None:
        self.url = url
        self._context = tls_context(ca_file) if url.scheme == "https" else None
        self._attempts = attempts
        self._try_seconds = try_seconds
        self._guard = threading.Lock()
        self._idle: list[Connection] = []
        self._closed = False

    def request(
        self,
        method: str,
        target: str,
        headers: MakeHeaders,
        body: bytes | None = None,
        *,
        most: int = 0,
        exact: int | None = None,
        statuses: frozenset[int] = frozenset(),
    ) -> Answer:
        """An idempotent request. Of the body of an answer with one of `statuses` at most `most` bytes are taken (EFBIG
        beyond them), `exact` when given (EIO: cut short); of any other the first bytes, as words for an error."""
        pause = FIRST_PAUSE
        for attempt in range(1, self._attempts + 1):
            last = attempt == self._attempts
            try:
                answer = self._once(method, target, headers(), body, most, exact, statuses)
            except OSError as failure:
                if last or self._closed or failure.errno not in _LOST:
                    raise
            else:
                if last or answer.status not in AGAIN:
                    return answer
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, LONGEST_PAUSE)
        raise AssertionError("the last attempt returns or raises")

    def _once(
        self,
        method: str,
        target: str,
        headers: dict[str, str],
        body: bytes | None,
        most: int,
        exact: int | None,
        statuses: frozenset[int],
    ) -> Answer:
        deadline = time.monotonic() + self._try_seconds
        while True:
            connection, fresh = self._take(deadline)
            try:
                response = connection.request(method, target, headers, body, deadline)
                answer, reusable = self._read(connection, response, most, exact, statuses)
            except OSError as failure:
                connection.close()
                # A kept connection that the server has closed meanwhile says nothing of the server.
                if fresh or failure.errno not in (errno.ECONNRESET, errno.EPIPE):
                    raise
                continue
            except BaseException:
                connection.close()
                raise
            self._give_back(connection, reusable)
            return answer

    def _read(
        self,
        connection: Connection,
        response: http.client.HTTPResponse,
        most: int,
        exact: int | None,
        statuses: frozenset[int],
    ) -> tuple[Answer, bool]:
        wanted = response.status in statuses
        names = {name.lower(): value for name, value in response.getheaders()}
        limit = (most if exact is None else exact) if wanted else MAX_WORDS
        parts, size = [], 0
        with failures(connection.url):
            while size <= limit:
                part = response.read1(min(PIECE, limit + 1 - size))
                if not part:
                    break
                parts.append(part)
                size += len(part)
        data = b"".join(parts)
        reusable = (response.length == 0 or response.isclosed()) and not response.will_close
        missing = 0 if size > limit else response.length or 0  # of what the server promised
        response.close()
        if wanted and size > limit:
            raise OSError(errno.EFBIG, f"{connection.url.text}: the answer has more than {limit} bytes")
        if wanted and (missing or size < (exact or 0)):
            raise OSError(errno.EIO, f"{connection.url.text}: the answer was cut short after {size} bytes")
        return Answer(response.status, names, data[:limit]), reusable

    def _take(self, deadline: float) -> tuple[Connection, bool]:
        with self._guard:
            if self._closed:
                raise OSError(errno.EBADF, f"{self.url.text}: closed")
            if self._idle:
                return self._idle.pop(), False
        return Connection(self.url, self._context, deadline), True

    def _give_back(self, connection: Connection, reusable: bool) -> None:
        with self._guard:
            if reusable and not self._closed and len(self._idle) < IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Requests under way end on their own."""
        with self._guard:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

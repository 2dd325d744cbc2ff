"""One connection to a web server, whose every wait ends at a deadline, however slowly the other side sends."""

from __future__ import annotations

import errno
import http.client
import io
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

CONNECT_SECONDS = 15.0


@dataclass(frozen=True)
class Url:
    """http or https; `target` is path and query as they are sent."""

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def parse(cls, text: str) -> Url:
        """EINVAL: no URL of a web server, or one with a user and password in it."""
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as problem:
            raise OSError(errno.EINVAL, f"{text!r} is no URL: {problem}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OSError(errno.EINVAL, f"{text!r} is no URL of a web server (http://... or https://...)")
        if parts.username is not None or parts.password is not None:
            raise OSError(errno.EINVAL, "a user and password within a URL are not taken")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if any(ord(c) <= 32 or ord(c) >= 127 for c in target + parts.hostname):
            raise OSError(errno.EINVAL, f"{text!r} has characters that a URL encodes (%20, ...)")
        return cls(parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), target)

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    @property
    def text(self) -> str:
        """Without what may be secret in it: signatures of presigned URLs are in the query."""
        return f"{self.scheme}://{self.authority}{self.target.partition('?')[0]}"


class _Timed(io.RawIOBase):
    """Reads from a socket until a deadline that can be moved."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.deadline = 0.0

    def readable(self) -> bool:
        return True

    def arm(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "the server did not answer in time")
        self.sock.settimeout(left)

    def readinto(self, buffer: Any) -> int:
        self.arm()
        return self.sock.recv_into(buffer)

    def sendall(self, data: Any) -> None:
        self.arm()
        self.sock.sendall(data)

    def makefile(self, *_: object, **__: object) -> io.BufferedReader:
        """For http.client: a reader that does not close the socket with itself."""
        reader = _Timed(self.sock)
        reader.deadline = self.deadline
        return io.BufferedReader(reader, 1 << 16)


class Connection:
    """Any failure is OSError with an errno; afterwards the connection is of no more use."""

    def __init__(self, url: Url, context: ssl.SSLContext | None, deadline: float) -> None:
        """`deadline`: time.monotonic() by which it is connected."""
        self._host = url.authority
        with failures(url):
            left = min(deadline - time.monotonic(), CONNECT_SECONDS)
            sock = socket.create_connection((url.host, url.port), max(left, 0.001))
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if context is not None:
                    sock = context.wrap_socket(sock, server_hostname=url.host)
            except BaseException:
                sock.close()
                raise
        self._sock = sock
        self._http = http.client.HTTPConnection(url.host, url.port)
        self.url = url

    def request(
        self, method: str, target: str, headers: dict[str, str], body: bytes | None, deadline: float
    ) -> http.client.HTTPResponse:
        """The head of the answer; its body is read before the next request."""
        timed = _Timed(self._sock)
        timed.deadline = deadline
        self._http.sock = cast(Any, timed)
        with failures(self.url):
            self._http.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            self._http.putheader("Host", self._host)
            for name, value in headers.items():
                self._http.putheader(name, value)
            if body is not None:
                self._http.putheader("Content-Length", str(len(body)))
            self._http.endheaders(body)
            return self._http.getresponse()

    def close(self) -> None:
        self._sock.close()


class failures:
    """What sockets, TLS and http.client raise, as OSError with an errno that says it and words that name the server."""

    def __init__(self, url: Url) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, failure: BaseException | None, trace: object) -> None:
        if failure is None or not isinstance(failure, OSError | http.client.HTTPException | ValueError):
            return
        code, words = errno.EPROTO, f"{failure}"
        if isinstance(failure, ssl.SSLCertVerificationError):
            words = f"its certificate cannot be trusted: {failure.verify_message}"
        elif isinstance(failure, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            code, words = errno.ECONNRESET, "the connection ended"
        elif isinstance(failure, ssl.SSLError):
            words = f"TLS failed: {failure.reason or failure}"
        elif isinstance(failure, socket.gaierror):
            code, words = errno.EHOSTUNREACH, failure.strerror or "no such host"
        elif isinstance(failure, TimeoutError):
            code, words = errno.ETIMEDOUT, "no answer in time"
        elif isinstance(failure, OSError):
            code, words = failure.errno or errno.ECONNRESET, failure.strerror or str(failure)
        else:
            words = f"its answer is no HTTP: {type(failure).__name__} {failure}"[:300]
        raise OSError(code, f"{self._url.text}: {words}") from failure

"""One connection to an NBD server (doc/proto.md of the NBD project): fixed newstyle, TLS, structured replies, block
status. What the server sends is checked here, and each request ends at a deadline."""

from __future__ import annotations

import errno
import socket
import ssl
import struct
import time
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import parse_qs, unquote, urlsplit

PORT = 10809
MAX_WORDS = 4096  # bytes of a name or message, as the protocol has it
MAX_OPTION = 16 << 10  # bytes of a reply to an option
MAX_EXTENTS = 64 << 10
MAX_REPLIES = 64  # to one option
_OPTION_MAGIC, _OPTION_REPLY = b"IHAVEOPT", 0x3E889045565A9
_REQUEST, _SIMPLE, _CHUNK = 0x25609513, 0x67446698, 0x668E33EF
_FIXED, _NO_ZEROES = 1, 2
_STARTTLS, _GO, _STRUCTURED, _SET_CONTEXT = 5, 7, 8, 10
_ACK, _INFO, _CONTEXT = 1, 3, 4
_UNSUPPORTED, _POLICY, _TLS_NEEDED, _UNKNOWN = ((1 << 31) + n for n in (1, 2, 5, 6))
_READ, _DISCONNECT, _BLOCK_STATUS = 0, 2, 7
_NONE, _DATA, _HOLE, _STATUS = 0, 1, 2, 5
_DONE = 1
_ERROR = 1 << 15
_ALLOCATION = b"base:allocation"
ZERO = 2  # a state: reads as zeros
_KNOWN = {1: errno.EPERM, 5: errno.EIO, 12: errno.ENOMEM, 22: errno.EINVAL, 28: errno.ENOSPC, 75: errno.EOVERFLOW,
          95: errno.EOPNOTSUPP, 108: errno.ESHUTDOWN}  # fmt: skip


@dataclass(frozen=True)
class Address:
    """What an NBD URI says (doc/uri.md)."""

    text: str
    host: str
    port: int
    path: str  # of a Unix socket; empty: TCP
    tls: bool
    export: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """EINVAL."""
        try:
            parts = urlsplit(text)
            port = parts.port or PORT
        except ValueError as problem:
            raise OSError(errno.EINVAL, f"{text!r} is no NBD URI: {problem}") from None
        scheme, _, transport = parts.scheme.partition("+")
        if scheme not in ("nbd", "nbds") or transport not in ("", "tcp", "unix"):
            raise OSError(errno.EINVAL, f"{text!r} is no NBD URI (nbd://HOST/EXPORT, nbd+unix:///EXPORT?socket=PATH)")
        path = parse_qs(parts.query).get("socket", [""])[0]
        if (transport == "unix") != bool(path) or bool(path) == bool(parts.hostname):
            raise OSError(errno.EINVAL, f"{text!r} names neither a host nor a socket, or both")
        export = unquote(parts.path.removeprefix("/"))
        if len(export.encode()) > MAX_WORDS:
            raise OSError(errno.EINVAL, "the name of the export is too long")
        return cls(text, parts.hostname or "", port, path, scheme == "nbds", export)


class Refused(OSError):
    """The server's answer to one request; the connection goes on."""


class Wire:
    """`size`, `has_status`, `block`: (least, most) bytes of a request. Not for several threads. After an OSError that
    is not the server's answer to a request (`Refused`) the connection is of no more use."""

    def __init__(self, address: Address, context: ssl.SSLContext | None, deadline: float) -> None:
        self._address = address
        self._deadline = deadline
        self._cookie = 0
        self.size = -1
        self.block = (1, 32 << 20)
        self._context: int | None = None
        self._sock = self._connect()
        try:
            self._negotiate(context)
        except BaseException:
            self._sock.close()
            raise

    @property
    def has_status(self) -> bool:
        return self._context is not None

    def _connect(self) -> socket.socket:
        if not self._address.path:
            left = max(self._deadline - time.monotonic(), 0.001)
            sock = socket.create_connection((self._address.host, self._address.port), left)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(max(self._deadline - time.monotonic(), 0.001))
            sock.connect(self._address.path)
        except BaseException:
            sock.close()
            raise
        return sock

    # --- bytes

    def _arm(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "the NBD server did not answer in time")
        self._sock.settimeout(left)

    def _send(self, data: bytes) -> None:
        self._arm()
        self._sock.sendall(data)

    def _receive(self, size: int) -> bytearray:
        data = bytearray(size)
        self._into(memoryview(data))
        return data

    def _into(self, rest: memoryview) -> None:
        while rest:
            self._arm()
            count = self._sock.recv_into(rest)
            if not count:
                raise OSError(errno.ECONNRESET, "the NBD server ended the connection")
            rest = rest[count:]

    def _wrong(self, what: str) -> NoReturn:
        raise OSError(errno.EPROTO, f"the NBD server does not keep to the protocol: {what}")

    # --- handshake

    def _negotiate(self, context: ssl.SSLContext | None) -> None:
        magic, second, flags = struct.unpack(">8s8sH", self._receive(18))
        if magic != b"NBDMAGIC" or second != _OPTION_MAGIC:
            self._wrong("that is no greeting, or one of the old style")
        if not flags & _FIXED:
            raise OSError(errno.EOPNOTSUPP, "the NBD server does not know the fixed newstyle handshake")
        self._send(struct.pack(">I", flags & (_FIXED | _NO_ZEROES)))
        if context is not None:
            self._start_tls(context)
        if self._option(_STRUCTURED, b"")[0]:
            name = self._address.export.encode()
            query = struct.pack(f">I{len(name)}sII", len(name), name, 1, len(_ALLOCATION)) + _ALLOCATION
            accepted, replies = self._option(_SET_CONTEXT, query)
            for kind, data in replies if accepted else ():
                if kind == _CONTEXT and data[4:] == _ALLOCATION:
                    self._context = int.from_bytes(data[:4], "big")
        self._go()

    def _start_tls(self, context: ssl.SSLContext) -> None:
        if not self._option(_STARTTLS, b"")[0]:
            raise OSError(errno.EPROTO, "the NBD server has no TLS, and the URI asks for it")
        self._arm()
        self._sock = context.wrap_socket(self._sock, server_hostname=self._address.host or "localhost")

    def _go(self) -> None:
        name = self._address.export.encode()
        accepted, replies = self._option(_GO, struct.pack(f">I{len(name)}sHH", len(name), name, 1, 3))
        if not accepted:
            code, words = replies[-1]
            said = f": {words[:200].decode('utf-8', 'replace')}" if words else ""
            if code == _UNKNOWN:
                raise OSError(errno.ENOENT, f"the NBD server has no export {self._address.export!r}{said}")
            if code in (_POLICY, _TLS_NEEDED):
                raise OSError(errno.EACCES, f"the NBD server does not let us in{said}")
            raise OSError(errno.EOPNOTSUPP, f"the NBD server refuses the export (code {code & 0xFFFF}){said}")
        for kind, data in replies:
            what = int.from_bytes(data[:2], "big")
            if kind == _INFO and what == 0 and len(data) == 12:
                self.size = int.from_bytes(data[2:10], "big")
            elif kind == _INFO and what == 3 and len(data) == 14:
                least, _, most = struct.unpack(">III", data[2:])
                if not least or least & (least - 1) or least > 1 << 16 or most < least:
                    self._wrong(f"blocks of {least} to {most} bytes")
                self.block = (least, most)
        if self.size < 0:
            self._wrong("it does not say how large the export is")

    def _option(self, option: int, data: bytes) -> tuple[bool, list[tuple[int, bytes]]]:
        """Whether it was accepted, and the replies."""
        self._send(_OPTION_MAGIC + struct.pack(">II", option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        while len(replies) < MAX_REPLIES:
            magic, said, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != _OPTION_REPLY or said != option or length > MAX_OPTION:
                self._wrong(f"a reply to option {option} is none")
            replies.append((kind, bytes(self._receive(length))))
            if kind == _ACK:
                return True, replies
            if kind >> 31:
                return False, replies
        return self._wrong("it does not stop to reply")

    # --- requests

    def _request(self, kind: int, offset: int, length: int, deadline: float) -> None:
        self._deadline = deadline
        self._cookie += 1
        self._send(struct.pack(">IHHQQI", _REQUEST, 0, kind, self._cookie, offset, length))

    def _head(self) -> tuple[bool, int, int, int]:
        """Whether it is a simple reply, and flags, type and length of the chunk otherwise. Refused."""
        magic = int.from_bytes(self._receive(4), "big")
        if magic == _SIMPLE:
            error, cookie = struct.unpack(">IQ", self._receive(12))
            found = (True, _DONE, _NONE, 0)
        elif magic == _CHUNK:
            flags, kind, cookie, length = struct.unpack(">HHQI", self._receive(16))
            error, found = 0, (False, flags, kind, length)
        else:
            self._wrong("a reply that is none")
        if cookie != self._cookie:
            self._wrong("a reply to what nobody asked")
        if error:
            raise Refused(_KNOWN.get(error, errno.EIO), "the NBD server failed the request")
        return found

    def _failed(self, length: int) -> Refused:
        """Reads an error chunk."""
        if not 6 <= length <= MAX_WORDS + 14:
            self._wrong("an error without a number")
        data = self._receive(length)
        error, size = struct.unpack_from(">IH", data)
        words = data[6 : 6 + size].decode("utf-8", "replace") or "the NBD server failed the request"
        return Refused(_KNOWN.get(error, errno.EIO), words)

    def read(self, offset: int, length: int, deadline: float) -> bytes:
        """Refused; EPROTO and others: the connection is lost."""
        self._request(_READ, offset, length, deadline)
        out = bytearray(length)
        missing = length
        refused: Refused | None = None
        flags = 0
        while not flags & _DONE:
            simple, flags, kind, size = self._head()
            if simple:
                self._into(memoryview(out))
                return bytes(out)
            if kind & _ERROR:
                refused = self._failed(size)
            elif kind in (_DATA, _HOLE):
                at, count = self._piece(kind, size, offset)
                missing -= count
                if missing < 0 or at < 0 or at + count > length:
                    self._wrong("other data than was asked for")
                if kind == _DATA:
                    self._into(memoryview(out)[at : at + count])
            elif kind != _NONE or size:
                self._wrong(f"a chunk of type {kind} for a read")
        if refused is not None:
            raise refused
        if missing:
            self._wrong("less data than was asked for")
        return bytes(out)

    def _piece(self, kind: int, size: int, offset: int) -> tuple[int, int]:
        """Where in the answer a chunk belongs, and how much it is."""
        if (size <= 8) if kind == _DATA else (size != 12):
            self._wrong("a chunk of data that holds none")
        at = int.from_bytes(self._receive(8), "big") - offset
        count = size - 8 if kind == _DATA else int.from_bytes(self._receive(4), "big")
        if not count:
            self._wrong("a hole that is none")
        return at, count

    def status(self, offset: int, length: int, deadline: float) -> list[tuple[int, int]]:
        """(bytes, flags) of consecutive ranges from `offset`, at least one, perhaps fewer or more than asked for. As
        `read`."""
        self._request(_BLOCK_STATUS, offset, length, deadline)
        rows: list[tuple[int, int]] = []
        refused: Refused | None = None
        flags = 0
        while not flags & _DONE:
            simple, flags, kind, size = self._head()
            if simple:
                self._wrong("no status")
            if kind & _ERROR:
                refused = self._failed(size)
            elif kind == _STATUS:
                if rows or size < 12 or size % 8 != 4 or size > 8 * MAX_EXTENTS:
                    self._wrong("a status that is none")
                data = bytes(self._receive(size))
                if int.from_bytes(data[:4], "big") != self._context:
                    self._wrong("a status of what nobody asked")
                rows = list(struct.iter_unpack(">II", data[4:]))
            elif kind != _NONE or size:
                self._wrong(f"a chunk of type {kind} for a status")
        if refused is not None:
            raise refused
        if not rows or not all(count for count, _ in rows):
            self._wrong("a status of nothing")
        return rows

    def close(self) -> None:
        try:
            self._sock.settimeout(1)
            self._sock.sendall(struct.pack(">IHHQQI", _REQUEST, 0, _DISCONNECT, 0, 0, 0))
        except OSError:
            pass  # it has gone already
        self._sock.close()

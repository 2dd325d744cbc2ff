"""A byte-level NBD client: builds any message, also wrong ones, and checks every reply's form."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MAGIC, OPTION_MAGIC = b"NBDMAGIC", b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC, SIMPLE_MAGIC, CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
FIXED, NO_ZEROES = 1, 2

(
    OPT_EXPORT_NAME,
    OPT_ABORT,
    OPT_LIST,
    OPT_PEEK,
    OPT_STARTTLS,
    OPT_INFO,
    OPT_GO,
    OPT_STRUCTURED_REPLY,
    OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT,
    OPT_EXTENDED_HEADERS,
) = range(1, 12)
REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = ((1 << 31) + n for n in (1, 3, 6, 9))
INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = range(4)

(
    HAS_FLAGS,
    READ_ONLY,
    SEND_FLUSH,
    SEND_FUA,
    SEND_TRIM,
    SEND_WRITE_ZEROES,
    SEND_DF,
    CAN_MULTI_CONN,
    SEND_CACHE,
    SEND_FAST_ZERO,
) = 1, 2, 4, 8, 32, 64, 128, 256, 1024, 2048

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
CHUNK_NONE, CHUNK_DATA, CHUNK_STATUS, CHUNK_ERROR = 0, 1, 5, 0x8001
EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108


class Closed(Exception):
    """The server ended the connection."""


@dataclass
class OptionReply:
    option: int
    reply: int
    data: bytes


@dataclass
class Reply:
    cookie: int
    error: int = 0
    data: bytes = b""
    extents: tuple[tuple[int, int], ...] = ()
    structured: bool = False
    message: str = ""


@dataclass
class Info:
    error: int = 0
    size: int = 0
    flags: int = 0
    name: bytes | None = None
    description: bytes | None = None
    block_size: tuple[int, int, int] | None = None


def name_option(name: bytes, infos: Iterable[int] = ()) -> bytes:
    asked = list(infos)
    return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(asked)}H", len(asked), *asked)


def meta_option(name: bytes, queries: Iterable[bytes]) -> bytes:
    asked = list(queries)
    parts = [struct.pack(">I", len(name)), name, struct.pack(">I", len(asked))]
    for query in asked:
        parts += [struct.pack(">I", len(query)), query]
    return b"".join(parts)


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    return OPTION_MAGIC + struct.pack(">II", number, len(data) if length is None else length) + data


def request(
    command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 0, magic: int = REQUEST_MAGIC
) -> bytes:
    return struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length)


def connect(sock: socket.socket, target: Path | str, timeout: float) -> None:
    """Waits while the server's backlog is full, which a socket with Python's own timeout does not."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(timeout), 0))
    sock.settimeout(None)
    sock.connect(str(target))
    sock.settimeout(timeout)


class Client:
    """One connection. `negotiate` goes to transmission; before it every option can be sent by hand."""

    def __init__(
        self, target: Path | str | socket.socket, *, flags: int | None = FIXED | NO_ZEROES, timeout: float = 20
    ) -> None:
        if isinstance(target, socket.socket):
            self.sock = target
        else:
            self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(timeout)
        self.structured = False
        self.size = 0
        self.flags = 0
        self.cookie = 0
        self.lengths: dict[int, tuple[int, int, int]] = {}
        try:
            if not isinstance(target, socket.socket):
                connect(self.sock, target, timeout)
            greeting = self.receive(18)
            assert greeting[:16] == MAGIC + OPTION_MAGIC, greeting
            self.handshake_flags: int = struct.unpack(">H", greeting[16:])[0]
            if flags is not None:
                self.send(struct.pack(">I", flags))
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error

    def receive(self, size: int) -> bytes:
        parts = []
        while size:
            try:
                part = self.sock.recv(min(size, 1 << 20))
            except ConnectionResetError as error:
                raise Closed from error
            if not part:
                raise Closed
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def closed(self) -> bool:
        """Waits for the end of the connection, dropping what comes before it."""
        try:
            while self.sock.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True

    # options

    def option_reply(self) -> OptionReply:
        magic, number, reply, length = struct.unpack(">QIII", self.receive(20))
        assert magic == OPTION_REPLY_MAGIC, hex(magic)
        assert length <= 1 << 20
        return OptionReply(number, reply, self.receive(length))

    def ask(self, number: int, data: bytes = b"", *, length: int | None = None) -> list[OptionReply]:
        """Sends an option and collects its replies up to the acknowledgement or the error."""
        self.send(option(number, data, length=length))
        return self.answers(number)

    def answers(self, number: int) -> list[OptionReply]:
        replies = []
        while True:
            reply = self.option_reply()
            assert reply.option == number, reply
            replies.append(reply)
            if reply.reply == REP_ACK or reply.reply & 1 << 31:
                return replies

    def structured_replies(self) -> None:
        assert [r.reply for r in self.ask(OPT_STRUCTURED_REPLY)] == [REP_ACK]
        self.structured = True

    def select(self, name: bytes = b"", queries: Iterable[bytes] = (b"base:allocation",)) -> list[OptionReply]:
        return self.ask(OPT_SET_META_CONTEXT, meta_option(name, queries))

    def info(self, name: bytes = b"", infos: Iterable[int] = (), *, go: bool = False) -> Info:
        found = Info()
        *answers, last = self.ask(OPT_GO if go else OPT_INFO, name_option(name, infos))
        if last.reply != REP_ACK:
            found.error = last.reply
            return found
        for answer in answers:
            assert answer.reply == REP_INFO
            kind, body = struct.unpack(">H", answer.data[:2])[0], answer.data[2:]
            if kind == INFO_EXPORT:
                found.size, found.flags = struct.unpack(">QH", body)
            elif kind == INFO_NAME:
                found.name = body
            elif kind == INFO_DESCRIPTION:
                found.description = body
            else:
                assert kind == INFO_BLOCK_SIZE
                found.block_size = struct.unpack(">III", body)
        if go:
            self.size, self.flags = found.size, found.flags
        return found

    def negotiate(self, name: bytes = b"", *, structured: bool = True, meta: bool = True) -> Client:
        if structured:
            self.structured_replies()
            if meta:
                assert [r.reply for r in self.select(name)] == [REP_META_CONTEXT, REP_ACK]
        assert not self.info(name, go=True).error
        return self

    # transmission

    def start(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes | None = None
    ) -> int:
        """Sends a request and returns its cookie."""
        self.cookie += 1
        self.lengths[self.cookie] = (command, offset, length)
        self.send(request(command, offset, length, flags=flags, cookie=self.cookie) + (data or b""))
        return self.cookie

    def start_reads(self, extents: Iterable[tuple[int, int]]) -> list[int]:
        """Many requests in one packet."""
        cookies, messages = [], []
        for offset, length in extents:
            self.cookie += 1
            self.lengths[self.cookie] = (READ, offset, length)
            cookies.append(self.cookie)
            messages.append(request(READ, offset, length, cookie=self.cookie))
        self.send(b"".join(messages))
        return cookies

    def reply(self) -> Reply:
        """The next whole reply, whichever request it answers."""
        magic = struct.unpack(">I", self.receive(4))[0]
        if magic == SIMPLE_MAGIC:
            error, cookie = struct.unpack(">IQ", self.receive(12))
            command, _, length = self.lengths.pop(cookie)
            has_data = command == READ and not error
            assert not (has_data and self.structured), "a simple reply to a structured read"
            return Reply(cookie, error, self.receive(length) if has_data else b"")
        assert magic == CHUNK_MAGIC and self.structured, hex(magic)
        flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
        assert flags == 1, "one chunk per reply, with DONE"
        command, offset, wanted = self.lengths.pop(cookie)
        body = self.receive(length)
        if kind == CHUNK_NONE:
            assert not body
            return Reply(cookie, structured=True)
        if kind == CHUNK_DATA:
            assert command == READ and struct.unpack(">Q", body[:8])[0] == offset and length - 8 == wanted > 0
            return Reply(cookie, data=body[8:], structured=True)
        if kind == CHUNK_STATUS:
            assert command == BLOCK_STATUS and length > 4 and length % 8 == 4 and struct.unpack(">I", body[:4])[0] == 1
            pairs = tuple(struct.iter_unpack(">II", body[4:]))
            assert all(size for size, _ in pairs) and sum(size for size, _ in pairs) <= wanted
            return Reply(cookie, extents=pairs, structured=True)
        assert kind == CHUNK_ERROR, hex(kind)
        error, size = struct.unpack(">IH", body[:6])
        assert error and len(body) == 6 + size
        return Reply(cookie, error, structured=True, message=body[6:].decode())

    def call(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes | None = None
    ) -> Reply:
        cookie = self.start(command, offset, length, flags=flags, data=data)
        reply = self.reply()
        assert reply.cookie == cookie
        return reply

    def read(self, offset: int, length: int) -> bytes:
        reply = self.call(READ, offset, length)
        assert not reply.error, reply
        return reply.data

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        reply = self.call(WRITE, offset, len(data), flags=flags, data=data)
        assert not reply.error, reply

"""Datagrams between the clients of one store: bytes <-> values, pure.

    4 bytes magic, u8 version, u8 type, u16 0, then the fields, little endian; strings as u32 length + bytes.

Whoever may write to run/ may send anything, so each field is checked against the bytes there are and nothing is
believed that can be looked up.
"""

from __future__ import annotations

import struct

from librbd_py.format.values import dataclass

MAX_PAYLOAD = 128 << 10  # bytes of a notify or of an ack
MAX_COOKIES = 1024  # per datagram
MAX_NAME = 4096  # bytes
MAX_DATAGRAM = MAX_PAYLOAD + MAX_COOKIES * 8 + 2 * MAX_NAME + 256

_HEAD = struct.Struct("<4sBBH")
_MAGIC = b"rbdW"
_VERSION = 1
_NOTIFY, _ACK, _LOST, _FENCED = 1, 2, 3, 4
_U32 = struct.Struct("<I")
_NOTIFY_FIXED = struct.Struct("<QQq")
_ACK_FIXED = struct.Struct("<QQQB")


@dataclass(frozen=True)
class Notify:
    notify_id: int  # its upper 32 bits name the notifier's socket
    notifier: int  # gid
    pool: int
    namespace: str
    oid: str
    cookies: tuple[int, ...]  # watches of the receiver
    payload: bytes


@dataclass(frozen=True)
class Ack:
    notify_id: int
    gid: int
    cookie: int
    gone: bool  # there is no such watch (any more)
    payload: bytes


@dataclass(frozen=True)
class Lost:
    """Look whether your watches are still registered."""


@dataclass(frozen=True)
class Fenced:
    """Look whether you are blocklisted."""


Message = Notify | Ack | Lost | Fenced


def encode(message: Message) -> bytes:
    match message:
        case Notify():
            kind = _NOTIFY
            body = b"".join(
                (
                    _NOTIFY_FIXED.pack(message.notify_id, message.notifier, message.pool),
                    _blob(message.namespace.encode()),
                    _blob(message.oid.encode()),
                    _U32.pack(len(message.cookies)),
                    struct.pack(f"<{len(message.cookies)}Q", *message.cookies),
                    _blob(message.payload),
                )
            )
        case Ack():
            kind = _ACK
            fixed = _ACK_FIXED.pack(message.notify_id, message.gid, message.cookie, message.gone)
            body = fixed + _blob(message.payload)
        case Lost():
            kind, body = _LOST, b""
        case Fenced():
            kind, body = _FENCED, b""
    return _HEAD.pack(_MAGIC, _VERSION, kind, 0) + body


def decode(data: bytes | memoryview) -> Message | None:
    """None for anything that is not exactly one message."""
    reader = _Reader(memoryview(data))
    try:
        magic, version, kind, zero = _HEAD.unpack(reader.take(_HEAD.size))
        if magic != _MAGIC or version != _VERSION or zero:
            return None
        message: Message
        if kind == _NOTIFY:
            notify_id, notifier, pool = _NOTIFY_FIXED.unpack(reader.take(_NOTIFY_FIXED.size))
            namespace, oid = reader.text(), reader.text()
            count = reader.u32(MAX_COOKIES)
            cookies = struct.unpack(f"<{count}Q", reader.take(count * 8))
            message = Notify(notify_id, notifier, pool, namespace, oid, cookies, reader.blob(MAX_PAYLOAD))
        elif kind == _ACK:
            notify_id, gid, cookie, gone = _ACK_FIXED.unpack(reader.take(_ACK_FIXED.size))
            if gone > 1:
                return None
            message = Ack(notify_id, gid, cookie, bool(gone), reader.blob(MAX_PAYLOAD))
        elif kind == _LOST:
            message = Lost()
        elif kind == _FENCED:
            message = Fenced()
        else:
            return None
    except ValueError:
        return None
    return message if reader.left == 0 else None


def _blob(data: bytes) -> bytes:
    return _U32.pack(len(data)) + data


class _Reader:
    """Raises ValueError for whatever does not fit (UnicodeDecodeError is one)."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, length: int) -> memoryview:
        if length > self.left:
            raise ValueError("short message")
        self._at += length
        return self._data[self._at - length : self._at]

    def u32(self, limit: int) -> int:
        value: int = _U32.unpack(self.take(4))[0]
        if value > limit:
            raise ValueError("number out of range")
        return value

    def blob(self, limit: int) -> bytes:
        return bytes(self.take(self.u32(limit)))

    def text(self) -> str:
        return self.blob(MAX_NAME).decode()

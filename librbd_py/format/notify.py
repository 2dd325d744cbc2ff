"""Messages on `rbd_header.<id>`: what clients of an image tell and ask each other through notify.

Every message of version 7 (what Ceph 16 sends). Older versions lack fields (WatchNotifyTypes.cc says since when; krbd
speaks version 2): a request id then decodes as None. Unknown ops are kept as `Unknown`: a lock owner can refuse them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from librbd_py.format.values import dataclass

from .encoding import DecodeError, Decoder, EncodeError, Encoder
from .header import USER, SnapshotNamespace, decode_namespace, encode_namespace

VERSION = 7
MAX_MESSAGE = 1 << 20  # bytes; longer ones are refused unread

SNAP_SKIP_OBJECT_MAP = 1  # SnapCreate.flags
SNAP_SKIP_QUIESCE = 2
SNAP_IGNORE_QUIESCE_ERROR = 4


@dataclass(frozen=True, order=True)
class ClientId:
    """A client of the image: global id and handle of its watch."""

    gid: int = 0
    handle: int = 0

    @property
    def valid(self) -> bool:
        return self != ClientId()


@dataclass(frozen=True, order=True)
class AsyncRequestId:
    client: ClientId
    request: int


# --- messages: field order is the wire's ---------------------------------------------------------------------------


@dataclass(frozen=True)
class AcquiredLock:
    op: ClassVar[int] = 0
    client: ClientId


@dataclass(frozen=True)
class ReleasedLock:
    op: ClassVar[int] = 1
    client: ClientId


@dataclass(frozen=True)
class RequestLock:
    op: ClassVar[int] = 2
    client: ClientId
    force: bool = False


@dataclass(frozen=True)
class HeaderUpdate:
    op: ClassVar[int] = 3


@dataclass(frozen=True)
class AsyncProgress:
    op: ClassVar[int] = 4
    request: AsyncRequestId
    offset: int
    total: int


@dataclass(frozen=True)
class AsyncComplete:
    op: ClassVar[int] = 5
    request: AsyncRequestId
    result: int


@dataclass(frozen=True)
class Flatten:
    op: ClassVar[int] = 6
    request: AsyncRequestId


@dataclass(frozen=True)
class Resize:
    op: ClassVar[int] = 7
    size: int
    request: AsyncRequestId
    allow_shrink: bool = True


@dataclass(frozen=True)
class SnapCreate:
    op: ClassVar[int] = 8
    name: str
    namespace: SnapshotNamespace
    request: AsyncRequestId | None
    flags: int = 0


@dataclass(frozen=True)
class SnapRemove:
    op: ClassVar[int] = 9
    name: str
    namespace: SnapshotNamespace
    request: AsyncRequestId | None


@dataclass(frozen=True)
class RebuildObjectMap:
    op: ClassVar[int] = 10
    request: AsyncRequestId


@dataclass(frozen=True)
class SnapRename:
    op: ClassVar[int] = 11
    snap_id: int
    name: str
    namespace: SnapshotNamespace
    request: AsyncRequestId | None


@dataclass(frozen=True)
class SnapProtect:
    op: ClassVar[int] = 12
    name: str
    namespace: SnapshotNamespace
    request: AsyncRequestId | None


@dataclass(frozen=True)
class SnapUnprotect:
    op: ClassVar[int] = 13
    name: str
    namespace: SnapshotNamespace
    request: AsyncRequestId | None


@dataclass(frozen=True)
class Rename:
    op: ClassVar[int] = 14
    name: str
    request: AsyncRequestId | None


@dataclass(frozen=True)
class UpdateFeatures:
    op: ClassVar[int] = 15
    features: int
    enabled: bool
    request: AsyncRequestId | None


@dataclass(frozen=True)
class Migrate:
    op: ClassVar[int] = 16
    request: AsyncRequestId


@dataclass(frozen=True)
class Sparsify:
    op: ClassVar[int] = 17
    request: AsyncRequestId
    sparse_size: int


@dataclass(frozen=True)
class Quiesce:
    op: ClassVar[int] = 18
    request: AsyncRequestId


@dataclass(frozen=True)
class Unquiesce:
    op: ClassVar[int] = 19
    request: AsyncRequestId


@dataclass(frozen=True)
class MetadataUpdate:
    op: ClassVar[int] = 20
    key: str
    value: str | None  # None: remove
    request: AsyncRequestId | None


@dataclass(frozen=True)
class WhoAreYou:
    """Ours alone, with a number far from librbd's: every watcher of ours acks with a `who.Answer`. Real clients ack
    empty or, owning the lock, -EOPNOTSUPP, as they do with anything they do not know."""

    op: ClassVar[int] = 0x57504252
    gid: int = 0  # of who asks


@dataclass(frozen=True)
class Unknown:
    op: int
    body: bytes = b""


Message = (
    AcquiredLock
    | ReleasedLock
    | RequestLock
    | HeaderUpdate
    | AsyncProgress
    | AsyncComplete
    | Flatten
    | Resize
    | SnapCreate
    | SnapRemove
    | RebuildObjectMap
    | SnapRename
    | SnapProtect
    | SnapUnprotect
    | Rename
    | UpdateFeatures
    | Migrate
    | Sparsify
    | Quiesce
    | Unquiesce
    | MetadataUpdate
    | WhoAreYou
    | Unknown
)


# --- codecs of fields -----------------------------------------------------------------------------------------------


def _put_client(out: Encoder, value: ClientId) -> None:
    out.u64(value.gid).u64(value.handle)


def _get_client(source: Decoder, version: int) -> ClientId:
    gid = source.u64()
    return ClientId(gid, source.u64())


def _get_client_v2(source: Decoder, version: int) -> ClientId:
    return _get_client(source, version) if version >= 2 else ClientId()


def _put_request(out: Encoder, value: AsyncRequestId | None) -> None:
    if value is None:
        raise EncodeError("a message of version 7 needs a request id")
    _put_client(out, value.client)
    out.u64(value.request)


def _get_request(source: Decoder, version: int) -> AsyncRequestId:
    client = _get_client(source, version)
    return AsyncRequestId(client, source.u64())


def _get_request_v7(source: Decoder, version: int) -> AsyncRequestId | None:
    return _get_request(source, version) if version >= 7 else None


def _get_namespace(source: Decoder, version: int) -> SnapshotNamespace:
    return decode_namespace(source) if version >= 6 else USER


def _get_created_namespace(source: Decoder, version: int) -> SnapshotNamespace:
    return decode_namespace(source) if version >= 5 else USER


def _plain(read: Callable[[Decoder], Any]) -> Callable[[Decoder, int], Any]:
    return lambda source, version: read(source)


@dataclass(frozen=True)
class _Field:
    name: str
    put: Callable[[Encoder, Any], object]
    get: Callable[[Decoder, int], Any]


def _u64(name: str, since: int = 0) -> _Field:
    return _Field(name, Encoder.u64, lambda source, version: source.u64() if version >= since else 0)


def _text(name: str) -> _Field:
    return _Field(name, Encoder.string, _plain(Decoder.string))


def _flag(name: str, since: int = 0, before: bool = False) -> _Field:
    return _Field(name, Encoder.bool, lambda source, version: source.bool() if version >= since else before)


_CLIENT = _Field("client", _put_client, _get_client_v2)
_REQUEST = _Field("request", _put_request, _get_request)
_REQUEST_V7 = _Field("request", _put_request, _get_request_v7)
_NAMESPACE = _Field("namespace", encode_namespace, _get_namespace)
_SNAP = (_text("name"), _NAMESPACE)

_FIELDS: dict[type, tuple[_Field, ...]] = {
    AcquiredLock: (_CLIENT,),
    ReleasedLock: (_CLIENT,),
    RequestLock: (_CLIENT, _flag("force", since=3)),
    HeaderUpdate: (),
    AsyncProgress: (_REQUEST, _u64("offset"), _u64("total")),
    AsyncComplete: (_REQUEST, _Field("result", Encoder.s32, _plain(Decoder.s32))),
    Flatten: (_REQUEST,),
    Resize: (_u64("size"), _REQUEST, _flag("allow_shrink", since=4, before=True)),
    SnapCreate: (
        _text("name"),
        _Field("namespace", encode_namespace, _get_created_namespace),
        _REQUEST_V7,
        _u64("flags", since=7),
    ),
    SnapRemove: (*_SNAP, _REQUEST_V7),
    RebuildObjectMap: (_REQUEST,),
    SnapRename: (_u64("snap_id"), *_SNAP, _REQUEST_V7),
    SnapProtect: (*_SNAP, _REQUEST_V7),
    SnapUnprotect: (*_SNAP, _REQUEST_V7),
    Rename: (_text("name"), _REQUEST_V7),
    UpdateFeatures: (_u64("features"), _flag("enabled"), _REQUEST_V7),
    Migrate: (_REQUEST,),
    Sparsify: (_REQUEST, _u64("sparse_size")),
    Quiesce: (_REQUEST,),
    Unquiesce: (_REQUEST,),
    MetadataUpdate: (
        _text("key"),
        _Field(
            "value",
            lambda out, value: out.optional(value, Encoder.string),
            lambda source, version: source.optional(Decoder.string),
        ),
        _REQUEST_V7,
    ),
    WhoAreYou: (_u64("gid"),),
}
_BY_OP: dict[int, type] = {kind.op: kind for kind in _FIELDS}  # type: ignore[attr-defined]


def encode(message: Message) -> bytes:
    out = Encoder()
    with out.struct(VERSION, 1):
        out.u32(message.op)
        if isinstance(message, Unknown):
            out.raw(message.body)
        else:
            for field in _FIELDS[type(message)]:
                field.put(out, getattr(message, field.name))
    return out.done()


def decode(data: bytes) -> Message:
    """An empty body is HeaderUpdate (very old clients). DecodeError: do not answer."""
    if not data:
        return HeaderUpdate()
    if len(data) > MAX_MESSAGE:
        raise DecodeError(f"notify message of {len(data)} bytes")
    source = Decoder(data)
    with source.struct(VERSION, "notify message") as version:
        op = source.u32()
        kind = _BY_OP.get(op)
        if kind is None:
            return Unknown(op, source.rest())
        values = {field.name: field.get(source, version) for field in _FIELDS[kind]}
        result: Message = kind(**values)
        return result


# --- acks -----------------------------------------------------------------------------------------------------------


def encode_response(result: int) -> bytes:
    """A lock owner's answer: 0 or -errno. Everybody else acks with nothing."""
    out = Encoder()
    with out.struct(1, 1):
        out.s32(result)
    return out.done()


def decode_response(data: bytes) -> int | None:
    """None for the empty ack of a client that is not the owner."""
    if not data:
        return None
    source = Decoder(data)
    with source.struct(1, "notify response"):
        return source.s32()


def encode_reply(acks: dict[tuple[int, int], bytes], timed_out: list[tuple[int, int]]) -> bytes:
    """The reply blob of a RADOS notify: who answered what, and who did not."""
    out = Encoder().u32(len(acks))
    for (gid, cookie), payload in acks.items():
        out.u64(gid).u64(cookie).blob(payload)
    out.u32(len(timed_out))
    for gid, cookie in timed_out:
        out.u64(gid).u64(cookie)
    return out.done()


def decode_reply(data: bytes) -> tuple[dict[tuple[int, int], bytes], list[tuple[int, int]]]:
    source = Decoder(data)
    acks: dict[tuple[int, int], bytes] = {}
    for _ in range(source.count(20)):
        gid, cookie = source.u64(), source.u64()
        acks[gid, cookie] = source.blob()
    silent = []
    for _ in range(source.count(16)):
        gid = source.u64()
        silent.append((gid, source.u64()))
    return acks, silent

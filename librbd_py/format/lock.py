"""Class `lock`: its state in the xattr `lock.<name>`, its requests and its replies."""

from __future__ import annotations

import re

from librbd_py.format.values import dataclass, field

from .encoding import NEVER, DecodeError, Decoder, EncodeError, Encoder, Time

LOCK_NONE = 0
LOCK_EXCLUSIVE = 1
LOCK_SHARED = 2
LOCK_EXCLUSIVE_EPHEMERAL = 3  # the object is removed with its last lock

FLAG_MAY_RENEW = 1
FLAG_MUST_RENEW = 2

XATTR_PREFIX = "lock."

ENTITY_CLIENT = 8
ADDRESS_NONE, ADDRESS_LEGACY, ADDRESS_MSGR2, ADDRESS_ANY = 0, 1, 2, 3
_AF_INET, _AF_INET6 = 2, 10


@dataclass(frozen=True, order=True)
class EntityName:
    """`client.<gid>` and its kin. type: 1 mon, 2 mds, 4 osd, 8 client, 16 mgr."""

    type: int
    number: int

    def __str__(self) -> str:
        kind = {1: "mon", 2: "mds", 4: "osd", 8: "client", 16: "mgr"}.get(self.type, f"type{self.type}")
        return f"{kind}.{self.number}"

    def encode(self, out: Encoder) -> None:
        out.u8(self.type).s64(self.number)

    @classmethod
    def decode(cls, source: Decoder) -> EntityName:
        kind = source.u8()
        return cls(kind, source.s64())

    @classmethod
    def parse(cls, text: str) -> EntityName:
        """`client.4123`. ValueError."""
        match = re.fullmatch(r"(mon|mds|osd|client|mgr)\.(-?[0-9]{1,19})", text)
        if match is None:
            raise ValueError(f"{text!r} is not an entity name like client.4123")
        return cls({"mon": 1, "mds": 2, "osd": 4, "client": 8, "mgr": 16}[match[1]], int(match[2]))


@dataclass(frozen=True)
class EntityAddress:
    """A network address. `text` is Ceph's `ip:port/nonce`, IPv6 in brackets."""

    type: int = ADDRESS_NONE
    nonce: int = 0
    family: int = 0  # 0: no socket address at all
    port: int = 0
    host: bytes = b""  # 4 or 16 bytes in network order
    flow: int = 0  # IPv6
    scope: int = 0  # IPv6
    extra: bytes = b""  # a socket address of a family we do not know, as it came

    @classmethod
    def parse(cls, text: str, kind: int = ADDRESS_LEGACY) -> EntityAddress:
        """From `ip:port/nonce`; a leading `v1:`, `v2:` or `any:` is understood. ValueError."""
        match = re.fullmatch(r"(?:(v1|v2|any):)?(?:\[([^\]]+)\]|([^:/\[\]]+)):([0-9]{1,5})/([0-9]{1,10})", text)
        if match is None:
            raise ValueError(f"{text!r} is not an address like 127.0.0.1:0/123")
        import ipaddress  # here: it takes as long as the rest of the format together

        address = ipaddress.ip_address(match[2] or match[3])
        port, nonce = int(match[4]), int(match[5])
        if port > 0xFFFF or nonce > 0xFFFFFFFF:
            raise ValueError(f"{text!r}: port or nonce out of range")
        if match[1]:
            kind = {"v1": ADDRESS_LEGACY, "v2": ADDRESS_MSGR2, "any": ADDRESS_ANY}[match[1]]
        return cls(kind, nonce, _AF_INET if address.version == 4 else _AF_INET6, port, address.packed)

    @property
    def text(self) -> str:
        if self.family == _AF_INET:
            return f"{'.'.join(map(str, self.host))}:{self.port}/{self.nonce}"
        if self.family == _AF_INET6:
            import ipaddress

            return f"[{ipaddress.IPv6Address(self.host)}]:{self.port}/{self.nonce}"
        return f":/{self.nonce}"

    def as_type(self, kind: int) -> EntityAddress:
        return EntityAddress(kind, self.nonce, self.family, self.port, self.host, self.flow, self.scope, self.extra)

    def encode(self, out: Encoder) -> None:
        if self.family == _AF_INET:
            socket = self.port.to_bytes(2, "big") + self.host + bytes(8)
        elif self.family == _AF_INET6:
            socket = self.port.to_bytes(2, "big") + self.flow.to_bytes(4, "big") + self.host
            socket += self.scope.to_bytes(4, "little")
        else:
            socket = self.extra
        out.u8(1)
        with out.struct(1, 1):
            out.u32(self.type).u32(self.nonce)
            if self.family == 0 and not socket:
                out.u32(0)
            else:
                out.u32(2 + len(socket)).u16(self.family).raw(socket)

    @classmethod
    def decode(cls, source: Decoder) -> EntityAddress:
        if source.u8() != 1:
            raise DecodeError("entity address: old encoding")
        with source.struct(1, "entity address"):
            kind, nonce = source.u32(), source.u32()
            length = source.u32()
            if length == 0:
                return cls(kind, nonce)
            if length < 2 or length > 128:
                raise DecodeError(f"entity address: socket address of {length} bytes")
            inner = Decoder(source.raw(length))
            family = inner.u16()
            body = inner.rest()
            if family == _AF_INET:
                if len(body) < 6:
                    raise DecodeError("entity address: short IPv4 address")
                return cls(kind, nonce, family, int.from_bytes(body[:2], "big"), body[2:6])
            if family == _AF_INET6:
                if len(body) < 26:
                    raise DecodeError("entity address: short IPv6 address")
                return cls(
                    kind,
                    nonce,
                    family,
                    int.from_bytes(body[:2], "big"),
                    body[6:22],
                    int.from_bytes(body[2:6], "big"),
                    int.from_bytes(body[22:26], "little"),
                )
            return cls(kind, nonce, family, extra=body)


@dataclass(frozen=True, order=True)
class LockerId:
    entity: EntityName
    cookie: str

    def encode(self, out: Encoder) -> None:
        with out.struct(1, 1):
            self.entity.encode(out)
            out.string(self.cookie)

    @classmethod
    def decode(cls, source: Decoder) -> LockerId:
        with source.struct(1, "locker id"):
            entity = EntityName.decode(source)
            return cls(entity, source.string())


@dataclass(frozen=True)
class LockerInfo:
    expiration: Time  # zero: never
    address: EntityAddress
    description: str = ""

    def encode(self, out: Encoder) -> None:
        with out.struct(1, 1):
            out.time(self.expiration)
            self.address.encode(out)
            out.string(self.description)

    @classmethod
    def decode(cls, source: Decoder) -> LockerInfo:
        with source.struct(1, "locker info"):
            expiration = source.time()
            address = EntityAddress.decode(source)
            return cls(expiration, address, source.string())


@dataclass(frozen=True)
class LockState:
    """The xattr's value, and the reply of get_info. Unlocked: no lockers, type and tag of the last lock (or 0, "")."""

    lockers: dict[LockerId, LockerInfo] = field(default_factory=dict)
    type: int = LOCK_NONE
    tag: str = ""

    def encode(self) -> bytes:
        out = Encoder()
        with out.struct(1, 1):
            out.map(dict(sorted(self.lockers.items())), lambda o, k: k.encode(o), lambda o, v: v.encode(o))
            out.u8(self.type).string(self.tag)
        return out.done()

    @classmethod
    def decode(cls, data: bytes) -> LockState:
        source = Decoder(data)
        with source.struct(1, "lock"):
            lockers = source.map(LockerId.decode, LockerInfo.decode, smallest=19 + 22)
            kind = source.u8()
            return cls(lockers, kind, source.string())


# --- requests: field order is the wire's -------------------------------------------------------------------------


@dataclass(frozen=True)
class LockRequest:
    name: str
    type: int
    cookie: str
    tag: str = ""
    description: str = ""
    duration: Time = NEVER
    flags: int = 0

    def encode(self) -> bytes:
        out = Encoder()
        with out.struct(1, 1):
            out.string(self.name).u8(self.type).string(self.cookie).string(self.tag).string(self.description)
            out.time(self.duration).u8(self.flags)
        return out.done()

    @classmethod
    def decode(cls, data: bytes) -> LockRequest:
        source = Decoder(data)
        with source.struct(1, "lock request"):
            name, kind = source.string(), source.u8()
            cookie, tag, description = source.string(), source.string(), source.string()
            duration = source.time()
            return cls(name, kind, cookie, tag, description, duration, source.u8())


@dataclass(frozen=True)
class UnlockRequest:
    name: str
    cookie: str

    def encode(self) -> bytes:
        out = Encoder()
        with out.struct(1, 1):
            out.string(self.name).string(self.cookie)
        return out.done()

    @classmethod
    def decode(cls, data: bytes) -> UnlockRequest:
        source = Decoder(data)
        with source.struct(1, "unlock request"):
            name = source.string()
            return cls(name, source.string())


@dataclass(frozen=True)
class BreakRequest:
    name: str
    locker: EntityName
    cookie: str

    def encode(self) -> bytes:
        out = Encoder()
        with out.struct(1, 1):
            out.string(self.name)
            self.locker.encode(out)
            out.string(self.cookie)
        return out.done()

    @classmethod
    def decode(cls, data: bytes) -> BreakRequest:
        source = Decoder(data)
        with source.struct(1, "break_lock request"):
            name = source.string()
            locker = EntityName.decode(source)
            return cls(name, locker, source.string())


@dataclass(frozen=True)
class InfoRequest:
    name: str

    def encode(self) -> bytes:
        out = Encoder()
        with out.struct(1, 1):
            out.string(self.name)
        return out.done()

    @classmethod
    def decode(cls, data: bytes) -> InfoRequest:
        source = Decoder(data)
        with source.struct(1, "get_info request"):
            return cls(source.string())


@dataclass(frozen=True)
class AssertRequest:
    name: str
    type: int
    cookie: str
    tag: str = ""

    def encode(self) -> bytes:
        out = Encoder()
        with out.struct(1, 1):
            out.string(self.name).u8(self.type).string(self.cookie).string(self.tag)
        return out.done()

    @classmethod
    def decode(cls, data: bytes) -> AssertRequest:
        source = Decoder(data)
        with source.struct(1, "assert_locked request"):
            name, kind = source.string(), source.u8()
            cookie = source.string()
            return cls(name, kind, cookie, source.string())


@dataclass(frozen=True)
class SetCookieRequest:
    name: str
    type: int
    cookie: str
    tag: str
    new_cookie: str

    def encode(self) -> bytes:
        out = Encoder()
        with out.struct(1, 1):
            out.string(self.name).u8(self.type).string(self.cookie).string(self.tag).string(self.new_cookie)
        return out.done()

    @classmethod
    def decode(cls, data: bytes) -> SetCookieRequest:
        source = Decoder(data)
        with source.struct(1, "set_cookie request"):
            name, kind = source.string(), source.u8()
            cookie, tag = source.string(), source.string()
            return cls(name, kind, cookie, tag, source.string())


def encode_lock_names(names: list[str]) -> bytes:
    """Reply of list_locks."""
    out = Encoder()
    with out.struct(1, 1):
        out.list(names, Encoder.string)
    return out.done()


def decode_lock_names(data: bytes) -> list[str]:
    source = Decoder(data)
    with source.struct(1, "list_locks reply"):
        return source.list(Decoder.string, 4)


# --- the exclusive lock of an image --------------------------------------------------------------------------------

RBD_LOCK_NAME = "rbd_lock"
RBD_LOCK_TAG = "internal"
_AUTO = "auto "
_OFFER, _TAKEN = "rbdpy hand-off ", "rbdpy taken "  # descriptions of lockers; librbd and krbd leave theirs empty
_WORD = r"[!-~]{1,256}"


def auto_cookie(watch_handle: int) -> str:
    """The lock cookie that names a watch, as librbd and krbd write it."""
    if not 0 <= watch_handle < 1 << 64:
        raise EncodeError(f"watch handle {watch_handle} is not a u64")
    return f"{_AUTO}{watch_handle}"


def parse_auto_cookie(cookie: str) -> int | None:
    """The watch handle, or None when the lock was taken by other means (never to be broken automatically)."""
    if re.fullmatch(_AUTO + r"[0-9]{1,20}", cookie, re.ASCII) is None:
        return None
    handle = int(cookie[len(_AUTO) :])
    return handle if handle < 1 << 64 else None


@dataclass(frozen=True)
class Offer:
    """What a locker's description says while it hands the lock over: to the VM `key` ("*": to whoever migrates it), in
    the generation `nonce`, which no other offer ever has."""

    key: str
    nonce: str

    @property
    def mark(self) -> str:
        """The description of the locker that offers. EncodeError: a key or nonce that has blanks, or is too long."""
        for part in (self.key, self.nonce):
            if re.fullmatch(_WORD, part) is None:
                raise EncodeError(f"{part!r} cannot stand in the description of a lock")
        return f"{_OFFER}{self.key} {self.nonce}"

    @property
    def taken(self) -> str:
        """The description of the locker that took it: how the one before knows its heir from a stranger."""
        return f"{_TAKEN}{self.nonce}"

    @classmethod
    def parse(cls, mark: str) -> Offer | None:
        """None when the description offers nothing."""
        found = re.fullmatch(re.escape(_OFFER) + f"({_WORD}) ({_WORD})", mark)
        return cls(found[1], found[2]) if found else None

    def meant_for(self, key: str) -> bool:
        return self.key == key or "*" in (self.key, key)

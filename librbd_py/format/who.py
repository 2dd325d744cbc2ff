"""The answer to `notify.WhoAreYou`: what a watcher of ours says of itself. Our own record; Ceph's clients have none.

    (1,1){ u32 magic, string host, u32 pid, string program, map<string,string> about, string state, string policy,
           u32 flags, s64 watch age, s64 lock age, s64 I/O age, string I/O kind, u64 in flight, u64 parked,
           list<{u64 gid, u64 handle, s64 age}> waiting }

Ages are milliseconds, -1 for "not (yet)". A newer version may add fields at the end. Answers come from whoever watches
the image, so sizes and counts are bounded, and nothing in them is believed that the store knows better.
"""

from __future__ import annotations

from typing import Any

from librbd_py.format.values import dataclass, field

from .encoding import DecodeError, Decoder, Encoder

MAGIC = 0x57504252  # "RBPW"
MAX_ANSWER = 16 << 10  # bytes; longer ones are refused unread
MAX_TEXT = 256  # bytes of a string
MAX_ABOUT = 16
MAX_WAITING = 32
NEVER = -1
OWNER, STAND_BY = 1, 2  # flags


@dataclass(frozen=True)
class Waiting:
    """A client that asked the answering one for the lock: its watch, and how long ago it asked last (ms)."""

    gid: int
    handle: int
    age: int


@dataclass(frozen=True)
class Answer:
    """`about`: what the program wants known, of a VM for example: {"vm": "uuid:...", "name": ...}."""

    host: str = ""
    pid: int = 0
    program: str = ""
    about: dict[str, str] = field(default_factory=dict)
    state: str = ""  # of watch and lock, for people
    policy: str = ""  # automatic: gives the lock up when asked; exclusive: refuses
    owner: bool = False
    stand_by: bool = False
    watch_age: int = NEVER
    lock_age: int = NEVER
    io_age: int = NEVER
    io_kind: str = ""  # read, write, ...
    in_flight: int = 0
    parked: int = 0  # requests that wait, for the lock or for a change
    waiting: tuple[Waiting, ...] = ()

    def encode(self) -> bytes:
        """Cuts what is too long."""
        out = Encoder()
        with out.struct(1, 1):
            out.u32(MAGIC).string(_cut(self.host)).u32(self.pid).string(_cut(self.program))
            about = {_cut(key): _cut(value) for key, value in list(self.about.items())[:MAX_ABOUT]}
            out.u32(len(about))
            for key, value in about.items():
                out.string(key).string(value)
            out.string(_cut(self.state)).string(_cut(self.policy))
            out.u32(OWNER * self.owner | STAND_BY * self.stand_by)
            out.s64(self.watch_age).s64(self.lock_age).s64(self.io_age).string(_cut(self.io_kind))
            out.u64(self.in_flight).u64(self.parked)
            out.list(self.waiting[:MAX_WAITING], lambda to, who: to.u64(who.gid).u64(who.handle).s64(who.age))
        return out.done()

    @classmethod
    def decode(cls, data: bytes) -> Answer:
        """DecodeError for anything else, an owner's plain result for one."""
        if len(data) > MAX_ANSWER:
            raise DecodeError(f"an answer of {len(data)} bytes")
        source = Decoder(data)
        with source.struct(1, "who are you") as _:
            if source.u32() != MAGIC:
                raise DecodeError("an answer to something else")
            values: dict[str, Any] = {"host": _text(source), "pid": source.u32(), "program": _text(source)}
            values["about"] = {}
            for _ in range(_count(source, 8, MAX_ABOUT)):
                key = _text(source)
                values["about"][key] = _text(source)
            values |= {"state": _text(source), "policy": _text(source)}
            flags = source.u32()
            values |= {"owner": bool(flags & OWNER), "stand_by": bool(flags & STAND_BY)}
            values |= {name: _age(source) for name in ("watch_age", "lock_age", "io_age")}
            values |= {"io_kind": _text(source), "in_flight": source.u64(), "parked": source.u64()}
            waiting = [(source.u64(), source.u64(), _age(source)) for _ in range(_count(source, 24, MAX_WAITING))]
            values["waiting"] = tuple(Waiting(*row) for row in waiting)
            source.rest()
        return cls(**values)


def _cut(text: str) -> str:
    return text.encode(errors="replace")[:MAX_TEXT].decode(errors="ignore")


def _text(source: Decoder) -> str:
    """As it may be printed: no control characters, whoever sent it."""
    text = source.string()
    if len(text) > MAX_TEXT:
        raise DecodeError(f"a text of {len(text)} characters")
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _age(source: Decoder) -> int:
    age = source.s64()
    if age < NEVER:
        raise DecodeError(f"an age of {age}")
    return age


def _count(source: Decoder, smallest: int, most: int) -> int:
    count = source.count(smallest)
    if count > most:
        raise DecodeError(f"{count} entries, {most} at most")
    return count

"""Ceph's primitive encodings, little endian (bytes <-> values, nothing else).

Every decoder in `librbd_py.format` reads through `Decoder`. Input is hostile until proven otherwise: each read is
bounded by what is left, a count is checked against the bytes its elements need before anything is allocated, and the
only exception that leaves is `DecodeError`, an OSError with EIO.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from librbd_py.format.values import dataclass

T = TypeVar("T")
K = TypeVar("K")

U64_MAX = (1 << 64) - 1


class DecodeError(OSError):
    """The bytes are not what they should be. errno EIO."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.EIO, text)


class EncodeError(ValueError):
    """A value does not fit its field: a caller's mistake, never caused by input that was decoded."""


@dataclass(frozen=True, order=True)
class Time:
    """utime_t: seconds since 1970 and nanoseconds, both u32."""

    seconds: int = 0
    nanoseconds: int = 0

    @classmethod
    def from_ns(cls, nanoseconds: int) -> Time:
        return cls((nanoseconds // 1_000_000_000) & 0xFFFFFFFF, nanoseconds % 1_000_000_000)

    @property
    def ns(self) -> int:
        return self.seconds * 1_000_000_000 + self.nanoseconds

    def __bool__(self) -> bool:
        return self.seconds != 0 or self.nanoseconds != 0


NEVER = Time()


class Decoder:
    """A cursor over bytes. Reading past the end raises DecodeError."""

    __slots__ = ("_data", "_end", "_pos")

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = bytes(data)
        self._pos = 0
        self._end = len(self._data)

    @property
    def remaining(self) -> int:
        return self._end - self._pos

    @property
    def at_end(self) -> bool:
        return self._pos == self._end

    def raw(self, length: int) -> bytes:
        if length > self._end - self._pos:
            raise DecodeError(f"{length} bytes wanted at offset {self._pos}, {self._end - self._pos} left")
        start = self._pos
        self._pos = start + length
        return self._data[start : self._pos]

    def peek_u8(self, ahead: int) -> int:
        """The byte `ahead` of the cursor, which stays where it is."""
        if ahead >= self._end - self._pos:
            raise DecodeError(f"a byte wanted at offset {self._pos + ahead}, {self._end - self._pos} left")
        return self._data[self._pos + ahead]

    def rest(self) -> bytes:
        return self.raw(self.remaining)

    def u8(self) -> int:
        return self.raw(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.raw(2), "little")

    def u32(self) -> int:
        return int.from_bytes(self.raw(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.raw(8), "little")

    def s32(self) -> int:
        return int.from_bytes(self.raw(4), "little", signed=True)

    def s64(self) -> int:
        return int.from_bytes(self.raw(8), "little", signed=True)

    def bool(self) -> bool:
        return self.raw(1)[0] != 0

    def time(self) -> Time:
        seconds = self.u32()
        return Time(seconds, self.u32())

    def blob(self) -> bytes:
        """u32 length and that many bytes (a string on the wire, without any promise about its text)."""
        return self.raw(self.u32())

    def string(self) -> str:
        """UTF-8; bytes that are not survive as lone surrogates and encode back to themselves."""
        return self.blob().decode("utf-8", "surrogateescape")

    def count(self, smallest: int) -> int:
        """A u32 element count, refused unless that many elements of at least `smallest` bytes can follow."""
        count = self.u32()
        if count * smallest > self.remaining:
            raise DecodeError(f"{count} elements cannot fit in {self.remaining} bytes")
        return count

    def list(self, element: Callable[[Decoder], T], smallest: int) -> list[T]:
        return [element(self) for _ in range(self.count(smallest))]

    def map(self, key: Callable[[Decoder], K], value: Callable[[Decoder], T], smallest: int) -> dict[K, T]:
        result: dict[K, T] = {}
        for _ in range(self.count(smallest)):
            k = key(self)
            result[k] = value(self)
        return result

    def optional(self, element: Callable[[Decoder], T]) -> T | None:
        return element(self) if self.bool() else None

    @contextmanager
    def struct(self, supported: int, what: str) -> Iterator[int]:
        """A versioned struct: yields struct_v; fields are read inside the block; what a newer writer appended is
        skipped. Refuses a compat version newer than `supported`."""
        version = self.u8()
        compat = self.u8()
        length = self.u32()
        if compat > supported:
            raise DecodeError(f"{what}: needs decoder version {compat}, this one knows {supported}")
        if length > self.remaining:
            raise DecodeError(f"{what}: {length} bytes announced, {self.remaining} left")
        outer, self._end = self._end, self._pos + length
        try:
            yield version
            self._pos = self._end
        finally:
            self._end = outer

    def finish(self, what: str) -> None:
        if self._pos != self._end:
            raise DecodeError(f"{what}: {self.remaining} bytes too many")


def decode_string(decoder: Decoder) -> str:
    return decoder.string()


def decode_blob(decoder: Decoder) -> bytes:
    return decoder.blob()


def decode_u64(decoder: Decoder) -> int:
    return decoder.u64()


class Encoder:
    """Appends to a buffer; every method returns the encoder, so calls chain. EncodeError when a value does not fit."""

    __slots__ = ("_out",)

    def __init__(self) -> None:
        self._out = bytearray()

    def done(self) -> bytes:
        return bytes(self._out)

    def _int(self, value: int, width: int, signed: bool = False) -> Encoder:
        try:
            self._out += value.to_bytes(width, "little", signed=signed)
        except OverflowError:
            raise EncodeError(f"{value} does not fit in {'s' if signed else 'u'}{8 * width}") from None
        return self

    def u8(self, value: int) -> Encoder:
        return self._int(value, 1)

    def u16(self, value: int) -> Encoder:
        return self._int(value, 2)

    def u32(self, value: int) -> Encoder:
        return self._int(value, 4)

    def u64(self, value: int) -> Encoder:
        return self._int(value, 8)

    def s32(self, value: int) -> Encoder:
        return self._int(value, 4, signed=True)

    def s64(self, value: int) -> Encoder:
        return self._int(value, 8, signed=True)

    def bool(self, value: bool) -> Encoder:
        self._out.append(1 if value else 0)
        return self

    def time(self, value: Time) -> Encoder:
        return self.u32(value.seconds).u32(value.nanoseconds)

    def raw(self, data: bytes | bytearray | memoryview) -> Encoder:
        self._out += data
        return self

    def blob(self, data: bytes | bytearray | memoryview) -> Encoder:
        self.u32(len(data))
        self._out += data
        return self

    def string(self, text: str) -> Encoder:
        try:
            return self.blob(text.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError:
            raise EncodeError(f"{text!r} cannot be written as UTF-8") from None

    def list(self, items: Iterable[T], element: Callable[[Encoder, T], object]) -> Encoder:
        held = list(items)
        self.u32(len(held))
        for item in held:
            element(self, item)
        return self

    def map(
        self, items: Mapping[K, T], key: Callable[[Encoder, K], object], value: Callable[[Encoder, T], object]
    ) -> Encoder:
        """In the mapping's own order; the caller sorts where the order matters."""
        self.u32(len(items))
        for k, v in items.items():
            key(self, k)
            value(self, v)
        return self

    def optional(self, value: T | None, element: Callable[[Encoder, T], object]) -> Encoder:
        self.bool(value is not None)
        if value is not None:
            element(self, value)
        return self

    @contextmanager
    def struct(self, version: int, compat: int) -> Iterator[Encoder]:
        """A versioned struct around what is written inside the block."""
        self.u8(version).u8(compat)
        at = len(self._out)
        self._out += b"\0\0\0\0"
        yield self
        self._out[at : at + 4] = (len(self._out) - at - 4).to_bytes(4, "little")


def encode_string(text: str) -> bytes:
    return Encoder().string(text).done()


def encode_u64(value: int) -> bytes:
    return Encoder().u64(value).done()

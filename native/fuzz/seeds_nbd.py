"""Writes the seeds of fuzz_nbd: one file per protocol feature. usage: seeds_nbd.py FOLDER"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

OPTION = b"IHAVEOPT"


def option(number: int, data: bytes = b"") -> bytes:
    return OPTION + struct.pack(">II", number, len(data)) + data


def name(text: bytes = b"", infos: tuple[int, ...] = ()) -> bytes:
    return struct.pack(">I", len(text)) + text + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta(text: bytes, *queries: bytes) -> bytes:
    body = struct.pack(">I", len(text)) + text + struct.pack(">I", len(queries))
    return body + b"".join(struct.pack(">I", len(query)) + query for query in queries)


def request(command: int, offset: int, length: int, flags: int = 0) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, 77, offset, length)


def step(command: int, block: int, length: int, flags: int = 0) -> bytes:
    return bytes([0x81, command, flags]) + struct.pack(">H", block) + length.to_bytes(3, "big")


HELLO = struct.pack(">I", 3)
RAW, LATE, READ_ONLY = b"\4", b"\2", b"\1"
GO = HELLO + option(8) + option(10, meta(b"", b"base:allocation")) + option(7, name(b"", (1, 2, 3)))
COMMANDS = b"".join(
    [
        request(0, 0, 4096),
        request(1, 512, 16) + b"sixteen bytes!!!",
        request(3, 0, 0),
        request(4, 0, 65536, 1),
        request(5, 0, 100),
        request(6, 0, 4096, 2),
        request(6, 0, 4096, 18),
        request(7, 0, 1 << 20),
        request(7, 0, 9, 8),
        request(9, 0, 0),
        request(0, 1 << 40, 1),
        request(2, 0, 0),
    ]
)
SEEDS = {
    "export_name": RAW + struct.pack(">I", 1) + option(1) + COMMANDS,
    "go": RAW + GO + COMMANDS,
    "simple": RAW + HELLO + option(7, name()) + COMMANDS,
    "read_only": b"\5" + GO + COMMANDS,
    "options": RAW
    + HELLO
    + option(3)
    + option(5)
    + option(6, name(b"x"))
    + option(9, meta(b"", b"base:"))
    + option(11)
    + option(2),
    "bad_options": RAW
    + HELLO
    + option(7, b"\xff" * 6)
    + option(10, meta(b"", b"x")[:-1])
    + option(4, b"1234")
    + b"IHAVE",
    "steps": b"\0\x80" + step(1, 0, 70000) + step(0, 0, 70000) + step(7, 0, 65536) + step(6, 1, 4096) + step(3, 0, 0),
    "late": LATE
    + b"\x80"
    + step(1, 0, 300) * 3
    + step(0, 0, 65536) * 3
    + step(7, 0, 9)
    + b"\x84\x01"
    + step(0, 1, 9)
    + b"\x86",
    "blocked": b"\0\x80\x82\x01" + step(0, 0, 0xFFFFF) * 4 + b"\x83" + step(0, 0, 512),
    "stop": LATE + b"\x80" + step(0, 0, 512) + b"\x87\x00" + step(1, 0, 512) + b"\x87\x01\x84\x00",
    "many": LATE + b"\x80" + step(1, 0, 200) * 20 + b"\x84\x00" + step(0, 0, 60000) * 9 + b"\x84\x01",
    "race": b"\0\x80" + step(0, 0, 512) + b"\x87\x03",
    "deadline": b"\0\x04\0\0\0\3\x89\x80",
    "fails": b"\0\x80\x88\x05" + step(0, 0, 512) + step(7, 0, 512) + b"\x88\x1c" + step(1, 0, 512),
    "packets": LATE + b"\x80" + (b"\x72" + 3 * (request(1, 0, 10) + b"0123456789")) * 40 + b"\x84\x00",
    "hold": b"\0\x80\x8a\x01" + step(0, 0, 9) * 18 + b"\x8a\x02" + step(0, 0, 9) * 20,
    "hold_late": LATE + b"\x80\x8a\x09" + step(0, 0, 9) * 2 + (b"\x84\1" + step(0, 0, 9)) * 16 + b"\x87\x01",
    "hold_gone": b"\0\x80\x8a\x01" + step(0, 0, 9) * 18 + b"\x86",
    "resize": b"\0\x80\x85\x08" + step(0, 0x80, 4096) + b"\x85\xff" + step(0, 0x80, 4096),
}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for seed, content in SEEDS.items():
        (folder / seed).write_bytes(content)

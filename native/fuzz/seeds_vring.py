"""Seeds for fuzz_vring: requests a driver would make, in the bytes that target reads. usage: seeds_vring.py FOLDER"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

NEXT, WRITE, INDIRECT, FOLLOWING = 1, 2, 4, 128
LENGTHS = (0, 1, 15, 16, 17, 20, 511, 512, 513, 4096, 16384, 32768, 0xFFFFFFFF, 0xFFFFFE00, 32, 48)


def start(mode: int, exponent: int = 5) -> bytes:
    return bytes([mode, exponent, 3, 0])


def desc(index: int, offset: int, length: int, flags: int, region: int = 0) -> bytes:
    """A descriptor of the ring; the next one follows."""
    return bytes([0, index, region]) + struct.pack("<H", offset) + bytes([LENGTHS.index(length), flags | FOLLOWING])


def table(where: int, index: int, offset: int, length: int, flags: int, region: int = 0) -> bytes:
    """A descriptor in a table at 64 * where of region 0."""
    tail = bytes([LENGTHS.index(length), flags | FOLLOWING])
    return bytes([2, where, index, region]) + struct.pack("<H", offset) + tail


def header(offset: int, kind: int, sector: int) -> bytes:
    return bytes([7, kind]) + struct.pack("<HH", sector, offset)


OFFER, KICK, JOB, SLEEP, POLL, STOP, DIE = 4, 9, 11, 12, 13, 15, 31


def request(kind: int, data_flags: int, length: int = 512, sector: int = 1) -> bytes:
    return (header(0x3000, kind, sector) + desc(0, 0x3000, 16, NEXT) + desc(1, 0x3400, length, NEXT | data_flags)
            + desc(2, 0x3100, 1, WRITE) + bytes([OFFER, 0, KICK]))


def indirect(kind: int, data_flags: int, length: int = 512) -> bytes:
    return (header(0x3000, kind, 2) + table(0xB0, 0, 0x3000, 16, NEXT)
            + table(0xB0, 1, 0x3400, length, NEXT | data_flags) + table(0xB0, 2, 0x3100, 1, WRITE)
            + desc(5, 0x2C00, 48, INDIRECT) + bytes([OFFER, 5, KICK]))


def seeds() -> dict[str, bytes]:
    out = {}
    for mode in (0, 2, 4 | 2, 8 | 4 | 2, 1 | 2 | 4 | 8, 64 | 2, 128 | 2, 16 | 2, 32 | 8 | 2):
        out[f"read-{mode}"] = start(mode) + request(0, WRITE) + bytes([SLEEP])
        out[f"write-{mode}"] = start(mode) + request(1, 0) + bytes([POLL, SLEEP])
        out[f"flush-{mode}"] = start(mode) + request(4, 0)
        out[f"id-{mode}"] = start(mode) + request(8, WRITE, 20)
        out[f"discard-{mode}"] = start(mode) + request(11, 0, 32) + bytes([JOB, JOB])
        out[f"zeroes-{mode}"] = start(mode) + request(13, 0, 48) + bytes([JOB])
        out[f"indirect-{mode}"] = start(mode) + indirect(0, WRITE) + indirect(1, 0, 4096)
        out[f"late-{mode}"] = start(mode) + request(0, WRITE) + bytes([0x7E, 0x4E, JOB]) + request(1, 0)
        out[f"die-{mode}"] = start(mode) + request(0, WRITE) + bytes([DIE]) + request(1, 0) + bytes([STOP])
        out[f"straddle-{mode}"] = (start(mode) + header(0x3000, 0, 0) + desc(0, 0x3000, 16, NEXT)
                                   + desc(1, 8, 16, NEXT | WRITE, 3) + desc(2, 0x3100, 1, WRITE)
                                   + bytes([OFFER, 0, KICK]))
    return out


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()

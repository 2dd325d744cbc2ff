"""Seeds for fuzz_vhost_msg, in the bytes that target reads. usage: seeds_vhost_msg.py FOLDER"""

from __future__ import annotations

import struct
import sys
from pathlib import Path


def proper(what: int, n: int = 0, bend: int | None = None) -> bytes:
    """A well-formed message (see proper() in the target) for queue n."""
    if bend is None:
        return bytes([2 + 8 * what, n])
    return bytes([2 + 8 * what | 128, n]) + struct.pack("<Q", bend)


def start(how: int) -> bytes:
    return bytes([4 + 8 * how])


def poke(at: int, data: bytes) -> bytes:
    """The guest writes and kicks."""
    return bytes([5]) + struct.pack("<HB", at, len(data)) + data


def message(request: int, payload: bytes, fds: tuple[int, ...] = ()) -> bytes:
    return bytes([8, request]) + struct.pack("<HB", len(payload), len(fds)) + bytes(fds) + payload


def request(kind: int, writable: int, queue: int = 0) -> bytes:
    """A request of one indirect-free chain: header at 32 KiB, data at 36 KiB, status at 40 KiB."""
    ring = queue * 8192
    chain = [(32768, 16, 1, 1), (36864, 512, 1 | writable, 2), (40960, 1, 2, 0)]
    out = poke(32768, struct.pack("<IIQ", kind, 0, 1))
    for n, entry in enumerate(chain):
        out += poke(ring + 16 * n, struct.pack("<QIHH", *entry))
    return out + poke(ring + 2048 + 4, b"\0\0") + poke(ring + 2048 + 2, b"\1\0")


SLEEP, POLL, JOB, DEADLINE, RESIZE = 6 + 16, 6, 6 + 8, 7 + 8, 7


def seeds() -> dict[str, bytes]:
    out: dict[str, bytes] = {}
    for mode in (0, 1):
        head = bytes([mode])
        for how in range(4):
            out[f"start-{mode}-{how}"] = head + start(how) + bytes([SLEEP])
            out[f"read-{mode}-{how}"] = head + start(how) + request(0, 2) + bytes([SLEEP, JOB]) + proper(10)
            out[f"write-{mode}-{how}"] = head + start(how) + request(1, 0, 1) + proper(10, 1) + bytes([JOB, DEADLINE])
            stop = head + start(how) + request(0, 2) + proper(10)
            out[f"stop-{mode}-{how}"] = stop + bytes([DEADLINE, DEADLINE, JOB])
            out[f"memory-{mode}-{how}"] = head + start(how) + request(0, 2) + proper(2) + proper(3, 2) + proper(3, 3)
            out[f"reset-{mode}-{how}"] = head + start(how) + request(0, 2) + bytes([2 + 8 * 15, 20, JOB])
            out[f"log-{mode}-{how}"] = head + start(how) + proper(12) + request(0, 2) + proper(6, 0, 1) + bytes([JOB])
            out[f"kicks-{mode}-{how}"] = head + start(how) + proper(7) + proper(8, 5) + proper(9, 0) + proper(9, 4)
        for what in range(16):
            out[f"proper-{mode}-{what}"] = head + proper(1, 0, 0) + proper(what) + proper(what, 1)
            out[f"bent-{mode}-{what}"] = head + proper(1, 0, 0) + proper(what, 0, (1 << 63) + 4096)
        for number in range(48):
            for size in (0, 8, 12, 16, 24, 40):
                out[f"message-{mode}-{number}-{size}"] = head + message(number, bytes(size))
            out[f"with-fd-{mode}-{number}"] = head + message(number, bytes(8), (1,))
        out[f"pieces-{mode}"] = head + bytes([1, 8]) + struct.pack("<II", 1, 1) + bytes([1, 4]) + bytes(4)
        out[f"resize-{mode}"] = head + proper(1, 0, 0) + proper(14) + bytes([RESIZE, RESIZE])
    return out


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()

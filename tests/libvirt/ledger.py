"""What is left in an image of what a guest's `ledger` (vm_images/guest/ledger.c) wrote, against what it was told.

The guest says on its console which writes were acknowledged and flushed. From that follows what each block must hold at
least. The image is read through the library, by another client, and each block is one of:

* empty, or as new as it must be (newer by what was in flight): right;
* older than what was acknowledged: lost, or overwritten by a write that came late;
* of another place, image, VM or boot, torn, or from a write nobody made: wrong;
* with `before`, an earlier look: changed since by a boot that had ended then: a zombie's.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from librbd_py import rados, rbd

BLOCK = 4096
HEAD = struct.Struct("<8Q")
MAGIC = 0x4C44474552444252
BATCH = 32  # writes between flushes, as in ledger.c
MASK = (1 << 64) - 1
ACK = re.compile(r"STAMP-ACK (\d+) (\d+) (\d+) \.")


def mix(x: int) -> int:
    x ^= x >> 33
    x = x * 0xFF51AFD7ED558CCD & MASK
    x ^= x >> 33
    x = x * 0xC4CEB9FE1A85EC53 & MASK
    return x ^ x >> 33


@dataclass(frozen=True)
class Writer:
    """What the guest is told on its kernel command line."""

    image: int
    owner: int
    blocks: int = 1024
    threads: int = 4

    @property
    def share(self) -> int:
        return self.blocks // self.threads

    @property
    def append(self) -> str:
        said = {"image": self.image, "owner": self.owner, "blocks": self.blocks, "threads": self.threads}
        return "rbdpy.mode=ledger rbdpy.start=0 " + " ".join(f"rbdpy.{key}={value}" for key, value in said.items())

    def place(self, thread: int, epoch: int, version: int) -> int:
        """The block of the device that this write goes to."""
        at = mix((version * 0x9E3779B97F4A7C15 + epoch * 1000003 + thread) & MASK) % self.share
        return 1 + thread * self.share + at


@dataclass(frozen=True, order=True)
class Stamp:
    epoch: int
    version: int
    thread: int


@dataclass
class Verdict:
    """`acknowledged`: writes that were acknowledged and flushed."""

    blocks: int
    acknowledged: int
    epochs: int
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    zombies: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        return not (self.lost or self.wrong or self.zombies)

    @classmethod
    def total(cls, verdicts: Iterable[Verdict]) -> Verdict:
        """What was read all together; a guest that was looked at twice counts twice."""
        total = cls(0, 0, 0)
        for each in verdicts:
            total.blocks += each.blocks
            total.acknowledged += each.acknowledged
            total.epochs += each.epochs
            total.lost += each.lost
            total.wrong += each.wrong
            total.zombies += each.zombies
        return total

    def __str__(self) -> str:
        said = (
            f"{self.acknowledged} acknowledged writes of {self.epochs} boots in {self.blocks} blocks: "
            f"{len(self.lost)} lost, {len(self.wrong)} wrong, {len(self.zombies)} of zombies"
        )
        return "; ".join([said, *(self.lost + self.wrong + self.zombies)[:8]])


def acknowledged(console: str) -> dict[tuple[int, int], int]:
    """(epoch, thread) -> the newest version that was flushed."""
    found: dict[tuple[int, int], int] = {}
    for thread, epoch, version in ACK.findall(console):
        key = int(epoch), int(thread)
        found[key] = max(found.get(key, 0), int(version))
    return found


def content(store: str, image: str, writer: Writer, pool: str = "rbd") -> bytes:
    """The guest's blocks, in one read at a time of 1 MiB; the first block is the one of the boot counter."""
    with rados.Rados(conf={"rbdpy_store": store}) as cluster, cluster.open_ioctx(pool) as ioctx:
        with rbd.Image(ioctx, image, read_only=True) as opened:
            size, step = (1 + writer.blocks) * BLOCK, 1 << 20
            return b"".join(opened.read(at, min(step, size - at)) for at in range(0, size, step))


def stamp(writer: Writer, lba: int, block: bytes) -> Stamp | str | None:
    """Who wrote the block; None: nobody; text: what is wrong with it."""
    magic, image, said, owner, epoch, thread, version, crc = HEAD.unpack_from(block)
    if not any(block):
        return None
    if magic != MAGIC or zlib.crc32(block[:56] + bytes(8) + block[64:]) != crc:
        return "is torn"
    if (image, said, owner) != (writer.image, lba, writer.owner):
        return f"is block {said} of image {image} of VM {owner}"
    if thread >= writer.threads or writer.place(thread, epoch, version) != lba:
        return f"holds version {version} of thread {thread}, which belongs elsewhere"
    return Stamp(epoch, version, thread)


def judge(writer: Writer, console: str, now: bytes, before: bytes | None = None, ended: int = 0) -> Verdict:
    """`now`: content(). `before`: an earlier one, from when boots up to number `ended` had ended."""
    acks = acknowledged(console)
    must: dict[int, Stamp] = {}
    for epoch, thread in sorted(acks):
        for version in range(1, acks[epoch, thread] + 1):
            must[writer.place(thread, epoch, version)] = Stamp(epoch, version, thread)
    verdict = Verdict(writer.blocks, sum(acks.values()), len({epoch for epoch, _ in acks}))
    for lba in range(1, writer.blocks + 1):
        block = now[lba * BLOCK : (lba + 1) * BLOCK]
        found, least = stamp(writer, lba, block), must.get(lba)
        if isinstance(found, str):
            verdict.wrong.append(f"block {lba} {found}")
        elif least is not None and (found is None or found < least):
            verdict.lost.append(f"block {lba} holds {found} instead of {least}")
        elif found is not None and found.version > acks.get((found.epoch, found.thread), 0) + 2 * BATCH:
            verdict.wrong.append(f"block {lba} holds {found}, which is not written yet")
        moved = before is not None and block != before[lba * BLOCK : (lba + 1) * BLOCK]
        if moved and isinstance(found, Stamp) and found.epoch <= ended:
            verdict.zombies.append(f"block {lba} became {found} after boot {ended} had ended")
    return verdict

"""The writer that says what it wrote, and who checks it: what one writes the other reads, and no defect passes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.libvirt.ledger import BLOCK, HEAD, Stamp, Writer, acknowledged, judge, stamp
from vm_images.initramfs import program

WRITER = Writer(image=7, owner=(1 << 64) - 9, blocks=64, threads=2)


def write(disk: Path, epoch: int, seconds: int = 1) -> str:
    words = [disk, WRITER.image, WRITER.owner, epoch, WRITER.blocks, WRITER.threads, seconds]
    done = subprocess.run(
        [program("ledger"), *(str(word) for word in words)], capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes, str, bytes]:
    """Console and disk after one boot, and after two."""
    disk = tmp_path_factory.mktemp("ledger", numbered=True) / "disk"
    # O_DIRECT, so not in a tmpfs of an old kernel
    disk.touch()
    os.truncate(disk, (1 + WRITER.blocks) * BLOCK)
    first = write(disk, 1)
    between = disk.read_bytes()
    return first, between, first + write(disk, 2), disk.read_bytes()


def changed(disk: bytes, lba: int, block: bytes) -> bytes:
    return disk[: lba * BLOCK] + block + disk[(lba + 1) * BLOCK :]


def test_what_was_written_is_right(written: tuple[str, bytes, str, bytes]) -> None:
    first, between, both, disk = written
    once, twice = judge(WRITER, first, between), judge(WRITER, both, disk, before=between, ended=1)
    assert once.right and once.acknowledged > 200, str(once)
    assert twice.right and twice.acknowledged > once.acknowledged and twice.epochs == 2, str(twice)


def test_the_newest_version_of_each_block_is_required(written: tuple[str, bytes, str, bytes]) -> None:
    first, between, both, disk = written
    for lba in range(1, WRITER.blocks + 1):
        old, new = (stamp(WRITER, lba, image[lba * BLOCK : (lba + 1) * BLOCK]) for image in (between, disk))
        assert isinstance(old, Stamp) and isinstance(new, Stamp) and (old.epoch, new.epoch) == (1, 2)
    assert not judge(WRITER, both, between).right
    assert len(judge(WRITER, both, between).lost) == WRITER.blocks
    assert len(judge(WRITER, first, bytes(len(disk))).lost) == WRITER.blocks


def test_one_stale_block_is_seen_and_one_of_a_zombie(written: tuple[str, bytes, str, bytes]) -> None:
    _, between, both, disk = written
    for lba in (1, 33, 64):
        stale = changed(disk, lba, between[lba * BLOCK : (lba + 1) * BLOCK])
        verdict = judge(WRITER, both, stale, before=disk, ended=1)
        assert len(verdict.lost) == len(verdict.zombies) == 1 and not verdict.wrong


def test_wrong_blocks_are_seen(written: tuple[str, bytes, str, bytes]) -> None:
    first, disk, *_ = written
    block = disk[5 * BLOCK : 6 * BLOCK]
    for at in (0, 8, 16, 24, 32, 40, 48, 56, 64, BLOCK - 1):
        flipped = bytearray(block)
        flipped[at] ^= 1
        assert len(judge(WRITER, first, changed(disk, 5, bytes(flipped))).wrong) == 1, at
    assert len(judge(WRITER, first, changed(disk, 6, block)).wrong) == 1
    half = block[:512] + disk[6 * BLOCK + 512 : 7 * BLOCK]
    assert judge(WRITER, first, changed(disk, 5, half)).wrong == ["block 5 is torn"]
    other = Writer(image=8, owner=WRITER.owner, blocks=64, threads=2)
    assert len(judge(other, first, disk).wrong) == WRITER.blocks


def test_a_block_from_the_future_is_wrong(written: tuple[str, bytes, str, bytes]) -> None:
    """A console that lost its end looks like that, so what was read is never taken for what was acknowledged."""
    disk = written[1]
    assert judge(WRITER, "STAMP-ACK 0 1 32 .\nSTAMP-ACK 1 1 32 .\n", disk).wrong


def test_only_whole_lines_count() -> None:
    assert acknowledged("STAMP-ACK 1 2 32 .\nSTAMP-ACK 1 2 64\nSTAMP-ACK 3 1 6") == {(2, 1): 32}
    assert HEAD.size == 64

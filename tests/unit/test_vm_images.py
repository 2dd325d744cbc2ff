"""Guest builders: the archive is what cpio reads, and equal inputs give equal bytes."""

from __future__ import annotations

import gzip
import stat
import subprocess
from pathlib import Path

import pytest

from vm_images import disk
from vm_images.initramfs import initramfs, newc
from vm_images.kernel import kernel


def test_newc_archive_is_read_back_by_busybox(tmp_path: Path) -> None:
    entries = [
        ("d", stat.S_IFDIR | 0o755, b""),
        ("d/f", stat.S_IFREG | 0o640, b"hello"),
        ("g", stat.S_IFREG | 0o755, b""),
    ]
    subprocess.run(
        ["/bin/busybox", "cpio", "-i", "-d"], input=newc(entries), cwd=tmp_path, check=True, capture_output=True
    )
    assert (tmp_path / "d/f").read_bytes() == b"hello"
    assert stat.S_IMODE((tmp_path / "d/f").stat().st_mode) == 0o640
    assert (tmp_path / "g").stat().st_size == 0


def test_boot_disk_is_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = disk.boot_disk()
    chosen, ramdisk = kernel(), initramfs(kernel())
    again = tmp_path / "again.raw"
    disk._build(again, chosen, ramdisk, "rbdpy.mode=check", 48 << 20)
    assert again.read_bytes() == first.read_bytes()


def test_initramfs_holds_the_init_script(tmp_path: Path) -> None:
    archive = gzip.decompress(initramfs(kernel()).read_bytes())
    subprocess.run(["/bin/busybox", "cpio", "-i", "-d"], input=archive, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "init").read_text().startswith("#!/bin/busybox sh")
    assert {p.name for p in (tmp_path / "modules").iterdir()} >= {"virtio_blk.ko", "virtio_pci.ko"}


def test_disk_too_small_for_data_is_refused() -> None:
    with pytest.raises(ValueError, match="boot disk"):
        disk.boot_disk(size=disk.DATA_START)

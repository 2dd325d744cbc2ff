"""A whole disk that boots from firmware: SeaBIOS -> syslinux -> kernel -> initramfs, all read from the disk.

FAT16 starts at LBA 0 without a partition table. So there is no MBR that loads a second boot sector over itself: under
TCG, QEMU does not notice that a vhost-user process wrote over code it has already translated, and would run the old
one. For the same reason the userland lives in the initramfs. Raw data begins at DATA_START.
"""

from __future__ import annotations

import os
from pathlib import Path

from vm_images.cache import cached, key
from vm_images.initramfs import initramfs
from vm_images.kernel import Kernel, kernel, run

MIB = 1 << 20
DATA_START = 24 * MIB  # bytes; the init script's default of rbdpy.start


def boot_disk(append: str = "rbdpy.mode=check", size: int = 48 * MIB) -> Path:
    """Raw image of `size` bytes; `append` goes to the kernel command line. Cached; needs no root and no loop device."""
    if size < DATA_START + MIB:
        raise ValueError(f"a boot disk needs at least {DATA_START + MIB} bytes")
    chosen = kernel()
    ramdisk = initramfs(chosen)
    name = key(chosen.version, ramdisk.name, append, str(size), "1")
    return cached(f"boot-{name}.raw", lambda target: _build(target, chosen, ramdisk, append, size))


def _build(target: Path, chosen: Kernel, ramdisk: Path, append: str, size: int) -> None:
    config = target.with_name(target.name + ".cfg")
    config.write_text(
        "SERIAL 0 115200\nDEFAULT linux\nPROMPT 0\nLABEL linux\n LINUX /vmlinuz\n INITRD /initrd.gz\n"
        f" APPEND console=ttyS0 quiet panic=1 no_timer_check {append}\n"
    )
    # fixed times and volume id, so that equal inputs give equal disks
    fixed = {"MTOOLS_SKIP_CHECK": "1", "SOURCE_DATE_EPOCH": "0", "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    try:
        with target.open("wb") as disk:
            disk.truncate(DATA_START)
        run("mkfs.fat", "-F", "16", "-i", "52424450", "--invariant", target, env=fixed)
        for source, name in ((chosen.vmlinuz, "vmlinuz"), (ramdisk, "initrd.gz"), (config, "syslinux.cfg")):
            run("mcopy", "-i", target, source, f"::/{name}", env=fixed)
        run("syslinux", "--install", target, env=fixed)
        os.truncate(target, size)
    finally:
        config.unlink(missing_ok=True)

"""`make boot`: the whole path once, on this machine, in front of the user's eyes.

A small guest is built, imported into an RBD image of an embedded store (or of a Ceph cluster that is started for it and
removed again) and cloned; the clone is exported by `rbdpyd`
and QEMU boots from it: firmware, boot loader, kernel and initramfs are read through the export. The guest writes,
fsyncs and verifies stamped blocks and powers off; what it wrote is read back through the library. Once over
vhost-user-blk, once over NBD.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from librbd_py import rados, rbd
from librbd_py.devcluster import Options, scratch
from qemu_glue.accel import accelerator
from qemu_glue.client import Daemon
from qemu_glue.guest import Disk, Guest
from vm_images.cache import cache_dir
from vm_images.disk import DATA_START, boot_disk
from vm_images.initramfs import initramfs
from vm_images.kernel import BuildError, kernel

GUEST_DEADLINE = 180.0  # seconds for one boot, also on a slow host under TCG
BLOCKS = 512  # stamped by the guest, 4 KiB each


class BootError(RuntimeError):
    """A step failed; the text says which, and the log to read."""


def say(text: str) -> None:
    print(f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text, flush=True)


def prepare(cluster: rados.Rados, disk: Path) -> None:
    """Image `golden` with the disk's content, its snapshot `v1`, and the clones `vm-vhost-user` and `vm-nbd`."""
    with cluster.open_ioctx("rbd") as ioctx:
        size = disk.stat().st_size
        rbd.RBD().create(ioctx, "golden", size, old_format=False)
        with rbd.Image(ioctx, "golden") as image, disk.open("rb") as source:
            offset = 0
            while data := source.read(1 << 20):
                if data.strip(b"\0"):
                    image.write(data, offset)
                offset += len(data)
            image.flush()
            image.create_snap("v1")
            image.protect_snap("v1")
        for name in ("vm-vhost-user", "vm-nbd"):
            rbd.RBD().clone(ioctx, "golden", "v1", ioctx, name)


def verify(cluster: rados.Rados, name: str) -> str:
    """Checks in the image what the guest says it wrote. Returns a sentence; BootError when it is not there."""
    with cluster.open_ioctx("rbd") as ioctx, rbd.Image(ioctx, name, read_only=True) as image:
        counter = image.read(DATA_START, 512).split(b"\n")[0]
        if counter != b"1":
            raise BootError(f"the guest's boot counter reads {counter!r} through the library, b'1' was expected")
        first = DATA_START // 4096 + 1
        for number in range(BLOCKS):
            block = image.read((first + number) * 4096, 4096)
            magic, lba = block[:8], int.from_bytes(block[8:16], "little")
            if magic != b"RBDSTAMP" or lba != first + number:
                raise BootError(f"block {first + number} of {name} does not hold what the guest wrote")
        changed = 0

        def extent(offset: int, length: int, exists: bool) -> None:
            nonlocal changed
            changed += length if exists else 0

        image.diff_iterate(0, image.size(), None, extent, include_parent=False, whole_object=True)
    with cluster.open_ioctx("rbd") as ioctx, rbd.Image(ioctx, "golden", read_only=True) as image:
        if image.read(DATA_START, 512).strip(b"\0"):
            raise BootError("the guest's write reached the parent image")
    return f"read back {BLOCKS} blocks and the boot counter; {changed >> 20} MiB of the clone differ from its parent"


def served(stats: dict[str, int]) -> str:
    def row(what: str, key: str) -> str:
        count, total = stats[f"{key}_operations"], stats[f"{key}_total_time_ns"]
        size = f", {stats[f'{key}_bytes'] / (1 << 20):.1f} MiB" if f"{key}_bytes" in stats else ""
        mean = f", mean {total / count / 1000:.0f} us" if count else ""
        return f"{count} {what}{size}{mean}"

    return "served " + "; ".join((row("reads", "rd"), row("writes", "wr"), row("flushes", "flush")))


async def boot(kind: str, daemon: Daemon, folder: Path, accel: str, show: Callable[[str], None]) -> None:
    """One boot of the clone `vm-<kind>` through an export of that kind."""
    image, sock = f"vm-{kind}", str(folder / f"{kind}.sock")
    await daemon.execute("blockdev-add", {"driver": "rbd", "node-name": image, "pool": "rbd", "image": image})
    export: dict[str, Any] = {"id": kind, "node-name": image, "writable": True}
    if kind == "nbd":
        await daemon.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": sock}}})
        await daemon.execute("block-export-add", {**export, "type": "nbd", "name": image})
        disk = Disk("nbd", sock, export=image)
    else:
        address = {"type": "unix", "path": sock}
        await daemon.execute("block-export-add", {**export, "type": "vhost-user-blk", "addr": address})
        disk = Disk("vhost-user", sock)
    begin = time.monotonic()
    with Guest([disk], accel) as guest:
        ended = await asyncio.to_thread(guest.wait_for, None, GUEST_DEADLINE, show)
        (folder / f"console-{kind}.log").write_text(guest.console)
        if not ended or "GUEST-CHECK ok" not in guest.console or "GUEST-FAILED" in guest.console:
            what = "did not check its disk successfully" if ended else f"was not done after {GUEST_DEADLINE:.0f} s"
            raise BootError(f"the guest on {kind} {what}: read {folder}/console-{kind}.log")
    took = time.monotonic() - begin
    stats = (await daemon.execute("query-blockstats"))[-1]["stats"]
    await daemon.execute("block-export-del", {"id": kind, "mode": "hard"})
    await daemon.execute("blockdev-del", {"node-name": image})
    say(f"{kind}: firmware to power-off in {took:.1f} s; {served(stats)}")


def make_store(kind: str, folder: Path, stack: ExitStack) -> str:
    """An empty store in the folder, for as long as `stack` is open. Its URL; OSError."""
    if kind != "ceph":
        return f"embedded:{folder / 'store'}"
    begin = time.monotonic()
    cluster = stack.enter_context(scratch(Options(osds=3, auth="cephx"), folder))
    say(f"started a Ceph cluster of 3 OSDs in {cluster.folder}: {time.monotonic() - begin:.1f} s")
    return cluster.url


async def demonstrate(folder: Path, kind_of_store: str, stack: ExitStack) -> None:
    begin = time.monotonic()
    say("building the guest: Debian's kernel, busybox, a boot disk")
    disk = boot_disk()
    chosen = kernel()
    accel, why = accelerator(chosen.vmlinuz, initramfs(chosen), cache_dir())
    say(f"accelerator: {accel} ({why})")
    store = make_store(kind_of_store, folder, stack)
    say(f"importing {disk.name} into rbd/golden, snapshot v1, cloning it twice")
    with rados.Rados(conf={"rbdpy_store": store}) as cluster:
        prepare(cluster, disk)

        def show(text: str) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        async with Daemon(folder, store) as daemon:
            for kind in ("vhost-user", "nbd"):
                say(f"booting QEMU from rbd/vm-{kind} over {kind}")
                await boot(kind, daemon, folder, accel, show)
                say(f"{kind}: {await asyncio.to_thread(verify, cluster, f'vm-{kind}')}")
    say(f"all done in {time.monotonic() - begin:.1f} s")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make boot", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--store", choices=("embedded", "ceph"), default="embedded", help="where the image lies")
    parser.add_argument("--keep", action="store_true", help="keep the store and the logs")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rbdpy-boot-", dir=os.environ.get("TMPDIR", "/tmp")))
    try:
        with ExitStack() as stack:
            asyncio.run(demonstrate(folder, options.store, stack))
    except (BootError, BuildError, OSError, rbd.Error, rados.Error, subprocess.SubprocessError) as error:
        print(f"make boot failed: {error}\nlogs: {folder}", file=sys.stderr)
        return 1
    if options.keep:
        say(f"kept: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

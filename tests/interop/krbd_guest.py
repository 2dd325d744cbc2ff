"""A guest with Debian's kernel and krbd, driven command by command."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path

from qemu_glue.guest import Guest
from vm_images.initramfs import krbd_initramfs
from vm_images.kernel import kernel

BOOT_DEADLINE = 60.0  # seconds; TCG needs 4 on a quiet machine
NETWORK = ["-netdev", "user,id=n0,net=127.0.0.0/24,host=127.0.0.1,dns=127.0.0.3"]
DEVICE = ["-device", "virtio-net-pci,netdev=n0,romfile="]


class KrbdGuest:
    """`conf` is the ceph.conf of a cluster on this machine's loopback. Always close()."""

    def __init__(self, conf: str, accel: str) -> None:
        text = Path(conf).read_text()
        found = re.search(r"v1:(127\.0\.0\.1:\d+)", text)
        assert found, text
        self._mon = found.group(1)
        keyring = re.search(r"^\s*keyring\s*=\s*(\S+)", text, re.M)
        secret = re.search(r"key\s*=\s*(\S+)", Path(keyring.group(1)).read_text()) if keyring else None
        self._options = f"name=admin,secret={secret.group(1)}" if secret else "name=admin"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            k = kernel()
            append = f"rbdpy.port={port}"
            initrd = krbd_initramfs(k)
            self.guest = Guest([], accel, kernel=k.vmlinuz, initrd=initrd, append=append, extra=[*NETWORK, *DEVICE])
            listener.settimeout(BOOT_DEADLINE)
            try:
                self._shell = listener.accept()[0]
            except TimeoutError:
                self.guest.wait_for(None, 0.1)
                self.guest.close()
                raise AssertionError(f"the guest did not come up:\n{self.guest.console}") from None
        self._shell.settimeout(1.0)
        self._number = 0

    def run(self, command: str, timeout: float = 30.0) -> tuple[int, str]:
        """-> exit status, output"""
        self._number += 1
        mark = f"=== {self._number} "
        self._shell.sendall(f"{{ {command}\n}} 2>&1; echo '{mark}'$?\n".encode())
        out, end = b"", time.monotonic() + timeout
        while mark.encode() not in out or not out.endswith(b"\n"):
            assert time.monotonic() < end, f"{command}: no end after {timeout} s\n{out!r}\n{self.guest.console[-2000:]}"
            try:
                data = self._shell.recv(65536)
            except TimeoutError:
                continue
            assert data, f"{command}: the guest went away\n{self.guest.console[-2000:]}"
            out += data
        text, _, status = out.decode().rpartition(mark)
        return int(status), text

    def ok(self, command: str, timeout: float = 30.0) -> str:
        status, text = self.run(command, timeout)
        assert status == 0, f"{command}: {status}: {text}\n{self.run('dmesg | tail -5')[1]}"
        return text.strip()

    def map(self, pool: str, image: str, options: str = "", snap: str = "-") -> str:
        """-> the device's path"""
        known = set(self.ok("ls /sys/bus/rbd/devices").split())
        more = f"{self._options},{options}" if options else self._options
        self.ok(f"echo '{self._mon} {more} {pool} {image} {snap}' >/sys/bus/rbd/add_single_major")
        (new,) = set(self.ok("ls /sys/bus/rbd/devices").split()) - known
        return f"/dev/rbd{new}"

    def unmap(self, device: str) -> None:
        self.ok(f"echo {device.removeprefix('/dev/rbd')} >/sys/bus/rbd/remove_single_major")

    def write(self, device: str, text: str, offset: int) -> None:
        """One block of 4096 bytes that begins with `text`, durable. No quotes in it: a shell sees it."""
        self.ok(f"echo '{text}' | dd of={device} bs=4096 seek={offset // 4096} count=1 conv=sync,fsync 2>/dev/null")

    def read(self, device: str, count: int, offset: int) -> str:
        self.ok("echo 3 >/proc/sys/vm/drop_caches")
        return self.ok(f"dd if={device} bs=4096 skip={offset // 4096} count=1 2>/dev/null | head -c {count}")

    def close(self) -> None:
        self._shell.close()
        self.guest.close()

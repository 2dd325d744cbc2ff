"""A QEMU guest on our exports: command line, console, deadline.

A vhost-user disk needs guest memory that the export may map, so memory is always a shared memfd.
"""

from __future__ import annotations

import codecs
import json
import os
import selectors
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from qemu_glue.accel import QEMU, cpu_of, cpus_of, memory_of
from qemu_glue.qmp.disks import nbd_node, raw_node

AGENT_PORT = "org.qemu.guest_agent.0"
CONSOLE_LIMIT = 4 << 20  # bytes of console kept; a guest that prints more loses the oldest


@dataclass(frozen=True)
class Disk:
    """One disk. `kind` is "vhost-user" (path of the export's socket), "nbd" (path of the server's socket, `export`
    its name) or "raw" (path of a file). The first disk is the boot disk unless a kernel is given. Its device is called
    d0, d1, ... in the order of the disks (for `qemu_glue.qmp`)."""

    kind: str
    path: str
    export: str = ""
    queues: int = 1
    reconnect: int = 1  # seconds between attempts (vhost-user) or reconnect-delay (NBD); 0 = never

    def arguments(self, number: int) -> list[str]:
        boot = f",bootindex={number + 1}"  # 0 is the option ROM of -kernel
        if self.kind == "vhost-user":
            again = f",reconnect={self.reconnect}" if self.reconnect else ""
            return [
                "-chardev", f"socket,id=d{number}-chardev,path={comma(self.path)}{again}",
                "-device", f"vhost-user-blk-pci,id=d{number},chardev=d{number}-chardev,num-queues={self.queues}{boot}",
            ]  # fmt: skip
        blocks: list[str] = []
        if self.kind == "nbd":
            blocks = ["-blockdev", json.dumps(nbd_node(f"d{number}-nbd0", self.path, self.export, self.reconnect))]
            blocks += ["-blockdev", json.dumps(raw_node(f"d{number}-node", f"d{number}-nbd0"))]
        elif self.kind == "raw":
            blocks = ["-blockdev", f"driver=file,node-name=d{number}-node,filename={comma(self.path)}"]
        else:
            raise ValueError(f"no disk kind {self.kind!r}")
        device = f"virtio-blk-pci,id=d{number},drive=d{number}-node,num-queues={self.queues}{boot}"
        return [*blocks, "-device", device]


def comma(text: str) -> str:
    """QEMU's option syntax: a comma in a value is doubled."""
    return text.replace(",", ",,")


class ConsoleText:
    """A console's bytes as text, in whatever pieces they come: characters stay whole, lines end with a newline."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, data: bytes) -> str:
        """The text of this piece; a carriage return at its end waits for what follows."""
        text = self._held + self._decoder.decode(data)
        self._held = "\r" if text.endswith("\r") else ""
        return text.removesuffix("\r").replace("\r\n", "\n")


class Guest:
    """A running QEMU. States: started -> ended. Always call close(): it ends the process if it still runs."""

    def __init__(
        self,
        disks: Iterable[Disk],
        accel: str,
        memory_mib: int = 256,
        qmp: Path | None = None,
        kernel: Path | None = None,
        initrd: Path | None = None,
        append: str = "",
        cpus: int = 1,
        ports: int = 0,
        agent: Path | None = None,
        extra: Iterable[str] = (),
    ) -> None:
        """`ports`: free root ports for disks to come. `agent`: the socket of a guest agent's port, made by QEMU."""
        command = [QEMU, "-accel", accel, "-machine", "q35,memory-backend=ram", "-cpu", cpu_of(accel)]
        memory = memory_of(memory_mib, accel)
        command += ["-m", memory, "-object", f"memory-backend-memfd,id=ram,size={memory},share=on"]
        command += ["-smp", cpus_of(cpus, accel), "-display", "none", "-nodefaults", "-no-user-config"]
        command += ["-no-reboot", "-serial", "stdio"]
        for number, disk in enumerate(disks):
            command += disk.arguments(number)
        if kernel:
            # no_timer_check: on a busy host the timer does not tick in time, and Linux panics ("IO-APIC + timer").
            options = f"console=ttyS0 quiet panic=1 no_timer_check {append}"
            command += ["-kernel", str(kernel), "-append", options]
        if initrd:
            command += ["-initrd", str(initrd)]
        if qmp:
            command += ["-qmp", f"unix:{comma(str(qmp))},server=on,wait=off"]
        for number in range(ports):
            command += ["-device", f"pcie-root-port,id=port{number},chassis={number + 1}"]
        if agent:
            command += ["-chardev", f"socket,id=agent,path={comma(str(agent))},server=on,wait=off"]
            command += ["-device", "virtio-serial-pci", "-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"]
        command += extra
        self.command = command
        self._text = ConsoleText()
        self.console = ""  # what the guest printed so far, the newest CONSOLE_LIMIT characters
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        assert self._process.stdout is not None
        self._out = self._process.stdout
        os.set_blocking(self._out.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)
        self._open = True

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(
        self, text: str | None, deadline: float, show: Callable[[str], None] | None = None, after: int = 0
    ) -> bool:
        """Reads the console until `text` appears at or behind character `after` (True), or QEMU ends or `deadline`
        seconds pass (False). With text None waits for the end. `show` gets what arrives."""
        limit = time.monotonic() + deadline
        while True:
            if text is not None and text in self.console[after:]:
                return True
            left = limit - time.monotonic()
            if not self._open or left <= 0:
                return text is None and not self._open
            if self._selector.select(left):
                self._read(show)

    def status(self, deadline: float = 10.0) -> int | None:
        """Exit status of QEMU; None while it runs after `deadline` seconds."""
        try:
            return self._process.wait(deadline)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """Ends QEMU (SIGKILL) if it still runs. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._selector.close()
        self._out.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self, show: Callable[[str], None] | None) -> None:
        data = self._out.read(65536)
        if data is None:
            return
        if not data:
            self._open = False
            self._selector.unregister(self._out)
            return
        text = self._text.add(data)
        self.console = (self.console + text)[-CONSOLE_LIMIT:]
        if show:
            show(text)

"""`python -m tests.libvirt.guard BRIDGE`: ends hosts when standard input ends, which tells it their UTS namespaces.

The other end is held by the test run, which may end in any way.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SECONDS = 30.0


def members(namespace: int) -> list[int]:
    """Processes in a UTS namespace: libvirt gives each QEMU mounts of its own, but no host name."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if os.stat(entry / "ns/uts").st_ino == namespace:
                    found.append(int(entry.name))
    return found


def end_namespace(namespace: int) -> None:
    """SIGKILLs all of them; returns when they are gone. TimeoutError."""
    if namespace == os.stat("/proc/self/ns/uts").st_ino:
        raise ValueError("that is the machine's own")
    end = time.monotonic() + SECONDS
    while pids := members(namespace):
        if time.monotonic() > end:
            raise TimeoutError(f"processes {pids} do not end")
        for pid in pids:
            with suppress(OSError):
                handle = os.pidfd_open(pid)
                try:
                    if os.stat(f"/proc/{pid}/ns/uts").st_ino == namespace:  # still that process
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                finally:
                    os.close(handle)
        time.sleep(0.02)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the process that holds the other end
    namespaces = [int(line) for line in sys.stdin.buffer]
    for namespace in namespaces:
        try:
            end_namespace(namespace)
        except (OSError, ValueError) as failure:  # the others shall end all the same
            print(f"guard: {failure}", file=sys.stderr)
    for link in Path("/sys/class/net").iterdir():
        if link.name.startswith(sys.argv[1]):  # the bridge and its ports
            subprocess.run(["ip", "link", "delete", link.name], check=False, stderr=subprocess.DEVNULL)
    return 0


if __name__ == "__main__":
    sys.exit(main())

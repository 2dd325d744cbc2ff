"""A VM whose disk does not start after a migration.

When this host's service dies within a second before a VM arrives here, QEMU 7.2 finds nobody to start the disk with
("vhost start failed"). It connects again, but takes no notice of that until the machine is stopped and continued: then
the disk is there, and the guest goes on without an error. Somebody has to do that: this does, whenever the machine
comes to run; it may arrive suspended.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from pathlib import Path

from qemu_glue.libvirt import client

PAUSE = 1.0  # seconds between looks at whether the processors do anything, which cost next to nothing
ANYWAY = 30  # looks after which libvirt is asked whatever they say
ASK_SECONDS = 5.0
ATTEMPTS = 5  # at resuming what was suspended

log = logging.getLogger(__name__)


class Processors:
    """Whether the processors of a QEMU did anything since the last look: those of a suspended machine sleep."""

    def __init__(self, pid: int) -> None:
        self._tasks = Path(f"/proc/{pid}/task") if pid else None
        self._before: dict[str, str] = {}

    def ran(self) -> bool:
        """True also for the first time, and when nobody can tell."""
        now: dict[str, str] = {}
        try:
            for task in self._tasks.iterdir() if self._tasks is not None else ():
                if (task / "comm").read_text().startswith("CPU "):
                    now[task.name] = (task / "schedstat").read_text()
        except OSError:
            now = {}
        before, self._before = self._before, now
        return not now or now != before


async def wake(uri: str, vm: str, pid: int, path: str, silent: Callable[[], bool]) -> None:
    """Suspends and resumes the domain whose QEMU (`pid`, 0 when that is not known), older than this service, runs and
    is connected without a word. Returns when it is not silent any more."""
    processors = Processors(pid)
    for look in itertools.count():
        await asyncio.sleep(PAUSE)
        try:
            if not silent():
                return
            if not ((processors.ran() and (pid or look < ANYWAY)) or look % ANYWAY == 0):
                continue
            if not await asyncio.to_thread(client.running, uri, vm, ASK_SECONDS):
                continue
            await asyncio.sleep(PAUSE)  # it may be starting the disk just now
            if not silent():
                return
            log.warning("%s: VM %s runs without this disk: it is suspended and resumed", path, vm)
            await asyncio.to_thread(client.suspend, uri, vm, ASK_SECONDS)
            await _resumed(uri, vm, path)
            return
        except OSError as error:
            log.warning("%s: VM %s cannot be looked at: %s", path, vm, error.strerror)


async def _resumed(uri: str, vm: str, path: str) -> None:
    for attempt in range(ATTEMPTS):
        try:
            await asyncio.to_thread(client.resume, uri, vm, ASK_SECONDS)
            return
        except OSError as error:
            log.error("%s: VM %s is suspended: %s", path, vm, error.strerror)
            await asyncio.sleep(PAUSE * (attempt + 1))

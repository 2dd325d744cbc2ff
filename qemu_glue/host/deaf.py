"""A VM whose disk does not start after a migration.

When this host's service dies within a second before a VM arrives here, QEMU 7.2 finds nobody to start the disk with
("vhost start failed"). It connects again, but takes no notice of that until the machine is stopped and continued: then
the disk is there, and the guest goes on without an error. Somebody has to do that: this does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from qemu_glue.libvirt import client

LOOKS, PAUSE = 20, 1.0  # how often, and seconds between: a machine that comes to run later finds its disk
ASK_SECONDS = 5.0
ATTEMPTS = 5  # at resuming what was suspended

log = logging.getLogger(__name__)


async def wake(uri: str, vm: str, path: str, silent: Callable[[], bool]) -> None:
    """Suspends and resumes the domain whose QEMU, older than this service, runs and is connected without a word."""
    for _ in range(LOOKS):
        await asyncio.sleep(PAUSE)
        try:
            if not silent():
                return
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

"""NBD guests after the service was away.

QEMU's NBD client fails requests while nobody answers, because libvirt has no way to tell it to wait (9.0 drops the
reconnect delay). `rbdpy libvirt convert` gives such disks error_policy='stop': the guest stands still, sees no error,
and libvirt shows it as paused by an I/O error. Somebody has to resume it: this does, after the service has come back.
QEMU connects again after 1, 2, 4, ... seconds, so a guest may stop several times before its disk is back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from qemu_glue.libvirt import client

SECONDS = 90.0  # how long after the start guests are looked at
PAUSE = 0.5  # between looks
ASK_SECONDS = 5.0

log = logging.getLogger(__name__)


async def resume(uri: str, uuids: Callable[[], set[str]]) -> None:
    """Resumes those of the domains that stand still for a failed request, for SECONDS. `uuids`: of VMs that have
    NBD disks and were here before the service was started."""
    loop = asyncio.get_running_loop()
    end = loop.time() + SECONDS
    told = ""
    while loop.time() < end:
        for uuid in uuids():
            try:
                if await asyncio.to_thread(client.paused_by_an_error, uri, uuid, ASK_SECONDS):
                    await asyncio.to_thread(client.resume, uri, uuid, ASK_SECONDS)
                    log.info("VM %s, paused by an I/O error, was resumed", uuid)
            except OSError as error:
                if str(error) != told:  # no libvirt, or not its VM
                    told = str(error)
                    log.info("VM %s cannot be resumed: %s", uuid, error.strerror)
        await asyncio.sleep(PAUSE)

"""NBD guests after the service was away.

QEMU's NBD client fails requests while nobody answers, because libvirt has no way to tell it to wait (9.0 drops the
reconnect delay). `rbdpy libvirt convert` gives such disks error_policy='stop': the guest stands still, sees no error,
and libvirt shows it as paused by an I/O error. Somebody has to resume it: this does, after the service has come back.
QEMU connects again after 1, 2, 4, ... seconds, so a guest may stop several times before its disk is back. One that does
so in the moment of its arrival libvirt 9.0 shows as paused by the user: what QEMU says of its disks counts then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from qemu_glue.libvirt import client

SECONDS = 90.0  # how long after the start guests are looked at often
PAUSE = 0.5  # seconds between looks
PAUSE_MAX = 10.0  # later, and when libvirt cannot be asked
ASK_SECONDS = 5.0

log = logging.getLogger(__name__)


async def resume(uri: str, uuids: set[str], back: Callable[[str], bool]) -> None:
    """Resumes those of the domains that stand still for a failed request, until their disks are back: an idle guest
    may meet the outage hours later. `uuids`: of VMs that have NBD disks and were here before the service was started;
    `back(uuid)`: they are connected, or the VM is gone."""
    loop = asyncio.get_running_loop()
    end = loop.time() + SECONDS
    pause, told = PAUSE, ""
    while uuids:
        for uuid in sorted(uuids):
            try:
                connected = back(uuid)
                if await asyncio.to_thread(client.paused_by_an_error, uri, uuid, ASK_SECONDS):
                    await asyncio.to_thread(client.resume, uri, uuid, ASK_SECONDS)
                    log.info("VM %s, paused by an I/O error, was resumed", uuid)
                elif connected:  # before the look: it does not stop any more
                    uuids = uuids - {uuid}
                pause = PAUSE if loop.time() < end else PAUSE_MAX
            except OSError as error:
                pause = min(2 * pause, PAUSE_MAX)
                if back(uuid):
                    uuids = uuids - {uuid}
                if str(error) != told:  # no libvirt, or not its VM
                    told = str(error)
                    log.info("VM %s cannot be resumed: %s", uuid, error.strerror)
        await asyncio.sleep(pause)

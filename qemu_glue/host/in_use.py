"""Whether a VM that is to start here would take a disk from one that runs already.

Asked in `prepare`, of a VM that does not come by a migration. Living clients give the lock up when they are asked for
it, which is right for a backup and the end of two guests that write to one file system. What watchers say of
themselves is believed here because it only keeps a VM from starting.

Who does not answer keeps nobody from starting: it is a host that crashed, most of the time, and its watch has not run
out. The guest boots; its first write waits until that watch has ended, the dead one is fenced and its lock broken.
"""

from __future__ import annotations

import logging
import time

from librbd_py.format import features as ft
from librbd_py.image.handle import ImageHandle
from librbd_py.image.ownership import Outcome, Ownership, Watching, look

PATIENCE = 2.0  # seconds: a VM that was just ended elsewhere, or saved, leaves its images within one
ASK_MS = 1500  # how long a watcher may take to say who it is
PAUSE = 0.1  # between looks

log = logging.getLogger(__name__)


def in_use(handle: ImageHandle, uuid: str) -> str | None:
    """Who has the image and where, as a sentence; None: VM `uuid` may start. For a disk that it writes to; images
    without exclusive lock are meant to be shared. Blocks, for PATIENCE and ASK_MS at most; OSError of the store."""
    if not handle.header.has(ft.EXCLUSIVE_LOCK):
        return None
    end = time.monotonic() + PATIENCE
    while True:
        found = look(handle, ASK_MS)
        why = _user(found, uuid) or _locked(found)
        if why is None and found.outcome is Outcome.SILENT:
            log.warning("VM %s: %s", uuid, found.sentence)
        if why is None or time.monotonic() >= end:
            return why
        time.sleep(PAUSE)


def _user(found: Ownership, uuid: str) -> str | None:
    """The VM that has it open."""
    owner = found.owner.watching if found.owner is not None else None
    for watching in (*([owner] if owner is not None else []), *found.others):
        about = watching.answer.about if watching.answer is not None else {}
        if not about.keys() & {"VM", "VM uuid", "QEMU"}:
            continue
        if watching.self and about.get("VM uuid") == uuid:
            continue  # what this VM's last QEMU here has left, and this one meets
        return f"is in use by {_vm(about, uuid)} on {_where(watching)}{_how(found, watching, owner)}"
    return None


def _vm(about: dict[str, str], uuid: str) -> str:
    name, other = about.get("VM", ""), about.get("VM uuid", "")
    if other == uuid:
        return "this very VM"
    if not (name or other):
        return "a VM without a name"
    return f"VM {name} ({other})" if name and other else f"VM {name or other}"


def _where(watching: Watching) -> str:
    answer = watching.answer
    assert answer is not None
    host = "this host" if watching.self else f"host {answer.host or 'without a name'}"
    return f"{host} (process {answer.pid}, {watching.address})"


def _how(found: Ownership, watching: Watching, owner: Watching | None) -> str:
    if watching is not owner:
        return ", which waits there for a migration" if watching.stand_by else ""
    assert found.owner is not None
    return ", which owns its lock" + (" and is moving" if found.owner.offered_to is not None else "")


def _locked(found: Ownership) -> str | None:
    """The lock cannot be had, or is somebody's of whom nobody knows what it is for."""
    owner = found.owner
    if found.outcome is Outcome.BY_HAND:
        return f"is locked: {found.sentence}"
    if owner is None or owner.watching is None or owner.watching.self:
        return None
    if found.outcome is Outcome.REFUSED:
        return f"is locked: {found.sentence} ({_where(owner.watching)})"
    if owner.watching.answered and owner.answer is None:
        return (
            f"is in use by {owner.client} at {owner.address}, a client of Ceph's own that lives and owns its lock; if"
            " that is no VM, `rbdpy lock take` asks it for the lock"
        )
    return None

"""Whether a VM runs on another host already.

QEMU 7.2 connects again to a service that comes back also when its guest has moved away meanwhile, and starts the rings
of the stopped machine: what was in flight there when the service died is asked for again, after the guest has gone on
elsewhere. Those writes must never be done.
"""

from __future__ import annotations

from librbd_py.control.handoff import ANYBODY
from librbd_py.image.handle import ImageHandle
from librbd_py.image.ownership import look


def runs_elsewhere(handle: ImageHandle, key: str) -> str | None:
    """The host of another living client that owns the image's lock and says that it has it for the VM `key`; None:
    nobody does. What a client says of itself is believed here because it only makes us wait. Blocks, for two seconds
    when a watcher is silent; OSError of the store."""
    control = handle.control
    if key == ANYBODY or control is None or not handle.uses_lock or control.is_owner or not control.owner_lives():
        return None
    owner = look(handle).owner
    if owner is None or owner.answer is None or owner.watching is None or owner.watching.self:
        return None
    about = owner.answer.about
    kind, _, name = key.partition(":")
    same = about.get("VM uuid") == name if kind == "uuid" else about.get("VM") == (name if kind == "name" else key)
    return f"{owner.answer.host} (process {owner.answer.pid})" if same else None

"""Which data objects there are, without a look at each of them where that can be had."""

from __future__ import annotations

from collections.abc import Sequence

from librbd_py.format.object_map import NONEXISTENT
from librbd_py.store.api import NOSNAP

from ..handle import ImageHandle
from ..objects import exists
from ..resize import known_states
from ..transfer_data import FEW, Objects, existing


def objects_of(handle: ImageHandle) -> list[int]:
    """Numbers of the objects in HEAD."""
    known = known_states(handle)
    header = handle.header
    count = header.layout.objects(header.size)
    if known is not None:
        return [number for number in range(min(count, len(known))) if known[number] != NONEXISTENT]
    return [number for number in _candidates(handle, count) if exists(handle.data_ctx, handle.objects.oid(number))]


def any_version(handle: ImageHandle) -> list[int]:
    """Numbers of the objects that may exist in HEAD or any snapshot."""
    header = handle.header
    sizes = [header.size, *(snap.size for snap in header.snaps.values())]
    count = max(header.layout.objects(size) for size in sizes)
    maps = [known_states(handle, snap_id) for snap_id in (NOSNAP, *header.snaps)]
    if any(states is None for states in maps):
        return [number for number in _candidates(handle, count) if number < count]
    return existing([states for states in maps if states is not None], count)


def _candidates(handle: ImageHandle, count: int) -> Sequence[int]:
    return (
        Objects(handle.data_ctx, handle.objects.prefix, handle.header.order).heads(count)
        if count > FEW
        else range(count)
    )

"""Switching features of an existing image on and off."""

from __future__ import annotations

import errno

from librbd_py.format import features as ft
from librbd_py.format import notify as nf
from librbd_py.store.api import NOSNAP

from . import object_map
from .cls import u64
from .handle import ImageHandle
from .header import map_oid
from .objects import remove
from .proxy import perform

BOTH_INVALID = ft.FLAG_OBJECT_MAP_INVALID | ft.FLAG_FAST_DIFF_INVALID


def update_features(handle: ImageHandle, features: int, enabled: bool) -> None:
    """EINVAL: nothing to do, immutable features, missing companions; EROFS; ENOSYS: journaling.

    object-map and fast-diff go together. A map made for an image with data is invalid until it is rebuilt.
    """
    handle.require_writable()
    known = ft.MUTABLE | (0 if enabled else ft.DISABLE_ONLY)
    if not features or features & ~known:
        raise OSError(errno.EINVAL, f"features {features & ~known or features:#x} cannot be changed")
    if features & ft.JOURNALING and enabled:
        raise OSError(errno.ENOSYS, "journaling is not supported")
    has = handle.header.features
    if (features & has) == (features if enabled else 0):
        raise OSError(errno.EINVAL, "the features are already so")
    if not has & ft.EXCLUSIVE_LOCK:
        # Nobody owns an image without the lock: a short time of its own is all there is.
        _change(handle, features, enabled)
        return
    perform(
        handle,
        lambda request: nf.UpdateFeatures(features, enabled, request),
        lambda: _change_owning(handle, features, enabled),
        done_already=errno.EINVAL,
    )


def _change_owning(handle: ImageHandle, features: int, enabled: bool) -> None:
    with handle.exclusive():
        _change(handle, features, enabled)


def _change(handle: ImageHandle, features: int, enabled: bool) -> None:
    header = handle.header
    if features & (ft.OBJECT_MAP | ft.FAST_DIFF):
        features |= ft.OBJECT_MAP | ft.FAST_DIFF
    after = header.features | features if enabled else header.features & ~features
    if after & ft.OBJECT_MAP and not after & ft.EXCLUSIVE_LOCK:
        raise OSError(errno.EINVAL, "object-map needs exclusive-lock")
    if enabled:
        _enable(handle, features & ~header.features)
    else:
        _disable(handle, features & header.features)


def _enable(handle: ImageHandle, features: int) -> None:
    header = handle.header
    every = [NOSNAP, *header.snaps]
    with handle.quiesced():
        if features & ft.OBJECT_MAP:
            object_map.resize(handle.ctx, handle.id, header.layout.objects(header.size), locked=False)
            for snap_id, snap in header.snaps.items():
                states = bytes(header.layout.objects(snap.size))
                object_map.save(handle.ctx, handle.id, snap_id, states)
            object_map.invalidate(handle.ctx, handle.oid, every, BOTH_INVALID)
        _set(handle, features, features)
        handle.refresh()
        if features & ft.OBJECT_MAP and handle.is_lock_owner:
            object_map.lock(handle.ctx, handle.id)
            handle.take_map()
    handle.announce()


def _disable(handle: ImageHandle, features: int) -> None:
    header = handle.header
    every = [NOSNAP, *header.snaps]
    gives_up_lock = bool(features & ft.EXCLUSIVE_LOCK)
    with handle.quiesced():
        if features & ft.OBJECT_MAP:
            # The maps go first: without the feature nobody would look for them. A missing map is an invalid one.
            handle.drop_map()
            for snap_id in every:
                remove(handle.ctx, map_oid(handle.id, snap_id))
        _set(handle, 0, features)
        if features & ft.OBJECT_MAP:
            for snap_id in every:
                object_map.set_flags(handle.ctx, handle.oid, snap_id, 0, BOTH_INVALID)
        handle.refresh()
    if gives_up_lock:
        handle.lock_no_longer_used()
    handle.announce()


def _set(handle: ImageHandle, features: int, mask: int) -> None:
    handle.ctx.exec(handle.oid, "rbd", "set_features", u64(features) + u64(mask))

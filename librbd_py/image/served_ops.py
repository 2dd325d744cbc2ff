"""What a lock owner does for other clients, by message."""

from __future__ import annotations

import errno
from typing import Any

from librbd_py.format import notify as nf

from . import directory, feature_update, flatten, map_check, metadata, resize, snapshots, sparsify
from .handle import ImageHandle
from .migration import execute
from .progress import Progress
from .proxy import Operation


def _snap_id(handle: ImageHandle, message: Any) -> int:
    """By name in the message's namespace. ENOENT."""
    snap = handle.header.snap_named(message.name, message.namespace.type)
    if snap is None:
        raise OSError(errno.ENOENT, f"no snapshot named {message.name!r}")
    return snap.id


def _resize(handle: ImageHandle, message: nf.Resize, progress: Progress) -> None:
    resize.resize(handle, message.size, allow_shrink=message.allow_shrink, progress=progress)


def _flatten(handle: ImageHandle, message: nf.Flatten, progress: Progress) -> None:
    flatten.flatten(handle, progress)


def _snap_create(handle: ImageHandle, message: nf.SnapCreate, progress: Progress) -> None:
    snapshots.create(handle, message.name, message.namespace, message.flags)


def _snap_remove(handle: ImageHandle, message: nf.SnapRemove, progress: Progress) -> None:
    snapshots.remove(handle, _snap_id(handle, message))


def _snap_rename(handle: ImageHandle, message: nf.SnapRename, progress: Progress) -> None:
    snapshots.rename(handle, message.snap_id, message.name)


def _snap_protect(handle: ImageHandle, message: nf.SnapProtect, progress: Progress) -> None:
    snapshots.protect(handle, message.name)


def _snap_unprotect(handle: ImageHandle, message: nf.SnapUnprotect, progress: Progress) -> None:
    snapshots.unprotect(handle, message.name)


def _rebuild(handle: ImageHandle, message: nf.RebuildObjectMap, progress: Progress) -> None:
    map_check.rebuild(handle, progress)


def _rename(handle: ImageHandle, message: nf.Rename, progress: Progress) -> None:
    directory.rename_open(handle, message.name)


def _update_features(handle: ImageHandle, message: nf.UpdateFeatures, progress: Progress) -> None:
    feature_update.update_features(handle, message.features, message.enabled)


def _sparsify(handle: ImageHandle, message: nf.Sparsify, progress: Progress) -> None:
    sparsify.sparsify(handle, message.sparse_size, progress)


def _migrate(handle: ImageHandle, message: nf.Migrate, progress: Progress) -> None:
    execute.bring_all(handle, progress)


def _metadata(handle: ImageHandle, message: nf.MetadataUpdate, progress: Progress) -> None:
    if message.value is None:
        metadata.remove(handle, message.key)
    else:
        metadata.put(handle, message.key, message.value)


OPERATIONS: dict[type, Operation] = {
    nf.Resize: _resize,
    nf.Flatten: _flatten,
    nf.SnapCreate: _snap_create,
    nf.SnapRemove: _snap_remove,
    nf.SnapRename: _snap_rename,
    nf.SnapProtect: _snap_protect,
    nf.SnapUnprotect: _snap_unprotect,
    nf.RebuildObjectMap: _rebuild,
    nf.Rename: _rename,
    nf.UpdateFeatures: _update_features,
    nf.Sparsify: _sparsify,
    nf.Migrate: _migrate,
    nf.MetadataUpdate: _metadata,
}

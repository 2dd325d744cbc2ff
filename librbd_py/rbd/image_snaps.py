"""Snapshots, clones and the current snapshot of `rbd.Image`."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from librbd_py.errors import rbd_errors
from librbd_py.format import header as fh
from librbd_py.image import cls, snapshots
from librbd_py.image.flatten import flatten_children
from librbd_py.image.handle import ImageHandle

from .common import OnProgress, moment, number, requires_not_closed, text
from .constants import RBD_SNAP_REMOVE_FLATTEN, RBD_SNAP_REMOVE_UNPROTECT
from .groups import create_flags
from .iterators import ChildIterator, SnapIterator, group_row, mirror_row

if TYPE_CHECKING:
    from datetime import datetime


class ImageSnaps:
    handle: ImageHandle

    @property
    def label(self) -> str:
        raise NotImplementedError

    @requires_not_closed
    def list_snaps(self) -> SnapIterator:
        return SnapIterator(self)  # type: ignore[arg-type]

    @requires_not_closed
    def create_snap(self, name: str | bytes, flags: int = 0) -> None:
        """ImageExists, DiskQuotaExceeded (limit), ReadOnlyImage; what a guest's quiesce hook fails with, unless `flags`
        (RBD_SNAP_CREATE_SKIP_QUIESCE, RBD_SNAP_CREATE_IGNORE_QUIESCE_ERROR) say otherwise."""
        snap, flags = text(name, "name"), number(flags)
        with rbd_errors(f"error creating snapshot {name!r} from {self.label}"):
            snapshots.create(self.handle, snap, flags=create_flags(flags))

    @requires_not_closed
    def rename_snap(self, srcname: str | bytes, dstname: str | bytes) -> None:
        source, dest = text(srcname, "srcname"), text(dstname, "dstname")
        with rbd_errors(f"error renaming snapshot of {self.label} from {source!r} to {dest!r}"):
            snapshots.rename(self.handle, snapshots.find(self.handle.header, source).id, dest)

    @requires_not_closed
    def remove_snap(self, name: str | bytes) -> None:
        """ImageNotFound; ImageBusy: protected."""
        self.remove_snap2(name, 0)

    @requires_not_closed
    def remove_snap2(self, name: str | bytes, flags: int) -> None:
        """With RBD_SNAP_REMOVE_UNPROTECT and _FLATTEN what stands in the way is done first."""
        snap, flags = text(name, "name"), number(flags)
        with rbd_errors(f"error removing snapshot {snap!r} from {self.label}"):
            found = snapshots.find_removable(self.handle.header, snap)
            if flags & RBD_SNAP_REMOVE_FLATTEN:
                flatten_children(self.handle, found.id)
            if flags & RBD_SNAP_REMOVE_UNPROTECT and found.protection:
                snapshots.unprotect(self.handle, snap)
            snapshots.remove(self.handle, found.id)

    @requires_not_closed
    def remove_snap_by_id(self, snap_id: int) -> None:
        snap_id = number(snap_id)
        with rbd_errors(f"error removing snapshot {snap_id} from {self.label}"):
            snapshots.remove(self.handle, snap_id)

    @requires_not_closed
    def rollback_to_snap(self, name: str | bytes, on_progress: OnProgress = None) -> None:
        snap = text(name, "name")
        with rbd_errors(f"error rolling back image {self.label} to snapshot {name!r}"):
            self.handle.require_writable()
            snapshots.rollback(self.handle, snapshots.find(self.handle.header, snap).id, on_progress)

    @requires_not_closed
    def protect_snap(self, name: str | bytes) -> None:
        """ImageBusy: it is protected."""
        snap = text(name, "name")
        with rbd_errors(f"error protecting snapshot {self.label}@{name!r}"):
            snapshots.protect(self.handle, snap)

    @requires_not_closed
    def unprotect_snap(self, name: str | bytes) -> None:
        """InvalidArgument: it is not protected. ImageBusy: it has format v1 clones."""
        snap = text(name, "name")
        with rbd_errors(f"error unprotecting snapshot {self.label}@{name!r}"):
            snapshots.unprotect(self.handle, snap)

    @requires_not_closed
    def is_protected_snap(self, name: str | bytes) -> bool:
        snap = text(name, "name")
        with rbd_errors(f"error checking if snapshot {self.label}@{name!r} is protected"):
            return snapshots.find(self.handle.header, snap).protection != fh.PROTECTION_UNPROTECTED

    @requires_not_closed
    def snap_exists(self, name: str | bytes) -> bool:
        snap = text(name, "name")
        with rbd_errors(f"error getting snapshot exists for {self.label}"):
            return self.handle.header.snap_named(snap, fh.NAMESPACE_USER) is not None

    @requires_not_closed
    def get_snap_limit(self) -> int:
        """2^64 - 1: unlimited."""
        with rbd_errors(f"error getting snapshot limit for {self.label}"):
            return cls.snap_limit(self.handle.ctx, self.handle.oid)

    @requires_not_closed
    def set_snap_limit(self, limit: int) -> int:
        """OSError with ERANGE: the image has more snapshots already."""
        limit = number(limit)
        with rbd_errors(f"error setting snapshot limit for {self.label}"):
            snapshots.set_limit(self.handle, limit)
        return 0

    @requires_not_closed
    def remove_snap_limit(self) -> int:
        with rbd_errors(f"error removing snapshot limit for {self.label}"):
            snapshots.set_limit(self.handle, snapshots.UNLIMITED)
        return 0

    @requires_not_closed
    def get_snap_timestamp(self, snap_id: int) -> datetime:
        snap_id = number(snap_id)
        with rbd_errors(f"error getting snapshot timestamp for image: {self.label}, snap_id: {snap_id}"):
            return moment(snapshots.by_id(self.handle.header, snap_id).timestamp)

    @requires_not_closed
    def snap_get_id(self, snap_name: str | bytes) -> int:
        snap = text(snap_name, "snap_name")
        with rbd_errors("error snap_get_id."):
            return snapshots.find(self.handle.header, snap).id

    @requires_not_closed
    def snap_get_name(self, snap_id: int) -> str:
        snap_id = number(snap_id)
        with rbd_errors("error snap_get_name."):
            return snapshots.by_id(self.handle.header, snap_id).name

    @requires_not_closed
    def snap_get_namespace_type(self, snap_id: int) -> int:
        snap_id = number(snap_id)
        with rbd_errors(f"error getting snapshot namespace type for image: {self.label}, snap_id: {snap_id}"):
            return snapshots.by_id(self.handle.header, snap_id).namespace.type

    @requires_not_closed
    def snap_get_trash_namespace(self, snap_id: int) -> dict[str, Any]:
        snap_id = number(snap_id)
        with rbd_errors(f"error getting snapshot trash namespace image: {self.label}, snap_id: {snap_id}"):
            namespace = snapshots.by_id(self.handle.header, snap_id).namespace
            if not isinstance(namespace, fh.TrashNamespace):
                raise OSError(errno.EINVAL, "the snapshot is not in the trash")
            return {"original_name": namespace.original_name}

    @requires_not_closed
    def snap_get_group_namespace(self, snap_id: int) -> dict[str, Any]:
        snap_id = number(snap_id)
        with rbd_errors(f"error getting snapshot group namespace for image: {self.label}, snap_id: {snap_id}"):
            namespace = snapshots.by_id(self.handle.header, snap_id).namespace
            if not isinstance(namespace, fh.GroupNamespace):
                raise OSError(errno.EINVAL, "the snapshot belongs to no group")
            return group_row(self, namespace)  # type: ignore[arg-type]

    @requires_not_closed
    def snap_get_mirror_namespace(self, snap_id: int) -> dict[str, Any]:
        snap_id = number(snap_id)
        with rbd_errors(f"error getting snapshot mirror namespace for image: {self.label}, snap_id: {snap_id}"):
            namespace = snapshots.by_id(self.handle.header, snap_id).namespace
            if not isinstance(namespace, fh.MirrorNamespace):
                raise OSError(errno.EINVAL, "the snapshot is not a mirror's")
            return mirror_row(namespace)

    @requires_not_closed
    def set_snap(self, name: str | bytes | None) -> None:
        """Reads come from the snapshot from now on; None: back to HEAD."""
        snap = None if name is None else text(name, "name")
        with rbd_errors(f"error setting image {self.label} to snapshot {name!r}"):
            self.handle.set_snapshot(snap)

    @requires_not_closed
    def set_snap_by_id(self, snap_id: int | None) -> None:
        with rbd_errors(f"error setting image {self.label} to snapshot {snap_id!r}"):
            self.handle.set_snapshot(None if snap_id is None else number(snap_id))

    @requires_not_closed
    def list_children(self) -> list[tuple[str, str]]:
        """(pool, image) of the clones, without those in the trash."""
        children = ChildIterator(self)  # type: ignore[arg-type]
        return [(child["pool"], child["image"]) for child in children if not child["trash"]]

    @requires_not_closed
    def list_children2(self) -> ChildIterator:
        return ChildIterator(self)  # type: ignore[arg-type]

    @requires_not_closed
    def list_descendants(self) -> ChildIterator:
        return ChildIterator(self, True)  # type: ignore[arg-type]

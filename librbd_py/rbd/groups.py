"""Consistency groups of the `rbd` face."""

from __future__ import annotations

import errno
from types import TracebackType
from typing import Any, Literal

from librbd_py.errors import rbd_errors
from librbd_py.image import group
from librbd_py.image.quiesce import IGNORE_QUIESCE_ERROR, SKIP_QUIESCE

from .common import OnProgress, context, number, text
from .constants import RBD_SNAP_CREATE_IGNORE_QUIESCE_ERROR, RBD_SNAP_CREATE_SKIP_QUIESCE
from .iterators import GroupImageIterator, GroupSnapIterator


def create_flags(flags: int) -> int:
    """Of a snapshot's creation, as they go over the wire. EINVAL: unknown ones."""
    known = {
        RBD_SNAP_CREATE_SKIP_QUIESCE: SKIP_QUIESCE,
        RBD_SNAP_CREATE_IGNORE_QUIESCE_ERROR: IGNORE_QUIESCE_ERROR,
    }
    if flags & ~sum(known):
        raise OSError(errno.EINVAL, f"unknown flags {flags:#x}")
    return sum(wire for bit, wire in known.items() if flags & bit)


class PoolGroups:
    """The part of `RBD` that is about groups."""

    def group_create(self, ioctx: Any, name: str | bytes) -> None:
        """ObjectExists, InvalidArgument (no name)."""
        chosen = text(name, "name")
        with rbd_errors(f"error creating group {chosen.encode()!r}", objects=True):
            group.create(context(ioctx), chosen)

    def group_remove(self, ioctx: Any, name: str | bytes) -> None:
        """Its snapshots go, its images stay. None of that name is no error."""
        chosen = text(name, "name")
        with rbd_errors("error removing group", objects=True):
            group.remove_group(context(ioctx), chosen)

    def group_list(self, ioctx: Any) -> Any:
        """Names, sorted."""
        with rbd_errors("error listing groups", objects=True):
            return [*group.groups(context(ioctx))]

    def group_rename(self, ioctx: Any, src: str | bytes, dest: str | bytes) -> None:
        """ImageNotFound, ImageExists: as Ceph's module says it."""
        old, new = text(src, "src"), text(dest, "dest")
        with rbd_errors("error renaming group"):
            group.rename(context(ioctx), old, new)


class Group:
    """A group by name; nothing is looked up before it is used. Its methods raise ObjectNotFound without it."""

    def __init__(self, ioctx: Any, name: str | bytes) -> None:
        self.name = text(name, "name")
        self._context = context(ioctx)

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, type_: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        return False

    @property
    def ctx(self) -> Any:
        """The object context of its pool and namespace."""
        return self._context

    def add_image(self, image_ioctx: Any, image_name: str | bytes) -> None:
        """ObjectNotFound; ObjectExists: the image is in another group; InvalidArgument: in another namespace."""
        image = text(image_name, "image_name")
        with rbd_errors("error adding image to group", objects=True):
            group.add_image(self._context, self.name, context(image_ioctx), image)

    def remove_image(self, image_ioctx: Any, image_name: str | bytes) -> None:
        """ObjectNotFound."""
        image = text(image_name, "image_name")
        with rbd_errors("error removing image from group", objects=True):
            group.remove_image(self._context, self.name, context(image_ioctx), image)

    def list_images(self) -> GroupImageIterator:
        return GroupImageIterator(self)

    def create_snap(self, snap_name: str | bytes, flags: int = 0) -> None:
        """ObjectNotFound, ObjectExists; ReadOnlyImage: a member's owner keeps its lock."""
        snap, flags = text(snap_name, "snap_name"), number(flags)
        with rbd_errors("error creating group snapshot", objects=True):
            group.create_snap(self._context, self.name, snap, create_flags(flags))

    def remove_snap(self, snap_name: str | bytes) -> None:
        """ObjectNotFound."""
        snap = text(snap_name, "snap_name")
        with rbd_errors("error removing group snapshot", objects=True):
            group.remove_snap(self._context, self.name, snap)

    def rename_snap(self, old_snap_name: str | bytes, new_snap_name: str | bytes) -> None:
        """ObjectNotFound, ObjectExists."""
        old, new = text(old_snap_name, "old_snap_name"), text(new_snap_name, "new_snap_name")
        with rbd_errors("error renaming group snapshot", objects=True):
            group.rename_snap(self._context, self.name, old, new)

    def list_snaps(self) -> GroupSnapIterator:
        return GroupSnapIterator(self)

    def get_snap_info(self, snap_name: str | bytes) -> dict[str, Any]:
        """Of newer releases: id, name, state, image_snap_name and image_snaps (pool_id, image_name, snap_id) of a
        snapshot. ObjectNotFound."""
        snap = text(snap_name, "snap_name")
        with rbd_errors("error getting group snapshot info", objects=True):
            return group.snap_info(self._context, self.name, snap)

    def id(self) -> str:
        """Of newer releases. ObjectNotFound."""
        with rbd_errors("error getting group id", objects=True):
            return group.id_of(self._context, self.name)

    def rollback_to_snap(self, name: str | bytes, on_progress: OnProgress = None) -> None:
        """ObjectNotFound; ReadOnlyImage: a member's owner keeps its lock."""
        snap = text(name, "name")
        with rbd_errors("error rolling back group to snapshot", objects=True):
            group.rollback(self._context, self.name, snap, on_progress)

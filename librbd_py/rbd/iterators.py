"""What the `rbd` face gives back where there are many: iterables (not iterators) of dicts or tuples, as Ceph's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from librbd_py import errors
from librbd_py.errors import rbd_errors
from librbd_py.format import header as fh
from librbd_py.format import trash as ftr
from librbd_py.image import clones, cls, directory, locks, metadata, pool, trash
from librbd_py.image import group as groups
from librbd_py.image.options import OF_IMAGES, OPTIONS
from librbd_py.store.api import NOSNAP

from .common import context, moment
from .defaults import Defaults

if TYPE_CHECKING:
    from .groups import Group
    from .image import Image


class _Rows:
    """Filled when made; may be walked any number of times."""

    def __init__(self) -> None:
        self._rows: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        yield from self._rows


class ImageIterator(_Rows):
    """id and name of the images of a pool, in the order of RBD.list."""

    def __init__(self, ioctx: Any) -> None:
        super().__init__()
        with rbd_errors("error listing images"):
            listed = directory.list_images(context(ioctx))
        self._rows = [{"id": image_id, "name": name} for name, image_id in listed]


class SnapIterator(_Rows):
    """id, size, name, namespace of an image's snapshots, by id; `trash` for those in the trash."""

    def __init__(self, image: Image) -> None:
        super().__init__()
        with rbd_errors(f"error listing snapshots for image {image.label}"):
            for snap in image.handle.header.snaps.values():
                row: dict[str, Any] = {
                    "id": snap.id,
                    "size": snap.size,
                    "name": snap.name,
                    "namespace": snap.namespace.type,
                }
                if isinstance(snap.namespace, fh.TrashNamespace):
                    row["trash"] = {"original_name": snap.namespace.original_name}
                elif isinstance(snap.namespace, fh.GroupNamespace):
                    row["group"] = _group_row_or_none(image, snap.namespace)
                elif isinstance(snap.namespace, fh.MirrorNamespace):
                    row["mirror"] = mirror_row(snap.namespace)
                self._rows.append(row)


def group_row(image: Image, namespace: fh.GroupNamespace) -> dict[str, Any]:
    found = groups.of_snapshot(image.handle.ctx, namespace)
    return {"pool": found.pool_id, "name": found.group, "snap_name": found.name}


def _group_row_or_none(image: Image, namespace: fh.GroupNamespace) -> dict[str, Any] | None:
    """None when the group, or its record of the snapshot, is gone."""
    try:
        return group_row(image, namespace)
    except OSError as failure:
        if failure.errno != 2:
            raise
        return None


def mirror_row(namespace: fh.MirrorNamespace) -> dict[str, Any]:
    return {
        "state": namespace.state,
        "mirror_peer_uuids": list(namespace.peers),
        "complete": namespace.complete,
        "primary_mirror_uuid": namespace.primary_mirror_uuid,
        "primary_snap_id": namespace.primary_snap_id,
        "last_copied_object_number": namespace.last_copied_object,
    }


class ChildIterator(_Rows):
    """pool, pool_namespace, image, id, trash of clones of the image, or of the snapshot it is set to; by pool,
    namespace and name."""

    def __init__(self, image: Image, descendants: bool = False) -> None:
        super().__init__()
        handle = image.handle
        snap_id = None if handle.snap_id == NOSNAP else handle.snap_id
        with rbd_errors(f"error listing children for image {image.label}"):
            find = clones.descendants_of if descendants else clones.children_of
            for spec in find(handle, snap_id):
                child = clones.describe(handle, spec)
                self._rows.append(
                    {
                        "pool": child.pool,
                        "pool_namespace": child.namespace,
                        "image": child.name,
                        "id": child.id,
                        "trash": child.trash,
                    }
                )
        self._rows.sort(key=lambda row: (row["pool"], row["pool_namespace"], row["image"]))


class MetadataIterator(_Rows):
    """(key, value) of an image, by key."""

    def __init__(self, image: Image) -> None:
        super().__init__()
        self._image = image
        self.get_next_chunk()

    def get_next_chunk(self) -> None:
        with rbd_errors(f"error listing metadata for image {self._image.label}"):
            self._rows = list(metadata.items(self._image.handle).items())


class LockOwnerIterator(_Rows):
    """mode and owner (address) of the exclusive lock."""

    def __init__(self, image: Image) -> None:
        super().__init__()
        with rbd_errors(f"error listing lock owners for image {image.label}"):
            self._rows = [{"mode": 0, "owner": owner} for owner in locks.owners(image.handle)]


class WatcherIterator(_Rows):
    """addr, id and cookie of everybody who has the image open read-write."""

    def __init__(self, image: Image) -> None:
        super().__init__()
        with rbd_errors(f"error listing watchers for image {image.label}"):
            self._rows = [
                {"addr": row.address, "id": row.gid, "cookie": row.cookie} for row in locks.watchers(image.handle)
            ]


class TrashIterator(_Rows):
    """id, name, source, deletion_time, deferment_end_time of the images in a pool's trash."""

    def __init__(self, ioctx: Any) -> None:
        super().__init__()
        with rbd_errors("error listing trash entries"):
            listed = trash.entries(context(ioctx))
        self._rows = [trash_row(image_id, spec) for image_id, spec in listed.items()]


def trash_row(image_id: str, spec: ftr.TrashImageSpec) -> dict[str, Any]:
    return {
        "id": image_id,
        "name": spec.name,
        "source": ftr.SOURCE_NAMES.get(spec.source, "unknown").upper(),
        "deletion_time": moment(cls.seconds(spec.deletion_time)),
        "deferment_end_time": moment(cls.seconds(spec.deferment_end_time)),
    }


class PoolMetadataIterator(_Rows):
    """(key, value) of a pool."""

    def __init__(self, ioctx: Any) -> None:
        super().__init__()
        self._ioctx = ioctx
        self.get_next_chunk()

    def get_next_chunk(self) -> None:
        with rbd_errors("error listing metadata"):
            self._rows = list(pool.metadata(context(self._ioctx)).items())


class ConfigImageIterator(_Rows):
    """name, value, source of every option an image may have: what holds for it, and who says so."""

    def __init__(self, image: Image) -> None:
        super().__init__()
        with rbd_errors("error listing config options"):
            overrides = metadata.items(image.handle)
            self._rows = Defaults(image.ioctx, image.handle.ctx).options(OF_IMAGES, overrides)


class ConfigPoolIterator(_Rows):
    """name, value, source of every option a pool may have."""

    def __init__(self, ioctx: Any) -> None:
        super().__init__()
        with rbd_errors("error listing config options"):
            self._rows = Defaults(ioctx, context(ioctx)).options(OPTIONS, {})


class _Unsupported(_Rows):
    """Names of Ceph's module for things this library does not have yet."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.get_next_chunk()

    def get_next_chunk(self) -> None:
        raise errors.rbd.FunctionNotSupported(f"{type(self).__name__} is not supported", 38)


class GroupImageIterator(_Rows):
    """name, pool (id), state of the images of a group."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        with rbd_errors(f"error listing images for group {group.name.encode()!r}", objects=True):
            found = groups.members(group.ctx, group.name)
        self._rows = [{"name": row.name, "pool": row.pool_id, "state": row.state} for row in found]


class GroupSnapIterator(_Rows):
    """name, state of the snapshots of a group, in the order of their ids."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        with rbd_errors(f"error listing snapshots for group {group.name.encode()!r}", objects=True):
            found = groups.snaps(group.ctx, group.name)
        self._rows = [{"name": row.name, "state": row.state} for row in found]


class MirrorImageInfoIterator(_Unsupported):
    pass


class MirrorImageInstanceIdIterator(_Unsupported):
    pass


class MirrorImageStatusIterator(_Unsupported):
    pass


class MirrorPeerIterator(_Unsupported):
    pass

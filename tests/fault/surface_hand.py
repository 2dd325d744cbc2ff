"""One client of the surface programs, for any module with the interface of Ceph's `rbd`: ours and Ceph's own run the
same code (/usr/bin/python3 reads this file, too). A place is "pool" or "pool/namespace"; results can be
written as JSON.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import Any


class Hand:
    """`open_io(pool, namespace)` gives an I/O context; `default_format(n)` sets the format of the next clones; `prefix`
    is what open_io puts before the names of pools."""

    def __init__(self, rbd: Any, open_io: Any, default_format: Any, prefix: str = "") -> None:
        self.rbd, self.r, self._prefix = rbd, rbd.RBD(), prefix
        self._open_io, self._default_format = open_io, default_format
        self._ios: dict[str, Any] = {}
        self._images: dict[tuple[str, str], Any] = {}

    def io(self, place: str) -> Any:
        if place not in self._ios:
            pool, _, namespace = place.partition("/")
            self._ios[place] = self._open_io(pool, namespace)
        return self._ios[place]

    def call(self, verb: str, *args: Any) -> Any:
        """["ok", what the verb gives] or ["error", the exception's class]."""
        try:
            return ["ok", getattr(self, verb)(*args)]
        except self.rbd.Error as failure:
            return ["error", type(failure).__name__]

    def close(self) -> None:
        for image in self._images.values():
            image.close()
        self._images.clear()

    def opened(self, place: str, name: str) -> Any:
        if (place, name) not in self._images:
            self._images[place, name] = self.rbd.Image(self.io(place), name)
        image = self._images[place, name]
        image.features()  # librbd has heard of changes, but cuts requests and copies features before it looks at them
        return image

    def leave(self, place: str, name: str) -> None:
        image = self._images.pop((place, name), None)
        if image is not None:
            image.close()

    # --- images

    def create(
        self, place: str, name: str, size: int, order: int, features: int, unit: int, count: int, data_pool: str | None
    ) -> None:
        pool = data_pool and self._prefix + data_pool
        self.r.create(self.io(place), name, size, order, False, features, unit, count, pool)

    def clone(
        self, place: str, name: str, snap: str, to: str, child: str, features: int, order: int, form: int
    ) -> None:
        self._default_format(form)
        self.r.clone(self.io(place), name, snap, self.io(to), child, features, order)

    def remove(self, place: str, name: str) -> None:
        self.r.remove(self.io(place), name)

    def rename(self, place: str, name: str, new: str) -> None:
        self.r.rename(self.io(place), name, new)

    def copy(self, place: str, name: str, to: str, new: str, deep: bool) -> None:
        image = self.opened(place, name)
        (image.deep_copy if deep else image.copy)(self.io(to), new)

    def image(self, place: str, name: str, method: str, *args: Any) -> Any:
        """A method of an image that stays open."""
        result = getattr(self.opened(place, name), method)(*args)
        return result if isinstance(result, int | str | None) else None

    def write(self, place: str, name: str, offset: int, length: int, byte: int) -> None:
        self.opened(place, name).write(bytes([byte]) * length, offset)

    def zero(self, place: str, name: str, offset: int, length: int) -> None:
        image = self.opened(place, name)
        if hasattr(image, "write_zeroes"):
            image.write_zeroes(offset, length)
        else:
            image.write(bytes(length), offset)

    def fill_limit(self, place: str, name: str) -> str:
        """What a snapshot beyond the limit gives."""
        image = self.opened(place, name)
        image.set_snap_limit(len(list(image.list_snaps())))
        try:
            image.create_snap("beyond")
        except self.rbd.Error as failure:
            return type(failure).__name__
        finally:
            image.remove_snap_limit()
        return "made"

    def has_parent(self, place: str, name: str) -> bool:
        try:
            self.opened(place, name).get_parent_image_spec()
        except self.rbd.ImageNotFound:
            return False
        return True

    def rollback(self, place: str, name: str, snap: str) -> None:
        """Librbd does not ask another client for the lock here, but refuses; a write does."""
        image = self.opened(place, name)
        image.write(image.read(0, 1), 0)
        image.rollback_to_snap(snap)

    def rebuild(self, place: str, name: str) -> int:
        image = self.opened(place, name)
        image.rebuild_object_map()
        flags: int = image.flags()
        return flags

    def migration_prepare(self, place: str, name: str, to: str, new: str) -> None:
        self.r.migration_prepare(self.io(place), name, self.io(to), new)

    # --- trash, groups, namespaces

    def trash_move(self, place: str, name: str, delay: int) -> None:
        self.r.trash_move(self.io(place), name, delay)

    def trash_id(self, place: str, name: str) -> str:
        return str(next(row["id"] for row in self.r.trash_list(self.io(place)) if row["name"] == name))

    def trash_restore(self, place: str, name: str, new: str) -> None:
        self.r.trash_restore(self.io(place), self.trash_id(place, name), new)

    def trash_remove(self, place: str, name: str, force: bool) -> None:
        self.r.trash_remove(self.io(place), self.trash_id(place, name), force)

    def trash_purge(self, place: str) -> None:
        """A second ahead: the time of a move is rounded."""
        self.r.trash_purge(self.io(place), datetime.utcnow() + timedelta(seconds=2))

    def pool(self, place: str, method: str, *args: Any) -> None:
        getattr(self.r, method)(self.io(place), *args)

    def group(self, place: str, group: str, method: str, *args: Any) -> None:
        getattr(self.rbd.Group(self.io(place), group), method)(*args)

    def member(self, place: str, group: str, method: str, image: str) -> None:
        getattr(self.rbd.Group(self.io(place), group), method)(self.io(place), image)

    # --- what can be seen

    def state(self, places: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for place in places:
            io = self.io(place)
            groups = {}
            for name in self.r.group_list(io):
                group = self.rbd.Group(io, name)
                groups[name] = [
                    sorted(row["name"] for row in group.list_images()),
                    sorted(row["name"] for row in group.list_snaps()),
                ]
            found[place] = {
                "images": {name: self._image(io, name) for name in sorted(self.r.list(io))},
                "trash": sorted(row["name"] for row in self.r.trash_list(io)),
                "groups": groups,
            }
        return found

    def _image(self, io: Any, name: str) -> dict[str, Any]:
        with self.rbd.Image(io, name, read_only=True) as image:
            snaps = {}
            for snap in list(image.list_snaps()):
                kind = snap["namespace"]
                image.set_snap_by_id(snap["id"])
                label = snap["name"] if kind == 0 else snap["group"]["snap_name"] if kind == 1 else "trashed"
                protected = kind == 0 and image.is_protected_snap(snap["name"])
                children = sorted(child["image"] for child in image.list_children2())
                snaps[f"{kind} {label} {snap['id']}"] = [_sum(image), bool(protected), image.overlap(), children]
                image.set_snap(None)
            return {
                "head": _sum(image),
                "snaps": snaps,
                "features": image.features(),
                "flags": image.flags(),
                "operations": image.op_features(),
                "overlap": image.overlap(),
                "metadata": sorted([key, value] for key, value in image.metadata_list()),
                "group": image.group()["name"],
                "shape": [image.stat()["order"], image.stripe_unit(), image.stripe_count(), image.data_pool_id()],
            }


def _sum(image: Any) -> list[Any]:
    size = image.size()
    return [size, hashlib.sha256(image.read(0, size) if size else b"").hexdigest()]


def on_cluster(rbd: Any, cluster: Any, prefix: str) -> Hand:
    """On a connection of the `rados` module; `prefix` is put before the names of pools."""

    def open_io(pool: str, namespace: str) -> Any:
        io = cluster.open_ioctx(prefix + pool)
        io.set_namespace(namespace)
        return io

    def default_format(form: int) -> None:
        cluster.conf_set("rbd_default_clone_format", str(form))

    return Hand(rbd, open_io, default_format, prefix)

"""Metadata and configuration of `rbd.Image`, and the names of what is not supported yet."""

from __future__ import annotations

import errno
from typing import Any, NoReturn

from librbd_py.errors import rbd as exceptions
from librbd_py.errors import rbd_errors
from librbd_py.image import group, metadata
from librbd_py.image.handle import ImageHandle
from librbd_py.image.migration import records

from .common import requires_not_closed, text
from .iterators import ConfigImageIterator, MetadataIterator


class ImageMeta:
    handle: ImageHandle

    @property
    def label(self) -> str:
        raise NotImplementedError

    @requires_not_closed
    def metadata_get(self, key: str | bytes) -> str:
        """KeyError: no such key."""
        return self._value(text(key, "key"), f"no metadata {key!r} for image {self.label}")

    @requires_not_closed
    def metadata_set(self, key: str | bytes, value: str | bytes) -> None:
        name, content = text(key, "key"), text(value, "value")
        with rbd_errors(f"error setting metadata {key!r} for image {self.label}"):
            metadata.put(self.handle, name, content.encode("utf-8", "surrogateescape"))

    @requires_not_closed
    def metadata_remove(self, key: str | bytes) -> None:
        """KeyError: no such key."""
        self._remove(text(key, "key"), f"no metadata {key!r} for image {self.label}")

    @requires_not_closed
    def metadata_list(self) -> MetadataIterator:
        return MetadataIterator(self)  # type: ignore[arg-type]

    @requires_not_closed
    def config_list(self) -> ConfigImageIterator:
        return ConfigImageIterator(self)  # type: ignore[arg-type]

    @requires_not_closed
    def config_get(self, key: str | bytes) -> str:
        """KeyError: no override for this image."""
        name = text(key, "key")
        return self._value(metadata.CONFIG_PREFIX + name, f"no config {name} for image {self.label}")

    @requires_not_closed
    def config_set(self, key: str | bytes, value: str | bytes) -> None:
        self.metadata_set(metadata.CONFIG_PREFIX + text(key, "key"), value)

    @requires_not_closed
    def config_remove(self, key: str | bytes) -> None:
        """KeyError: no override for this image."""
        name = text(key, "key")
        self._remove(metadata.CONFIG_PREFIX + name, f"no config {name} for image {self.label}")

    def _value(self, key: str, missing: str) -> str:
        try:
            with rbd_errors(f"error getting metadata {key!r} for image {self.label}"):
                return metadata.get(self.handle, key)
        except exceptions.ImageNotFound:
            raise KeyError(missing) from None

    def _remove(self, key: str, missing: str) -> None:
        try:
            with rbd_errors(f"error removing metadata {key!r} for image {self.label}"):
                metadata.remove(self.handle, key)
        except exceptions.ImageNotFound:
            raise KeyError(missing) from None

    @requires_not_closed
    def group(self) -> dict[str, Any]:
        """{'pool': -1, 'name': ''} when it is in none."""
        with rbd_errors(f"error getting group for image {self.label}"):
            pool, name = group.of_image(self.handle)
            return {"pool": pool, "name": name}

    @requires_not_closed
    def migration_source_spec(self) -> str:
        with rbd_errors("error retrieving migration source"):
            return records.source_spec(self.handle.ctx, self.handle.id)

    def _unsupported(self, what: str) -> NoReturn:
        raise exceptions.FunctionNotSupported(f"{what} is not supported", errno.ENOSYS)


def _refuse(name: str) -> Any:
    @requires_not_closed
    def method(self: ImageMeta, *args: object, **kwargs: object) -> NoReturn:
        self._unsupported(name)

    method.__name__ = name
    method.__doc__ = "Not supported: FunctionNotSupported."
    return method


for _name in (
    "encryption_format",
    "encryption_load",
    "mirror_image_create_snapshot",
    "mirror_image_demote",
    "mirror_image_disable",
    "mirror_image_enable",
    "mirror_image_get_info",
    "mirror_image_get_instance_id",
    "mirror_image_get_mode",
    "mirror_image_get_status",
    "mirror_image_promote",
    "mirror_image_resync",
    "aio_mirror_image_create_snapshot",
    "aio_mirror_image_get_info",
    "aio_mirror_image_get_mode",
):
    setattr(ImageMeta, _name, _refuse(_name))

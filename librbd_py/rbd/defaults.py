"""Options of a cluster and of a pool that decide what an image is made like where the caller does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from librbd_py.errors import rbd as exceptions
from librbd_py.format.values import replace
from librbd_py.image import feature_names, metadata, pool
from librbd_py.image.directory import CreateOptions
from librbd_py.image.options import OPTIONS
from librbd_py.store.api import ObjectContext
from librbd_py.store.rados import RadosStore

from .constants import RBD_CONFIG_SOURCE_CONFIG, RBD_CONFIG_SOURCE_IMAGE, RBD_CONFIG_SOURCE_POOL

MIMIC = 13  # the first release whose clients understand clones of format 2


class Defaults:
    """Where they come from: the pool's configuration, what the program set, the cluster's configuration."""

    def __init__(self, ioctx: Any, ctx: ObjectContext) -> None:
        self._ctx = ctx
        self._ioctx = ioctx
        self._of_pool: dict[str, str] | None = None

    def option(self, name: str) -> str:
        """Empty when nobody set it."""
        return self.of_pool(name) or self.of_cluster(name)

    def of_pool(self, name: str) -> str:
        """What the pool says, alone."""
        if self._of_pool is None:
            self._of_pool = pool.metadata(self._ctx)
        return self._of_pool.get(metadata.CONFIG_PREFIX + name, "")

    def of_cluster(self, name: str) -> str:
        """What the program or the cluster's configuration says."""
        conf_get = getattr(getattr(self._ioctx, "rados", None), "conf_get", None)
        if callable(conf_get):
            return str(conf_get(name) or "")
        if isinstance(self._ctx.store, RadosStore):
            with suppress(OSError):
                return self._ctx.store.connection.conf_get(name)
        return ""

    def number(self, name: str) -> int | None:
        """None when nobody set it, or to 0. InvalidArgument."""
        value = self.option(name)
        try:
            return int(value, 0) or None if value else None
        except ValueError:
            raise exceptions.InvalidArgument(f"option {name}: {value!r} is no number", 22) from None

    def for_image(self, chosen: CreateOptions) -> CreateOptions:
        """A new image's."""
        if chosen.order is None:
            if self.option("rbd_default_order") == "0":
                raise exceptions.ArgumentOutOfRange("option rbd_default_order: objects of 1 byte", 33)
            chosen = replace(chosen, order=self.number("rbd_default_order"))
        if chosen.stripe_unit is None and chosen.stripe_count is None:
            unit, count = self.number("rbd_default_stripe_unit"), self.number("rbd_default_stripe_count")
            if unit or count:
                chosen = replace(chosen, stripe_unit=unit, stripe_count=count)
        if chosen.features is None and (features := self.option("rbd_default_features")):
            chosen = replace(chosen, features=feature_names.from_string(features))
        return self.for_clone(chosen)

    def for_clone(self, chosen: CreateOptions) -> CreateOptions:
        """A clone's: the rest comes from its parent."""
        if chosen.data_pool is None and (name := self.option("rbd_default_data_pool")):
            chosen = replace(chosen, data_pool=name)
        return chosen

    def clone_format(self) -> int:
        """1 or 2, as librbd decides: without a wish the newest that every client of the cluster understands."""
        value = self.option("rbd_default_clone_format")
        if value in ("1", "2"):
            return int(value)
        store = self._ctx.store
        return 1 if isinstance(store, RadosStore) and store.oldest_client() < MIMIC else 2

    def options(self, names: Iterable[str], of_image: Mapping[str, str]) -> list[dict[str, Any]]:
        """name, value, source of options that a pool or an image may override: what holds, and who says so."""
        rows = []
        for name in sorted(names):
            value, source = self.of_cluster(name) or OPTIONS[name], RBD_CONFIG_SOURCE_CONFIG
            if self.of_pool(name):
                value, source = self.of_pool(name), RBD_CONFIG_SOURCE_POOL
            if metadata.CONFIG_PREFIX + name in of_image:
                value, source = of_image[metadata.CONFIG_PREFIX + name], RBD_CONFIG_SOURCE_IMAGE
            rows.append({"name": name, "value": value, "source": source})
        return rows

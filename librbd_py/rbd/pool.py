"""`rbd.RBD`: images, namespaces and the trash of a pool."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from librbd_py.errors import rbd as exceptions
from librbd_py.errors import rbd_errors
from librbd_py.format.trash import SOURCE_USER_PARENT
from librbd_py.image import cls, directory, metadata, pool, trash
from librbd_py.image import feature_names as ft
from librbd_py.image.clones import clone
from librbd_py.image.directory import CreateOptions
from librbd_py.image.handle import ImageHandle
from librbd_py.store.api import ObjectContext
from librbd_py.store.rados import RadosStore

from .common import OnProgress, context, number, text
from .completion import Completion
from .defaults import Defaults
from .groups import PoolGroups
from .image import Image, options
from .iterators import ConfigPoolIterator, ImageIterator, PoolMetadataIterator, TrashIterator, trash_row
from .migrations import Migrations

if TYPE_CHECKING:
    from datetime import datetime

VERSION = (1, 16, 0)  # of the librbd whose behaviour this follows


class RBD(PoolGroups, Migrations):
    """Calls that need no open image."""

    def version(self) -> tuple[int, int, int]:
        return VERSION

    def create(
        self,
        ioctx: Any,
        name: str | bytes,
        size: int,
        order: int | None = None,
        old_format: bool = False,
        features: int | None = None,
        stripe_unit: int | None = None,
        stripe_count: int | None = None,
        data_pool: str | bytes | None = None,
    ) -> None:
        """ImageExists, InvalidArgument, ArgumentOutOfRange (order), FunctionNotSupported (features).

        Format 1 images are not made any more: `old_format` gives a format 2 image and excludes its options.
        """
        chosen_name = text(name, "name")
        chosen = options(order, features, stripe_unit, stripe_count, data_pool)
        if old_format and (features or stripe_unit or stripe_count or data_pool):
            raise exceptions.InvalidArgument(
                "format 1 images do not support feature masks, non-default striping, nor data pool"
            )
        size = number(size)
        with rbd_errors("error creating image"):
            ctx = context(ioctx)
            chosen = Defaults(ioctx, ctx).for_image(chosen)
            _validate(ctx, chosen)
            directory.create(ctx, chosen_name, size, chosen)

    def clone(
        self,
        p_ioctx: Any,
        p_name: str | bytes,
        p_snapname: str | bytes | int,
        c_ioctx: Any,
        c_name: str | bytes,
        features: int | None = None,
        order: int | None = None,
        stripe_unit: int | None = None,
        stripe_count: int | None = None,
        data_pool: str | bytes | None = None,
    ) -> None:
        """A copy-on-write child of a snapshot. Its format: the option rbd_default_clone_format, else 2 where every
        client of the cluster must understand that. The snapshot may be given by its id, as in newer releases: also one
        of a group."""
        parent, child = text(p_name, "p_name"), text(c_name, "c_name")
        snap = number(p_snapname) if isinstance(p_snapname, int) else text(p_snapname, "p_snapname")
        chosen = options(order, features, stripe_unit, stripe_count, data_pool)
        with rbd_errors("error creating clone"):
            ctx = context(c_ioctx)
            defaults = Defaults(c_ioctx, ctx)
            chosen, chosen_format = defaults.for_clone(chosen), defaults.clone_format()
            _validate(ctx, chosen)
            clone(context(p_ioctx), parent, snap, ctx, child, chosen, clone_format=chosen_format)

    def list(self, ioctx: Any) -> list[str]:
        """Names, sorted; at the end those of images whose removal began and has not ended."""
        with rbd_errors("error listing images"):
            return [name for name, _ in directory.list_images(context(ioctx))]

    def list2(self, ioctx: Any) -> ImageIterator:
        return ImageIterator(ioctx)

    def remove(self, ioctx: Any, name: str | bytes, on_progress: OnProgress = None) -> None:
        """ImageNotFound; ImageHasSnapshots; ImageBusy: open elsewhere."""
        chosen = text(name, "name")
        with rbd_errors("error removing image"):
            ctx = context(ioctx)
            defaults = Defaults(ioctx, ctx)
            if defaults.option("rbd_move_to_trash_on_remove").lower() in ("true", "1"):
                trash.move(ctx, chosen, float(defaults.option("rbd_move_to_trash_on_remove_expire_seconds") or 0))
                return
            try:
                directory.remove_image(ctx, chosen, on_progress)
            except OSError as failure:
                keep = defaults.option("rbd_move_parent_to_trash_on_remove").lower() in ("true", "1")
                if failure.errno != errno.ENOTEMPTY or not keep or not _only_for_clones(ctx, chosen):
                    raise
                trash.move(ctx, chosen, source=SOURCE_USER_PARENT)

    def rename(self, ioctx: Any, src: str | bytes, dest: str | bytes) -> None:
        """ImageNotFound, ImageExists."""
        old, new = text(src, "src"), text(dest, "dest")
        with rbd_errors("error renaming image"):
            directory.rename(context(ioctx), old, new)

    def aio_open_image(
        self,
        oncomplete: Callable[..., Any],
        ioctx: Any,
        name: str | bytes | None = None,
        snapshot: str | bytes | int | None = None,
        read_only: bool = False,
        image_id: str | bytes | None = None,
    ) -> Completion:
        """Opens in the background; then oncomplete(completion, image)."""
        image = Image(ioctx, name, snapshot, read_only, image_id, _oncomplete=oncomplete)

        def job() -> tuple[int, tuple[Any, ...]]:
            try:
                image._open()
            except OSError as failure:
                return -(failure.errno or errno.EIO), (image,)
            return 0, (image,)

        return Completion(oncomplete).start(job)

    def features_to_string(self, features: int) -> str:
        with rbd_errors("error converting features bitmask to str"):
            return ft.to_string(number(features))

    def features_from_string(self, str_features: str | bytes) -> int:
        with rbd_errors("error getting features bitmask from str"):
            return ft.from_string(text(str_features, "str_features"))

    # --- namespaces and pool ---------------------------------------------------------------------------------------

    def pool_init(self, ioctx: Any, force: bool) -> None:
        with rbd_errors("error initializing pool"):
            ctx = context(ioctx)
            if isinstance(ctx.store, RadosStore):
                ctx.store.application_enable(ctx.pool_id, force=force)
                pool.validate(ctx)
            else:
                pool.init(ctx, force=force)

    def pool_stats_get(self, ioctx: Any) -> dict[str, int]:
        with rbd_errors("error retrieving pool stats"):
            images, trashed = pool.totals(context(ioctx))
        return {
            "image_count": images.images,
            "image_provisioned_bytes": images.provisioned,
            "image_max_provisioned_bytes": images.max_provisioned,
            "image_snap_count": images.snapshots,
            "trash_count": trashed.images,
            "trash_provisioned_bytes": trashed.provisioned,
            "trash_max_provisioned_bytes": trashed.max_provisioned,
            "trash_snap_count": trashed.snapshots,
        }

    def namespace_create(self, ioctx: Any, name: str | bytes) -> None:
        """ImageExists, as Ceph's module says it."""
        chosen = text(name, "name")
        with rbd_errors("error creating namespace"):
            pool.namespace_create(context(ioctx), chosen)

    def namespace_remove(self, ioctx: Any, name: str | bytes) -> None:
        """ImageNotFound; ImageBusy: not empty."""
        chosen = text(name, "name")
        with rbd_errors("error removing namespace"):
            pool.namespace_remove(context(ioctx), chosen)

    def namespace_exists(self, ioctx: Any, name: str | bytes) -> bool:
        chosen = text(name, "name")
        with rbd_errors("error verifying namespace"):
            return chosen in pool.namespaces(context(ioctx))

    def namespace_list(self, ioctx: Any) -> Any:
        with rbd_errors("error listing namespaces"):
            return pool.namespaces(context(ioctx))

    def pool_metadata_get(self, ioctx: Any, key: str | bytes) -> str:
        """KeyError."""
        return self._pool_value(ioctx, text(key, "key"), f"no metadata {key!r}")

    def pool_metadata_set(self, ioctx: Any, key: str | bytes, value: str | bytes) -> None:
        name, content = text(key, "key"), text(value, "value")
        with rbd_errors("error setting metadata"):
            pool.metadata_set(context(ioctx), name, content.encode("utf-8", "surrogateescape"))

    def pool_metadata_remove(self, ioctx: Any, key: str | bytes) -> None:
        """KeyError."""
        self._pool_remove(ioctx, text(key, "key"), f"no metadata {key!r}")

    def pool_metadata_list(self, ioctx: Any) -> PoolMetadataIterator:
        return PoolMetadataIterator(ioctx)

    def config_get(self, ioctx: Any, key: str | bytes) -> str:
        """KeyError: no override for this pool."""
        name = text(key, "key")
        return self._pool_value(ioctx, metadata.CONFIG_PREFIX + name, f"no config {name} for pool")

    def config_set(self, ioctx: Any, key: str | bytes, value: str | bytes) -> None:
        """InvalidArgument: a pool has no such option, or it cannot be that."""
        self.pool_metadata_set(ioctx, metadata.CONFIG_PREFIX + text(key, "key"), value)

    def config_remove(self, ioctx: Any, key: str | bytes) -> None:
        """KeyError: no override for this pool."""
        name = text(key, "key")
        self._pool_remove(ioctx, metadata.CONFIG_PREFIX + name, f"no config {name} for pool")

    def config_list(self, ioctx: Any) -> ConfigPoolIterator:
        return ConfigPoolIterator(ioctx)

    def _pool_value(self, ioctx: Any, key: str, missing: str) -> str:
        try:
            with rbd_errors("error getting metadata"):
                return pool.metadata_get(context(ioctx), key)
        except exceptions.ImageNotFound:
            raise KeyError(missing) from None

    def _pool_remove(self, ioctx: Any, key: str, missing: str) -> None:
        try:
            with rbd_errors("error removing metadata"):
                pool.metadata_remove(context(ioctx), key)
        except exceptions.ImageNotFound:
            raise KeyError(missing) from None

    # --- trash -----------------------------------------------------------------------------------------------------

    def trash_move(self, ioctx: Any, name: str | bytes, delay: float = 0) -> None:
        """`delay`: seconds for which trash_remove refuses."""
        chosen = text(name, "name")
        with rbd_errors("error moving image to trash"):
            trash.move(context(ioctx), chosen, delay)

    def trash_list(self, ioctx: Any) -> TrashIterator:
        return TrashIterator(ioctx)

    def trash_get(self, ioctx: Any, image_id: str | bytes) -> dict[str, Any]:
        """ImageNotFound."""
        chosen = text(image_id, "image_id")
        with rbd_errors("error retrieving image from trash"):
            return trash_row(chosen, cls.trash_get(context(ioctx), chosen))

    def trash_remove(
        self, ioctx: Any, image_id: str | bytes, force: bool = False, on_progress: OnProgress = None
    ) -> None:
        """PermissionError: its time has not come. ImageNotFound, ImageHasSnapshots, ImageBusy."""
        chosen = text(image_id, "image_id")
        with rbd_errors("error deleting image from trash"):
            trash.remove_from_trash(context(ioctx), chosen, force=force, progress=on_progress)

    def trash_restore(self, ioctx: Any, image_id: str | bytes, name: str | bytes) -> None:
        """ImageNotFound, ImageExists."""
        chosen, new = text(image_id, "image_id"), text(name, "name")
        with rbd_errors("error restoring image from trash"):
            trash.restore(context(ioctx), chosen, new)

    def trash_purge(self, ioctx: Any, expire_ts: datetime | None = None, threshold: float = -1) -> None:
        """Removes what expired before `expire_ts` (UTC), by default now. With a `threshold` (0 to 1) what comes first
        instead, until the pool is filled to no more than that. InvalidArgument."""
        from datetime import UTC

        before = time.time() if expire_ts is None else expire_ts.replace(tzinfo=UTC).timestamp()
        with rbd_errors("error purging images from trash"):
            ctx = context(ioctx)
            if threshold == -1:
                trash.purge(ctx, before)
                return
            if not 0 <= threshold <= 1:
                raise OSError(errno.EINVAL, f"a threshold of {threshold} is not 0 to 1")
            used, total = pool.usage(ctx)
            trash.purge_to_free(ctx, used - int(total * threshold))

    def mirror_mode_get(self, ioctx: Any) -> int:
        """Disabled: mirroring is not supported."""
        context(ioctx)
        return 0


def _only_for_clones(ctx: ObjectContext, name: str) -> bool:
    """Are all of an image's snapshots in the trash, where clones keep them?"""
    with ImageHandle.open(ctx, name, read_only=True) as handle:
        return all(snap.is_trash for snap in handle.header.snaps.values())


def _validate(ctx: ObjectContext, chosen: CreateOptions) -> None:
    """Other stores have only one kind of pool."""
    if isinstance(ctx.store, RadosStore):
        pool.validate(ctx if chosen.data_pool is None else ctx.store.open(chosen.data_pool))


def _refuse(name: str) -> Any:
    def method(self: RBD, *args: object, **kwargs: object) -> NoReturn:
        raise exceptions.FunctionNotSupported(f"{name} is not supported", errno.ENOSYS)

    method.__name__ = name
    method.__doc__ = "Not supported: FunctionNotSupported."
    return method


for _name in (
    "mirror_image_info_list",
    "mirror_image_instance_id_list",
    "mirror_image_status_list",
    "mirror_image_status_summary",
    "mirror_mode_set",
    "mirror_peer_add",
    "mirror_peer_bootstrap_create",
    "mirror_peer_bootstrap_import",
    "mirror_peer_get_attributes",
    "mirror_peer_list",
    "mirror_peer_remove",
    "mirror_peer_set_attributes",
    "mirror_peer_set_client",
    "mirror_peer_set_cluster",
    "mirror_peer_set_name",
    "mirror_site_name_get",
    "mirror_site_name_set",
    "mirror_uuid_get",
):
    setattr(RBD, _name, _refuse(_name))

"""`rbd.RBD`: live migration of images."""

from __future__ import annotations

from typing import Any

from librbd_py.errors import rbd_errors
from librbd_py.image.migration import execute, finish, prepare, records

from .common import OnProgress, context, text
from .defaults import Defaults
from .image import options


class Migrations:
    """Of a program's view: an image goes on under its new name as soon as `migration_prepare` returns."""

    def migration_prepare(
        self,
        ioctx: Any,
        image_name: str | bytes,
        dest_ioctx: Any,
        dest_image_name: str | bytes,
        features: int | None = None,
        order: int | None = None,
        stripe_unit: int | None = None,
        stripe_count: int | None = None,
        data_pool: str | bytes | None = None,
        *,
        flatten: bool = False,
    ) -> None:
        """ImageNotFound, ImageBusy (open, or snapshots that are no user's), ImageExists, ReadOnlyImage (it migrates
        already), InvalidArgument. `flatten`: a clone becomes independent of its parent."""
        name, dest = text(image_name, "image_name"), text(dest_image_name, "dest_image_name")
        chosen = options(order, features, stripe_unit, stripe_count, data_pool)
        with rbd_errors(f"error migrating image {name}"):
            prepare.prepare(context(ioctx), name, context(dest_ioctx), dest, chosen, flatten=flatten)

    def migration_prepare_import(
        self,
        source_spec: str | bytes,
        dest_ioctx: Any,
        dest_image_name: str | bytes,
        features: int | None = None,
        order: int | None = None,
        stripe_unit: int | None = None,
        stripe_count: int | None = None,
        data_pool: str | bytes | None = None,
    ) -> None:
        """`source_spec`: JSON, as Ceph's; `{"type": "native", "store": URL, ...}` names an image of any store.
        InvalidArgument, ImageExists; what opening the source fails with."""
        from librbd_py.image.migration import imported

        spec, name = text(source_spec, "source_spec"), text(dest_image_name, "dest_image_name")
        chosen = options(order, features, stripe_unit, stripe_count, data_pool)
        with rbd_errors(f"error preparing the import of image {name}"):
            ctx = context(dest_ioctx)
            imported.prepare_import(spec, ctx, name, Defaults(dest_ioctx, ctx).for_image(chosen))

    def migration_execute(self, ioctx: Any, image_name: str | bytes, on_progress: OnProgress = None) -> None:
        """By the name of either image. ImageNotFound; InvalidArgument: it is not prepared."""
        name = text(image_name, "image_name")
        with rbd_errors(f"error executing migration of image {name}"):
            execute.execute(context(ioctx), name, _ignoring_result(on_progress))

    def migration_commit(self, ioctx: Any, image_name: str | bytes, on_progress: OnProgress = None) -> None:
        """ImageNotFound; InvalidArgument: it is not executed."""
        name = text(image_name, "image_name")
        with rbd_errors(f"error committing migration of image {name}"):
            finish.commit(context(ioctx), name, _ignoring_result(on_progress))

    def migration_abort(self, ioctx: Any, image_name: str | bytes, on_progress: OnProgress = None) -> None:
        """ImageNotFound; ImageBusy: the destination is open."""
        name = text(image_name, "image_name")
        with rbd_errors(f"error aborting migration of image {name}"):
            finish.abort(context(ioctx), name, _ignoring_result(on_progress))

    def migration_status(self, ioctx: Any, image_name: str | bytes) -> dict[str, Any]:
        """ImageNotFound; InvalidArgument: it does not migrate."""
        name = text(image_name, "image_name")
        with rbd_errors(f"error getting migration status of image {name}"):
            return dict(vars(records.status(context(ioctx), name)))


def _ignoring_result(on_progress: OnProgress) -> OnProgress:
    """Ceph's module takes any callable, and what it returns cancels nothing."""
    if on_progress is None:
        return None
    told = on_progress

    def tell(done: int, total: int) -> None:
        told(done, total)

    return tell

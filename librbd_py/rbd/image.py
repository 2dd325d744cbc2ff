"""`rbd.Image`: one open image."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from librbd_py.errors import rbd as exceptions
from librbd_py.errors import rbd_errors
from librbd_py.image import cls, io
from librbd_py.image.copy import copy, deep_copy
from librbd_py.image.diff import diff_iterate
from librbd_py.image.directory import CreateOptions
from librbd_py.image.feature_update import update_features
from librbd_py.image.flatten import flatten
from librbd_py.image.handle import ImageHandle, name_by_id
from librbd_py.image.map_check import rebuild
from librbd_py.image.resize import resize
from librbd_py.image.sparsify import sparsify

from .common import OnProgress, context, moment, number, requires_not_closed, text
from .completion import Completion
from .constants import RBD_WRITE_ZEROES_FLAG_THICK_PROVISION
from .defaults import Defaults
from .image_aio import ImageAio
from .image_locks import ImageLocks
from .image_meta import ImageMeta
from .image_snaps import ImageSnaps

if TYPE_CHECKING:
    from datetime import datetime


class Image(ImageSnaps, ImageAio, ImageLocks, ImageMeta):
    """An image opened for I/O and changes. Use it as a context manager, or close() it."""

    def __init__(
        self,
        ioctx: Any,
        name: str | bytes | None = None,
        snapshot: str | bytes | int | None = None,
        read_only: bool = False,
        image_id: str | bytes | None = None,
        _oncomplete: Any = None,
    ) -> None:
        """Opens by name or by id (exactly one), at HEAD or at a snapshot (which makes it read-only until `set_snap`).

        ImageNotFound, InvalidArgument, FunctionNotSupported (unknown features).
        """
        self.closed = True
        if name is None and image_id is None:
            raise exceptions.InvalidArgument("image name or image id was not specified")
        if name is not None and image_id is not None:
            raise exceptions.InvalidArgument("only need to specify image name or image id")
        self._name = None if name is None else text(name, "name")
        self._id = None if image_id is None else text(image_id, "image_id")
        at = snapshot if snapshot is None or isinstance(snapshot, int) else text(snapshot, "snapshot")
        self.ioctx = ioctx
        self._open_arguments = (context(ioctx), at, bool(read_only))
        if _oncomplete is None:
            with rbd_errors(f"error opening image {self.label} at snapshot {snapshot!r}"):
                self._open()

    def _open(self) -> None:
        ctx, at, read_only = self._open_arguments
        self.handle = ImageHandle.open(ctx, self._name, image_id=self._id, snapshot=at, read_only=read_only)
        try:
            self.handle.configure(Defaults(self.ioctx, ctx).of_cluster)
        except BaseException:
            self.handle.close()
            raise
        self._name = self.handle.name
        self.closed = False

    @property
    def label(self) -> str:
        """The image in messages, as Ceph's module writes it."""
        return repr((self._name if self._name is not None else self._id or "").encode("utf-8", "surrogateescape"))

    def __repr__(self) -> str:
        return f"rbd.Image(ioctx, {self.label})"

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self, type_: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        self.close()
        return False

    def __del__(self) -> None:
        if not getattr(self, "closed", True):
            self.close()

    def require_not_closed(self) -> None:
        if self.closed:
            raise exceptions.InvalidArgument("image is closed")

    def close(self) -> None:
        """Releases locks and resources. Closing again does nothing."""
        if not self.closed:
            with rbd_errors(f"error while closing image {self.label}"):
                self.handle.close()
            self.closed = True

    @requires_not_closed
    def aio_close(self, oncomplete: Any) -> Completion:
        def job() -> tuple[int, tuple[Any, ...]]:
            self.handle.close()
            self.closed = True
            return 0, ()

        return Completion(oncomplete).start(job)

    # --- facts -----------------------------------------------------------------------------------------------------

    @requires_not_closed
    def stat(self) -> dict[str, Any]:
        with rbd_errors(f"error getting info for image {self.label}"):
            header = self.handle.header
            size = header.size_at(self.handle.snap_id)
            return {
                "size": size,
                "obj_size": header.layout.object_size,
                "num_objs": header.layout.objects(size),
                "order": header.order,
                "block_name_prefix": header.object_prefix,
                "parent_pool": (1 << 64) - 1,
                "parent_name": b"",
            }

    @requires_not_closed
    def size(self) -> int:
        with rbd_errors(f"error getting size for image {self.label}"):
            return self.handle.header.size_at(self.handle.snap_id)

    @requires_not_closed
    def get_name(self) -> str:
        with rbd_errors(f"error getting name for image {self.label}"):
            return name_by_id(self.handle.ctx, self.handle.id) or self.handle.name

    @requires_not_closed
    def id(self) -> str:
        return self.handle.id

    @requires_not_closed
    def block_name_prefix(self) -> str:
        return self.handle.header.object_prefix

    @requires_not_closed
    def data_pool_id(self) -> int:
        return self.handle.data_ctx.pool_id

    @requires_not_closed
    def old_format(self) -> bool:
        return False

    @requires_not_closed
    def features(self) -> int:
        with rbd_errors(f"error getting features for image {self.label}"):
            return self.handle.header.features

    @requires_not_closed
    def op_features(self) -> int:
        with rbd_errors(f"error getting op features for image {self.label}"):
            return self.handle.header.op_features

    @requires_not_closed
    def flags(self) -> int:
        with rbd_errors(f"error getting flags for image {self.label}"):
            return self.handle.header.flags_at(self.handle.snap_id)

    @requires_not_closed
    def update_features(self, features: int, enabled: bool) -> None:
        with rbd_errors(f"error updating features for image {self.label}"):
            update_features(self.handle, number(features), bool(enabled))

    @requires_not_closed
    def overlap(self) -> int:
        """Bytes of the parent seen through the image; 0 without one."""
        with rbd_errors(f"error getting overlap for image {self.label}"):
            return self.handle.header.overlap_at(self.handle.snap_id)

    @requires_not_closed
    def stripe_unit(self) -> int:
        return self.handle.header.layout.stripe_unit

    @requires_not_closed
    def stripe_count(self) -> int:
        return self.handle.header.layout.stripe_count

    @requires_not_closed
    def create_timestamp(self) -> datetime:
        with rbd_errors(f"error getting create timestamp for image: {self.label}"):
            return moment(cls.timestamp(self.handle.ctx, self.handle.oid, "create"))

    @requires_not_closed
    def access_timestamp(self) -> datetime:
        with rbd_errors(f"error getting access timestamp for image: {self.label}"):
            return moment(cls.timestamp(self.handle.ctx, self.handle.oid, "access"))

    @requires_not_closed
    def modify_timestamp(self) -> datetime:
        with rbd_errors(f"error getting modify timestamp for image: {self.label}"):
            return moment(cls.timestamp(self.handle.ctx, self.handle.oid, "modify"))

    @requires_not_closed
    def get_parent_image_spec(self) -> dict[str, Any]:
        """pool_name, pool_namespace, image_name, snap_name; also image_id and snap_namespace_type. ImageNotFound."""
        with rbd_errors(f"error getting parent info for image {self.label}"):
            return self._parent()

    @requires_not_closed
    def parent_info(self) -> tuple[str, str, str]:
        """Pool, image and snapshot name. ImageNotFound."""
        with rbd_errors(f"error getting parent info for image {self.label}"):
            parent = self._parent()
            return parent["pool_name"], parent["image_name"], parent["snap_name"]

    @requires_not_closed
    def parent_id(self) -> str:
        with rbd_errors(f"error getting parent info for image {self.label}"):
            return str(self._parent()["image_id"])

    def _parent(self) -> dict[str, Any]:
        handle = self.handle
        header = handle.header
        spec = header.clone_of  # of an image that migrates: what the migration goes around
        if not (spec.exists if header.migrates else header.overlap_at(handle.snap_id)):
            raise OSError(2, "the image has no parent")
        ctx = handle.store.open(spec.pool_id, spec.pool_namespace)
        snap = cls.read_snapshots(ctx, f"rbd_header.{spec.image_id}", [spec.snap_id])[0]
        return {
            "pool_name": next(row.name for row in handle.store.pools() if row.pool_id == spec.pool_id),
            "pool_namespace": spec.pool_namespace,
            "image_name": name_by_id(ctx, spec.image_id),
            "snap_name": snap.name,
            "image_id": spec.image_id,
            "snap_namespace_type": snap.namespace.type,
        }

    # --- data ------------------------------------------------------------------------------------------------------

    @requires_not_closed
    def read(self, offset: int, length: int, fadvise_flags: int = 0) -> bytes:
        """Short at the end of the image. InvalidArgument beyond it."""
        offset, length = number(offset), number(length, kind="size_t")
        with rbd_errors(f"error reading {self.label} {offset}~{length}"):
            return io.read(self.handle, offset, length)

    @requires_not_closed
    def write(self, data: bytes, offset: int, fadvise_flags: int = 0) -> int:
        """How many bytes. IncompleteWriteError at the end of the image, InvalidArgument beyond it, ReadOnlyImage."""
        if not isinstance(data, bytes):
            raise TypeError("data must be a byte string")
        offset = number(offset)
        with rbd_errors(f"error writing to {self.label}"):
            written = io.write(self.handle, offset, data)
        if written != len(data):
            raise exceptions.IncompleteWriteError(f"Wrote only {written} out of {len(data)} bytes")
        return written

    @requires_not_closed
    def discard(self, offset: int, length: int) -> None:
        offset, length = number(offset), number(length)
        with rbd_errors(f"error discarding region {offset}~{length}"):
            io.discard(self.handle, offset, length)

    @requires_not_closed
    def write_zeroes(self, offset: int, length: int, zero_flags: int = 0) -> None:
        offset, length = number(offset), number(length, kind="size_t")
        with rbd_errors(f"error zeroing region {offset}~{length}"):
            io.write_zeroes(self.handle, offset, length, thick=_thick(zero_flags))

    @requires_not_closed
    def compare_and_write(self, offset: int, compare: bytes, data: bytes, fadvise_flags: int = 0) -> int | None:
        """librbd's `rbd_compare_and_write`, which Ceph's module does not offer: None when written, otherwise the image
        offset of the first difference. InvalidArgument: lengths differ, or across a stripe unit."""
        if not isinstance(data, bytes) or not isinstance(compare, bytes):
            raise TypeError("data must be a byte string")
        offset = number(offset)
        with rbd_errors(f"error writing to {self.label}"):
            return io.compare_and_write(self.handle, offset, compare, data)

    @requires_not_closed
    def readv(self, buffers: Sequence[Any], offset: int) -> int:
        """librbd's `rbd_aio_readv`, which Ceph's module does not offer: one read into several writable buffers, as
        `os.preadv`. How many bytes; short at the end of the image."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        data = self.read(offset, sum(len(view) for view in views))
        at = 0
        for view in views:
            part = data[at : at + len(view)]
            view[: len(part)] = part
            at += len(part)
        return len(data)

    @requires_not_closed
    def writev(self, buffers: Sequence[Any], offset: int) -> int:
        """librbd's `rbd_aio_writev`, which Ceph's module does not offer: one write from several buffers, as
        `os.pwritev`. As `write`."""
        return self.write(b"".join(bytes(buffer) for buffer in buffers), offset)

    @requires_not_closed
    def writesame(self, offset: int, length: int, data: bytes, fadvise_flags: int = 0) -> int:
        """librbd's `rbd_writesame`, which Ceph's module does not offer: fills a range with repetitions of `data`. How
        many bytes. InvalidArgument: `length` is no multiple of its length, or beyond the image."""
        if not isinstance(data, bytes):
            raise TypeError("data must be a byte string")
        offset, length = number(offset), number(length, kind="size_t")
        with rbd_errors(f"error writing to {self.label}"):
            return io.write_same(self.handle, offset, length, data)

    @requires_not_closed
    def flush(self) -> None:
        with rbd_errors("error flushing image"):
            io.flush(self.handle)

    @requires_not_closed
    def invalidate_cache(self) -> None:
        """There is no cache to drop."""

    @requires_not_closed
    def resize(self, size: int, allow_shrink: bool = True, on_progress: OnProgress = None) -> None:
        size = number(size)
        old = self.size()
        if not allow_shrink and old > size:
            raise exceptions.InvalidArgument("error allow_shrink is False but old_size > new_size")
        with rbd_errors(f"error resizing image {self.label}"):
            resize(self.handle, size, progress=on_progress)

    @requires_not_closed
    def flatten(self, on_progress: OnProgress = None) -> None:
        with rbd_errors(f"error flattening {self.label}"):
            flatten(self.handle, on_progress)

    @requires_not_closed
    def sparsify(self, sparse_size: int) -> None:
        with rbd_errors(f"error sparsifying {self.label}"):
            sparsify(self.handle, number(sparse_size))

    @requires_not_closed
    def rebuild_object_map(self, on_progress: OnProgress = None) -> None:
        with rbd_errors(f"error rebuilding object map {self.label}"):
            rebuild(self.handle, on_progress)

    @requires_not_closed
    def copy(
        self,
        dest_ioctx: Any,
        dest_name: str | bytes,
        features: int | None = None,
        order: int | None = None,
        stripe_unit: int | None = None,
        stripe_count: int | None = None,
        data_pool: str | bytes | None = None,
        on_progress: OnProgress = None,
    ) -> None:
        name = text(dest_name, "dest_name")
        chosen = options(order, features, stripe_unit, stripe_count, data_pool)
        with rbd_errors(f"error copying image {self.label} to {name.encode()!r}"):
            copy(self.handle, context(dest_ioctx), name, chosen, on_progress)

    @requires_not_closed
    def deep_copy(
        self,
        dest_ioctx: Any,
        dest_name: str | bytes,
        features: int | None = None,
        order: int | None = None,
        stripe_unit: int | None = None,
        stripe_count: int | None = None,
        data_pool: str | bytes | None = None,
        on_progress: OnProgress = None,
    ) -> None:
        name = text(dest_name, "dest_name")
        chosen = options(order, features, stripe_unit, stripe_count, data_pool)
        with rbd_errors(f"error copying image {self.label} to {name.encode()!r}"):
            deep_copy(self.handle, context(dest_ioctx), name, chosen, progress=on_progress)

    @requires_not_closed
    def diff_iterate(
        self,
        offset: int,
        length: int,
        from_snapshot: str | bytes | int | None,
        iterate_cb: Any,
        include_parent: bool = True,
        whole_object: bool = False,
    ) -> None:
        """Calls iterate_cb(offset, length, exists) for what changed since the snapshot (its name or, as in newer
        releases, its id); None: for what there is.

        What the callback raises ends it and is raised; so does a negative result (IOError).
        """
        offset, length = number(offset), number(length)
        start: str | int | None
        if from_snapshot is None or isinstance(from_snapshot, int):
            start = from_snapshot
        else:
            start = text(from_snapshot, "from_snapshot")
        raised: list[BaseException] = []

        def found(at: int, size: int, data: bool) -> int:
            try:
                result = iterate_cb(at, size, data)
            except BaseException as failure:
                raised.append(failure)
                return -5
            return -5 if isinstance(result, int) and result < 0 else 0

        try:
            with rbd_errors(f"error generating diff from snapshot {from_snapshot!r}"):
                diff_iterate(
                    self.handle, offset, length, start, found, include_parent=include_parent, whole_object=whole_object
                )
        except exceptions.Error:
            if raised:
                raise raised[0] from None
            raise


def _thick(zero_flags: int) -> bool:
    """InvalidArgument (EINVAL) for unknown flags."""
    flags = number(zero_flags)
    if flags & ~RBD_WRITE_ZEROES_FLAG_THICK_PROVISION:
        raise OSError(22, f"unknown flags {flags:#x}")
    return bool(flags)


def options(
    order: int | None,
    features: int | None,
    stripe_unit: int | None,
    stripe_count: int | None,
    data_pool: str | bytes | None,
) -> CreateOptions:
    if order is not None and number(order if order > 0 else 0) != order:
        raise exceptions.ArgumentOutOfRange(f"object order {order}", 33)
    return CreateOptions(
        order=None if order is None else number(order),
        features=None if features is None else number(features),
        stripe_unit=None if stripe_unit is None else number(stripe_unit),
        stripe_count=None if stripe_count is None else number(stripe_count),
        data_pool=None if data_pool is None else text(data_pool, "data_pool"),
    )

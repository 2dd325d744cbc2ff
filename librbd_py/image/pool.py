"""What RBD keeps per pool: namespaces, metadata, totals."""

from __future__ import annotations

import errno
import json
import os

from librbd_py.format import names
from librbd_py.format.group import GROUP_DIRECTORY
from librbd_py.format.trash import SOURCE_REMOVING
from librbd_py.format.values import dataclass
from librbd_py.store.api import ObjectContext, OmapSet, Read, Write, WriteFull
from librbd_py.store.rados import RadosStore

from . import cls
from .cls import call, text, u8
from .group import groups, remove_group
from .header import header_oid, load
from .metadata import CONFIG_PREFIX
from .objects import exists, ignoring, remove
from .options import OPTIONS, require

VALIDATED = b"overwrite validated"
_PROBE = b"validate"


def init(ctx: ObjectContext, *, force: bool = False) -> None:
    """Marks the pool as one for RBD."""
    if not exists(ctx, names.INFO):
        ctx.write(names.INFO, [WriteFull(VALIDATED)])


def validate(ctx: ObjectContext) -> None:
    """Refuses a pool that cannot hold data objects: EINVAL when its objects cannot be overwritten (erasure coding
    without that flag) or it has snapshots of its own. Looks once a pool, and leaves what librbd leaves. A user who may
    not look is believed."""
    default = ctx.store.open(ctx.pool_id)
    with ignoring(errno.EPERM):
        try:
            if default.read(names.INFO, [Read()])[0] == VALIDATED:
                return
        except FileNotFoundError:
            pass
        snap_id = default.snap_create()
        try:
            default.write(names.INFO, [WriteFull(_PROBE)])
            _overwrite(default)
        finally:
            default.snap_remove(snap_id)


def _overwrite(ctx: ObjectContext) -> None:
    try:
        ctx.write(names.INFO, [Write(0, VALIDATED)])
    except OSError as failure:
        if failure.errno != errno.EOPNOTSUPP:
            raise
        raise OSError(errno.EINVAL, f"objects of pool {ctx.pool_id} cannot be overwritten") from None


def namespace_create(ctx: ObjectContext, name: str) -> None:
    """EINVAL: no name; EEXIST."""
    if not name:
        raise OSError(errno.EINVAL, "a namespace needs a name")
    default = ctx.store.open(ctx.pool_id)
    default.write(names.NAMESPACES, [call("namespace_add", text(name))])
    inside = ctx.store.open(ctx.pool_id, name)
    inside.write(names.DIRECTORY, [call("dir_state_set", u8(0))])


def namespace_remove(ctx: ObjectContext, name: str) -> None:
    """ENOENT; EBUSY: there are images or trash in it."""
    if not name:
        raise OSError(errno.EINVAL, "a namespace needs a name")
    if name not in namespaces(ctx):
        raise OSError(errno.ENOENT, f"no namespace {name!r}")
    default = ctx.store.open(ctx.pool_id)
    inside = ctx.store.open(ctx.pool_id, name)
    if cls.trash_list(inside):
        raise OSError(errno.EBUSY, f"namespace {name!r} has images in the trash")
    with ignoring(errno.ENOENT):
        inside.write(names.DIRECTORY, [call("dir_state_set", u8(1))])
    remove(inside, names.DIRECTORY)
    for group in groups(inside):
        remove_group(inside, group)  # none of them has members
    for oid in (names.TRASH, names.CHILDREN, names.INFO, GROUP_DIRECTORY):
        remove(inside, oid)
    default.write(names.NAMESPACES, [call("namespace_remove", text(name))])


def namespaces(ctx: ObjectContext) -> list[str]:
    return cls.list_namespaces(ctx.store.open(ctx.pool_id))


def metadata(ctx: ObjectContext) -> dict[str, str]:
    try:
        return {key: value.decode(errors="surrogateescape") for key, value in cls.metadata(ctx, names.INFO).items()}
    except OSError as failure:
        if failure.errno == errno.ENOENT:
            return {}
        raise


def metadata_set(ctx: ObjectContext, key: str, value: bytes) -> None:
    """EINVAL: a `conf_` key that is no option a pool may have, or not with this value."""
    if key.startswith(CONFIG_PREFIX):
        require(key.removeprefix(CONFIG_PREFIX), value.decode(errors="surrogateescape"), OPTIONS)
    if not exists(ctx, names.INFO):
        ctx.write(names.INFO, [OmapSet({})])
    ctx.exec(names.INFO, "rbd", "metadata_set", cls.encode_metadata({key: value}))


def metadata_get(ctx: ObjectContext, key: str) -> str:
    """ENOENT."""
    return cls.metadata_value(ctx, names.INFO, key).decode(errors="surrogateescape")


def metadata_remove(ctx: ObjectContext, key: str) -> None:
    """ENOENT."""
    cls.metadata_value(ctx, names.INFO, key)
    ctx.exec(names.INFO, "rbd", "metadata_remove", text(key))


@dataclass
class Totals:
    images: int = 0
    provisioned: int = 0  # bytes of HEAD
    max_provisioned: int = 0  # bytes of HEAD or the largest snapshot
    snapshots: int = 0

    def add(self, ctx: ObjectContext, image_id: str) -> None:
        self.images += 1
        if not exists(ctx, header_oid(image_id)):
            return
        header = load(ctx, image_id, read_only=True)
        self.provisioned += header.size
        self.max_provisioned += max([header.size, *(snap.size for snap in header.snaps.values())])
        self.snapshots += len(header.snaps)


def totals(ctx: ObjectContext) -> tuple[Totals, Totals]:
    """Of the images, those whose removal began and has not ended among them, and of the trash."""
    images, trash = Totals(), Totals()
    for image_id in cls.list_images(ctx).values():
        images.add(ctx, image_id)
    for image_id, spec in cls.trash_list(ctx).items():
        (images if spec.source == SOURCE_REMOVING else trash).add(ctx, image_id)
    return images, trash


def usage(ctx: ObjectContext) -> tuple[int, int]:
    """Bytes that the pool uses, and all there could be in it, as far as the store knows; (0, 0): it does not."""
    store = ctx.store
    if isinstance(store, RadosStore):
        for row in json.loads(store.mon_command({"prefix": "df", "format": "json"}))["pools"]:
            if row["id"] == ctx.pool_id:
                used = int(row["stats"]["bytes_used"])
                return used, used + int(row["stats"]["max_avail"])
        return 0, 0
    folder = getattr(store, "path", None)
    if folder is None:
        return 0, 0
    disk = os.statvfs(folder)
    used = store.pool_stats(ctx.pool_id).num_bytes
    return used, used + disk.f_bavail * disk.f_frsize

"""Which two images a migration is between, and what their headers say of it."""

from __future__ import annotations

import errno
import json

from librbd_py.format import header as fh
from librbd_py.format import trash as ftr
from librbd_py.format.header import MIGRATION_DESTINATION, MIGRATION_SOURCE, MigrationSpec
from librbd_py.format.values import dataclass
from librbd_py.store.api import ObjectContext

from .. import cls
from ..cls import text, u8
from ..handle import announce
from ..header import header_oid, image_id_of
from ..objects import ignoring


@dataclass(frozen=True)
class Side:
    """One of the two images. `spec`: what its header says; None: it has no header (any more), or says nothing."""

    ctx: ObjectContext
    name: str
    id: str
    spec: MigrationSpec | None

    @property
    def oid(self) -> str:
        return header_oid(self.id)


@dataclass(frozen=True)
class Pair:
    source: Side | None  # None: it is no image of this store, or gone
    dest: Side
    spec: MigrationSpec  # what decides: the destination's, or where there is none yet, the source's

    @property
    def state(self) -> int:
        return self.spec.state


@dataclass(frozen=True)
class Status:
    source_pool_id: int
    source_pool_namespace: str
    source_image_name: str
    source_image_id: str
    dest_pool_id: int
    dest_pool_namespace: str
    dest_image_name: str
    dest_image_id: str
    state: int
    state_description: str


def record(ctx: ObjectContext, image_id: str) -> MigrationSpec | None:
    """None: there is no such image, or it does not migrate."""
    with ignoring(errno.EINVAL, errno.ENOENT):
        return cls.migration(ctx, header_oid(image_id))
    return None


def find(ctx: ObjectContext, name: str) -> Pair:
    """The migration that the image `name` is the source or the destination of. ENOENT: no such image, in the trash
    neither; EINVAL: it does not migrate."""
    try:
        image_id = image_id_of(ctx, name)
    except OSError as failure:
        if failure.errno != errno.ENOENT:
            raise
        image_id = _in_trash(ctx, name)
    spec = cls.migration(ctx, header_oid(image_id))
    this = Side(ctx, name, image_id, spec)
    if spec.header_type == MIGRATION_SOURCE:
        dest = _other(spec, ctx)
        # Until the destination has a record, the source's says how far it is.
        return Pair(this, dest, dest.spec or spec)
    if spec.header_type != MIGRATION_DESTINATION:
        raise OSError(errno.EINVAL, f"image {name} has a migration of unknown kind {spec.header_type}")
    if spec.source_spec:
        return Pair(None, this, spec)
    source = _other(spec, ctx)
    return Pair(source if source.spec is not None else None, this, spec)


def _in_trash(ctx: ObjectContext, name: str) -> str:
    for image_id, entry in cls.trash_list(ctx).items():
        if entry.source == ftr.SOURCE_MIGRATION and entry.name == name and record(ctx, image_id) is not None:
            return image_id
    raise OSError(errno.ENOENT, f"no image named {name!r}, nor a migration's source in the trash")


def _other(spec: MigrationSpec, ctx: ObjectContext) -> Side:
    there = ctx.store.open(spec.pool_id, spec.pool_namespace)
    return Side(there, spec.image_name, spec.image_id, record(there, spec.image_id))


def set_record(side: Side, spec: MigrationSpec) -> None:
    """EEXIST: it migrates already."""
    side.ctx.exec(side.oid, "rbd", "migration_set", spec.encode())


def set_state(side: Side, state: int, description: str = "") -> None:
    side.ctx.exec(side.oid, "rbd", "migration_set_state", u8(state) + text(description))


def set_both(pair: Pair, state: int, description: str = "") -> None:
    """The source first, as librbd."""
    if pair.source is not None and pair.source.spec is not None:
        set_state(pair.source, state, description)
    set_state(pair.dest, state, description)


def forget(side: Side) -> None:
    with ignoring(errno.ENOENT):
        side.ctx.exec(side.oid, "rbd", "migration_remove")
        announce(side.ctx, side.oid)


def status(ctx: ObjectContext, name: str) -> Status:
    """What `find` raises."""
    pair = find(ctx, name)
    dest, spec = pair.dest, pair.spec
    if pair.dest.spec is None and pair.source is not None:
        source = (pair.source.ctx.pool_id, pair.source.ctx.namespace, pair.source.name, pair.source.id)
    else:
        source = (spec.pool_id, spec.pool_namespace, spec.image_name, spec.image_id)
    known = fh.MIGRATION_ERROR <= spec.state <= fh.MIGRATION_EXECUTED
    where = (dest.ctx.pool_id, dest.ctx.namespace, dest.name, dest.id)
    return Status(*source, *where, spec.state if known else -1, spec.state_description)


def source_spec(ctx: ObjectContext, image_id: str) -> str:
    """What an image migrates from, as JSON in Ceph's form. EINVAL: it does not migrate."""
    spec = cls.migration(ctx, header_oid(image_id))
    if spec.source_spec:
        return spec.source_spec
    rows: dict[str, object] = {"type": "native", "pool_id": spec.pool_id, "pool_namespace": spec.pool_namespace}
    rows["image_name"] = spec.image_name
    if spec.image_id:
        rows["image_id"] = spec.image_id
    return json.dumps(rows, separators=(",", ":"))

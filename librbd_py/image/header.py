"""An image's header as values: loading it, its snapshots and its chain of parents.

`load` is one atomic read of `rbd_header.<id>`, as librbd does it, and a second one for the snapshots; when a snapshot
disappears between the two, it starts again.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from librbd_py.format import features as ft
from librbd_py.format import names
from librbd_py.format.header import (
    MIGRATION_ABORTING,
    MIGRATION_DESTINATION,
    MIGRATION_EXECUTED,
    MIGRATION_EXECUTING,
    MIGRATION_PREPARED,
    MIGRATION_PREPARING,
    MigrationSpec,
    ParentImageSpec,
)
from librbd_py.format.values import dataclass, replace
from librbd_py.store.api import NOSNAP, ObjectContext, SnapContext

from . import cls
from .cls import Snapshot
from .feature_names import SUPPORTED
from .layout import Layout
from .objects import exists

MAX_PARENTS = 64  # depth of a clone chain; deeper is refused (ELOOP)
NOBODY = ParentImageSpec()
ATTEMPTS = 16  # of a load that raced with the removal of a snapshot


header_oid = names.header
id_oid = names.id_object
map_oid = names.object_map


@dataclass(frozen=True)
class Header:
    id: str
    order: int
    object_prefix: str
    data_pool_id: int  # -1: the header's pool
    layout: Layout
    size: int  # bytes, of HEAD
    features: int
    incompatible: int  # features one must know to open it in the mode asked for
    op_features: int
    flags: int
    snapc: SnapContext
    snaps: Mapping[int, Snapshot]  # by id, ascending
    parent: ParentImageSpec  # what shows through where objects are absent; a null spec when there is none
    parent_overlap: int | None  # of HEAD; None: HEAD needs no parent
    version: int = 0  # of the header object when the reading began
    clone_of: ParentImageSpec = NOBODY  # as its header says; `parent` is another one while it migrates
    migration: MigrationSpec | None = None  # of an image whose migration is under way
    migrates: bool = False  # absent objects are the migration's source's

    def has(self, feature: int) -> bool:
        return bool(self.features & feature)

    def snap_named(self, name: str, kind: int | None = None) -> Snapshot | None:
        """By name; only in this namespace when `kind` is given."""
        for snap in self.snaps.values():
            if snap.name == name and kind in (None, snap.namespace.type):
                return snap
        return None

    def size_at(self, snap_id: int) -> int:
        return self.size if snap_id == NOSNAP else self.snaps[snap_id].size

    def flags_at(self, snap_id: int) -> int:
        return self.flags if snap_id == NOSNAP else self.snaps[snap_id].flags

    @property
    def head_has_parent(self) -> bool:
        """HEAD is tied to a parent, be it by no byte any more (after a shrink)."""
        return (self.parent.exists or self.migrates) and self.parent_overlap is not None

    @property
    def imports(self) -> bool:
        """It migrates from what is no image of this store: nothing is its parent."""
        return self.migrates and self.migration is not None and bool(self.migration.source_spec)

    def parent_at(self, snap_id: int) -> ParentImageSpec:
        """What shows through at a snapshot or HEAD."""
        if self.migrates and self.migration is not None:
            for here, there in self.migration.snap_seqs.items():
                if there == snap_id:
                    return replace(self.parent, snap_id=here)
        return self.parent

    def overlap_at(self, snap_id: int) -> int:
        """Bytes of the parent seen at this snapshot or HEAD; 0 when none."""
        if not self.parent.exists and not self.migrates:
            return 0
        overlap = self.parent_overlap if snap_id == NOSNAP else self.snaps[snap_id].parent_overlap
        return overlap or 0


def load(ctx: ObjectContext, image_id: str, *, read_only: bool, alone: bool = False) -> Header:
    """While an image migrates, what it migrates from is its parent, at HEAD, but not when `alone`.

    ENOENT: no such image. ENOSYS: it uses a feature this library does not know. EINVAL, EBADMSG: damaged."""
    oid = header_oid(image_id)
    for _ in range(ATTEMPTS):
        base = cls.read_header(ctx, oid, read_only)
        if base.order not in range(12, 26):
            raise OSError(errno.EINVAL, f"image {image_id}: object order {base.order} is not 12 to 25")
        unknown = base.incompatible & ~SUPPORTED
        if unknown:
            lacking = [*sorted(ft.names(unknown & ft.ALL)), *([hex(unknown & ~ft.ALL)] if unknown & ~ft.ALL else [])]
            raise OSError(errno.ENOSYS, f"image {image_id} uses features this library lacks: {', '.join(lacking)}")
        op_features = cls.op_features(ctx, oid) if base.features & ft.OPERATIONS else 0
        unit, count = 1 << base.order, 1
        if base.features & ft.STRIPINGV2:
            unit, count = cls.stripe(ctx, oid)
            if not unit or not 0 < count < 1 << 32 or (1 << base.order) % unit:
                raise OSError(errno.EINVAL, f"image {image_id}: impossible striping, {count} units of {unit} bytes")
        try:
            missing = [snap_id for snap_id in base.snapc.ids if snap_id not in base.snaps]
            more = {snap.id: snap for snap in cls.read_snapshots(ctx, oid, missing)}
        except OSError as failure:
            if failure.errno != errno.ENOENT:
                raise
            ctx.stat(oid)
            continue
        header = Header(
            id=image_id,
            order=base.order,
            object_prefix=base.object_prefix,
            data_pool_id=base.data_pool_id,
            layout=Layout(base.order, unit, count),
            size=base.size,
            features=base.features,
            incompatible=base.incompatible,
            op_features=op_features,
            flags=base.flags,
            snapc=base.snapc,
            snaps={number: more.get(number) or base.snaps[number] for number in sorted(base.snapc.ids)},
            parent=base.parent,
            parent_overlap=base.parent_overlap,
            version=base.version,
            clone_of=base.parent,
        )
        if not base.features & ft.MIGRATING:
            return header
        try:
            spec = cls.migration(ctx, oid)
        except OSError as failure:
            if failure.errno not in (errno.EINVAL, errno.ENOENT):
                raise
            ctx.stat(oid)
            continue  # it has just ended
        return replace(header, migration=spec) if alone else _migrating(header, spec)
    raise OSError(errno.EAGAIN, f"image {image_id}: its snapshots change faster than they can be read")


def _migrating(header: Header, spec: MigrationSpec) -> Header:
    """The source shows through wherever the destination has no object yet: its HEAD under HEAD and newer snapshots, its
    snapshot under one that was made from it."""
    header = replace(header, migration=spec)
    shows = spec.header_type == MIGRATION_DESTINATION and spec.state in (MIGRATION_PREPARED, MIGRATION_EXECUTING)
    if not shows:
        return header
    before = set(spec.snap_seqs.values())
    snaps = {
        number: replace(snap, parent_overlap=snap.size if number in before else min(snap.size, spec.overlap))
        for number, snap in header.snaps.items()
    }
    source = ParentImageSpec(spec.pool_id, spec.pool_namespace, spec.image_id, NOSNAP)
    overlap = min(header.size, spec.overlap)
    return replace(header, snaps=snaps, parent=source, parent_overlap=overlap, migrates=True)


def require_migrated_to(spec: MigrationSpec) -> None:
    """EROFS: the image of this record may not be written to, as librbd has it. EBADMSG: an impossible state."""
    if spec.header_type != MIGRATION_DESTINATION:
        raise OSError(errno.EROFS, f"the image migrates to {spec.image_name}")
    if spec.state in (MIGRATION_PREPARING, MIGRATION_ABORTING):
        raise OSError(errno.EROFS, "the image's migration is being prepared or aborted")
    if spec.state not in (MIGRATION_PREPARED, MIGRATION_EXECUTING, MIGRATION_EXECUTED):
        raise OSError(errno.EBADMSG, f"the image's migration is in state {spec.state}")


def image_id_of(ctx: ObjectContext, name: str) -> str:
    """ENOENT: no image of that name. EOPNOTSUPP: it has format 1."""
    try:
        return cls.get_id(ctx, id_oid(name))
    except OSError as failure:
        if failure.errno == errno.ENOENT and exists(ctx, names.old_header(name)):
            said = f"image {name} has format 1: copy it to one of format 2 with Ceph's rbd, which `rbd cp` does"
            raise OSError(errno.EOPNOTSUPP, said) from None
        raise

"""The header of an image, rewritten for another store.

Everything in the header's omap goes along as it is, known to us or not, except what means something else there:

* ids of snapshots: they are given by the pool. In the keys and records of snapshots, and in `snap_seq`;
* numbers of pools: in `data_pool_id`, in `object_prefix` (which holds the header's pool when data has its own), in the
  parent's record, whose snapshot id is the other store's too;
* children: recorded when the child comes, by attaching it. Snapshots start with none, and the operation feature that
  says there are some is not set.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from librbd_py.format import features as ft
from librbd_py.format import header as fh
from librbd_py.format import names
from librbd_py.format.encoding import Decoder, Encoder, decode_string, decode_u64, encode_string, encode_u64
from librbd_py.format.values import dataclass, replace
from librbd_py.store.api import ObjectContext, OmapCmp, OmapGetVals, OmapSet

from .layout import Layout

MARK, COPYING, WHOLE = fh.COPY_KEY, fh.COPYING, fh.COPIED
ATTEMPTS = 16  # of an exchange of rows that lost a race
_DERIVED = (fh.SNAP_PREFIX, fh.SNAP_CHILDREN_PREFIX)
_MINE = (b"snap_seq", b"features", b"op_features", b"object_prefix", b"data_pool_id", b"parent", MARK)


def omap(ctx: ObjectContext, oid: str) -> dict[bytes, bytes]:
    """All of it. ENOENT."""
    rows: dict[bytes, bytes] = {}
    more, after = True, b""
    while more:
        page, more = ctx.read(oid, [OmapGetVals(start_after=after)])[0]
        rows.update(page)
        after = max(page, default=after)
        more = more and bool(page)
    return rows


@dataclass(frozen=True)
class HeaderRows:
    """A header's omap, read once."""

    rows: Mapping[bytes, bytes]

    @property
    def features(self) -> int:
        """Without what follows from op_features."""
        return decode_u64(Decoder(self.rows[b"features"])) & ~ft.OPERATIONS

    @property
    def op_features(self) -> int:
        """Those that do not follow from children."""
        raw = self.rows.get(b"op_features")
        return 0 if raw is None else decode_u64(Decoder(raw)) & ~ft.OP_CLONE_PARENT

    @property
    def order(self) -> int:
        return self.rows[b"order"][0]

    @property
    def size(self) -> int:
        return decode_u64(Decoder(self.rows[b"size"]))

    @property
    def objects(self) -> int:
        """How many data objects HEAD or a snapshot can have."""
        unit, count = 1 << self.order, 1
        if self.features & ft.STRIPINGV2:
            unit, count = (decode_u64(Decoder(self.rows[key])) for key in (b"stripe_unit", b"stripe_count"))
        layout = Layout(self.order, unit, count)
        return max(layout.objects(size) for size in (self.size, *(snap.image_size for snap in self.snaps)))

    @property
    def maps_are_right(self) -> bool:
        """Whether HEAD and each snapshot have an object map that is not marked invalid."""
        raw = self.rows.get(b"flags")
        flags = 0 if raw is None else decode_u64(Decoder(raw))
        for snap in self.snaps:
            flags |= snap.flags
        return bool(self.features & ft.OBJECT_MAP) and not flags & ft.FLAG_OBJECT_MAP_INVALID

    @property
    def prefix(self) -> str:
        return decode_string(Decoder(self.rows[b"object_prefix"]))

    @property
    def data_pool_id(self) -> int:
        raw = self.rows.get(b"data_pool_id")
        return -1 if raw is None else Decoder(raw).s64()

    @property
    def parent(self) -> fh.Parent:
        raw = self.rows.get(b"parent")
        return fh.Parent() if raw is None else fh.Parent.decode(raw)

    @property
    def snaps(self) -> list[fh.Snap]:
        """By ascending id."""
        raw = [value for key, value in self.rows.items() if key.startswith(fh.SNAP_PREFIX)]
        return sorted((fh.Snap.decode(value) for value in raw), key=lambda snap: snap.id)

    def check(self, what: str) -> None:
        """ENOTSUP for what means nothing, or something else, in another store."""
        bad = self.features & (ft.JOURNALING | ft.MIGRATING | ft.NON_PRIMARY | ft.DIRTY_CACHE)
        if bad:
            raise OSError(errno.ENOTSUP, f"{what} cannot be copied with {', '.join(ft.names(bad))}")
        if self.op_features & ft.OP_GROUP or any(key.startswith(b"image_group") for key in self.rows):
            raise OSError(errno.ENOTSUP, f"{what} belongs to a group: take it out of the group first")
        for snap in self.snaps:
            if not isinstance(snap.namespace, (fh.UserNamespace, fh.TrashNamespace)):
                raise OSError(errno.ENOTSUP, f"{what} has a snapshot of a group or of mirroring: {snap.name}")

    def rewritten(
        self, snaps: Mapping[int, int], parent: fh.ParentImageSpec | None, prefix: str, data_pool_id: int
    ) -> dict[bytes, bytes]:
        """The omap for the destination. `snaps`: ids of snapshots here -> there; `parent`: there."""
        kept = {key: value for key, value in self.rows.items() if not key.startswith(_DERIVED) and key not in _MINE}
        kept[b"snap_seq"] = encode_u64(max(snaps.values(), default=0))
        kept[b"object_prefix"] = encode_string(prefix)
        kept[b"features"] = encode_u64(self.features | (ft.OPERATIONS if self.op_features else 0))
        if self.op_features:
            kept[b"op_features"] = encode_u64(self.op_features)
        if data_pool_id != -1:
            kept[b"data_pool_id"] = Encoder().s64(data_pool_id).done()
        if parent is not None:
            kept[b"parent"] = fh.Parent(parent, self.parent.head_overlap).encode()
        for snap in self.snaps:
            there = snaps[snap.id]
            kept[fh.snap_key(there)] = replace(snap, id=there, child_count=0).encode()
        return kept


def place(image_id: str, pool_id: int, data_pool_id: int) -> str:
    """The prefix of the data objects."""
    return names.data_prefix(image_id, None if data_pool_id == -1 else pool_id)


def add_child_of_trash(ctx: ObjectContext, oid: str, snap_id: int, child: fh.ChildImageSpec) -> None:
    """Records a child under a snapshot that is in the trash, which the class method refuses: the rows are exchanged if
    nobody else changed them. ENOENT: no such snapshot. EAGAIN: others change the header all the time."""
    snap_key, children_key = fh.snap_key(snap_id), fh.snap_children_key(snap_id)
    for _ in range(ATTEMPTS):
        rows = omap(ctx, oid)
        if snap_key not in rows:
            raise OSError(errno.ENOENT, f"{oid} has no snapshot {snap_id}")
        children = fh.decode_children(rows[children_key]) if children_key in rows else frozenset()
        children |= {child}
        header = HeaderRows(rows)
        fresh = {
            snap_key: replace(fh.Snap.decode(rows[snap_key]), child_count=len(children)).encode(),
            children_key: fh.encode_children(children),
            b"op_features": encode_u64(header.op_features | ft.OP_CLONE_PARENT),
            b"features": encode_u64(header.features | ft.OPERATIONS),
        }
        try:
            ctx.write(oid, [OmapCmp({key: (rows.get(key, b""), "eq") for key in fresh}), OmapSet(fresh)])
            return
        except OSError as failure:
            if failure.errno != errno.ECANCELED:
                raise
    raise OSError(errno.EAGAIN, f"{oid} is changed by others all the time")

"""Class `rbd`, clones: the parent of an image, the children of its snapshots, the registry of clones v1."""

from __future__ import annotations

import errno

from librbd_py.format import features as bits
from librbd_py.format import header
from librbd_py.format.encoding import Decoder, Encoder, decode_string
from librbd_py.format.header import NOSNAP, ChildImageSpec, Parent, ParentImageSpec, TrashNamespace
from librbd_py.format.values import replace

from .context import Context, stored
from .rbd_common import (
    check_exists,
    invalid,
    need_feature,
    read_parent,
    read_snap,
    read_u64,
    set_op_features,
    snaps,
    write_snap,
    write_value,
)
from .registry import method


def has_layering(context: Context) -> bool:
    try:
        need_feature(context, bits.LAYERING)
    except OSError as e:
        if e.errno == errno.ENOEXEC:
            return False
        raise
    return True


@method("rbd", "parent_get", writes=False)
def parent_get(context: Context, data: bytes) -> bytes:
    check_exists(context)
    out = Encoder()
    read_parent(context).spec.encode(out)
    return out.done()


@method("rbd", "parent_overlap_get", writes=False)
def parent_overlap_get(context: Context, data: bytes) -> bytes:
    snap_id = Decoder(data).u64()
    check_exists(context)
    overlap: int | None = None
    if not has_layering(context):
        pass
    elif snap_id == NOSNAP:
        parent = read_parent(context)
        overlap = parent.head_overlap if parent.exists else None
    else:
        overlap = read_snap(context, snap_id).parent_overlap
    return Encoder().optional(overlap, Encoder.u64).done()


def _attach(context: Context, spec: ParentImageSpec, overlap: int, reattach: bool) -> None:
    check_exists(context)
    need_feature(context, bits.LAYERING)
    if not spec.exists or not overlap:
        raise invalid(f"{spec} with an overlap of {overlap} bytes is no parent")
    held = read_parent(context)
    if held.exists and not (
        reattach and held.spec == replace(spec, snap_id=held.spec.snap_id) and held.head_overlap == overlap
    ):
        raise OSError(errno.EEXIST, "the image has a parent")
    overlap = min(overlap, read_u64(context, b"size"))
    write_value(context, b"parent", Parent(spec, overlap).encode())


def _detach(context: Context, legacy: bool = False) -> None:
    check_exists(context)
    need_feature(context, bits.LAYERING)
    parent = read_parent(context)
    if not parent.exists or parent.head_overlap is None:
        raise OSError(errno.ENOENT, "the image has no parent")
    if legacy and parent.spec.pool_namespace:
        raise OSError(errno.EXDEV, "the parent is in a namespace")
    features = read_u64(context, b"features")
    children = [snap for snap in snaps(context) if snap.parent_overlap is not None]
    if features & bits.DEEP_FLATTEN:
        for snap in children:
            write_snap(context, replace(snap, parent_overlap=None))
        children = []
    if children:
        write_value(context, b"parent", replace(parent, head_overlap=None).encode())
    else:
        context.omap_remove([b"parent"])
        set_op_features(context, 0, bits.OP_CLONE_CHILD)


@method("rbd", "parent_attach", writes=True)
def parent_attach(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    spec, overlap = ParentImageSpec.decode(source), source.u64()
    reattach = False if source.at_end else source.bool()
    _attach(context, spec, overlap, reattach)
    return b""


@method("rbd", "parent_detach", writes=True)
def parent_detach(context: Context, data: bytes) -> bytes:
    _detach(context)
    return b""


@method("rbd", "get_parent", writes=False)
def get_parent(context: Context, data: bytes) -> bytes:
    """Before Nautilus."""
    snap_id = Decoder(data).u64()
    check_exists(context)
    parent = read_parent(context) if has_layering(context) else Parent()
    if parent.exists and snap_id != NOSNAP:
        try:
            overlap = read_snap(context, snap_id).parent_overlap
        except OSError as e:
            if e.errno != errno.ENOENT:
                raise
            overlap = None
        parent = replace(parent, head_overlap=overlap)
    if parent.exists and parent.spec.pool_namespace:
        raise OSError(errno.EXDEV, "the parent is in a namespace")
    if not parent.exists or parent.head_overlap is None:
        parent = Parent()
    spec = parent.spec
    return Encoder().s64(spec.pool_id).string(spec.image_id).u64(spec.snap_id).u64(parent.head_overlap or 0).done()


@method("rbd", "set_parent", writes=True)
def set_parent(context: Context, data: bytes) -> bytes:
    """Before Nautilus."""
    source = Decoder(data)
    pool, image, snap = source.s64(), source.string(), source.u64()
    _attach(context, ParentImageSpec(pool, "", image, snap), source.u64(), False)
    return b""


@method("rbd", "remove_parent", writes=True)
def remove_parent(context: Context, data: bytes) -> bytes:
    """Before Nautilus."""
    _detach(context, legacy=True)
    return b""


# --- clones v2: children in the parent's header


def _read_children(context: Context, snap_id: int) -> frozenset[ChildImageSpec]:
    """ENOENT when there are none."""
    return stored(header.decode_children, context.omap_get(header.snap_children_key(snap_id)))


def _child_request(data: bytes) -> tuple[int, ChildImageSpec]:
    source = Decoder(data)
    snap_id = source.u64()
    return snap_id, ChildImageSpec.decode(source)


@method("rbd", "child_attach", writes=True)
def child_attach(context: Context, data: bytes) -> bytes:
    snap_id, child = _child_request(data)
    snap = read_snap(context, snap_id)
    if isinstance(snap.namespace, TrashNamespace):
        raise OSError(errno.ENOENT, "the snapshot is in the trash")
    try:
        children = _read_children(context, snap_id)
    except OSError as e:
        if e.errno != errno.ENOENT:
            raise
        children = frozenset()
    if child in children:
        raise OSError(errno.EEXIST, f"{child} is attached already")
    write_value(context, header.snap_children_key(snap_id), header.encode_children(children | {child}))
    write_snap(context, replace(snap, child_count=snap.child_count + 1))
    set_op_features(context, bits.OP_CLONE_PARENT, bits.OP_CLONE_PARENT)
    return b""


@method("rbd", "child_detach", writes=True)
def child_detach(context: Context, data: bytes) -> bytes:
    snap_id, child = _child_request(data)
    snap = read_snap(context, snap_id)
    children = _read_children(context, snap_id)
    if snap.child_count != len(children):
        raise invalid(f"the snapshot counts {snap.child_count} children and lists {len(children)}")
    if child not in children:
        raise OSError(errno.ENOENT, f"{child} is not attached")
    rest = children - {child}
    if rest:
        write_value(context, header.snap_children_key(snap_id), header.encode_children(rest))
    else:
        context.omap_remove([header.snap_children_key(snap_id)])
    write_snap(context, replace(snap, child_count=snap.child_count - 1))
    if not rest and not any(other.child_count for other in snaps(context) if other.id != snap_id):
        set_op_features(context, 0, bits.OP_CLONE_PARENT)
    return b""


@method("rbd", "children_list", writes=False)
def children_list(context: Context, data: bytes) -> bytes:
    return header.encode_children(_read_children(context, Decoder(data).u64()))


# --- clones v1: rbd_children in the child's pool


def _children_key(source: Decoder) -> bytes:
    pool, image, snap = source.s64(), source.string(), source.u64()
    return Encoder().s64(pool).string(image).u64(snap).done()


def _decode_ids(raw: bytes) -> set[str]:
    return set(Decoder(raw).list(decode_string, 4))


def _encode_ids(ids: set[str]) -> bytes:
    return Encoder().list(sorted(ids, key=lambda text: text.encode("utf-8", "surrogateescape")), Encoder.string).done()


@method("rbd", "add_child", writes=True)
def add_child(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    key, child = _children_key(source), source.string()
    try:
        held = stored(_decode_ids, context.omap_get(key))
    except OSError as e:
        if e.errno != errno.ENOENT:
            raise
        held = set()
    if child in held:
        raise OSError(errno.EEXIST, f"{child!r} is registered already")
    write_value(context, key, _encode_ids(held | {child}))
    return b""


@method("rbd", "remove_child", writes=True)
def remove_child(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    key, child = _children_key(source), source.string()
    held = stored(_decode_ids, context.omap_get(key))
    if child not in held:
        raise OSError(errno.ENOENT, f"{child!r} is not registered")
    if held == {child}:
        context.omap_remove([key])
    else:
        write_value(context, key, _encode_ids(held - {child}))
    return b""


@method("rbd", "get_children", writes=False)
def get_children(context: Context, data: bytes) -> bytes:
    return _encode_ids(stored(_decode_ids, context.omap_get(_children_key(Decoder(data)))))

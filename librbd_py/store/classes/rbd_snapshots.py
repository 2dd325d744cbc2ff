"""Class `rbd`, snapshots of an image: records `snapshot_<id>` in its header."""

from __future__ import annotations

import errno

from librbd_py.format import features as bits
from librbd_py.format import header
from librbd_py.format.encoding import U64_MAX, Decoder, Encoder, Time, encode_string
from librbd_py.format.header import (
    NOSNAP,
    PROTECTION_PROTECTED,
    PROTECTION_UNPROTECTED,
    Snap,
    SnapContextReply,
    SnapshotInfo,
    TrashNamespace,
    UnknownNamespace,
    UserNamespace,
    decode_namespace,
)
from librbd_py.format.values import replace

from .context import Context
from .rbd_common import (
    MAX_SNAP,
    check_exists,
    invalid,
    need_feature,
    read_parent,
    read_snap,
    read_u64,
    rows,
    set_op_features,
    snaps,
    u64,
    write_snap,
    write_u64,
)
from .registry import method


@method("rbd", "get_snapcontext", writes=False)
def get_snapcontext(context: Context, data: bytes) -> bytes:
    seq = read_u64(context, b"snap_seq")
    ids = []
    for key in rows(context, header.SNAP_PREFIX):
        digits = key[len(header.SNAP_PREFIX) :]
        try:
            ids.append(int(digits, 16))
        except ValueError:
            raise OSError(errno.EIO, f"stored value: snapshot key {key!r}") from None
    return SnapContextReply(seq, tuple(sorted(ids, reverse=True))).encode()


@method("rbd", "snapshot_add", writes=True)
def snapshot_add(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    name, snap_id = source.string(), source.u64()
    namespace = header.USER if source.at_end else decode_namespace(source)
    if isinstance(namespace, UnknownNamespace):
        raise invalid(f"unknown snapshot namespace {namespace.type}")
    if snap_id > MAX_SNAP:
        raise invalid(f"snapshot id {snap_id}")
    if snap_id < read_u64(context, b"snap_seq"):
        raise OSError(errno.ESTALE, "a newer snapshot exists: take a new id and try again")
    size, flags = read_u64(context, b"size"), read_u64(context, b"flags", 0)
    limit = read_u64(context, b"snap_limit", U64_MAX)
    # An OSD looks at the limit while it goes through the snapshots: the first one always fits, and a clash with an
    # older snapshot is found before the limit is.
    for count, other in enumerate(snaps(context), 1):
        if count >= limit:
            raise OSError(errno.EDQUOT, f"the image may have {limit} snapshots")
        if other.id == snap_id or (other.name == name and other.namespace == namespace):
            raise OSError(errno.EEXIST, f"snapshot {name!r} (id {snap_id}) exists")
    parent = read_parent(context)
    overlap = parent.head_overlap if parent.exists else None
    if isinstance(namespace, TrashNamespace):
        set_op_features(context, bits.OP_SNAP_TRASH, bits.OP_SNAP_TRASH)
    now = Time.from_ns(context.now_ns)
    write_u64(context, b"snap_seq", snap_id)
    write_snap(context, Snap(snap_id, name, size, 0, flags, namespace, now, 0, overlap))
    return b""


@method("rbd", "snapshot_get", writes=False)
def snapshot_get(context: Context, data: bytes) -> bytes:
    snap_id = Decoder(data).u64()
    if snap_id == NOSNAP:
        raise invalid("HEAD is no snapshot")
    snap = read_snap(context, snap_id)
    info = SnapshotInfo(snap.id, snap.namespace, snap.name, snap.image_size, snap.timestamp, snap.child_count)
    return info.encode()


@method("rbd", "get_snapshot_name", writes=False)
def get_snapshot_name(context: Context, data: bytes) -> bytes:
    snap_id = Decoder(data).u64()
    if snap_id == NOSNAP:
        raise invalid("HEAD has no name")
    return encode_string(read_snap(context, snap_id).name)


@method("rbd", "get_snapshot_timestamp", writes=False)
def get_snapshot_timestamp(context: Context, data: bytes) -> bytes:
    snap_id = Decoder(data).u64()
    if snap_id == NOSNAP:
        raise invalid("HEAD has no snapshot timestamp")
    return Encoder().time(read_snap(context, snap_id).timestamp).done()


@method("rbd", "snapshot_remove", writes=True)
def snapshot_remove(context: Context, data: bytes) -> bytes:
    snap = read_snap(context, Decoder(data).u64())
    if snap.protection_status != PROTECTION_UNPROTECTED:
        raise OSError(errno.EBUSY, "the snapshot is protected")
    if snap.child_count:
        raise OSError(errno.EBUSY, f"the snapshot has {snap.child_count} clones")
    parent = read_parent(context)
    others = [other for other in snaps(context) if other.id != snap.id]
    head_is_child = parent.exists and parent.head_overlap is not None
    snap_is_child = any(other.parent_overlap is not None for other in others)
    context.omap_remove([header.snap_key(snap.id)])
    if parent.exists and not head_is_child and not snap_is_child:
        context.omap_remove([b"parent"])
    mask = 0
    if not head_is_child and not snap_is_child:
        mask |= bits.OP_CLONE_CHILD
    if not any(isinstance(other.namespace, TrashNamespace) for other in others):
        mask |= bits.OP_SNAP_TRASH
    set_op_features(context, 0, mask)
    return b""


@method("rbd", "snapshot_rename", writes=True)
def snapshot_rename(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    snap_id, name = source.u64(), source.string()
    if any(isinstance(other.namespace, UserNamespace) and other.name == name for other in snaps(context)):
        raise OSError(errno.EEXIST, f"snapshot {name!r} exists")
    snap = read_snap(context, snap_id)
    if not isinstance(snap.namespace, UserNamespace):
        raise invalid("only a user's snapshot can be renamed")
    write_snap(context, replace(snap, name=name))
    return b""


@method("rbd", "snapshot_trash_add", writes=True)
def snapshot_trash_add(context: Context, data: bytes) -> bytes:
    snap = read_snap(context, Decoder(data).u64())
    if snap.protection_status != PROTECTION_UNPROTECTED:
        raise OSError(errno.EBUSY, "the snapshot is protected")
    if isinstance(snap.namespace, TrashNamespace):
        raise OSError(errno.EEXIST, "the snapshot is in the trash already")
    from uuid import uuid4  # here: it brings platform and ctypes

    namespace = TrashNamespace(snap.name, snap.namespace.type)
    set_op_features(context, bits.OP_SNAP_TRASH, bits.OP_SNAP_TRASH)
    write_snap(context, replace(snap, name=str(uuid4()), namespace=namespace))
    return b""


@method("rbd", "snapshot_get_limit", writes=False)
def snapshot_get_limit(context: Context, data: bytes) -> bytes:
    return u64(read_u64(context, b"snap_limit", U64_MAX))


@method("rbd", "snapshot_set_limit", writes=True)
def snapshot_set_limit(context: Context, data: bytes) -> bytes:
    limit = Decoder(data).u64()
    if limit == U64_MAX:
        context.omap_remove([b"snap_limit"])
        return b""
    count = sum(1 for _ in snaps(context))
    if limit < count:
        raise OSError(errno.ERANGE, f"the image has {count} snapshots already")
    write_u64(context, b"snap_limit", limit)
    return b""


@method("rbd", "get_protection_status", writes=False)
def get_protection_status(context: Context, data: bytes) -> bytes:
    snap_id = Decoder(data).u64()
    check_exists(context)
    if snap_id == NOSNAP:
        raise invalid("HEAD cannot be protected")
    status = read_snap(context, snap_id).protection_status
    if status > PROTECTION_PROTECTED:
        raise OSError(errno.EIO, f"stored value: protection status {status}")
    return bytes([status])


@method("rbd", "set_protection_status", writes=True)
def set_protection_status(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    snap_id, status = source.u64(), source.u8()
    check_exists(context)
    need_feature(context, bits.LAYERING)
    if snap_id == NOSNAP:
        raise invalid("HEAD cannot be protected")
    if status > PROTECTION_PROTECTED:
        raise invalid(f"protection status {status}")
    write_snap(context, replace(read_snap(context, snap_id), protection_status=status))
    return b""

"""The class methods of `rbd` that images use, as typed functions: one place that knows their arguments.

Every function may raise what the store raises: ENOENT for a missing object, the method's own errno otherwise.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from librbd_py.store.api import NOSNAP, Create, Exec, ObjectContext, Op, SnapContext

USER, GROUP, TRASH, MIRROR = range(4)  # snapshot namespaces
TRASH_USER, TRASH_MIRRORING, TRASH_MIGRATION, TRASH_REMOVING, TRASH_USER_PARENT = range(5)
STATE_NORMAL, STATE_MOVING, STATE_REMOVING, STATE_RESTORING = range(4)
PAGE = 1024  # rows per listing call

DIRECTORY = "rbd_directory"
CHILDREN = "rbd_children"
TRASH_OBJECT = "rbd_trash"
NAMESPACES = "rbd_namespace"
INFO = "rbd_info"


@dataclass(frozen=True)
class SnapNamespace:
    kind: int = USER
    original_name: str = ""  # trash
    original_kind: int = USER  # trash
    raw: bytes = b""  # the encoded form


@dataclass(frozen=True)
class ParentSpec:
    pool_id: int
    namespace: str
    image_id: str
    snap_id: int

    @property
    def exists(self) -> bool:
        return self.pool_id >= 0 and bool(self.image_id) and self.snap_id != NOSNAP


NO_PARENT = ParentSpec(-1, "", "", NOSNAP)


@dataclass(frozen=True, order=True)
class ChildSpec:
    pool_id: int
    namespace: str
    image_id: str


@dataclass(frozen=True)
class Snapshot:
    id: int
    name: str
    size: int  # bytes
    namespace: SnapNamespace
    protection: int
    flags: int
    timestamp: float  # seconds since 1970
    children: int  # format v2 clones
    parent_overlap: int | None  # bytes; None: this snapshot needs no parent

    @property
    def is_user(self) -> bool:
        return self.namespace.kind == USER

    @property
    def is_trash(self) -> bool:
        return self.namespace.kind == TRASH


@dataclass(frozen=True)
class BaseHeader:
    order: int
    size: int
    features: int
    incompatible: int
    object_prefix: str
    flags: int
    snapc: SnapContext
    data_pool_id: int
    parent: ParentSpec
    parent_overlap: int | None


# --- bytes ------------------------------------------------------------------------------------------------------


def u8(value: int) -> bytes:
    return struct.pack("<B", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def s64(value: int) -> bytes:
    return struct.pack("<q", value)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<I", len(data)) + data


def versioned(version: int, compat: int, body: bytes) -> bytes:
    return struct.pack("<BBI", version, compat, len(body)) + body


class Reader:
    """Takes values off the front of a method's answer. EBADMSG when it is shorter than it says."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, length: int) -> bytes:
        if length > len(self.data) - self.at:
            raise OSError(errno.EBADMSG, "the answer of a class method is cut short")
        piece = self.data[self.at : self.at + length]
        self.at += length
        return piece

    def _one(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def u8(self) -> int:
        return self._one("<B")

    def u32(self) -> int:
        return self._one("<I")

    def u64(self) -> int:
        return self._one("<Q")

    def s64(self) -> int:
        return self._one("<q")

    def blob(self) -> bytes:
        return self.take(self.u32())

    def text(self) -> str:
        return self.blob().decode(errors="surrogateescape")

    def time(self) -> float:
        seconds = self.u32()
        return seconds + self.u32() / 1e9

    def optional_u64(self) -> int | None:
        return self.u64() if self.u8() else None

    def struct(self) -> Reader:
        """The body of a versioned struct."""
        self.u8()
        self.u8()
        return Reader(self.blob())

    def namespace(self) -> SnapNamespace:
        start = self.at
        body = self.struct()
        raw = self.data[start : self.at]
        kind = body.u32()
        if kind == TRASH:
            name = body.text()
            return SnapNamespace(kind, name, body.u32(), raw)
        return SnapNamespace(kind, raw=raw)


USER_NAMESPACE = versioned(1, 1, struct.pack("<I", USER))


def call(method: str, *parts: bytes) -> Exec:
    return Exec("rbd", method, b"".join(parts))


def _ask(ctx: ObjectContext, oid: str, method: str, *parts: bytes) -> Reader:
    return Reader(ctx.exec(oid, "rbd", method, b"".join(parts)))


def encode_parent(spec: ParentSpec) -> bytes:
    return versioned(1, 1, s64(spec.pool_id) + text(spec.namespace) + text(spec.image_id) + u64(spec.snap_id))


def encode_child(spec: ChildSpec) -> bytes:
    return versioned(2, 1, s64(spec.pool_id) + text(spec.image_id) + text(spec.namespace))


# --- header -----------------------------------------------------------------------------------------------------


def create_header(
    ctx: ObjectContext,
    oid: str,
    size: int,
    order: int,
    features: int,
    prefix: str,
    data_pool: int | None,
    stripe: tuple[int, int] | None,
) -> None:
    parts = [u64(size), u8(order), u64(features), text(prefix)]
    if data_pool is not None:
        parts.append(s64(data_pool))
    ops: list[Op] = [Create(exclusive=True), call("create", *parts)]
    if stripe is not None:
        ops.append(call("set_stripe_unit_count", u64(stripe[0]), u64(stripe[1])))
    ctx.write(oid, ops)


def read_header(ctx: ObjectContext, oid: str, read_only: bool) -> BaseHeader:
    head = u64(NOSNAP)
    answers = [
        Reader(data)
        for data in ctx.read(
            oid,
            [
                call("get_size", head),
                call("get_features", head, u8(read_only)),
                call("get_object_prefix"),
                call("get_flags", head),
                call("get_snapcontext"),
                call("get_data_pool"),
                call("parent_get"),
                call("parent_overlap_get", head),
            ],
        )
    ]
    size, features, prefix, flags, snapc, pool, parent, overlap = answers
    order = size.u8()
    seq = snapc.u64()
    ids = tuple(snapc.u64() for _ in range(snapc.u32()))
    body = parent.struct()
    spec = ParentSpec(body.s64(), body.text(), body.text(), body.u64())
    return BaseHeader(
        order=order,
        size=size.u64(),
        features=features.u64(),
        incompatible=features.u64(),
        object_prefix=prefix.text(),
        flags=flags.u64(),
        snapc=SnapContext(seq, ids),
        data_pool_id=pool.s64(),
        parent=spec if spec.exists else NO_PARENT,
        parent_overlap=overlap.optional_u64(),
    )


def read_snapshots(ctx: ObjectContext, oid: str, ids: Sequence[int]) -> list[Snapshot]:
    """ENOENT when one of them has gone meanwhile."""
    snaps = []
    for start in range(0, len(ids), 64):
        some = ids[start : start + 64]
        ops: list[Op] = []
        for snap_id in some:
            arg = u64(snap_id)
            ops += [
                call("snapshot_get", arg),
                call("parent_overlap_get", arg),
                call("get_flags", arg),
                call("get_protection_status", arg),
            ]
        answers = ctx.read(oid, ops)
        for row in range(0, len(answers), 4):
            info = Reader(answers[row]).struct()
            snap_id = info.u64()
            namespace = info.namespace()
            snaps.append(
                Snapshot(
                    id=snap_id,
                    name=info.text(),
                    size=info.u64(),
                    namespace=namespace,
                    timestamp=info.time(),
                    children=info.u32(),
                    parent_overlap=Reader(answers[row + 1]).optional_u64(),
                    flags=Reader(answers[row + 2]).u64(),
                    protection=Reader(answers[row + 3]).u8(),
                )
            )
    return snaps


def op_features(ctx: ObjectContext, oid: str) -> int:
    return _ask(ctx, oid, "op_features_get").u64()


def stripe(ctx: ObjectContext, oid: str) -> tuple[int, int]:
    answer = _ask(ctx, oid, "get_stripe_unit_count")
    return answer.u64(), answer.u64()


def timestamp(ctx: ObjectContext, oid: str, which: str) -> float:
    """`which`: create, access or modify. Seconds since 1970."""
    return _ask(ctx, oid, f"get_{which}_timestamp").time()


def snap_limit(ctx: ObjectContext, oid: str) -> int:
    return _ask(ctx, oid, "snapshot_get_limit").u64()


def group_of(ctx: ObjectContext, oid: str) -> tuple[int, str]:
    body = _ask(ctx, oid, "image_group_get").struct()
    return body.s64(), body.text()


def protection(ctx: ObjectContext, oid: str, snap_id: int) -> int:
    return _ask(ctx, oid, "get_protection_status", u64(snap_id)).u8()


def children(ctx: ObjectContext, oid: str, snap_id: int) -> list[ChildSpec]:
    """Format v2 clones of a snapshot."""
    try:
        answer = _ask(ctx, oid, "children_list", u64(snap_id))
    except OSError as failure:
        if failure.errno == errno.ENOENT:
            return []
        raise
    out = []
    for _ in range(answer.u32()):
        body = answer.struct()
        pool, image = body.s64(), body.text()
        out.append(ChildSpec(pool, body.text() if body.at < len(body.data) else "", image))
    return sorted(out)


def v1_children(ctx: ObjectContext, parent: ParentSpec) -> list[str]:
    """Ids of the format v1 clones of a snapshot in this pool."""
    try:
        answer = _ask(ctx, CHILDREN, "get_children", s64(parent.pool_id) + text(parent.image_id) + u64(parent.snap_id))
    except OSError as failure:
        if failure.errno == errno.ENOENT:
            return []
        raise
    return [answer.text() for _ in range(answer.u32())]


def metadata(ctx: ObjectContext, oid: str) -> dict[str, bytes]:
    rows: dict[str, bytes] = {}
    start = ""
    while True:
        answer = _ask(ctx, oid, "metadata_list", text(start), u64(PAGE))
        count = answer.u32()
        for _ in range(count):
            start = answer.text()
            rows[start] = answer.blob()
        if count < PAGE:
            return rows


def metadata_value(ctx: ObjectContext, oid: str, key: str) -> bytes:
    return _ask(ctx, oid, "metadata_get", text(key)).blob()


def encode_metadata(values: dict[str, bytes]) -> bytes:
    return struct.pack("<I", len(values)) + b"".join(text(key) + text(values[key]) for key in sorted(values))


# --- directories ------------------------------------------------------------------------------------------------


def get_id(ctx: ObjectContext, oid: str) -> str:
    return _ask(ctx, oid, "get_id").text()


def name_of(ctx: ObjectContext, image_id: str) -> str:
    """ENOENT: not in the directory (perhaps in the trash)."""
    return _ask(ctx, DIRECTORY, "dir_get_name", text(image_id)).text()


def _pages(
    ctx: ObjectContext, oid: str, method: str, row: Callable[[Reader], tuple[str, object]]
) -> Iterable[tuple[str, object]]:
    start = ""
    while True:
        try:
            answer = _ask(ctx, oid, method, text(start), u64(PAGE))
        except OSError as failure:
            if failure.errno == errno.ENOENT:
                return
            raise
        count = answer.u32()
        for _ in range(count):
            start, value = row(answer)
            yield start, value
        if count < PAGE:
            return


def list_images(ctx: ObjectContext) -> dict[str, str]:
    """name -> id, sorted by name."""
    return {
        name: str(value) for name, value in _pages(ctx, DIRECTORY, "dir_list", lambda row: (row.text(), row.text()))
    }


def list_namespaces(ctx: ObjectContext) -> list[str]:
    return [name for name, _ in _pages(ctx, NAMESPACES, "namespace_list", lambda row: (row.text(), None))]


@dataclass(frozen=True)
class TrashSpec:
    source: int
    name: str
    deletion_time: float
    deferment_end: float
    state: int = STATE_NORMAL

    def encode(self) -> bytes:
        body = u8(self.source) + text(self.name) + _time(self.deletion_time) + _time(self.deferment_end)
        return versioned(2, 1, body + u8(self.state))


def _time(value: float) -> bytes:
    seconds = int(value)
    return struct.pack("<II", seconds, int((value - seconds) * 1e9))


def _trash_spec(answer: Reader) -> TrashSpec:
    body = answer.struct()
    source, name, deleted, until = body.u8(), body.text(), body.time(), body.time()
    return TrashSpec(source, name, deleted, until, body.u8() if body.at < len(body.data) else STATE_NORMAL)


def trash_get(ctx: ObjectContext, image_id: str) -> TrashSpec:
    return _trash_spec(_ask(ctx, TRASH_OBJECT, "trash_get", text(image_id)))


def trash_list(ctx: ObjectContext) -> dict[str, TrashSpec]:
    out: dict[str, TrashSpec] = {}
    for image_id, spec in _pages(ctx, TRASH_OBJECT, "trash_list", lambda row: (row.text(), _trash_spec(row))):
        assert isinstance(spec, TrashSpec)
        out[image_id] = spec
    return out


def trash_add(ctx: ObjectContext, image_id: str, spec: TrashSpec) -> None:
    ctx.write(TRASH_OBJECT, [call("trash_add", text(image_id), spec.encode())])


def trash_state(ctx: ObjectContext, image_id: str, state: int, expected: int) -> None:
    """ESTALE: it is in neither state."""
    ctx.exec(TRASH_OBJECT, "rbd", "trash_state_set", text(image_id) + u8(state) + u8(expected))


def trash_forget(ctx: ObjectContext, image_id: str) -> None:
    ctx.exec(TRASH_OBJECT, "rbd", "trash_remove", text(image_id))

"""Random programs of class-method calls, the same on every run, and a way to compare what different stores answer.

`steps()` gives the program, `outcome()` runs one step and describes the answer and the object afterwards with
everything that differs between clusters (times, client ids, addresses, random names) put aside.
"""

from __future__ import annotations

import errno
import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from librbd_py.format import group, header, lock, object_map, trash
from librbd_py.format.encoding import NEVER, Encoder, Time
from librbd_py.format.header import NOSNAP, ChildImageSpec, ParentImageSpec
from librbd_py.store import api, executor


@dataclass(frozen=True)
class Step:
    client: int  # 0 or 1
    oid: str
    ops: tuple[Any, ...]

    @property
    def label(self) -> str:
        words = [f"{op.cls}.{op.method}" if isinstance(op, api.Exec) else type(op).__name__ for op in self.ops]
        return f"client {self.client}: {self.oid}: {' '.join(words)}"


NAMES = ["a", "b", "snap", "x" * 40, ""]
IDS = ["1000a", "1000b", "ff", "bad id", ""]
CHILDREN = [
    ChildImageSpec(1, "c1"),
    ChildImageSpec(1, "c2"),
    ChildImageSpec(2, "a9", "zns"),
    ChildImageSpec(2, "b1", "ns"),
    ChildImageSpec(-1, "c3"),
]
NAMESPACES: list[header.SnapshotNamespace] = [
    header.USER,
    header.USER,
    header.USER,
    header.GroupNamespace(1, "g1", "gs1"),
    header.TrashNamespace("old", 0),
    header.MirrorNamespace(0, True, ("p1", "p2"), "", 4, 7, {1: 2}),
    header.UnknownNamespace(9, b""),
]


class _Random(random.Random):
    newest = 1  # snapshot id given last

    def snap(self) -> int:
        """Mostly one that was added."""
        if self.random() < 0.15:
            return self.choice([NOSNAP, 0, 99])
        return self.randrange(max(2, self.newest - 3), self.newest + 1) if self.newest > 1 else 2

    def next_snap(self) -> int:
        """Mostly a fresh one."""
        if self.random() < 0.2:
            return self.choice([self.newest, NOSNAP, max(1, self.newest - 1)])
        self.newest += 1
        return self.newest

    def name(self) -> str:
        return self.choice(NAMES)

    def id(self) -> str:
        return self.choice(IDS)

    def bits(self, known: Sequence[int]) -> int:
        value = 0
        for bit in known:
            if self.random() < 0.4:
                value |= 1 << bit
        return value


Args = Callable[[_Random], bytes]


def _u64(*choices: int) -> Args:
    return lambda r: Encoder().u64(r.choice(choices)).done()


def _none(r: _Random) -> bytes:
    return b""


def _snap(r: _Random) -> bytes:
    return Encoder().u64(r.snap()).done()


def _name(r: _Random) -> bytes:
    return Encoder().string(r.name()).done()


def _namespace(r: _Random) -> bytes:
    out = Encoder()
    header.encode_namespace(out, r.choice(NAMESPACES))
    return out.done()


def _child(r: _Random) -> bytes:
    out = Encoder().u64(r.snap())
    r.choice(CHILDREN).encode(out)
    return out.done()


def _parent(r: _Random) -> bytes:
    out = Encoder()
    ParentImageSpec(
        r.choice([1, 1, 7, -1]), r.choice(["", "", "ns"]), r.choice(["p1", "p1", ""]), r.choice([4, 4, NOSNAP])
    ).encode(out)
    return out.u64(r.choice([0, 1 << 20, 1 << 22, 1 << 40])).done()


def _metadata(r: _Random) -> bytes:
    values = {r.choice(["k1", "k2", "conf_x", ""]): bytes([r.randrange(256)]) * r.randrange(4) for _ in range(2)}
    return Encoder().map(dict(sorted(values.items())), Encoder.string, Encoder.blob).done()


def _listing(r: _Random) -> bytes:
    return Encoder().string(r.choice(["", "", "a", "k1", "b"])).u64(r.choice([0, 1, 2, 64, 1024])).done()


def _group_spec(r: _Random) -> bytes:
    return group.GroupSpec(r.choice([1, 2]), r.choice(["g1", "g2"])).encode()


def _migration(r: _Random) -> bytes:
    return header.MigrationSpec(1, 2, "", "name", "id", {1: 2}, 4, True, False, 2, "text", 0, "").encode()


HEADER: dict[str, Args] = {
    "get_size": _snap,
    "set_size": _u64(0, 1 << 20, 1 << 22, 1 << 23, 1 << 50),
    "get_features": lambda r: Encoder().u64(r.snap()).bool(r.random() < 0.5).done(),
    "set_features": lambda r: Encoder().u64(r.bits(range(14))).u64(r.bits(range(14)) & r.bits(range(14))).done(),
    "get_flags": _snap,
    "set_flags": lambda r: Encoder().u64(r.bits([0, 1])).u64(r.bits([0, 1])).u64(r.snap()).done(),
    "op_features_get": _none,
    "op_features_set": lambda r: Encoder().u64(r.bits([0, 1, 2, 3])).u64(r.bits([0, 1, 2, 3, 4, 5])).done(),
    "get_snapcontext": _none,
    "get_object_prefix": _none,
    "get_data_pool": _none,
    "get_stripe_unit_count": _none,
    "set_stripe_unit_count": lambda r: (
        Encoder().u64(r.choice([0, 4096, 65536, 12345, 1 << 23])).u64(r.choice([0, 1, 4])).done()
    ),
    "get_create_timestamp": _none,
    "get_modify_timestamp": _none,
    "set_access_timestamp": _none,
    "get_all_features": _none,
    "snapshot_add": lambda r: Encoder().string(r.name()).u64(r.next_snap()).raw(_namespace(r)).done(),
    "snapshot_add ": lambda r: Encoder().string(r.name()).u64(r.next_snap()).done(),
    "snapshot_add  ": lambda r: Encoder().string(r.name()).u64(r.next_snap()).raw(_namespace(r)).done(),
    "snapshot_add   ": lambda r: Encoder().string(r.name()).u64(r.next_snap()).done(),
    "snapshot_get": _snap,
    "snapshot_remove": _snap,
    "snapshot_rename": lambda r: Encoder().u64(r.snap()).string(r.name()).done(),
    "snapshot_trash_add": _snap,
    "get_snapshot_name": _snap,
    "get_snapshot_timestamp": _snap,
    "snapshot_get_limit": _none,
    "snapshot_set_limit": _u64(0, 1, 2, 5, (1 << 64) - 1),
    "get_protection_status": _snap,
    "set_protection_status": lambda r: Encoder().u64(r.snap()).u8(r.choice([0, 0, 0, 1, 2, 3])).done(),
    "parent_get": _none,
    "parent_overlap_get": _snap,
    "parent_attach": _parent,
    "parent_detach": _none,
    "get_parent": _snap,
    "remove_parent": _none,
    "set_parent": lambda r: Encoder().s64(r.choice([1, -1])).string(r.choice(["p1", ""])).u64(4).u64(1 << 21).done(),
    "child_attach": _child,
    "child_attach ": _child,
    "child_attach  ": _child,
    "child_detach": _child,
    "children_list": _snap,
    "metadata_list": _listing,
    "metadata_get": lambda r: Encoder().string(r.choice(["k1", "k2", "zz"])).done(),
    "metadata_set": _metadata,
    "metadata_remove": lambda r: Encoder().string(r.choice(["k1", "k2", "zz"])).done(),
    "image_group_add": _group_spec,
    "image_group_remove": _group_spec,
    "image_group_get": _none,
    "migration_set": _migration,
    "migration_get": _none,
    "migration_set_state": lambda r: Encoder().u8(r.randrange(7)).string("why").done(),
    "migration_remove": _none,
}


def _pair(r: _Random) -> bytes:
    return Encoder().string(r.name()).string(r.id()).done()


def _triple(r: _Random) -> bytes:
    return Encoder().string(r.name()).string(r.name()).string(r.id()).done()


DIRECTORY: dict[str, Args] = {
    "dir_get_id": _name,
    "dir_get_name": lambda r: Encoder().string(r.id()).done(),
    "dir_list": _listing,
    "dir_add_image": _pair,
    "dir_remove_image": _pair,
    "dir_rename_image": _triple,
    "dir_state_assert": lambda r: bytes([r.randrange(3)]),
    "dir_state_set": lambda r: bytes([r.randrange(3)]),
    "group_dir_add": _pair,
    "group_dir_remove": _pair,
    "group_dir_rename": _triple,
    "group_dir_list": _listing,
    "namespace_add": lambda r: Encoder().string(r.choice(["n1", "n2", ""])).done(),
    "namespace_remove": lambda r: Encoder().string(r.choice(["n1", "n2", ""])).done(),
    "namespace_list": _listing,
    "get_id": _none,
    "set_id": lambda r: Encoder().string(r.id()).done(),
}


def _trash_spec(r: _Random) -> bytes:
    out = Encoder().string(r.id())
    trash.TrashImageSpec(r.randrange(5), r.name(), Time(5, 6), Time(7, 8), r.randrange(4)).encode_to(out)
    return out.done()


TRASH: dict[str, Args] = {
    "trash_add": _trash_spec,
    "trash_remove": lambda r: Encoder().string(r.id()).done(),
    "trash_get": lambda r: Encoder().string(r.id()).done(),
    "trash_list": _listing,
    "trash_state_set": lambda r: Encoder().string(r.id()).u8(r.randrange(4)).u8(r.randrange(4)).done(),
}


def _v1(r: _Random, child: bool) -> bytes:
    out = Encoder().s64(r.choice([1, 1, -1])).string(r.choice(["p1", "p1", ""])).u64(r.choice([4, 4, NOSNAP]))
    return (out.string(r.choice(["c1", "c2", ""])) if child else out).done()


CHILDREN_V1: dict[str, Args] = {
    "add_child": lambda r: _v1(r, True),
    "remove_child": lambda r: _v1(r, True),
    "get_children": lambda r: _v1(r, False),
}


def _image_spec(r: _Random) -> group.GroupImageSpec:
    return group.GroupImageSpec(r.choice(["i1", "i2"]), r.choice([1, 20]))


def _group_status(r: _Random) -> bytes:
    out = Encoder()
    group.GroupImageStatus(_image_spec(r), r.randrange(2)).encode_to(out)
    return out.done()


def _group_image(r: _Random) -> bytes:
    out = Encoder()
    _image_spec(r).encode_to(out)
    return out.done()


def _group_image_list(r: _Random) -> bytes:
    out = Encoder()
    r.choice([group.GroupImageSpec(), group.GroupImageSpec(), _image_spec(r)]).encode_to(out)
    return out.u64(r.choice([1, 1024])).done()


def _group_snapshot(r: _Random) -> bytes:
    specs = tuple(group.ImageSnapshotSpec(1, f"i{n}", n) for n in range(r.randrange(3)))
    return group.GroupSnapshot(r.choice(["s1", "s2"]), r.choice(["n1", "n2"]), r.randrange(2), specs).encode()


def _group_snap_list(r: _Random) -> bytes:
    return group.GroupSnapshot(r.choice(["", "", "s1"])).encode() + Encoder().u64(r.choice([1, 1024])).done()


GROUP: dict[str, Args] = {
    "group_image_set": _group_status,
    "group_image_remove": _group_image,
    "group_image_list": _group_image_list,
    "group_snap_set": _group_snapshot,
    "group_snap_remove": lambda r: Encoder().string(r.choice(["s1", "s2"])).done(),
    "group_snap_get_by_id": lambda r: Encoder().string(r.choice(["s1", "s2"])).done(),
    "group_snap_list": _group_snap_list,
}


def _map(r: _Random) -> bytes:
    return object_map.encode(bytes(r.choices(range(4), k=r.choice([0, 3, 40, 16390, 40000]))), crc=r.random() < 0.5)


def _map_update(r: _Random) -> bytes:
    start = r.choice([0, 0, 1, 39, 16383, 16384, 39999, 100000])
    out = Encoder().u64(start).u64(start + r.choice([0, 1, 2, 40, 16385])).u8(r.randrange(4))
    return out.optional(r.choice([None, 0, 1, 2, 3]), Encoder.u8).done()


MAP: dict[str, Args] = {
    "object_map_load": _none,
    "object_map_save": _map,
    "object_map_resize": lambda r: (
        Encoder().u64(r.choice([0, 1, 10, 40, 16385, 50000, 1 << 40])).u8(r.randrange(4)).done()
    ),
    "object_map_update": _map_update,
    "object_map_update ": _map_update,
    "object_map_snap_add": _none,
    "object_map_snap_remove": _map,
}


def _sparse_copyup(r: _Random) -> bytes:
    extents = {offset: r.choice([1, 512]) for offset in r.sample([0, 512, 4096, 10000], k=r.randrange(3))}
    data = bytes(r.randrange(1, 256) for _ in range(sum(extents.values())))
    return Encoder().map(dict(sorted(extents.items())), Encoder.u64, Encoder.u64).blob(data).done()


DATA: dict[str, Args] = {
    "copyup": lambda r: bytes([r.randrange(256)]) * r.choice([0, 1, 5000]),
    "sparse_copyup": _sparse_copyup,
    "sparsify": lambda r: Encoder().u64(r.choice([512, 4096])).bool(r.random() < 0.5).done(),
    "assert_snapc_seq": lambda r: Encoder().u64(r.choice([0, 1])).u8(r.randrange(3)).done(),
}

LOCK_TYPES = [0, 1, 1, 1, 2, 2, 3, 4]
COOKIES = ["auto 1", "auto 2", ""]
TAGS = ["internal", "internal", ""]


def _lock(r: _Random) -> bytes:
    return lock.LockRequest(
        r.choice(["rbd_lock", "rbd_lock", ""]), r.choice(LOCK_TYPES), r.choice(COOKIES), r.choice(TAGS), "text",
        NEVER, r.choice([0, 0, 0, 1, 2, 3]),
    ).encode()  # fmt: skip


LOCK: dict[str, Args] = {
    "lock": _lock,
    "lock ": _lock,
    "unlock": lambda r: lock.UnlockRequest("rbd_lock", r.choice(COOKIES)).encode(),
    "get_info": lambda r: lock.InfoRequest("rbd_lock").encode(),
    "list_locks": _none,
    "assert_locked": lambda r: lock.AssertRequest(
        r.choice(["rbd_lock", "rbd_lock", ""]), r.choice(LOCK_TYPES), r.choice(COOKIES), r.choice(TAGS)
    ).encode(),
    "set_cookie": lambda r: lock.SetCookieRequest(
        "rbd_lock", r.choice(LOCK_TYPES), r.choice(COOKIES), r.choice(TAGS), r.choice(COOKIES)
    ).encode(),
}

THEMES: dict[str, tuple[str, dict[str, Args]]] = {
    "header": ("rbd", HEADER),
    "directory": ("rbd", DIRECTORY),
    "trash": ("rbd", TRASH),
    "children": ("rbd", CHILDREN_V1),
    "group": ("rbd", GROUP),
    "map": ("rbd", MAP),
    "data": ("rbd", DATA),
    "lock": ("lock", LOCK),
}
EPISODES = {"header": 24, "directory": 8, "trash": 5, "children": 3, "group": 5, "map": 10, "data": 6, "lock": 12}
LENGTH = 60


def _create(r: _Random) -> bytes:
    features = r.choice([0x3D, 0x3D, 0x1D, 0x3F, 0x3C, 0x80, 0x100, 0x1000, 0xBD])
    out = Encoder().u64(r.choice([1 << 22, 10 << 20])).u8(r.choice([12, 22])).u64(features)
    out.string(r.choice(["rbd_data.abc", "rbd_data.abc", ""]))
    if r.random() < 0.3:
        out.s64(r.choice([-1, 2]))
    return out.done()


def steps(theme: str, episode: int) -> Iterator[Step]:
    """One program on one object that does not exist at its start."""
    r = _Random(f"{theme} {episode}")
    cls, table = THEMES[theme]
    oid = f"{theme}-{episode}"
    if theme == "header":
        for _ in range(3):
            yield Step(0, oid, (api.Exec("rbd", "create", _create(r)),))
        create = Encoder().u64(10 << 20).u8(22).u64(r.choice([0x3D, 0x3D, 0x3F, 0x1D])).string("rbd_data.abc").done()
        yield Step(0, oid, (api.Create(), api.Exec("rbd", "create", create)))
    for _ in range(LENGTH):
        name = r.choice(list(table))
        data = table[name](r)
        if data and r.random() < 0.04:
            data = data[: r.randrange(len(data))]
        step: tuple[Any, ...] = (api.Exec(cls, name.strip(), data),)
        if r.random() < 0.06:
            step = (api.Create(), *step)
        elif theme == "data" and r.random() < 0.3:
            step = (r.choice([api.Remove(), api.WriteFull(bytes(4096) + b"x"), api.WriteFull(bytes(9000))]),)
        yield Step(r.randrange(2) if theme == "lock" else 0, oid, step)


# --- answers without what is random


def _time(raw: bytes) -> str:
    return "zero" if raw == bytes(8) else f"time of {len(raw)} bytes"


def _snap_text(raw: bytes) -> str:
    snap = header.Snap.decode(raw)
    name = "UUID" if re.fullmatch(r"[0-9a-f-]{36}", snap.name) else snap.name
    return replace(snap, timestamp=NEVER, name=name).encode().hex()


def _lock_text(raw: bytes, clients: Sequence[api.Client]) -> str:
    state = lock.LockState.decode(raw)
    gids = {client.gid: (number, client.address) for number, client in enumerate(clients)}
    rows = []
    for who, info in state.lockers.items():
        number, address = gids.get(who.entity.number, (-1, ""))
        same = info.address.text == address and info.address.type == lock.ADDRESS_LEGACY
        rows.append(f"{number} {who.cookie!r} {info.description!r} {info.expiration} address {same}")
    return f"{sorted(rows)} type {state.type} tag {state.tag!r}"


def _text(raw: bytes) -> str:
    return raw.hex() if len(raw) <= 24 else f"{len(raw)} bytes {hashlib.sha256(raw).hexdigest()[:12]}"


def _answer(method: str, raw: bytes, clients: Sequence[api.Client]) -> str:
    if method.endswith("_timestamp"):
        return _time(raw)
    if method == "snapshot_get":
        info = header.SnapshotInfo.decode(raw)
        name = "UUID" if re.fullmatch(r"[0-9a-f-]{36}", info.name) else info.name
        return replace(info, timestamp=NEVER, name=name).encode().hex()
    if method == "get_snapshot_name" and len(raw) == 40:
        return "UUID"
    if method == "get_info":
        return _lock_text(raw, clients)
    return _text(raw)


def _state(io: api.ObjectContext, oid: str, clients: Sequence[api.Client]) -> str:
    try:
        data, xattrs, (omap, _) = io.read(oid, [api.Read(), api.GetXattrs(), api.OmapGetVals()])
    except OSError as e:
        return errno.errorcode[e.errno or 0]
    rows = []
    for key, value in omap.items():
        if key.endswith(b"_timestamp"):
            shown = _time(value)
        elif key.startswith(b"snapshot_0"):
            shown = _snap_text(value)
        else:
            shown = value.hex()
        rows.append(f"{key!r}={shown}")
    rows += [f"{name}={_lock_text(value, clients)}" for name, value in sorted(xattrs.items())]
    if oid.startswith("map") and data:
        # An OSD leaves what a shrunk map had in the unused bits of its last byte; ours clears them.
        rows.append(_text(object_map.encode(object_map.decode(data))))
    else:
        rows.append(_text(data))
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:12] if len(rows) > 1 else rows[0]


def outcome(contexts: Sequence[api.ObjectContext], step: Step) -> list[str]:
    """[result of the step, object afterwards]."""
    io = contexts[step.client]
    clients = [context.store.client for context in contexts]
    writes = True
    try:
        writes = executor.has_writes(step.ops)
        results = io.exec_ops(step.oid, step.ops)
        last = step.ops[-1]
        shown = "done"
        if not writes and isinstance(last, api.Exec):
            shown = _answer(last.method, results[-1], clients)
    except OSError as e:
        shown = errno.errorcode.get(e.errno or 0, str(e.errno))
    return [shown, _state(io, step.oid, clients) if writes else ""]

"""Every record of a pool that holds one of everything is damaged, in every way, under every verb: each ends within a
second, well or with an error of the module that says so, and nothing else."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timedelta

import pytest

from librbd_py import rbd
from librbd_py.format import features as ft
from librbd_py.image.header import header_oid
from librbd_py.store.api import (
    GetXattrs,
    ObjectContext,
    OmapGetVals,
    OmapRmKeys,
    OmapSet,
    Read,
    Remove,
    RmXattr,
    SetXattr,
    Truncate,
    Write,
)
from librbd_py.store.memory import MemoryCluster

MIB = 1 << 20
SECOND = 1.0
TURNS = 40 if os.environ.get("RBDPY_SOAK") else 1
R = rbd.RBD()
FEATURES = ft.LAYERING | ft.EXCLUSIVE_LOCK | ft.OBJECT_MAP | ft.FAST_DIFF | ft.DEEP_FLATTEN
VALUES = 7
STRANGE = ("rbd_object_map.1005.x", "rbd_header.", "rbd_id.", "{prefix}.x", "{prefix}.00000000000000001")  # nobody's
Verb = Callable[[ObjectContext], object]


@contextmanager
def world(cluster: MemoryCluster | None = None) -> Iterator[ObjectContext]:
    """A pool with a parent, a clone, a group with a snapshot, trash, namespaces, metadata, configuration and an image
    on its way elsewhere."""
    client = (cluster or MemoryCluster()).connect()
    client.pool_create("rbd")
    with closing(client):
        io = client.open("rbd")
        R.pool_init(io, True)
        R.create(io, "base", MIB, 20, False, ft.LAYERING)
        with rbd.Image(io, "base") as base:
            base.write(b"b" * 100, 0)
            base.create_snap("s")
            base.protect_snap("s")
            base.metadata_set("key", "value")
            base.config_set("rbd_cache", "false")
            base.lock_shared("cookie", "tag")
        R.clone(io, "base", "s", io, "disk", FEATURES)
        with rbd.Image(io, "disk") as disk:
            disk.write(b"d" * 100, 100)
            disk.create_snap("one")
            disk.set_snap_limit(10)
            prefix = disk.block_name_prefix()
        R.namespace_create(io, "space")
        R.config_set(io, "rbd_cache", "true")
        R.group_create(io, "group")
        group = rbd.Group(io, "group")
        group.add_image(io, "disk")
        group.create_snap("together")
        R.create(io, "gone", MIB, 20, False, FEATURES)
        R.trash_move(io, "gone", 100)
        R.create(io, "leaving", MIB, 20, False, FEATURES)
        with rbd.Image(io, "leaving") as leaving:
            leaving.write(b"l" * 100, 0)
        R.migration_prepare(io, "leaving", io, "coming")
        with rbd.Image(io, "coming", read_only=True) as coming:
            header = header_oid(coming.id())
        for name in STRANGE:
            io.write(name.format(prefix=prefix), [Write(0, b"x")])
        io.write(header, [OmapSet({b"rbdpy_bringing_x": b"", b"unknown": b""})])
        yield io


def image(verb: Callable[[rbd.Image], object], name: str = "disk", read_only: bool = True) -> Verb:
    def call(io: ObjectContext) -> object:
        with rbd.Image(io, name, read_only=read_only) as opened:
            return verb(opened)

    return call


def group(verb: Callable[[rbd.Group], object]) -> Verb:
    return lambda io: verb(rbd.Group(io, "group"))


def snapshots(opened: rbd.Image) -> None:
    for snap in list(opened.list_snaps()):
        opened.snap_get_namespace_type(snap["id"])
        opened.snap_get_name(snap["id"])
        opened.get_snap_timestamp(snap["id"])
        if snap["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_USER:
            opened.is_protected_snap(snap["name"])
        elif snap["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_GROUP:
            opened.snap_get_group_namespace(snap["id"])
    opened.get_snap_limit()


def each_in_trash(verb: Callable[[ObjectContext, str], object]) -> Verb:
    def call(io: ObjectContext) -> None:
        for row in list(R.trash_list(io)):
            verb(io, row["id"])

    return call


def forget(opened: rbd.Image) -> None:
    with suppress(KeyError):  # what Ceph's module raises for a key that is not there
        opened.metadata_remove("key")


def trash(io: ObjectContext) -> None:
    for row in list(R.trash_list(io)):
        R.trash_get(io, row["id"])


LOOKS: dict[str, Verb] = {
    "list": lambda io: (R.list(io), list(R.list2(io))),
    "namespaces": lambda io: (R.namespace_list(io), R.namespace_exists(io, "space")),
    "trash": trash,
    "stats": R.pool_stats_get,
    "pool configuration": lambda io: (list(R.config_list(io)), list(R.pool_metadata_list(io))),
    "groups": R.group_list,
    "group images": group(lambda it: list(it.list_images())),
    "group snapshots": group(lambda it: (list(it.list_snaps()), it.get_snap_info("together"), it.id())),
    "migration": lambda io: R.migration_status(io, "coming"),
    "stat": image(lambda it: (it.stat(), it.flags(), it.features(), it.op_features(), it.create_timestamp())),
    "snapshots": image(snapshots),
    "parent": image(lambda it: (it.get_parent_image_spec(), it.overlap())),
    "children": image(lambda it: (list(it.list_children2()), list(it.list_descendants())), "base"),
    "metadata": image(lambda it: (list(it.metadata_list()), list(it.config_list())), "base"),
    "lockers": image(lambda it: (it.list_lockers(), list(it.watchers_list())), "base"),
    "owners": image(lambda it: (it.list_lockers(), list(it.lock_get_owners()))),
    "group of": image(lambda it: it.group()),
    "read": image(lambda it: it.read(0, 4096)),
    "read of a migrating image": image(lambda it: it.read(0, 4096), "coming"),
    "diff": image(lambda it: it.diff_iterate(0, MIB, None, lambda *found: None)),
}

CHANGES: dict[str, Verb] = {
    "write": image(lambda it: it.write(b"w", 0), read_only=False),
    "write to a migrating image": image(lambda it: it.write(b"w", 0), "coming", read_only=False),
    "resize": image(lambda it: it.resize(2 * MIB), read_only=False),
    "shrink": image(lambda it: it.resize(MIB // 2), read_only=False),
    "snap create": image(lambda it: it.create_snap("two"), read_only=False),
    "snap rename": image(lambda it: it.rename_snap("one", "two"), read_only=False),
    "snap remove": image(lambda it: it.remove_snap("one"), read_only=False),
    "snap roll back": image(lambda it: it.rollback_to_snap("one"), read_only=False),
    "unprotect": image(lambda it: it.unprotect_snap("s"), "base", read_only=False),
    "flatten": image(lambda it: it.flatten(), read_only=False),
    "features": image(lambda it: it.update_features(ft.OBJECT_MAP | ft.FAST_DIFF, False), read_only=False),
    "object map": image(lambda it: it.rebuild_object_map(), read_only=False),
    "sparsify": image(lambda it: it.sparsify(4096), read_only=False),
    "metadata set": image(lambda it: it.metadata_set("k", "v"), read_only=False),
    "metadata remove": image(forget, "base", read_only=False),
    "break lock": image(lambda it: it.break_lock("client.1", "cookie"), "base", read_only=False),
    "copy": image(lambda it: it.copy(it.ioctx, "copied")),
    "deep copy": image(lambda it: it.deep_copy(it.ioctx, "copied")),
    "clone": lambda io: R.clone(io, "base", "s", io, "second", FEATURES),
    "create": lambda io: R.create(io, "new", MIB, 20, False, FEATURES),
    "rename": lambda io: R.rename(io, "disk", "renamed"),
    "remove": lambda io: R.remove(io, "disk"),
    "trash move": lambda io: R.trash_move(io, "disk", 0),
    "trash restore": each_in_trash(lambda io, which: R.trash_restore(io, which, "back")),
    "trash remove": each_in_trash(lambda io, which: R.trash_remove(io, which, True)),
    "trash purge": lambda io: R.trash_purge(io, datetime.now() + timedelta(days=1)),
    "namespace remove": lambda io: R.namespace_remove(io, "space"),
    "pool configuration set": lambda io: R.config_set(io, "rbd_cache", "false"),
    "group add": group(lambda it: it.add_image(it.ctx, "base")),
    "group remove image": group(lambda it: it.remove_image(it.ctx, "disk")),
    "group snap create": group(lambda it: it.create_snap("again")),
    "group snap remove": group(lambda it: it.remove_snap("together")),
    "group snap rename": group(lambda it: it.rename_snap("together", "later")),
    "group snap roll back": group(lambda it: it.rollback_to_snap("together")),
    "group rename": lambda io: R.group_rename(io, "group", "renamed"),
    "group delete": lambda io: R.group_remove(io, "group"),
    "migration execute": lambda io: R.migration_execute(io, "coming"),
    "migration commit": lambda io: R.migration_commit(io, "coming"),
    "migration abort": lambda io: R.migration_abort(io, "coming"),
}


def ended(name: str, verb: Verb, io: ObjectContext) -> str:
    """What is wrong with how it ended; "" when nothing is."""
    began = time.monotonic()
    try:
        verb(io)
    except rbd.Error:
        pass
    except Exception as other:
        return f"{name}: not an error of the module: {other!r}"
    seconds = time.monotonic() - began
    return f"{name}: {seconds:.1f} s" if seconds > SECOND else ""


def bad_value(good: bytes, which: int) -> bytes | None:
    """None: it is missing."""
    return (
        None,
        b"",
        good[:-1],
        b"\xff" * max(len(good), 1),
        bytes(len(good)),
        struct.pack("<I", 1 << 31) + good,
        b"\xff" * 4096,
    )[which]


# What a sound world refuses: nobody has that lock, snapshots are in the way, the trash holds the source of a migration,
# which is not executed yet.
REFUSED = frozenset({"break lock", "remove", "trash restore", "trash remove", "migration commit"})

Damage = tuple[str, str, bytes | None]  # (object, "omap" | "xattr" | "data" | "object", key)


def labels(io: ObjectContext) -> dict[str, str]:
    """Ids, which are others in each world, and whose they are."""
    found = {row["id"]: row["name"] for row in R.trash_list(io)}
    for name in R.list(io):
        with rbd.Image(io, name, read_only=True) as opened:
            found[opened.id()] = name
    it = rbd.Group(io, "group")
    return found | {it.id(): "group", it.get_snap_info("together")["id"]: "together"}


def records(io: ObjectContext) -> list[Damage]:
    """All there is to damage, in an order that is the same in each world."""
    names = labels(io)

    def place(record: Damage) -> tuple[str, str, str]:
        oid, key = record[0], (record[2] or b"").decode(errors="replace")
        for some_id, name in names.items():
            oid, key = oid.replace(some_id, name), key.replace(some_id, name)
        return oid, record[1], key

    found: list[Damage] = []
    for oid in io.objects():
        if oid.startswith("rbd_data.") or oid in STRANGE:
            continue
        found.append((oid, "object", None))
        rows, _ = io.read(oid, [OmapGetVals(b"", b"", 1024)])[0]
        found += [(oid, "omap", key) for key in rows]
        found += [(oid, "xattr", name.encode()) for name in io.read(oid, [GetXattrs()])[0]]
        if io.stat(oid).size:
            found.append((oid, "data", None))
    return sorted(found, key=place)


def damage(io: ObjectContext, where: Damage, which: int) -> bool:
    """False: this value makes no sense there."""
    oid, kind, key = where
    if kind == "object":
        if which:
            return False
        io.write(oid, [Remove()])
    elif kind == "omap":
        assert key is not None
        good = io.read(oid, [OmapGetVals(b"", key, 1024)])[0][0][key]
        bad = bad_value(good, which)
        if bad == good:
            return False
        io.write(oid, [OmapRmKeys([key]) if bad is None else OmapSet({key: bad})])
    elif kind == "xattr":
        assert key is not None
        name = key.decode()
        bad = bad_value(io.read(oid, [GetXattrs()])[0][name], which)
        io.write(oid, [RmXattr(name) if bad is None else SetXattr(name, bad)])
    else:
        good = io.read(oid, [Read(0, 1 << 20)])[0]
        bad = bad_value(good, which)
        io.write(oid, [Truncate(0), *([Write(0, bad)] if bad else [])])
    return True


with world() as _io:
    NUMBER = len(records(_io))


def test_there_is_one_of_everything() -> None:
    with world() as io:
        for verb in LOOKS.values():
            verb(io)
    for name, verb in CHANGES.items():
        with world() as io:
            try:
                verb(io)
            except rbd.Error as error:  # in the way of others' records only, not for a mistake of this list
                assert name in REFUSED, (name, error)
            else:
                assert name not in REFUSED


@pytest.mark.parametrize("which", range(VALUES))
def test_looks_at_damaged_records(which: int) -> None:
    wrong: list[str] = []
    for number in range(NUMBER):
        with world() as io:
            where = records(io)[number]
            if damage(io, where, which):
                found = [ended(name, verb, io) for name, verb in LOOKS.items()]
                wrong += [f"{where}: {text}" for text in found if text]
    assert not wrong, "\n".join(wrong[:40])


@pytest.mark.parametrize("which", range(VALUES))
def test_changes_of_damaged_records(which: int) -> None:
    """One change a world: each value of each record meets some of them, in turns."""
    wrong: list[str] = []
    changes = list(CHANGES.items())
    for number in range(NUMBER):
        for turn in range(TURNS):
            name, verb = changes[(number * TURNS + turn + which * 5) % len(changes)]
            with world() as io:
                where = records(io)[number]
                if damage(io, where, which) and (text := ended(name, verb, io)):
                    wrong.append(f"{where}: {text}")
    assert not wrong, "\n".join(wrong[:40])

"""Records that are whole and lie: what they point at is not there, is the image itself, or leads back to it. Each verb
ends within a second, well or with an error of the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from test_metadata_hostile import MIB, R, Verb, ended, image, world

from librbd_py import rbd
from librbd_py.format import header as fh
from librbd_py.format.values import replace
from librbd_py.image.header import header_oid
from librbd_py.store.api import NOSNAP, GetXattrs, ObjectContext, OmapGetVals, OmapSet, SetXattr
from librbd_py.store.check.pools import check


def id_of(io: ObjectContext, name: str) -> str:
    with rbd.Image(io, name, read_only=True) as opened:
        return str(opened.id())


def ends(io: ObjectContext) -> dict[str, str]:
    """The headers of both images of the migration."""
    source = next(row["id"] for row in R.trash_list(io) if row["name"] == "leaving")
    return {"leaving": header_oid(source), "coming": header_oid(id_of(io, "coming"))}


def own(oid: str) -> str:
    return oid.partition(".")[2]


RECORDS: dict[str, Callable[[fh.MigrationSpec, dict[str, str], str], fh.MigrationSpec]] = {
    "no such image": lambda spec, oids, who: replace(spec, image_id="1234567890ab", image_name="nobody"),
    "no such pool": lambda spec, oids, who: replace(spec, pool_id=999),
    "a pool below nothing": lambda spec, oids, who: replace(spec, pool_id=-1),
    "no such namespace": lambda spec, oids, who: replace(spec, pool_namespace="nowhere"),
    "itself": lambda spec, oids, who: replace(spec, image_id=own(oids[who]), image_name=who),
    "both are sources": lambda spec, oids, who: replace(spec, header_type=fh.MIGRATION_SOURCE),
    "both are destinations": lambda spec, oids, who: replace(spec, header_type=fh.MIGRATION_DESTINATION),
    "no such type": lambda spec, oids, who: replace(spec, header_type=77),
    "no such state": lambda spec, oids, who: replace(spec, state=77),
    "endless overlap": lambda spec, oids, who: replace(spec, overlap=(1 << 64) - 1),
    "snapshots that are none": lambda spec, oids, who: replace(spec, snap_seqs={1 << 40: 7, 5: NOSNAP, NOSNAP: 1}),
    "a stream of nothing": lambda spec, oids, who: replace(
        spec, source_spec='{"type": "raw"}', pool_id=-1, image_id=""
    ),
    "a stream of itself": lambda spec, oids, who: replace(
        spec, source_spec='{"type": "native", "pool_name": "rbd", "image_name": "coming"}', pool_id=-1, image_id=""
    ),
    "a name that is none": lambda spec, oids, who: replace(spec, image_name="a/b@c\0", image_id="../x"),
}

VERBS: dict[str, Verb] = {
    "list": lambda io: (R.list(io), list(R.trash_list(io))),
    "status": lambda io: R.migration_status(io, "coming"),
    "status of the source": lambda io: R.migration_status(io, "leaving"),
    "stat": image(
        lambda it: (it.stat(), it.flags(), it.migration_spec() if hasattr(it, "migration_spec") else 0), "coming"
    ),
    "parent": image(lambda it: (it.overlap(), it.get_parent_image_spec()), "coming"),
    "read": image(lambda it: it.read(0, 4096), "coming"),
    "diff": image(lambda it: it.diff_iterate(0, MIB, None, lambda *found: None), "coming"),
    "write": image(lambda it: it.write(b"w", 0), "coming", read_only=False),
    "resize": image(lambda it: it.resize(2 * MIB), "coming", read_only=False),
    "shrink": image(lambda it: it.resize(MIB // 2), "coming", read_only=False),
    "snap create": image(lambda it: it.create_snap("two"), "coming", read_only=False),
    "flatten": image(lambda it: it.flatten(), "coming", read_only=False),
    "copy": image(lambda it: it.copy(it.ioctx, "copied"), "coming"),
    "deep copy": image(lambda it: it.deep_copy(it.ioctx, "copied"), "coming"),
    "clone of it": lambda io: R.clone(io, "coming", "s", io, "second"),
    "rename": lambda io: R.rename(io, "coming", "renamed"),
    "remove": lambda io: R.remove(io, "coming"),
    "trash move": lambda io: R.trash_move(io, "coming", 0),
    "migrate on": lambda io: R.migration_prepare(io, "coming", io, "further"),
    "execute": lambda io: R.migration_execute(io, "coming"),
    "commit": lambda io: (R.migration_execute(io, "coming"), R.migration_commit(io, "coming")),
    "abort": lambda io: R.migration_abort(io, "coming"),
    "abort by the source": lambda io: R.migration_abort(io, "leaving"),
    "check": lambda io: check(io.store),
}


def spec_of(io: ObjectContext, oid: str) -> fh.MigrationSpec:
    return fh.MigrationSpec.decode(io.read(oid, [OmapGetVals(b"", fh.MIGRATION_KEY, 1)])[0][0][fh.MIGRATION_KEY])


@pytest.mark.parametrize("who", ["coming", "leaving"])
@pytest.mark.parametrize("lie", RECORDS)
def test_a_migration_that_leads_elsewhere(lie: str, who: str) -> None:
    wrong = []
    for name, verb in VERBS.items():
        with world() as io:
            oids = ends(io)
            io.write(oids[who], [OmapSet({fh.MIGRATION_KEY: RECORDS[lie](spec_of(io, oids[who]), oids, who).encode()})])
            wrong.append(ended(name, verb, io))
    assert not any(wrong), "\n".join(filter(None, wrong))


def in_a_circle(io: ObjectContext, length: int) -> None:
    """Images that each migrate from the next, the last one from "coming"."""
    first = ends(io)["coming"]
    last, spec = first, spec_of(io, first)
    for number in range(length):
        R.create(io, f"link{number}", MIB, 20)
        oid = header_oid(id_of(io, f"link{number}"))
        io.write(last, [OmapSet({fh.MIGRATION_KEY: replace(spec, image_id=own(oid), image_name=oid).encode()})])
        last = oid
    io.write(last, [OmapSet({fh.MIGRATION_KEY: replace(spec, image_id=own(first), image_name="coming").encode()})])


@pytest.mark.parametrize("length", [1, 40])
def test_migrations_in_a_circle(length: int) -> None:
    wrong = []
    for name, verb in VERBS.items():
        with world() as io:
            in_a_circle(io, length)
            wrong.append(ended(name, verb, io))
    assert not any(wrong), "\n".join(filter(None, wrong))


def test_a_source_that_is_a_clone_of_its_destination() -> None:
    wrong = []
    for name, verb in VERBS.items():
        with world() as io:
            oids = ends(io)
            snap = fh.Snap(1, "s", MIB)
            io.write(oids["coming"], [OmapSet({fh.snap_key(1): snap.encode()})])
            parent = fh.Parent(fh.ParentImageSpec(io.pool_id, "", own(oids["coming"]), 1), MIB)
            io.write(oids["leaving"], [OmapSet({b"parent": parent.encode()})])
            wrong.append(ended(name, verb, io))
    assert not any(wrong), "\n".join(filter(None, wrong))


SNAPSHOTS: dict[str, Any] = {
    "of a mirror": fh.MirrorNamespace(0, True, ("peer",), "uuid", 12345, 1 << 60, {1: 2}),
    "of a mirror, half made": fh.MirrorNamespace(255, False, (), "\0", NOSNAP, (1 << 64) - 1, {NOSNAP: 0}),
    "of a group that is none": fh.GroupNamespace(999, "nothing", "nobody"),
    "of a group below nothing": fh.GroupNamespace(-1, "", ""),
    "in the trash": fh.TrashNamespace("s", fh.NAMESPACE_MIRROR),
    "in the trash, from the trash": fh.TrashNamespace("one", fh.NAMESPACE_TRASH),
    "of a later Ceph": fh.UnknownNamespace(77, b"\xff" * 40),
}


def each_snapshot(it: rbd.Image) -> None:
    for snap in list(it.list_snaps()):
        kind = it.snap_get_namespace_type(snap["id"])
        if kind == rbd.RBD_SNAP_NAMESPACE_TYPE_MIRROR:
            it.snap_get_mirror_namespace(snap["id"])
        if kind == rbd.RBD_SNAP_NAMESPACE_TYPE_GROUP:
            it.snap_get_group_namespace(snap["id"])
        if kind == rbd.RBD_SNAP_NAMESPACE_TYPE_TRASH:
            it.snap_get_trash_namespace(snap["id"])
        it.set_snap_by_id(snap["id"])
        it.read(0, 100)
        it.set_snap(None)


def forget_each(it: rbd.Image) -> None:
    for snap in list(it.list_snaps()):
        it.remove_snap_by_id(snap["id"])


OF_SNAPSHOTS: dict[str, Verb] = {
    "each": image(each_snapshot),
    "remove each": image(forget_each, read_only=False),
    "remove by name": image(lambda it: it.remove_snap("one"), read_only=False),
    "protect": image(lambda it: it.protect_snap("one"), read_only=False),
    "rename": image(lambda it: it.rename_snap("one", "two"), read_only=False),
    "roll back": image(lambda it: it.rollback_to_snap("one"), read_only=False),
    "write": image(lambda it: it.write(b"w", 0), read_only=False),
    "flatten": image(lambda it: it.flatten(), read_only=False),
    "diff": image(lambda it: it.diff_iterate(0, MIB, "one", lambda *found: None)),
    "clone": lambda io: R.clone(io, "disk", "one", io, "second"),
    "deep copy": image(lambda it: it.deep_copy(it.ioctx, "copied")),
    "migrate": lambda io: R.migration_prepare(io, "disk", io, "elsewhere"),
    "remove": lambda io: R.remove(io, "disk"),
    "trash": lambda io: R.trash_move(io, "disk", 0),
    "check": lambda io: check(io.store),
}


@pytest.mark.parametrize("kind", SNAPSHOTS)
def test_snapshots_of_every_kind(kind: str) -> None:
    """The user's snapshot "one" becomes one of this kind, whole and with its record cut short at every byte."""
    wrong = []
    for turn, (name, verb) in enumerate(OF_SNAPSHOTS.items()):
        for cut in (None, turn):
            with world() as io:
                oid = header_oid(id_of(io, "disk"))
                rows = io.read(oid, [OmapGetVals(b"", b"snapshot_", 100)])[0][0]
                key, snap = next(
                    (k, s) for k, s in ((k, fh.Snap.decode(v)) for k, v in rows.items()) if s.name == "one"
                )
                raw = replace(snap, namespace=SNAPSHOTS[kind]).encode()
                io.write(oid, [OmapSet({key: raw if cut is None else raw[: -1 - cut]})])
                wrong.append(ended(name, verb, io))
    assert not any(wrong), "\n".join(filter(None, wrong))


LOCKS = {
    "another name's": b"\1\1\4\0\0\0\0\0\0\0",
    "endless": b"\1\1\xff\xff\xff\xff",
    "a million lockers": b"\1\1\x08\0\0\0\x40\x42\x0f\0\1\0\0\0",
}


@pytest.mark.parametrize("value", LOCKS)
@pytest.mark.parametrize("where", ["header", "map"])
def test_locks_that_are_none(where: str, value: str) -> None:
    verbs: dict[str, Verb] = {
        "lockers": image(lambda it: (it.list_lockers(), list(it.watchers_list()), list(it.lock_get_owners()))),
        "take": image(lambda it: it.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE), read_only=False),
        "break": image(lambda it: it.lock_break(rbd.RBD_LOCK_MODE_EXCLUSIVE, "client.1"), read_only=False),
        "lock": image(lambda it: it.lock_exclusive("cookie"), read_only=False),
        "write": image(lambda it: it.write(b"w", 0), read_only=False),
        "remove": lambda io: R.remove(io, "disk"),
    }
    wrong = []
    for name, verb in verbs.items():
        with world() as io:
            number = id_of(io, "disk")
            oid = header_oid(number) if where == "header" else f"rbd_object_map.{number}"
            assert isinstance(io.read(oid, [GetXattrs()])[0], dict)
            io.write(oid, [SetXattr("lock.rbd_lock", LOCKS[value])])
            wrong.append(ended(name, verb, io))
    assert not any(wrong), "\n".join(filter(None, wrong))

"""Calls about groups, quiesce flags and configuration on any module with the interface of Ceph's `rbd`: what each gives
or raises. Ours and Ceph's own run the same code (this file is also read by /usr/bin/python3).

usage: python groups_program.py CONF POOL -> one JSON object
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

MIB = 1 << 20


def outcomes(modules: tuple[Any, Any], conf: str, pool: str) -> dict[str, Any]:
    rados, rbd = modules
    cluster = rados.Rados(conffile=conf)
    cluster.connect()
    io, inside = cluster.open_ioctx(pool), cluster.open_ioctx(pool)
    inside.set_namespace("space")
    r = rbd.RBD()
    r.pool_init(io, True)
    found: dict[str, Any] = {}

    def note(what: str, call: Callable[..., Any], *args: Any) -> Any:
        assert what not in found, what
        try:
            result = call(*args)
        except Exception as failure:
            result = [type(failure).__name__, getattr(failure, "errno", None)]
        found[what] = result
        return result

    for name in ("a", "b"):
        r.create(io, name, 8 * MIB)
    note("create", r.group_create, io, "g")
    note("create again", r.group_create, io, "g")
    note("create without a name", r.group_create, io, "")
    r.group_create(io, "h")
    note("list", lambda: sorted(r.group_list(io)))
    note("remove none", r.group_remove, io, "no")
    note("rename none", r.group_rename, io, "no", "x")
    note("rename to another", r.group_rename, io, "g", "h")
    note("rename to itself", r.group_rename, io, "g", "g")
    note("rename to nothing", r.group_rename, io, "g", "")
    group, other, none = rbd.Group(io, "g"), rbd.Group(io, "h"), rbd.Group(io, "no")
    for method in ("add_image", "remove_image"):
        note(f"{method}: no group", getattr(none, method), io, "a")
        note(f"{method}: no image", getattr(group, method), io, "no")
        note(f"{method}: no text", getattr(group, method), io, None)
    for method in ("create_snap", "remove_snap", "rollback_to_snap"):
        note(f"{method}: no group", getattr(none, method), "s")
    note("rename_snap: no group", none.rename_snap, "s", "t")
    note("list_images: no group", lambda: list(none.list_images()))
    note("list_snaps: no group", lambda: list(none.list_snaps()))

    note("remove what is no member", group.remove_image, io, "a")
    note("add", group.add_image, io, "a")
    note("add again", group.add_image, io, "a")
    note("add to another", other.add_image, io, "a")
    note("remove from another", other.remove_image, io, "a")
    note("members", lambda: [[row["name"], row["state"]] for row in group.list_images()])
    r.namespace_create(io, "space")
    r.create(inside, "n", MIB)
    note("add from a namespace", group.add_image, inside, "n")
    with rbd.Image(io, "a") as image:
        note("group of a member", lambda: image.group()["name"])
        note("operations of a member", image.op_features)
        image.write(b"first", 0)
    with rbd.Image(io, "b") as image:
        note("group of none", image.group)
    note("snapshot", group.create_snap, "s")
    note("snapshot again", group.create_snap, "s")
    note("snapshot without a name", group.create_snap, "")
    note("snapshot with unknown flags", group.create_snap, "f", 8)
    note("snapshot without quiesce", group.create_snap, "t", rbd.RBD_SNAP_CREATE_SKIP_QUIESCE)
    note("snapshots", lambda: sorted([row["name"], row["state"]] for row in group.list_snaps()))
    note("rename to the same", group.rename_snap, "s", "s")
    note("rename no snapshot", group.rename_snap, "no", "x")
    note("rename to another's", group.rename_snap, "s", "t")
    note("rename a snapshot", group.rename_snap, "s", "r")
    note("remove no snapshot", group.remove_snap, "no")
    note("roll back to none", group.rollback_to_snap, "no")
    with rbd.Image(io, "a") as image:
        rows = list(image.list_snaps())
        note(
            "of the image",
            lambda: [[row["namespace"], row["group"]["name"], row["group"]["snap_name"]] for row in rows],
        )
        first = rows[0]
        note("by id", lambda: image.snap_get_group_namespace(first["id"])["snap_name"])
        note("kind", image.snap_get_namespace_type, first["id"])
        note("as of the trash", image.snap_get_trash_namespace, first["id"])
        for method in (
            "remove_snap",
            "protect_snap",
            "unprotect_snap",
            "rollback_to_snap",
            "set_snap",
            "is_protected_snap",
        ):
            note(f"{method} by the name of a member's", getattr(image, method), first["name"])
        note("exists by name", image.snap_exists, first["name"])
        note("rename by name", image.rename_snap, first["name"], "x")
        note("clone by name", r.clone, io, "a", first["name"], io, "c")
        note("create with unknown flags", image.create_snap, "x", 8)
        image.write(b"later", 0)
    note("roll back", group.rollback_to_snap, "r")
    with rbd.Image(io, "a") as image:
        note("rolled back", lambda: image.read(0, 5).decode())
        image_id = image.id()
    note("remove a member with snapshots", r.remove, io, "a")
    note("to the trash", r.trash_move, io, "a")
    note("members without the trash", lambda: list(group.list_images()))
    note("remove it from the trash", r.trash_remove, io, image_id)
    note("back", r.trash_restore, io, image_id, "a")
    note("members again", lambda: [[row["name"], row["state"]] for row in group.list_images()])
    with rbd.Image(io, "a") as image:
        note("remove a member's snapshot by id", image.remove_snap_by_id, first["id"])
        note("what is left", lambda: [row["group"]["snap_name"] for row in image.list_snaps()])
    note("roll back without it", group.rollback_to_snap, "r")
    note("remove its record", group.remove_snap, "r")
    note("leave", group.remove_image, io, "a")
    note("snapshots of who left", lambda: len(list(group.list_snaps())))
    note("remove with snapshots", r.group_remove, io, "g")
    with rbd.Image(io, "a") as image:
        note("snapshots left", lambda: len(list(image.list_snaps())))
        note("group left", image.group)
    note("remove the image", r.remove, io, "a")
    note("group in a namespace", r.group_create, inside, "gn")
    note("remove a namespace with an image", r.namespace_remove, io, "space")
    r.remove(inside, "n")
    note("remove a namespace with a group", r.namespace_remove, io, "space")
    note("groups of no namespace", r.group_list, inside)

    with rbd.Image(io, "b") as image:
        for name, value in (
            ("rbd_cache", "false"),
            ("rbd_cache", "on"),
            ("rbd_cache_size", "4K"),
            ("rbd_cache_size", "-1"),
            ("rbd_default_order", "20"),
            ("rbd_nonsense", "1"),
            ("rbd_cache_policy", "writeback"),
            ("rbd_cache_max_dirty_age", "1.5"),
        ):
            note(f"image option {name} {value}", image.config_set, name, value)
            note(f"pool option {name} {value}", r.config_set, io, name, value)
        rows = [[row["name"], row["source"]] for row in image.config_list()]
        note("options of the image", lambda: sorted(rows))
        note("options of the pool", lambda: sorted([row["name"], row["source"]] for row in r.config_list(io)))
        note("values", lambda: sorted([row["name"], row["value"]] for row in image.config_list() if row["source"]))
        note("an option nobody set", image.config_get, "rbd_qos_iops_limit")
    for closing in (io, inside):
        closing.close()
    cluster.shutdown()
    return found


if __name__ == "__main__":
    import rados as their_rados  # type: ignore[import-not-found]
    import rbd as their_rbd  # type: ignore[import-not-found]

    print(json.dumps(outcomes((their_rados, their_rbd), *sys.argv[1:])))

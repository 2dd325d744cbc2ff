"""Removes all that a pool shows, with any module that has the interface of Ceph's `rbd` (/usr/bin/python3 reads this,
too): what an administrator would do who has nothing else."""

from __future__ import annotations

from typing import Any


def clean(rbd: Any, io: Any) -> list[str]:
    """What could not be done."""
    r, problems = rbd.RBD(), []

    def tried(what: str, call: Any, *args: Any) -> bool:
        try:
            call(*args)
        except rbd.Error as failure:
            problems.append(f"{what}: {failure!r}")
            return False
        return True

    for name in r.group_list(io):
        group = rbd.Group(io, name)
        for snap in list(group.list_snaps()):
            tried(f"group snapshot {snap['name']}", group.remove_snap, snap["name"])
        tried(f"group {name}", r.group_remove, io, name)
    for name in r.namespace_list(io):
        tried(f"namespace {name}", r.namespace_remove, io, name)
    for _ in range(4):  # clones go before their parents, half a destination before its migration can be aborted
        for name in [*r.list(io), "disk"]:  # that one is in the trash
            for end in (r.migration_commit, r.migration_abort):
                try:
                    end(io, name)
                    break
                except rbd.Error:
                    continue  # it does not migrate, or has not come so far
        del problems[:]
        for name in r.list(io):
            tried(f"snapshots of {name}", remove_snaps, rbd, io, name)
            tried(f"image {name}", r.remove, io, name)
        for row in trash(r, io):
            tried(f"snapshots of {row['name']}", remove_snaps, rbd, io, None, row["id"])
            try:
                r.trash_remove(io, row["id"], True)
            except rbd.ImageBusy:  # half restored
                tried(f"trash {row['name']}", r.trash_restore, io, row["id"], row["name"])
                problems.append(f"{row['name']} is restored, and not yet removed")
            except rbd.Error as failure:
                problems.append(f"trash {row['name']}: {failure!r}")
    return problems


def trash(r: Any, io: Any) -> list[Any]:
    try:
        return list(r.trash_list(io))
    except IndexError:  # python3-rbd 16.2.15 does not know of migrations there
        return []


def remove_snaps(rbd: Any, io: Any, name: str | None, image_id: str | None = None) -> None:
    try:
        image = rbd.Image(io, name, image_id=image_id)
    except rbd.ImageNotFound:
        return  # half an image has a name to remove it by, and nothing to open
    with image:
        for snap in list(image.list_snaps()):
            if snap["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_USER:
                if image.is_protected_snap(snap["name"]):
                    image.unprotect_snap(snap["name"])
                image.remove_snap(snap["name"])
            elif not list(image.list_children2()):
                image.remove_snap_by_id(snap["id"])

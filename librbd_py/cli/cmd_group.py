"""`rbdpy group ...`: groups of images and snapshots of whole groups."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from librbd_py.cli.arguments import FORMAT, GROUP, GROUP_SNAP, POOL
from librbd_py.cli.cmd_snap import quiesce_flags
from librbd_py.cli.failure import Failure, code_of
from librbd_py.cli.output import Rows, Section, Table
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session, Spec, failing, failures

_MEMBER = (
    "group-pool",
    "group-namespace",
    "group",
    "image-pool",
    "image-namespace",
    "image",
    "pool:pool name unless overridden",
)
_SOURCE = ("pool:source pool name", "namespace:source namespace name", "group:source group name")
_DEST = ("dest-pool", "dest-namespace", "dest-group")


@contextmanager
def _missing_is_empty() -> Iterator[None]:
    """A group that is not there has nothing in it and need not be removed: so does rbd."""
    try:
        yield
    except failures() as error:
        if code_of(error) != 2:
            raise


def _calls() -> Any:
    from librbd_py import rbd

    return rbd.RBD()


def _group(session: Session, spec: Spec) -> Any:
    from librbd_py import rbd

    return rbd.Group(session.ioctx(spec), spec.image)


@verb("group create", "Create a group.", *GROUP, spec=("group-spec",))
def create(session: Session) -> None:
    spec = session.spec(kind="group", check="full")
    ioctx = session.ioctx(spec)
    with failing("create error"):
        _calls().group_create(ioctx, spec.image)


@verb("group list", "List rbd groups.", *POOL, *FORMAT, spec=("pool-spec",), alias="group ls")
def list_groups(session: Session) -> None:
    spec = session.pool_spec()
    session.layout()
    ioctx = session.ioctx(spec)
    with failing("listing groups failed"):
        names = list(_calls().group_list(ioctx))
    if session.plain:
        sys.stdout.write("".join(f"{name}\n" for name in names))
    else:
        session.show(Rows("groups", names, item="name"))


@verb("group remove", "Delete a group.", *GROUP, spec=("group-spec",), alias="group rm")
def remove(session: Session) -> None:
    spec = session.spec(kind="group")
    ioctx = session.ioctx(spec)
    with failing("remove error"), _missing_is_empty():
        _calls().group_remove(ioctx, spec.image)


@verb("group rename", "Rename a group within pool.", *_SOURCE, *_DEST, spec=("source-group-spec", "dest-group-spec"))
def rename(session: Session) -> None:
    source = session.spec(kind="group")
    dest = session.spec(kind="group", dest=True, check="full")
    dest = dest._replace(pool=dest.pool or source.pool, namespace=dest.namespace or source.namespace)
    if source.pool != dest.pool:
        text = f"rbd: group rename across pools not supported\nsource pool: {source.pool}, dest pool: {dest.pool}"
        raise Failure(text, 22)
    if source.namespace != dest.namespace:
        raise Failure(
            "rbd: group rename across namespaces not supported\n"
            f"source namespace: {source.namespace}, dest namespace: {dest.namespace}",
            22,
        )
    ioctx = session.ioctx(source)
    with failing("failed to rename group"):
        _calls().group_rename(ioctx, source.image, dest.image)


def _member(session: Session, need_image: bool = True) -> tuple[Spec, Spec]:
    default = {"pool": session.given.get("pool", "")}
    group = session.spec(kind="group", pool_option="group-pool", namespace_option="group-namespace")
    image = session.spec(need=need_image, pool_option="image-pool", namespace_option="image-namespace")
    group = group._replace(pool=group.pool or default["pool"])
    image = image._replace(pool=image.pool or default["pool"])
    if group.namespace != image.namespace:
        raise Failure("rbd: group and image namespace must match.", 22)
    return group, image


@verb("group image add", "Add an image to a group.", *_MEMBER, spec=("group-spec", "image-spec"))
def image_add(session: Session) -> None:
    spec, image = _member(session)
    group, ioctx = _group(session, spec), session.ioctx(image)
    with failing("add image error"):
        group.add_image(ioctx, image.image)


@verb(
    "group image remove",
    "Remove an image from a group.",
    *_MEMBER,
    "image-id",
    spec=("group-spec", "image-spec"),
    alias="group image rm",
)
def image_remove(session: Session) -> None:
    image_id = session.option("image-id") or ""
    spec, image = _member(session, need_image=not image_id)
    if image_id and image.image:
        raise Failure("rbd: trying to access image using both name and id. ", 22)
    group, ioctx = _group(session, spec), session.ioctx(image)
    with failing("remove image error"):
        if image_id:
            from librbd_py.image.group import remove_image_by_id

            remove_image_by_id(group.ctx, spec.image, ioctx.context.pool_id, image_id)
        else:
            group.remove_image(ioctx, image.image)


@verb(
    "group image list",
    "List images in a group.",
    *FORMAT,
    *GROUP,
    spec=("group-spec",),
    alias="group image ls",
)
def image_list(session: Session) -> None:
    spec = session.spec(kind="group")
    session.layout()
    group = _group(session, spec)
    rows = []
    with failing("listing images failed"), _missing_is_empty():
        for image in group.list_images():
            pool = str(session.cluster.pool_reverse_lookup(image["pool"]))
            rows.append((image["name"], pool, image.get("namespace", spec.namespace), image["state"]))
    rows.sort()
    if session.plain:
        for name, pool, namespace, state in rows:
            print(Spec(pool, namespace, name).text() + (" incomplete" if state else " "))
        return
    shown = [
        Section("image", {"image": name, "pool": pool, "namespace": namespace, "state": state})
        for name, pool, namespace, state in rows
    ]
    session.show(Rows("images", shown))


@verb(
    "group snap create",
    "Make a snapshot of a group.",
    *GROUP_SNAP,
    "skip-quiesce",
    "ignore-quiesce-error",
    spec=("group-snap-spec",),
)
def snap_create(session: Session) -> None:
    spec, flags = session.spec(kind="group", snap="must", check="full"), quiesce_flags(session)
    group = _group(session, spec)
    with failing("failed to create group snapshot"):
        group.create_snap(spec.snap, flags)


@verb(
    "group snap remove",
    "Remove a snapshot from a group.",
    *GROUP_SNAP,
    spec=("group-snap-spec",),
    alias="group snap rm",
)
def snap_remove(session: Session) -> None:
    spec = session.spec(kind="group", snap="must")
    group = _group(session, spec)
    with failing("failed to remove group snapshot"):
        group.remove_snap(spec.snap)


@verb(
    "group snap rename",
    "Rename group's snapshot.",
    *GROUP_SNAP,
    "dest-snap",
    spec=("group-snap-spec", "dest-snap:destination snapshot name\n(example: <snap-name>)"),
)
def snap_rename(session: Session) -> None:
    spec = session.spec(kind="group", snap="must")
    new = session.option("dest-snap") or session.word()
    if not new:
        raise Failure("rbd: destination snapshot name was not specified", 22)
    if "@" in new or "/" in new:
        raise Failure(f"rbd: invalid snap name '{new}'", 22)
    group = _group(session, spec)
    with failing("failed to rename group snapshot"):
        group.rename_snap(spec.snap, new)


@verb(
    "group snap list",
    "List snapshots of a group.",
    *FORMAT,
    *GROUP,
    spec=("group-spec",),
    alias="group snap ls",
)
def snap_list(session: Session) -> None:
    spec = session.spec(kind="group")
    session.layout()
    group = _group(session, spec)
    snaps = []
    with failing("listing group snapshots failed"), _missing_is_empty():
        snaps = [(snap["name"], "ok" if snap["state"] else "incomplete") for snap in group.list_snaps()]
    if not session.plain:
        rows = [Section("group_snap", {"snapshot": name, "state": state}) for name, state in snaps]
        session.show(Rows("group_snaps", rows))
    elif snaps:
        table = Table(("NAME", "left"), ("STATUS", "right"))
        for name, state in snaps:
            table.add(name, state)
        sys.stdout.write(table.text())


@verb(
    "group snap rollback",
    "Rollback group to snapshot.",
    "no-progress",
    *GROUP_SNAP,
    spec=("group-snap-spec",),
)
def snap_rollback(session: Session) -> None:
    spec = session.spec(kind="group", snap="must")
    group = _group(session, spec)
    with failing("rollback group to snapshot failed"):
        with session.progress("Rolling back to group snapshot") as progress:
            group.rollback_to_snap(spec.snap, progress)

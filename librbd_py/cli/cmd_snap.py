"""`rbdpy snap ...`: create, list, remove, purge, protect, unprotect, rollback, rename, limit."""

from __future__ import annotations

import sys
from typing import Any

from librbd_py.cli.arguments import DEST, FORMAT, IMAGE, SNAP, SOURCE_SNAP
from librbd_py.cli.cmd_list import stamp
from librbd_py.cli.failure import Failure, code_of, reason
from librbd_py.cli.output import Rows, Section, Table, size_text
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session, failing, failures

NAMESPACES = {0: "user", 1: "group", 2: "trash", 3: "mirror"}


def quiesce_flags(session: Session) -> int:
    """Of the two options; Failure (22) for both."""
    from librbd_py.rbd.constants import RBD_SNAP_CREATE_IGNORE_QUIESCE_ERROR, RBD_SNAP_CREATE_SKIP_QUIESCE

    skip, ignore = session.option("skip-quiesce"), session.option("ignore-quiesce-error")
    if skip and ignore:
        raise Failure("rbd: ignore-quiesce-error cannot be used together with skip-quiesce", 22)
    return RBD_SNAP_CREATE_SKIP_QUIESCE if skip else RBD_SNAP_CREATE_IGNORE_QUIESCE_ERROR if ignore else 0


@verb(
    "snap create",
    "Create a snapshot.",
    *SNAP,
    "skip-quiesce",
    "ignore-quiesce-error",
    "no-progress",
    spec=("snap-spec",),
    alias="snap add",
)
def create(session: Session) -> None:
    spec, flags = session.spec(snap="must", check="snap"), quiesce_flags(session)
    with session.image(spec) as image, failing("failed to create snapshot"):
        with session.progress("Creating snap"):
            image.create_snap(spec.snap, flags)


def user_snaps(image: Any) -> list[dict[str, Any]]:
    return [snap for snap in image.list_snaps() if not snap["namespace"]]


@verb(
    "snap list",
    "Dump list of image snapshots.",
    *IMAGE,
    "image-id",
    *FORMAT,
    "all:list snapshots from all namespaces",
    spec=("image-spec",),
    alias="snap ls",
)
def list_snaps(session: Session) -> None:
    from librbd_py.image.listing import snapshots_of

    everything = bool(session.option("all"))
    spec = session.spec(need=not session.option("image-id"))
    image_id = session.by_name_or_id(spec)
    session.layout()
    rows = Rows("snapshots")
    with session.image(spec, read_only=True, image_id=image_id) as image, failing("failed to list snapshots"):
        for snap in snapshots_of(image.handle):
            if snap.namespace_type and not everything:
                continue
            row = Section("snapshot", {"id": snap.id, "name": snap.name, "size": snap.size})
            row["protected"] = "true" if snap.protected else "false"
            row["timestamp"] = stamp(image.get_snap_timestamp(snap.id))
            if everything:
                row["namespace"] = _namespace(session, image, snap.id, snap.namespace_type)
            rows.append(row)
    if not session.plain:
        session.show(rows)
    elif rows:
        _show(rows, everything)


def _namespace(session: Session, image: Any, snap_id: int, kind: int) -> Section:
    found = Section("namespace", {"type": NAMESPACES.get(kind, f"unknown ({kind})")})
    if kind == 1:
        group = image.snap_get_group_namespace(snap_id)
        found["pool"] = session.cluster.pool_reverse_lookup(group["pool"])
        found |= {"group": group["name"], "group snap": group["snap_name"]}
    elif kind == 2:
        trash = image.snap_get_trash_namespace(snap_id)
        found["original_name"] = trash["original_name"]
    return found


def _show(rows: Rows, everything: bool) -> None:
    columns = [("SNAPID", "right"), ("NAME", "left"), ("SIZE", "right"), ("PROTECTED", "left"), ("TIMESTAMP", "right")]
    table = Table(*columns, *([("NAMESPACE", "left")] if everything else []))
    for row in rows:
        protected = "yes" if row["protected"] == "true" else ""
        cells = [row["id"], row["name"], size_text(row["size"]), protected, row["timestamp"]]
        if everything:
            kind = row["namespace"]
            detail = ""
            if "group" in kind:
                detail = f" ({kind['pool']}/{kind['group']}@{kind['group snap']})"
            elif "original_name" in kind:
                detail = f" ({kind['original_name']})"
            cells.append(kind["type"] + detail)
        table.add(*cells)
    sys.stdout.write(table.text())


@verb(
    "snap remove",
    "Delete a snapshot.",
    *SNAP,
    "image-id",
    "snap-id",
    "no-progress",
    "force:flatten children and unprotect snapshot if needed.",
    spec=("snap-spec",),
    alias="snap rm",
)
def remove(session: Session) -> None:
    from librbd_py import rbd

    snap_id = session.option("snap-id")
    spec = session.spec(snap="must" if snap_id is None else "may", need=not session.option("image-id"))
    image_id = session.by_name_or_id(spec, "")
    if spec.snap and snap_id is not None:
        raise Failure("rbd: trying to access snapshot using both name and id.", 22)
    with session.image(spec, image_id=image_id) as image:
        progress = session.progress("Removing snap")
        try:
            if snap_id is None:
                with progress:
                    image.remove_snap2(spec.snap, rbd.RBD_SNAP_REMOVE_FORCE if session.option("force") else 0)
            else:
                image.remove_snap_by_id(snap_id)
                progress.done()
        except failures() as error:
            code = code_of(error)
            if code == 16:
                which = f"'{spec.snap}'" if snap_id is None else f"id {snap_id}"
                raise Failure(f"rbd: snapshot {which} is protected from removal.", code) from None
            raise Failure(f"rbd: failed to remove snapshot: {reason(code)}", code) from None


@verb(
    "snap purge",
    "Delete all unprotected snapshots.",
    *IMAGE,
    "image-id",
    "no-progress",
    spec=("image-spec",),
)
def purge(session: Session) -> None:
    spec = session.spec(need=not session.option("image-id"))
    image_id = session.by_name_or_id(spec, "")
    with session.image(spec, image_id=image_id) as image:
        snaps = user_snaps(image)
        kept = [snap["name"] for snap in snaps if image.is_protected_snap(snap["name"])]
        if kept:
            which = "which is" if len(kept) == 1 else "which are"
            names = ", ".join(f"'{name}'" for name in kept)
            print(
                f"rbd: error removing snapshot(s) {names}, {which} protected - these must be unprotected with "
                "`rbd snap unprotect`.",
                flush=True,
            )
        progress = session.progress("Removing all snapshots")
        doomed = [snap for snap in snaps if snap["name"] not in kept]
        try:
            for number, snap in enumerate(doomed, start=1):
                image.remove_snap(snap["name"])
                progress(number, len(snaps))
        except failures() as error:
            progress.failed()
            raise Failure(f"rbd: removing snaps failed: {reason(error)}", code_of(error)) from None
        if kept:
            progress.failed()
        elif snaps:
            progress.done()


@verb("snap protect", "Prevent a snapshot from being deleted.", *SNAP, spec=("snap-spec",))
def protect(session: Session) -> None:
    spec = session.spec(snap="must")
    with session.image(spec) as image, failing("protecting snap failed"):
        if image.is_protected_snap(spec.snap):
            raise Failure("rbd: snap is already protected", 16)
        image.protect_snap(spec.snap)


@verb("snap unprotect", "Allow a snapshot to be deleted.", *SNAP, "image-id", spec=("snap-spec",))
def unprotect(session: Session) -> None:
    spec = session.spec(snap="must", need=not session.option("image-id"))
    image_id = session.by_name_or_id(spec, "")
    with session.image(spec, image_id=image_id) as image, failing("unprotecting snap failed"):
        if not image.is_protected_snap(spec.snap):
            raise Failure("rbd: snap is already unprotected", 22)
        image.unprotect_snap(spec.snap)


@verb(
    "snap rollback",
    "Rollback image to snapshot.",
    *SNAP,
    "no-progress",
    spec=("snap-spec",),
    alias="snap revert",
)
def rollback(session: Session) -> None:
    spec = session.spec(snap="must")
    with session.image(spec) as image, failing("rollback failed"):
        with session.progress("Rolling back to snapshot") as progress:
            image.rollback_to_snap(spec.snap, on_progress=progress)


@verb(
    "snap rename",
    "Rename a snapshot.",
    *SOURCE_SNAP,
    *DEST,
    "dest-snap",
    spec=("source-snap-spec", "dest-snap-spec"),
)
def rename(session: Session) -> None:
    source = session.spec(snap="must")
    dest = session.spec(dest=True, snap="must", check="snap")
    for what in ("pool", "namespace", "image"):
        if getattr(source, what) != getattr(dest, what):
            name = "image name" if what == "image" else what
            raise Failure(f"rbd: source and destination {name} must be the same", 22)
    with session.image(source) as image, failing("renaming snap failed"):
        image.rename_snap(source.snap, dest.snap)


@verb("snap limit set", "Limit the number of snapshots.", *IMAGE, "limit", spec=("image-spec",))
def limit_set(session: Session) -> None:
    limit, spec = session.option("limit"), session.spec()
    if limit is None:
        raise Failure("rbd: must specify --limit <num>", 34)
    with session.image(spec) as image, failing("setting snapshot limit failed"):
        image.set_snap_limit(limit)


@verb("snap limit clear", "Remove snapshot limit.", *IMAGE, spec=("image-spec",))
def limit_clear(session: Session) -> None:
    with session.image(session.spec()) as image, failing("clearing snapshot limit failed"):
        image.set_snap_limit((1 << 64) - 1)

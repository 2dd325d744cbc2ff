"""`rbdpy snap ...`: create, list, remove, purge, protect, unprotect, rollback, rename, limit."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from librbd_py import rbd
from librbd_py.cli.cmd_image import stamp
from librbd_py.cli.output import Rows, Section, Table, size_text
from librbd_py.cli.registry import command, with_dest, with_format, with_image, with_image_id, with_progress, with_snap
from librbd_py.cli.session import Failure, Session, code_of, failing, reason

NAMESPACES = {0: "user", 1: "group", 2: "trash", 3: "mirror"}


def with_quiesce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--skip-quiesce", action="store_true", help="do not run quiesce hooks")
    parser.add_argument("--ignore-quiesce-error", action="store_true", help="ignore quiesce hook error")


def with_all(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="list snapshots from all namespaces")


def with_removal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--snap-id", type=int, help="snapshot id")
    parser.add_argument("--force", action="store_true", help="flatten children and unprotect snapshot if needed.")


def with_dest_snap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dest-snap", help="destination snapshot name")


def with_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=int, help="maximum allowed snapshot count")


@command(
    "snap create",
    "Create a snapshot.",
    with_image,
    with_snap,
    with_quiesce,
    with_progress,
    specs=("snap-spec",),
    aliases=("snap add",),
)
def create(session: Session) -> None:
    spec, options = session.spec(snap="must"), session.options
    flags = 0
    if options.skip_quiesce:
        flags |= rbd.RBD_SNAP_CREATE_SKIP_QUIESCE
    if options.ignore_quiesce_error:
        flags |= rbd.RBD_SNAP_CREATE_IGNORE_QUIESCE_ERROR
    with session.image(spec, snap=False) as image, failing("failed to create snapshot"):
        with session.progress("Creating snap"):
            image.create_snap(spec.snap, flags)


def user_snaps(image: Any) -> list[dict[str, Any]]:
    return [s for s in image.list_snaps() if s.get("namespace", 0) == rbd.RBD_SNAP_NAMESPACE_TYPE_USER]


@command(
    "snap list",
    "Dump list of image snapshots.",
    with_image,
    with_image_id,
    with_format,
    with_all,
    specs=("image-spec",),
    aliases=("snap ls",),
)
def list_snaps(session: Session) -> None:
    everything = session.options.all
    spec = session.spec(need_image=session.options.image_id is None)
    with session.image(spec, read_only=True) as image, failing("failed to list snapshots"):
        rows = Rows("snapshots")
        for snap in list(image.list_snaps()) if everything else user_snaps(image):
            row = Section("snapshot", {"id": snap["id"], "name": snap["name"], "size": snap["size"]})
            kind = snap.get("namespace", 0)
            protected = kind == rbd.RBD_SNAP_NAMESPACE_TYPE_USER and image.is_protected_snap(snap["name"])
            row["protected"] = "true" if protected else "false"
            row["timestamp"] = stamp(image.get_snap_timestamp(snap["id"]))
            if everything:
                row["namespace"] = Section("namespace", {"type": NAMESPACES.get(kind, "unknown")})
                if kind == rbd.RBD_SNAP_NAMESPACE_TYPE_TRASH:
                    row["namespace"]["original_name"] = image.snap_get_trash_namespace(snap["id"])["original_name"]
            rows.append(row)
    if not session.plain:
        session.show(rows)
        return
    columns = [("SNAPID", "right"), ("NAME", "left"), ("SIZE", "left"), ("PROTECTED", "left"), ("TIMESTAMP", "left")]
    table = Table(*columns, *([("NAMESPACE", "left")] if everything else []))
    for row in rows:
        cells = [
            row["id"],
            row["name"],
            size_text(row["size"]),
            "yes" if row["protected"] == "true" else "",
            row["timestamp"],
        ]
        if everything:
            kind = row["namespace"]
            cells.append(kind["type"] + (f" ({kind['original_name']})" if "original_name" in kind else ""))
        table.add(*cells)
    if rows:
        sys.stdout.write(table.text())


@command(
    "snap remove",
    "Delete a snapshot.",
    with_image,
    with_snap,
    with_image_id,
    with_removal,
    with_progress,
    specs=("snap-spec",),
    aliases=("snap rm",),
)
def remove(session: Session) -> None:
    options = session.options
    by_id = options.snap_id is not None
    spec = session.spec(snap="may" if by_id else "must", need_image=options.image_id is None)
    flags = rbd.RBD_SNAP_REMOVE_FORCE if options.force else 0
    with session.image(spec, snap=False) as image:
        progress = session.progress("Removing snap")
        try:
            with progress:
                if by_id:
                    image.remove_snap_by_id(options.snap_id)
                elif flags:
                    image.remove_snap2(spec.snap, flags)
                else:
                    image.remove_snap(spec.snap)
        except rbd.ImageBusy as error:
            text = f"rbd: snapshot '{spec.snap or options.snap_id}' is protected from removal."
            raise Failure(text, code_of(error)) from None
        except rbd.Error as error:
            raise Failure(f"rbd: failed to remove snapshot: {reason(error)}", code_of(error)) from None


@command(
    "snap purge", "Delete all unprotected snapshots.", with_image, with_image_id, with_progress, specs=("image-spec",)
)
def purge(session: Session) -> None:
    with session.image(session.spec(need_image=session.options.image_id is None)) as image:
        snaps = user_snaps(image)
        kept = [snap["name"] for snap in snaps if image.is_protected_snap(snap["name"])]
        if kept:
            names = ", ".join(f"'{name}'" for name in kept)
            which = "which is" if len(kept) == 1 else "which are"
            print(
                f"rbd: error removing snapshot(s) {names}, {which} protected - these must be unprotected with "
                "`rbd snap unprotect`.",
                file=sys.stderr,
            )
        try:
            with session.progress("Removing all snapshots") as progress:
                doomed = [snap for snap in snaps if snap["name"] not in kept]
                for number, snap in enumerate(doomed, start=1):
                    image.remove_snap(snap["name"])
                    progress(number, len(snaps))
                if kept:
                    raise Failure("", 0)
        except rbd.Error as error:
            raise Failure(f"rbd: removing snaps failed: {reason(error)}", code_of(error)) from None


@command("snap protect", "Prevent a snapshot from being deleted.", with_image, with_snap, specs=("snap-spec",))
def protect(session: Session) -> None:
    spec = session.spec(snap="must")
    with session.image(spec, snap=False) as image:
        if spec.snap in [s["name"] for s in user_snaps(image)] and image.is_protected_snap(spec.snap):
            raise Failure("rbd: snap is already protected", 16)
        with failing("protecting snap failed"):
            image.protect_snap(spec.snap)


@command("snap unprotect", "Allow a snapshot to be deleted.", with_image, with_snap, specs=("snap-spec",))
def unprotect(session: Session) -> None:
    spec = session.spec(snap="must")
    with session.image(spec, snap=False) as image:
        if spec.snap in [s["name"] for s in user_snaps(image)] and not image.is_protected_snap(spec.snap):
            raise Failure("rbd: snap is already unprotected", 22)
        with failing("unprotecting snap failed"):
            image.unprotect_snap(spec.snap)


@command(
    "snap rollback",
    "Rollback image to snapshot.",
    with_image,
    with_snap,
    with_progress,
    specs=("snap-spec",),
    aliases=("snap revert",),
)
def rollback(session: Session) -> None:
    spec = session.spec(snap="must")
    with session.image(spec, snap=False) as image, failing("rollback failed"):
        with session.progress("Rolling back to snapshot") as progress:
            image.rollback_to_snap(spec.snap, on_progress=progress)


@command(
    "snap rename",
    "Rename a snapshot.",
    with_image,
    with_snap,
    with_dest,
    with_dest_snap,
    specs=("source-snap-spec", "dest-snap-spec"),
)
def rename(session: Session) -> None:
    source = session.spec(snap="must")
    dest = session.spec(1, prefix="dest_", snap="must", need_image=False)
    if dest.image and (dest.image != source.image or dest.namespace != source.namespace):
        raise Failure("rbd: source and destination image name must be the same", 22)
    with session.image(source, snap=False) as image, failing("renaming snap failed"):
        image.rename_snap(source.snap, dest.snap)


@command("snap limit set", "Limit the number of snapshots.", with_image, with_limit, specs=("image-spec",))
def limit_set(session: Session) -> None:
    if session.options.limit is None:
        raise Failure("rbd: must specify --limit <num>", 34)
    with session.image(session.spec()) as image, failing("setting snapshot limit failed"):
        image.set_snap_limit(session.options.limit)


@command("snap limit clear", "Remove snapshot limit.", with_image, specs=("image-spec",))
def limit_clear(session: Session) -> None:
    with session.image(session.spec()) as image, failing("clearing snapshot limit failed"):
        image.set_snap_limit((1 << 64) - 1)

"""Commands on whole images: create, ls, info, rm, rename, resize, clone, flatten, children, copy, status, watch."""

from __future__ import annotations

import argparse
import sys
import time
from datetime import datetime
from typing import Any

from librbd_py import rbd
from librbd_py.cli import sizes
from librbd_py.cli.output import Rows, Section, Table, size_text
from librbd_py.cli.registry import (
    command,
    with_create,
    with_dest,
    with_format,
    with_image,
    with_image_id,
    with_pool,
    with_progress,
    with_snap,
)
from librbd_py.cli.session import Failure, Session, Spec, code_of, failing, parse_spec, reason


def with_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-s", "--size", help="image size (in M/G/T) [default: M]")


def with_shrink(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allow-shrink", action="store_true", help="permit shrinking")


def with_thick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--thick-provision", action="store_true", help="fully allocate storage and zero image")


def with_long(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-l", "--long", action="store_true", help="long listing format")


def with_children(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--snap-id", type=int, help="snapshot id")
    parser.add_argument("-a", "--all", action="store_true", help="list all children (include trash)")
    parser.add_argument("--descendants", action="store_true", help="include all descendants")


def size_option(session: Session) -> int:
    if session.options.size is None:
        raise Failure("rbd: must specify --size <M/G/T>", 22)
    try:
        return sizes.size(session.options.size)
    except ValueError:
        raise Failure("rbd: the argument for option '--size' is invalid") from None


def creation(session: Session) -> dict[str, Any]:
    """The options of `with_create` as arguments of RBD.create and RBD.clone. Failure for a malformed one."""
    options = session.options
    chosen: dict[str, Any] = {}
    wrong = "--object-size"
    try:
        if options.object_size:
            chosen["order"] = sizes.order(options.object_size)
        elif options.order is not None:
            print("rbd: --order is deprecated, use --object-size", file=sys.stderr)
            chosen["order"] = options.order
        wrong = "--image-feature"
        if options.image_feature:
            chosen["features"] = sizes.features(options.image_feature)
        elif options.image_shared:
            chosen["features"] = sizes.FEATURES["layering"]
        wrong = "--stripe-unit"
        if options.stripe_unit:
            chosen["stripe_unit"] = sizes.size(options.stripe_unit, "B")
    except ValueError:
        raise Failure(f"rbd: the argument for option '{wrong}' is invalid") from None
    if options.stripe_count:
        chosen["stripe_count"] = options.stripe_count
    if bool(options.stripe_unit) != bool(options.stripe_count):
        raise Failure("rbd: must specify both (or neither) of stripe-unit and stripe-count", 22)
    if options.data_pool:
        chosen["data_pool"] = options.data_pool
    return chosen


@command(
    "create",
    "Create an empty image.",
    with_image,
    with_create,
    with_size,
    with_thick,
    with_progress,
    specs=("image-spec",),
)
def create(session: Session) -> None:
    spec, size, chosen = session.spec(), size_option(session), creation(session)
    ioctx = session.ioctx(spec)
    with failing("create error"):
        rbd.RBD().create(ioctx, spec.image, size, old_format=False, **chosen)
    if session.options.thick_provision:
        with session.progress("Thick provisioning"), session.image(spec) as image:
            step = 4 << 20
            for offset in range(0, size, step):
                image.write(b"\0" * min(step, size - offset), offset)
                session.progress("Thick provisioning")(offset, size)
            image.flush()


def pool_spec(session: Session) -> Spec:
    """[pool[/namespace]] of a command that works on a pool."""
    given = session.options.specs[0].rstrip("/") if session.options.specs else ""
    pool, _, namespace = given.partition("/")
    options = session.options
    return Spec(pool or options.pool or "rbd", namespace or options.namespace or "", "", "")


@command("list", "List rbd images.", with_long, with_pool, with_format, specs=("pool-spec",), aliases=("ls",))
def list_images(session: Session) -> None:
    spec = pool_spec(session)
    try:
        ioctx = session.ioctx(spec)
    except Failure as error:
        print(error, file=sys.stderr)
        raise Failure("rbd: listing images failed: (2) No such file or directory", 2) from None
    with failing("listing images failed"):
        found = sorted(rbd.RBD().list(ioctx))
    if not session.options.long:
        if session.plain:
            sys.stdout.write("".join(f"{name}\n" for name in found))
        else:
            session.show(Rows("images", found, item="name"))
        return
    rows = [row for name in found for row in long_rows(ioctx, name)]
    if session.plain:
        if rows:
            show_long(rows)
        return
    session.show(Rows("images", [long_section(row) for row in rows]))


def long_rows(ioctx: Any, name: str) -> list[dict[str, Any]]:
    """What `ls -l` shows of an image and its user snapshots. An image removed meanwhile has no rows."""
    try:
        image = rbd.Image(ioctx, name, read_only=True)
    except rbd.ImageNotFound:
        return []
    with image:
        lockers = image.list_lockers() or {}
        lock = "" if not lockers.get("lockers") else "excl" if lockers["exclusive"] else "shr"
        head = {"image": name, "id": image.id(), "size": image.size(), "lock": lock, "parent": parent_of(image)}
        rows = [head]
        for snap in image.list_snaps():
            if snap.get("namespace", 0) == rbd.RBD_SNAP_NAMESPACE_TYPE_USER:
                image.set_snap_by_id(snap["id"])
                row = {"image": name, "id": head["id"], "snapshot": snap["name"], "snapshot_id": snap["id"]}
                row |= {"size": snap["size"], "parent": parent_of(image), "lock": ""}
                row["protected"] = image.is_protected_snap(snap["name"])
                rows.append(row)
        return rows


def parent_of(image: Any) -> dict[str, Any] | None:
    try:
        parent: dict[str, Any] = image.get_parent_image_spec()
    except rbd.ImageNotFound:
        return None
    return parent


def parent_text(parent: dict[str, Any] | None) -> str:
    if not parent:
        return ""
    return Spec(parent["pool_name"], parent["pool_namespace"], parent["image_name"], parent["snap_name"]).text()


def show_long(rows: list[dict[str, Any]]) -> None:
    table = Table(
        ("NAME", "left"), ("SIZE", "right"), ("PARENT", "left"), ("FMT", "right"), ("PROT", "left"), ("LOCK", "left")
    )
    for row in rows:
        name = row["image"] + ("@" + row["snapshot"] if "snapshot" in row else "")
        protected = "yes" if row.get("protected") else ""
        table.add(name, size_text(row["size"]), parent_text(row["parent"]), 2, protected, row["lock"])
    sys.stdout.write(table.text())


def long_section(row: dict[str, Any]) -> Section:
    section = Section("image", {"image": row["image"], "id": row["id"]})
    if "snapshot" in row:
        section |= {"snapshot": row["snapshot"], "snapshot_id": row["snapshot_id"]}
    section["size"] = row["size"]
    parent = row["parent"]
    if parent:
        section["parent"] = Section(
            "parent",
            {
                "pool": parent["pool_name"],
                "pool_namespace": parent["pool_namespace"],
                "image": parent["image_name"],
                "snapshot": parent["snap_name"],
            },
        )
    section["format"] = 2
    if "snapshot" in row:
        section["protected"] = "true" if row["protected"] else "false"
    if row["lock"]:
        section["lock_type"] = "exclusive" if row["lock"] == "excl" else "shared"
    return section


def stamp(moment: datetime) -> str:
    """Local time as ctime writes it. The library gives naive UTC, as Ceph's module does."""
    seconds = (moment - datetime(1970, 1, 1)).total_seconds()
    return time.ctime(seconds)


@command(
    "info",
    "Show information about image size, striping, etc.",
    with_image,
    with_snap,
    with_image_id,
    with_format,
    specs=("image-or-snap-spec",),
)
def info(session: Session) -> None:
    spec = session.spec(snap="may", need_image=session.options.image_id is None)
    with session.image(spec, read_only=True) as image, failing("info"):
        stat = image.stat()
        features, op_features, flags = image.features(), image.op_features(), image.flags()
        shown = Section("image", {"name": image.get_name(), "id": image.id(), "size": stat["size"]})
        shown |= {"objects": stat["num_objs"], "order": stat["order"], "object_size": stat["obj_size"]}
        if features & sizes.FEATURES["data-pool"]:
            shown["data_pool"] = session.cluster.pool_reverse_lookup(image.data_pool_id())
        shown["snapshot_count"] = sum(1 for _ in image.list_snaps())
        shown |= {"block_name_prefix": stat["block_name_prefix"], "format": 2}
        shown["features"] = Rows("features", sizes.names(features, sizes.FEATURES), "feature")
        shown["op_features"] = Rows("op_features", sizes.names(op_features, sizes.OP_FEATURES), "op_feature")
        shown["flags"] = Rows("flags", sizes.names(flags, sizes.FLAGS), "flag")
        shown["create_timestamp"] = stamp(image.create_timestamp())
        shown["access_timestamp"] = stamp(image.access_timestamp())
        shown["modify_timestamp"] = stamp(image.modify_timestamp())
        parent = parent_of(image)
        if spec.snap:
            shown["protected"] = "true" if image.is_protected_snap(spec.snap) else "false"
        if parent:
            shown["parent"] = Section(
                "parent",
                {
                    "pool": parent["pool_name"],
                    "pool_namespace": parent["pool_namespace"],
                    "image": parent["image_name"],
                    "id": parent["image_id"],
                    "snapshot": parent["snap_name"],
                    "trash": parent["snap_namespace_type"] == rbd.RBD_SNAP_NAMESPACE_TYPE_TRASH,
                    "overlap": image.overlap(),
                },
            )
        if features & sizes.FEATURES["striping"]:
            shown |= {"stripe_unit": image.stripe_unit(), "stripe_count": image.stripe_count()}
    if session.plain:
        show_info(shown)
    else:
        session.show(shown)


def show_info(shown: Section) -> None:
    lines = [f"rbd image '{shown['name']}':"]
    lines.append(f"\tsize {size_text(shown['size'])} in {shown['objects']} objects")
    lines.append(f"\torder {shown['order']} ({size_text(shown['object_size'])} objects)")
    lines.append(f"\tsnapshot_count: {shown['snapshot_count']}")
    lines.append(f"\tid: {shown['id']}")
    if "data_pool" in shown:
        lines.append(f"\tdata_pool: {shown['data_pool']}")
    lines.append(f"\tblock_name_prefix: {shown['block_name_prefix']}")
    lines.append(f"\tformat: {shown['format']}")
    for key in ("features", "op_features", "flags"):
        lines.append(f"\t{key}: {', '.join(shown[key])}")
    for key in ("create_timestamp", "access_timestamp", "modify_timestamp"):
        lines.append(f"\t{key}: {shown[key]}")
    if "protected" in shown:
        lines.append(f"\tprotected: {shown['protected'].capitalize()}")
    if "parent" in shown:
        parent = shown["parent"]
        where = Spec(parent["pool"], parent["pool_namespace"], parent["image"], parent["snapshot"]).text()
        lines.append(f"\tparent: {where}" + (f" (trash {parent['id']})" if parent["trash"] else ""))
        lines.append(f"\toverlap: {size_text(parent['overlap'])}")
    if "stripe_unit" in shown:
        lines.append(f"\tstripe unit: {size_text(shown['stripe_unit'])}")
        lines.append(f"\tstripe count: {shown['stripe_count']}")
    print("\n".join(lines))


@command("remove", "Delete an image.", with_image, with_progress, specs=("image-spec",), aliases=("rm",))
def remove(session: Session) -> None:
    spec = session.spec()
    ioctx = session.ioctx(spec)
    progress = session.progress("Removing image")
    try:
        with progress:
            rbd.RBD().remove(ioctx, spec.image, on_progress=progress)
    except rbd.ImageHasSnapshots as error:
        raise Failure(
            "rbd: image has snapshots - these must be deleted with 'rbd snap purge' before the image can be removed.",
            code_of(error),
        ) from None
    except rbd.ImageBusy as error:
        raise Failure(
            "rbd: error: image still has watchers\nThis means the image is still open or the client using it crashed. "
            "Try again after closing/unmapping it or waiting 30s for the crashed client to timeout.",
            code_of(error),
        ) from None
    except rbd.Error as error:
        raise Failure(f"rbd: delete error: {reason(error)}", code_of(error)) from None


@command(
    "rename",
    "Rename image within pool.",
    with_image,
    with_dest,
    specs=("source-image-spec", "dest-image-spec"),
    aliases=("mv",),
)
def rename(session: Session) -> None:
    source, dest = session.spec(), session.spec(1, prefix="dest_")
    given = session.options.specs[1] if len(session.options.specs) > 1 else ""
    if not parse_spec(given).pool if given else not session.options.dest_pool:
        dest = Spec(source.pool, dest.namespace or source.namespace, dest.image, "")
    if (dest.pool, dest.namespace) != (source.pool, source.namespace):
        raise Failure(
            f"rbd: mv/rename across pools not supported\nsource pool: {source.pool} dest pool: {dest.pool}", 22
        )
    with failing("rename error"):
        rbd.RBD().rename(session.ioctx(source), source.image, dest.image)


@command(
    "resize",
    "Resize (expand or shrink) image.",
    with_image,
    with_size,
    with_shrink,
    with_progress,
    specs=("image-spec",),
)
def resize(session: Session) -> None:
    spec, size = session.spec(), size_option(session)
    with session.image(spec) as image:
        now = image.size()
        if size < now and not session.options.allow_shrink:
            raise Failure("rbd: shrinking an image is only allowed with the --allow-shrink flag", 22)
        if size == now:
            raise Failure("rbd: new size is equal to original size ", 22)
        with failing("resize error"), session.progress("Resizing image") as progress:
            image.resize(size, allow_shrink=session.options.allow_shrink, on_progress=progress)


@command(
    "clone",
    "Clone a snapshot into a CoW child image.",
    with_image,
    with_snap,
    with_dest,
    with_create,
    specs=("source-snap-spec", "dest-image-spec"),
)
def clone(session: Session) -> None:
    dest, source = session.spec(1, prefix="dest_"), session.spec(snap="must")
    chosen = creation(session)
    with failing("clone error"):
        rbd.RBD().clone(session.ioctx(source), source.image, source.snap, session.ioctx(dest), dest.image, **chosen)


@command(
    "flatten", "Fill clone with parent data (make it independent).", with_image, with_progress, specs=("image-spec",)
)
def flatten(session: Session) -> None:
    with session.image(session.spec()) as image, failing("flatten error"):
        with session.progress("Image flatten") as progress:
            image.flatten(on_progress=progress)


@command(
    "children",
    "Display children of an image or its snapshot.",
    with_image,
    with_snap,
    with_children,
    with_format,
    specs=("image-or-snap-spec",),
)
def children(session: Session) -> None:
    spec = session.spec(snap="may")
    with session.image(spec, read_only=True) as image, failing("listing children failed"):
        if session.options.snap_id is not None:
            image.set_snap_by_id(session.options.snap_id)
        found = list(image.list_descendants() if session.options.descendants else image.list_children2())
    rows = Rows("children")
    for child in found:
        if child["trash"] and not session.options.all:
            continue
        where = {"pool": child["pool"], "pool_namespace": child["pool_namespace"], "image": child["image"]}
        if session.options.all:
            where |= {"id": child["id"], "trash": child["trash"]}
        rows.append(Section("child", where))
    if not session.plain:
        session.show(rows)
        return
    for row in rows:
        trashed = f" (trash {row['id']})" if row.get("trash") else ""
        print(Spec(row["pool"], row["pool_namespace"], row["image"], "").text() + trashed)


@command(
    "copy",
    "Copy src image to dest.",
    with_image,
    with_snap,
    with_dest,
    with_create,
    with_progress,
    specs=("source-image-or-snap-spec", "dest-image-spec"),
    aliases=("cp",),
)
def copy(session: Session) -> None:
    source, dest = session.spec(snap="may"), session.spec(1, prefix="dest_")
    chosen = creation(session)
    target = session.ioctx(dest)
    with session.image(source, read_only=True) as image, failing("Copy failed"):
        with session.progress("Image copy") as progress:
            image.copy(target, dest.image, on_progress=progress, **chosen)


@command("status", "Show the status of this image.", with_image, with_format, specs=("image-spec",))
def status(session: Session) -> None:
    with session.image(session.spec(), read_only=True) as image, failing("show status failed"):
        watchers = [
            Section("watcher", {"address": w["addr"], "client": w["id"], "cookie": w["cookie"]})
            for w in image.watchers_list()
        ]
    if not session.plain:
        session.show(Section("status", {"watchers": Rows("watchers", watchers)}))
    elif watchers:
        print("Watchers:")
        for w in watchers:
            print(f"\twatcher={w['address']} client.{w['client']} cookie={w['cookie']}")
    else:
        print("Watchers: none")


@command("watch", "Watch events on image.", with_image, specs=("image-spec",))
def watch(session: Session) -> None:
    """Prints one line per notification until a line is entered, standard input ends or the command is interrupted."""
    spec = session.spec()
    with session.image(spec, read_only=True) as image:
        header = "rbd_header." + image.id()
    ioctx = session.ioctx(spec)

    def notified(notify_id: int, notifier: int, watch_id: int, data: bytes) -> bool:
        print(
            f"{header} received notification: notify_id={notify_id}, cookie={watch_id}, notifier_id={notifier}, "
            f"bl.length={len(data)}",
            flush=True,
        )
        return True

    with failing("watch failed"), ioctx.watch(header, notified):
        print("press enter to exit...", flush=True)
        sys.stdin.readline()

"""Commands that look: list, info, children, status, watch."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from librbd_py.cli import sizes
from librbd_py.cli.arguments import FORMAT, IMAGE, POOL, SNAP
from librbd_py.cli.failure import Failure, code_of, reason
from librbd_py.cli.output import Rows, Section, Table, size_text
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session, Spec, failing, failures

if TYPE_CHECKING:
    from datetime import datetime


@verb("list", "List rbd images.", "long", *POOL, *FORMAT, spec=("pool-spec",), alias="ls")
def list_images(session: Session) -> None:
    from librbd_py.image.cls import all_images

    spec = session.pool_spec()
    session.layout()
    try:
        ctx = session.context(spec)
    except Failure as error:
        session.say(str(error))
        raise Failure(f"rbd: listing images failed: {reason(error.code)}", error.code) from None
    with failing("listing images failed"):
        found = all_images(ctx)
    if not session.option("long"):
        if session.plain:
            sys.stdout.write("".join(f"{name}\n" for name, _ in found))
        else:
            session.show(Rows("images", [name for name, _ in found], item="name"))
        return
    from librbd_py.image.listing import overview

    rows: list[dict[str, Any]] = []
    with failing("listing images failed"):
        for image in overview(ctx, found):
            if image.error is None:
                rows += image.rows
            else:
                session.say(f"rbd: error opening {image.name}: {reason(image.error)}")
    if not session.plain:
        session.show(Rows("images", [_long_section(row) for row in rows]))
    elif found:
        _show_long(rows)


def parent_text(parent: dict[str, Any] | None) -> str:
    if not parent:
        return ""
    return Spec(parent["pool_name"], parent["pool_namespace"], parent["image_name"], parent["snap_name"]).text()


def _show_long(rows: list[dict[str, Any]]) -> None:
    table = Table(
        ("NAME", "left"), ("SIZE", "right"), ("PARENT", "left"), ("FMT", "right"), ("PROT", "left"), ("LOCK", "left")
    )
    for row in rows:
        name = row["image"] + ("@" + row["snapshot"] if "snapshot" in row else "")
        protected = "yes" if row.get("protected") else ""
        table.add(name, size_text(row["size"]), parent_text(row["parent"]), 2, protected, row.get("lock", ""))
    sys.stdout.write(table.text())


def parent_section(parent: dict[str, Any]) -> Section:
    names = {"pool": "pool_name", "pool_namespace": "pool_namespace", "image": "image_name", "snapshot": "snap_name"}
    return Section("parent", {key: parent[name] for key, name in names.items()})


def _long_section(row: dict[str, Any]) -> Section:
    section = Section("snapshot" if "snapshot" in row else "image", {"image": row["image"], "id": row["id"]})
    if "snapshot" in row:
        section |= {"snapshot": row["snapshot"], "snapshot_id": row["snapshot_id"]}
    section["size"] = row["size"]
    if row["parent"]:
        section["parent"] = parent_section(row["parent"])
    section["format"] = 2
    if "snapshot" in row:
        section["protected"] = "true" if row["protected"] else "false"
    elif row["lock"]:
        section["lock_type"] = "exclusive" if row["lock"] == "excl" else "shared"
    return section


def stamp(moment: datetime) -> str:
    """Local time as ctime writes it. The library gives naive UTC, as Ceph's module does."""
    from datetime import datetime

    return time.ctime((moment - datetime(1970, 1, 1)).total_seconds())


def parent_of(image: Any) -> dict[str, Any] | None:
    from librbd_py import rbd

    try:
        parent: dict[str, Any] = image.get_parent_image_spec()
    except rbd.ImageNotFound:
        return None
    return parent


@verb(
    "info",
    "Show information about image size, striping, etc.",
    *SNAP,
    "image-id",
    *FORMAT,
    spec=("image-or-snap-spec",),
)
def info(session: Session) -> None:
    spec = session.spec(snap="may", need=not session.option("image-id"))
    image_id = session.by_name_or_id(spec)
    session.layout()
    with session.image(spec, read_only=True, snap=True, image_id=image_id) as image, failing("info"):
        shown = _info(session, image, spec)
    if session.plain:
        _show_info(shown)
    else:
        session.show(shown)


def _info(session: Session, image: Any, spec: Spec) -> Section:
    stat, features = image.stat(), image.features()
    shown = Section("image", {"name": image.get_name(), "id": image.id(), "size": stat["size"]})
    shown |= {"objects": stat["num_objs"], "order": stat["order"], "object_size": stat["obj_size"]}
    shown["snapshot_count"] = sum(1 for _ in image.list_snaps())
    if features & sizes.FEATURES["data-pool"]:
        shown["data_pool"] = _pool_name(session, image.data_pool_id())
    shown |= {"block_name_prefix": stat["block_name_prefix"], "format": 2}
    shown["features"] = Rows("features", sizes.names(features, sizes.FEATURES), "feature")
    shown["op_features"] = Rows("op_features", sizes.names(image.op_features(), sizes.OP_FEATURES), "op_feature")
    shown["flags"] = Rows("flags", sizes.names(image.flags(), sizes.FLAGS), "flag")
    group = image.group()
    if group["pool"] != -1:
        where = Spec(_pool_name(session, group["pool"]), group.get("namespace", ""), group["name"])
        shown["group"] = where.text()
    shown["create_timestamp"] = stamp(image.create_timestamp())
    shown["access_timestamp"] = stamp(image.access_timestamp())
    shown["modify_timestamp"] = stamp(image.modify_timestamp())
    if spec.snap:
        shown["protected"] = "true" if image.is_protected_snap(spec.snap) else "false"
    limit = image.get_snap_limit()
    if limit < (1 << 64) - 1:
        shown["snapshot_limit"] = limit
    parent = parent_of(image)
    if parent:
        shown["parent"] = _parent_info(parent, image.overlap())
    if features & sizes.FEATURES["striping"]:
        shown |= {"stripe_unit": image.stripe_unit(), "stripe_count": image.stripe_count()}
    return shown


def _parent_info(parent: dict[str, Any], overlap: int) -> Section:
    return Section(
        "parent",
        {
            "pool": parent["pool_name"],
            "pool_namespace": parent["pool_namespace"],
            "image": parent["image_name"],
            "id": parent["image_id"],
            "snapshot": parent["snap_name"],
            "trash": parent.get("trash", False),
            "overlap": overlap,
        },
    )


def _pool_name(session: Session, number: int) -> str:
    try:
        return str(session.cluster.pool_reverse_lookup(number))
    except failures():
        return f"<missing data pool {number}>"


def _show_info(shown: Section) -> None:
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
    for key in ("group", "create_timestamp", "access_timestamp", "modify_timestamp"):
        if key in shown:
            lines.append(f"\t{key}: {shown[key]}")
    if "protected" in shown:
        lines.append(f"\tprotected: {shown['protected'].capitalize()}")
    if "snapshot_limit" in shown:
        lines.append(f"\tsnapshot_limit: {shown['snapshot_limit']}")
    if "parent" in shown:
        parent = shown["parent"]
        where = Spec(parent["pool"], parent["pool_namespace"], parent["image"], parent["snapshot"]).text()
        lines.append(f"\tparent: {where}" + (f" (trash {parent['id']})" if parent["trash"] else ""))
        lines.append(f"\toverlap: {size_text(parent['overlap'])}")
    if "stripe_unit" in shown:
        lines.append(f"\tstripe unit: {size_text(shown['stripe_unit'])}")
        lines.append(f"\tstripe count: {shown['stripe_count']}")
    print("\n".join(lines))


@verb(
    "children",
    "Display children of an image or its snapshot.",
    *SNAP,
    "snap-id",
    "all:list all children (include trash)",
    "descendants",
    *FORMAT,
    spec=("image-or-snap-spec",),
)
def children(session: Session) -> None:
    spec = session.spec(snap="may")
    if spec.snap and session.option("snap-id") is not None:
        raise Failure("rbd: trying to access snapshot using both name and id.", 22)
    session.layout()
    with session.image(spec, read_only=True) as image:
        try:
            if session.option("snap-id") is not None:
                image.set_snap_by_id(session.option("snap-id"))
            elif spec.snap:
                image.set_snap(spec.snap)
        except failures() as error:
            raise Failure("rbd: snapshot does not exist.", code_of(error)) from None
        descendants = session.option("descendants")
        with failing(f"listing {'descendants' if descendants else 'children'} failed"):
            found = list(image.list_descendants() if descendants else image.list_children2())
    rows = Rows("children")
    for child in found:
        if child["trash"] and not session.option("all"):
            continue
        where = {"pool": child["pool"], "pool_namespace": child["pool_namespace"], "image": child["image"]}
        if session.option("all"):
            where |= {"id": child["id"], "trash": child["trash"]}
        rows.append(Section("child", where))
    if not session.plain:
        session.show(rows)
        return
    for row in rows:
        trashed = f" (trash {row['id']})" if row.get("trash") else ""
        print(Spec(row["pool"], row["pool_namespace"], row["image"]).text() + trashed)


@verb("status", "Show the status of this image.", *IMAGE, *FORMAT, spec=("image-spec",))
def status(session: Session) -> None:
    spec = session.spec()
    session.layout()
    with session.image(spec, read_only=True) as image, failing("show status failed"):
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


@verb("watch", "Watch events on image.", *IMAGE, spec=("image-spec",))
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

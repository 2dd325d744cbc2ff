"""`rbdpy trash ...`: list, move, restore, remove, purge, and the schedule of purges."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, datetime
from typing import Any

from librbd_py.cli.arguments import FORMAT, IMAGE, POOL
from librbd_py.cli.cmd_image import removal_text
from librbd_py.cli.cmd_list import parent_of, parent_section, parent_text
from librbd_py.cli.failure import Failure, code_of, reason
from librbd_py.cli.output import Rows, Section, Table
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session, failing, failures

_ID = "image-id:image id\n(example: [<pool-name>/[<namespace>/]]<image-id>)"
_RESTORE_ID = "image-id:image id\n(example: [<pool-name>/]<image-id>)"
_FORCE = "force:force remove of non-expired delayed images"
DATE = "/bin/date"  # reads dates as people write them: "1 hour", "tomorrow"


def moment(text: str) -> float:
    """Seconds since 1970 of a date in any of the forms date(1) knows. Failure."""
    done = subprocess.run([DATE, f"--date={text}", "+%s.%N"], capture_output=True, text=True, timeout=10)
    if done.returncode:
        raise Failure(f"{done.stderr}rbd: error calling {DATE}: {reason(22)}", 22)
    return float(done.stdout)


@verb("trash move", "Move an image to the trash.", *IMAGE, "expires-at", spec=("image-spec",), alias="trash mv")
def move(session: Session) -> None:
    """A date in the past makes an image that never expires by itself: so does rbd."""
    from librbd_py import rbd

    spec = session.spec()
    ioctx = session.ioctx(spec)
    now = time.time()
    text = session.option("expires-at")
    delay = 0.0 if text in (None, "now") else moment(text) - now
    if delay < 0:
        delay = float((1 << 32) - 1 - int(now))  # what librbd's clock can hold
    with failing("deferred delete error"):
        rbd.RBD().trash_move(ioctx, spec.image, delay)


@verb(
    "trash list",
    "List trash images.",
    *POOL,
    "all",
    "long",
    *FORMAT,
    spec=("pool-spec",),
    alias="trash ls",
)
def list_trash(session: Session) -> None:
    from librbd_py import rbd

    spec = session.pool_spec()
    session.layout()
    ioctx = session.ioctx(spec)
    with failing("trash list"):
        found = [row for row in rbd.RBD().trash_list(ioctx) if session.option("all") or row["source"] == "USER"]
        if session.option("long"):
            rows = [row for row in (_long_row(session, ioctx, entry) for entry in found) if row is not None]
            _show_long(session, rows, bool(found))
            return
    if session.plain:
        for row in found:
            print(row["id"], row["name"])
        return
    session.show(Rows("trash", [Section("image", {"id": row["id"], "name": row["name"]}) for row in found]))


def _long_row(session: Session, ioctx: Any, entry: dict[str, Any]) -> dict[str, Any] | None:
    from librbd_py import rbd

    try:
        image = rbd.Image(ioctx, image_id=entry["id"], read_only=True)
    except rbd.ImageNotFound:
        return None
    except rbd.Error as error:
        session.say(f"rbd: error opening {entry['id']}: {reason(error)}")
        return None
    with image:
        parent = parent_of(image)
    ends = _local(entry["deferment_end_time"])
    status = "protected until" if entry["deferment_end_time"].timestamp() > _naive_now() else "expired at"
    return {
        "id": entry["id"],
        "name": entry["name"],
        "source": entry["source"],
        "deleted_at": _local(entry["deletion_time"]),
        "status": f"{status} {ends}",
        "parent": parent,
    }


def _local(moment: datetime) -> str:
    """The library gives naive UTC; people get local time, as ctime writes it."""
    return time.ctime(moment.replace(tzinfo=UTC).timestamp())


def _naive_now() -> float:
    return datetime.now(UTC).replace(tzinfo=None).timestamp()


def _show_long(session: Session, rows: list[dict[str, Any]], any_entries: bool) -> None:
    names = ("id", "name", "source", "deleted_at", "status")
    if session.plain:
        table = Table(*((name.upper(), "left") for name in (*names, "parent")))
        for row in rows:
            table.add(*(row[name] for name in names), parent_text(row["parent"]))
        if any_entries:
            sys.stdout.write(table.text())
        return
    shown = Rows("trash")
    for row in rows:
        section = Section("image", {name: row[name] for name in names})
        if row["parent"]:
            section["parent"] = parent_section(row["parent"])
        shown.append(section)
    session.show(shown)


@verb(
    "trash remove",
    "Remove an image from trash.",
    *POOL,
    "image-id",
    "no-progress",
    _FORCE,
    spec=(_ID,),
    alias="trash rm",
)
def remove(session: Session) -> None:
    from librbd_py import rbd

    spec = session.image_id_spec()
    ioctx = session.ioctx(spec)
    progress = session.progress("Removing image")
    try:
        rbd.RBD().trash_remove(ioctx, spec.image, bool(session.option("force")), progress)
    except failures() as error:
        code = code_of(error)
        if code == 1:
            text = "\nDeferment time has not expired, please use --force if you really want to remove the image"
        elif code == 117:
            text = "rbd: error: image not fully moved to trash."
        elif code in (39, 16, 31):
            text = removal_text(session, ioctx, "", error, image_id=spec.image)
        else:
            text = f"rbd: remove error: {reason(error)}"
        session.say(text)
        progress.failed()
        raise Failure("", code) from None
    progress.done()


@verb("trash restore", "Restore an image from trash.", *POOL, "image-id", "image", spec=(_RESTORE_ID,))
def restore(session: Session) -> None:
    from librbd_py import rbd

    spec = session.image_id_spec()
    ioctx = session.ioctx(spec)
    try:
        rbd.RBD().trash_restore(ioctx, spec.image, session.option("image") or "")
    except failures() as error:
        code = code_of(error)
        text = {
            2: "rbd: error: image does not exist in trash",
            17: "rbd: error: an image with the same name already exists, try again with with a different name",
        }.get(code, f"rbd: restore error: {reason(code)}")
        raise Failure(text, code) from None


@verb(
    "trash purge",
    "Remove all expired images from trash.",
    *POOL,
    "no-progress",
    "expired-before",
    "threshold",
    spec=("pool-spec",),
)
def purge(session: Session) -> None:
    from librbd_py import rbd

    spec = session.pool_spec()
    ioctx = session.ioctx(spec)
    threshold, before = session.option("threshold"), None
    if threshold is None and session.option("expired-before"):
        before = datetime.fromtimestamp(moment(session.option("expired-before")), UTC).replace(tzinfo=None)
    progress = session.progress("Removing images")
    if threshold is not None and not 0 <= threshold <= 1:
        progress.failed()
        raise Failure("", 22)
    try:
        rbd.RBD().trash_purge(ioctx, before, -1 if threshold is None else threshold)
    except failures() as error:
        progress.failed()
        if code_of(error) == 39:
            session.say(
                "rbd: some expired images could not be removed\nEnsure that they are closed/unmapped, do not have "
                "snapshots (including trashed snapshots with linked clones), are not in a group and were moved to the "
                "trash successfully."
            )
            raise Failure("", 39) from None
        raise Failure(f"rbd: remove error: {reason(error)}", code_of(error)) from None
    progress.done()

"""Commands that measure data: diff and disk-usage."""

from __future__ import annotations

import sys
from typing import Any

from librbd_py.cli import sizes
from librbd_py.cli.arguments import FORMAT, SNAP
from librbd_py.cli.failure import Failure, code_of, reason
from librbd_py.cli.output import Rows, Section, Table, size_text
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session, Spec, failing, failures


@verb(
    "diff",
    "Print extents that differ since a previous snap, or image creation.",
    *SNAP,
    "from-snap",
    "whole-object",
    *FORMAT,
    spec=("image-or-snap-spec",),
)
def diff(session: Session) -> None:
    spec = session.spec(snap="may")
    session.layout()
    rows: list[tuple[int, int, bool]] = []
    with session.image(spec, read_only=True, snap=True) as image, failing("diff error"):
        image.diff_iterate(
            0,
            image.size(),
            session.option("from-snap"),
            lambda offset, length, exists: rows.append((offset, length, exists)),
            whole_object=bool(session.option("whole-object")),
        )
    if not session.plain:
        shown = [
            Section("extent", {"offset": offset, "length": length, "exists": "true" if exists else "false"})
            for offset, length, exists in rows
        ]
        session.show(Rows("extents", shown))
    elif rows:
        table = Table(("Offset", "left"), ("Length", "left"), ("Type", "left"))
        for offset, length, exists in rows:
            table.add(offset, length, "data" if exists else "zero")
        sys.stdout.write(table.text())


@verb(
    "disk-usage",
    "Show disk usage stats for pool, image or snapshot.",
    *SNAP,
    *FORMAT,
    "from-snap",
    "exact",
    "merge-snapshots",
    spec=("image-or-snap-spec",),
    alias="du",
)
def usage(session: Session) -> None:
    from librbd_py.image.directory import list_images

    spec = session.spec(snap="may", need=bool(session.option("from-snap")))
    session.layout()
    ioctx = session.ioctx(spec)
    try:
        images = list_images(ioctx.context)
        totals = _Usage(session, spec)
        for name, _ in images:
            if not spec.image or name == spec.image:
                totals.add(ioctx, name)
        if spec.image and not totals.found:
            session.say(f"specified image {spec.image} is not found.")
            raise Failure(f"rbd: du failed: {reason(2)}", 2)
    except failures() as error:
        raise Failure(f"rbd: du failed: {reason(error)}", code_of(error)) from None
    totals.show(bool(images))


class _Usage:
    """Rows of images and their snapshots, oldest first; each counts what changed since the one before."""

    def __init__(self, session: Session, spec: Spec) -> None:
        self._session, self._spec = session, spec
        self._from = session.option("from-snap") or ""
        self._rows: list[Section] = []
        self._provisioned = self._used = self._count = 0
        self.found = False

    def add(self, ioctx: Any, name: str) -> None:
        from librbd_py import rbd

        try:
            image = rbd.Image(ioctx, name, read_only=True)
        except rbd.ImageNotFound:
            return
        except rbd.Error as error:
            self.found = True
            self._session.say(f"rbd: error opening {name}: {reason(error)}")
            return
        with image:
            self.found = True
            self._add(image, name)

    def _add(self, image: Any, name: str) -> None:
        session, only = self._session, self._spec.snap
        image_id, size = image.id(), image.size()
        fast = bool(image.features() & sizes.FEATURES["fast-diff"])
        if not fast:
            session.say(f"warning: fast-diff map is not enabled for {name}. operation may be slow.")
        snaps = [snap for snap in image.list_snaps() if not snap["namespace"]]
        names = [snap["name"] for snap in snaps]
        for wanted in (only, self._from):
            if wanted and wanted not in names:
                session.say("specified snapshot is not found.")
                raise Failure(f"rbd: du failed: {reason(2)}", 2)
        first = names.index(self._from) + 1 if self._from else 0
        last = names.index(only) + 1 if only else len(names)
        if self._from and only and first >= last:
            if first == last:
                return
            raise Failure(f"rbd: du failed: {reason(22)}", 22)
        before = names[first - 1] if first else None
        merged = 0
        for snap in snaps[first:last]:
            used = self._one(image, name, snap["name"], before)
            merged += used
            before = snap["name"]
            if not session.option("merge-snapshots"):
                row = {"name": name, "id": image_id, "snapshot": snap["name"], "snapshot_id": snap["id"]}
                self._row(row, snap["size"], used)
            self._provisioned += snap["size"] if only else 0
            self._used += used
            self._count += 1
        if only:
            return
        used = self._one(image, name, None, before)
        self._row({"name": name, "id": image_id}, size, used + (merged if session.option("merge-snapshots") else 0))
        self._provisioned += size
        self._used += used
        self._count += 1

    def _row(self, row: dict[str, Any], provisioned: int, used: int) -> None:
        self._rows.append(Section("image", row | {"provisioned_size": provisioned, "used_size": used}))

    def _one(self, image: Any, name: str, snap: str | None, before: str | None) -> int:
        image.set_snap(snap)
        if image.flags() & sizes.FLAGS["fast diff invalid"]:
            where = name + (f"@{snap}" if snap else "")
            self._session.say(f"warning: fast-diff map is invalid for {where}. operation may be slow.")
        total = 0

        def extent(offset: int, length: int, exists: bool) -> None:
            nonlocal total
            total += length if exists else 0

        exact = bool(self._session.option("exact"))
        image.diff_iterate(0, image.size(), before, extent, include_parent=False, whole_object=not exact)
        return total

    def show(self, any_images: bool) -> None:
        session = self._session
        if not session.plain:
            shown = Section("stats", {"images": Rows("images", self._rows)})
            if not self._spec.image:
                shown |= {"total_provisioned_size": self._provisioned, "total_used_size": self._used}
            session.show(shown)
            return
        table = Table(("NAME", "left"), ("PROVISIONED", "right"), ("USED", "right"))
        for row in self._rows:
            name = row["name"] + (f"@{row['snapshot']}" if "snapshot" in row else "")
            table.add(name, size_text(row["provisioned_size"]), size_text(row["used_size"]))
        if self._count > 1:
            table.add("<TOTAL>", size_text(self._provisioned), size_text(self._used))
        if any_images:
            sys.stdout.write(table.text())

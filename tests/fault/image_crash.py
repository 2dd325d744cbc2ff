"""Operations on images, killed at the Nth change of the store, and what is found afterwards.

Run as a program it is a server: it has no threads and no store open, so it forks a child for each line of JSON it
reads, and answers with the child's status and output. A fork is twenty times quicker than a new interpreter.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

from librbd_py import rbd
from librbd_py.format import features as ft
from librbd_py.format import streams
from librbd_py.image import clones, directory, map_check, snapshots
from librbd_py.image.datapath import READ, NativeImage
from librbd_py.image.directory import CreateOptions
from librbd_py.image.streams import import_diff
from librbd_py.store.api import NO_SNAPS, ListSnaps, ObjectContext, OmapGetKeys, SnapContext
from librbd_py.store.embedded import EmbeddedStore
from librbd_py.store.embedded.check import check
from librbd_py.store.embedded.context import EmbeddedContext

R = rbd.RBD()
DIRECTORIES = ("rbd_directory", "rbd_children", "rbd_trash", "rbd_group_directory", "rbd_namespace")
ORDER = 13  # 8 KiB objects
SIZE = 10 << ORDER
LOCKED = ft.OBJECT_MAP | ft.FAST_DIFF  # what needs the exclusive lock
MAPPED = ft.LAYERING | ft.EXCLUSIVE_LOCK | ft.OBJECT_MAP | ft.FAST_DIFF | ft.DEEP_FLATTEN


@dataclass(frozen=True)
class Operation:
    """`run` on what `prepare` made; called again after a kill it ends in the same state, or finds that it is done."""

    prepare: Callable[[ObjectContext], None]
    run: Callable[[ObjectContext], None]


# --- what is killed -----------------------------------------------------------------------------------------------


def fill(io: ObjectContext, name: str = "disk") -> None:
    """Ten objects, two snapshots, changes before, between and after them."""
    R.create(io, name, SIZE, ORDER, False, MAPPED)
    with rbd.Image(io, name) as image:
        image.write(b"1" * (4 << ORDER), 0)
        image.create_snap("one")
        image.write(b"2" * (2 << ORDER), 3 << ORDER)
        image.create_snap("two")
        image.write(b"3" * 5000, 4 << ORDER)
        image.write(b"4" * 100, 9 << ORDER)
        image.metadata_set("key", "value")


def plain(io: ObjectContext) -> None:
    fill(io)
    with rbd.Image(io, "disk") as image:
        image.remove_snap("one")
        image.remove_snap("two")


def family(io: ObjectContext) -> None:
    """A clone with a snapshot, written to in part."""
    fill(io)
    R.clone(io, "disk", "two", io, "kid", MAPPED, ORDER)
    with rbd.Image(io, "kid") as kid:
        kid.write(b"5" * 100, 1 << ORDER)
        kid.create_snap("early")
        kid.write(b"6" * 100, 3 << ORDER)


def old_family(io: ObjectContext) -> None:
    """A clone of format 1."""
    fill(io)
    with rbd.Image(io, "disk") as image:
        image.protect_snap("two")
    clones.clone(io, "disk", "two", io, "kid", CreateOptions(ORDER, MAPPED), clone_format=1)
    with rbd.Image(io, "kid") as kid:
        kid.write(b"5" * 100, 1 << ORDER)


def last_clone(io: ObjectContext) -> None:
    """A clone whose parent's snapshot waits in the trash for it to go."""
    fill(io)
    R.clone(io, "disk", "two", io, "kid", MAPPED, ORDER)
    with rbd.Image(io, "disk") as image:
        image.remove_snap("two")


def trashed(io: ObjectContext) -> None:
    plain(io)
    R.trash_move(io, "disk", 0)


def mapless(io: ObjectContext) -> None:
    fill(io)
    with rbd.Image(io, "disk") as image:
        image.update_features(ft.OBJECT_MAP, False)


def on(name: str, call: Callable[[rbd.Image], object]) -> Callable[[ObjectContext], None]:
    def run(io: ObjectContext) -> None:
        with rbd.Image(io, name) as image:
            call(image)

    return run


def deep_copy(io: ObjectContext) -> None:
    with rbd.Image(io, "disk") as image:
        image.deep_copy(io, "copy")


def restore(io: ObjectContext) -> None:
    for entry in R.trash_list(io):
        R.trash_restore(io, entry["id"], "back")


def purge(io: ObjectContext) -> None:
    for image_id in R.trash_list(io):
        R.trash_remove(io, image_id["id"], True)


def with_map(image: rbd.Image) -> None:
    if not image.features() & ft.OBJECT_MAP:
        image.update_features(ft.OBJECT_MAP, True)
    image.rebuild_object_map()


def without(features: int) -> Callable[[ObjectContext], None]:
    def prepare(io: ObjectContext) -> None:
        fill(io)
        with rbd.Image(io, "disk") as image:
            image.update_features(features, False)

    return prepare


def doubted(io: ObjectContext) -> None:
    """Its object map was just switched on, and says of itself that it is not to be believed."""
    mapless(io)
    with rbd.Image(io, "disk") as image:
        image.update_features(ft.OBJECT_MAP | ft.FAST_DIFF, True)


def switched(features: int, on: bool) -> Callable[[rbd.Image], object]:
    """What is so already is left alone, as a user would who looks first."""

    def switch(image: rbd.Image) -> None:
        if open_ones := features & (~image.features() if on else image.features()):
            image.update_features(open_ones, on)

    return switch


def with_all_maps(image: rbd.Image) -> None:
    switched(ft.EXCLUSIVE_LOCK | ft.OBJECT_MAP | ft.FAST_DIFF, True)(image)
    image.rebuild_object_map()


def create(io: ObjectContext) -> None:
    """What a crash left of an image has its name; removing it gives the name back."""
    try:
        rbd.Image(io, "new", read_only=True).close()
    except rbd.ImageNotFound:
        if "new" in R.list(io):
            R.remove(io, "new")
    R.create(io, "new", SIZE, ORDER, False, MAPPED)


def copy(io: ObjectContext) -> None:
    with rbd.Image(io, "disk", snapshot="two") as image:
        image.copy(io, "copy")


def zeroed(io: ObjectContext) -> None:
    """Objects that hold nothing but zeros, and halves of some."""
    plain(io)
    with rbd.Image(io, "disk") as image:
        image.write(bytes(3 << ORDER), 0)
        image.write(b"8" * 100, (6 << ORDER) + 100)
        image.write(bytes(3 << ORDER), 7 << ORDER)


def diff_to_three(io: ObjectContext) -> None:
    """A diff from snapshot "two" to a new one, as long as that is not there."""
    data = bytes(range(256)) * 64
    parts = [streams.diff_head(1, "two", "three", SIZE - 5000, False), streams.extent(1 << ORDER, len(data), True, 1)]
    parts += [data, streams.extent(5 << ORDER, 3 << ORDER, False, 1), streams.END]
    with rbd.Image(io, "disk") as image:
        import_diff(image.handle, streams.Reader(BytesIO(b"".join(parts))))


def protected(io: ObjectContext) -> None:
    fill(io)
    with rbd.Image(io, "disk") as image:
        image.protect_snap("one")


def grouped(io: ObjectContext) -> None:
    """Two members, of which one has been in a snapshot of the group."""
    for name in ("disk", "second"):
        fill(io, name)
    R.group_create(io, "group")
    group = rbd.Group(io, "group")
    for name in ("disk", "second"):
        group.add_image(io, name)


def lonely(io: ObjectContext) -> None:
    fill(io)
    R.group_create(io, "group")


def group_snapshot(io: ObjectContext) -> None:
    grouped(io)
    rbd.Group(io, "group").create_snap("one")
    for name in ("disk", "second"):
        with rbd.Image(io, name) as image:
            image.write(b"7" * 5000, 0)


def group_create(io: ObjectContext) -> None:
    """What a crash left of a group has its name; removing it gives the name back."""
    if R.group_list(io):
        R.group_remove(io, "group")
    R.group_create(io, "group")


def group_snap_create(io: ObjectContext) -> None:
    """What a crash left of a snapshot is listed as incomplete; removing it gives the name back."""
    group = rbd.Group(io, "group")
    for row in group.list_snaps():
        if row["state"] != rbd.RBD_GROUP_SNAP_STATE_COMPLETE:
            group.remove_snap(row["name"])
    group.create_snap("new")


def related(io: ObjectContext) -> None:
    """A parent that is a member of a group."""
    family(io)
    R.group_create(io, "group")
    rbd.Group(io, "group").add_image(io, "disk")


def migration_prepare(io: ObjectContext) -> None:
    """What a crash left half prepared is aborted first."""
    with suppress(rbd.ImageNotFound, rbd.InvalidArgument):
        R.migration_abort(io, "disk")
    R.migration_prepare(io, "disk", io, "moved")


def migrating(io: ObjectContext) -> None:
    related(io)
    R.migration_prepare(io, "disk", io, "moved")
    with rbd.Image(io, "moved") as image:
        image.write(b"8" * 100, 5 << ORDER)


def migrated(io: ObjectContext) -> None:
    migrating(io)
    R.migration_execute(io, "moved")


OPERATIONS = {
    "migration prepare": Operation(related, migration_prepare),
    "migration execute": Operation(migrating, lambda io: R.migration_execute(io, "moved")),
    "migration commit": Operation(migrated, lambda io: R.migration_commit(io, "moved")),
    "migration abort": Operation(migrating, lambda io: R.migration_abort(io, "disk")),
    "migration abort of everything": Operation(migrated, lambda io: R.migration_abort(io, "disk")),
    "group create": Operation(lambda io: None, group_create),
    "group remove": Operation(group_snapshot, lambda io: R.group_remove(io, "group")),
    "group rename": Operation(grouped, lambda io: R.group_rename(io, "group", "renamed")),
    "group add": Operation(
        lonely,
        lambda io: rbd.Group(io, "group").add_image(io, "disk"),
    ),
    "group leave": Operation(grouped, lambda io: rbd.Group(io, "group").remove_image(io, "disk")),
    "group snapshot create": Operation(grouped, group_snap_create),
    "group snapshot remove": Operation(group_snapshot, lambda io: rbd.Group(io, "group").remove_snap("one")),
    "group snapshot rename": Operation(group_snapshot, lambda io: rbd.Group(io, "group").rename_snap("one", "1")),
    "group rollback": Operation(group_snapshot, lambda io: rbd.Group(io, "group").rollback_to_snap("one")),
    "namespace create": Operation(lambda io: None, lambda io: R.namespace_create(io, "space")),
    "namespace remove": Operation(
        lambda io: R.namespace_create(io, "space"), lambda io: R.namespace_remove(io, "space")
    ),
    "create": Operation(lambda io: None, create),
    "snapshot create": Operation(fill, on("disk", lambda image: image.create_snap("new"))),
    "snapshot remove": Operation(fill, on("disk", lambda image: image.remove_snap("one"))),
    "snapshot rename": Operation(fill, on("disk", lambda image: image.rename_snap("one", "1"))),
    "protect": Operation(fill, on("disk", lambda image: image.protect_snap("one"))),
    "unprotect": Operation(protected, on("disk", lambda image: image.unprotect_snap("one"))),
    "copy": Operation(fill, copy),
    "rollback": Operation(fill, on("disk", lambda image: image.rollback_to_snap("one"))),
    "grow": Operation(fill, on("disk", lambda image: image.resize(SIZE + (3 << ORDER)))),
    "shrink": Operation(fill, on("disk", lambda image: image.resize((3 << ORDER) + 100))),
    "shrink a clone": Operation(family, on("kid", lambda image: image.resize((2 << ORDER) + 100))),
    "clone": Operation(fill, lambda io: R.clone(io, "disk", "two", io, "kid", MAPPED, ORDER)),
    "flatten": Operation(family, on("kid", lambda image: image.flatten())),
    "flatten format 1": Operation(old_family, on("kid", lambda image: image.flatten())),
    "rename": Operation(fill, lambda io: R.rename(io, "disk", "renamed")),
    "remove": Operation(plain, lambda io: R.remove(io, "disk")),
    "remove the last clone": Operation(last_clone, lambda io: R.remove(io, "kid")),
    "remove a clone of format 1": Operation(old_family, lambda io: R.remove(io, "kid")),
    "deep copy": Operation(fill, deep_copy),
    "trash move": Operation(fill, lambda io: R.trash_move(io, "disk", 0)),
    "trash restore": Operation(trashed, restore),
    "trash remove": Operation(trashed, purge),
    "trash purge": Operation(trashed, lambda io: R.trash_purge(io, datetime(2100, 1, 1))),
    "sparsify": Operation(zeroed, on("disk", lambda image: image.sparsify(4096))),
    "import a diff": Operation(fill, diff_to_three),
    "object map off": Operation(fill, on("disk", lambda image: image.update_features(ft.OBJECT_MAP, False))),
    "object map on": Operation(mapless, on("disk", with_map)),
    "object map rebuilt": Operation(doubted, on("disk", lambda image: image.rebuild_object_map())),
    "fast diff off": Operation(fill, on("disk", switched(ft.FAST_DIFF, False))),
    "fast diff on": Operation(without(ft.FAST_DIFF), on("disk", with_all_maps)),
    "exclusive lock off": Operation(without(LOCKED), on("disk", switched(ft.EXCLUSIVE_LOCK, False))),
    "exclusive lock on": Operation(without(LOCKED | ft.EXCLUSIVE_LOCK), on("disk", with_all_maps)),
    "everything off": Operation(fill, on("disk", switched(LOCKED | ft.EXCLUSIVE_LOCK, False))),
    "deep flatten off": Operation(fill, on("disk", switched(ft.DEEP_FLATTEN, False))),
}


# --- the kill -----------------------------------------------------------------------------------------------------


class Fuse:
    """Counts changes; the process dies before number `at`."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0

    def burn(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class FusedContext(EmbeddedContext):
    fuse: Fuse

    def write(self, oid: str, ops: Any, snapc: SnapContext = NO_SNAPS) -> list[Any]:
        self.fuse.burn()
        return super().write(oid, ops, snapc)

    def snap_create(self) -> int:
        self.fuse.burn()
        return super().snap_create()

    def snap_remove(self, snap_id: int) -> None:
        self.fuse.burn()
        super().snap_remove(snap_id)


class FusedStore(EmbeddedStore):
    fuse: Fuse

    def open(self, pool: str | int, namespace: str = "") -> FusedContext:
        plain = super().open(pool, namespace)
        made = FusedContext(self, plain.pool_id, namespace)
        made.fuse = self.fuse
        return made


def fuse_data(fuse: Fuse) -> None:
    """From here on this process's requests to images burn it, too."""
    io_of, copyup = NativeImage._io, NativeImage.copyup

    def fused_io(self: NativeImage, kind: int, *args: Any, **kwargs: Any) -> int:
        if kind != READ:
            fuse.burn()
        return io_of(self, kind, *args, **kwargs)

    def fused_copyup(self: NativeImage, objno: int) -> bool:
        fuse.burn()
        return copyup(self, objno)

    NativeImage._io, NativeImage.copyup = fused_io, fused_copyup  # type: ignore[method-assign]


def run(name: str, folder: str, at: int) -> object:
    """The operation, with a fuse; the number of changes when it came through."""
    fuse = Fuse(at)
    fuse_data(fuse)
    with FusedStore(folder) as store:
        store.fuse = fuse
        OPERATIONS[name].run(store.open("rbd"))
    return fuse.count


def prepare(name: str, folder: str) -> object:
    with EmbeddedStore(folder, create=True) as store:
        OPERATIONS[name].prepare(store.open("rbd"))
    return None


# --- what is found ------------------------------------------------------------------------------------------------


def content(image: rbd.Image) -> int:
    return zlib.crc32(image.read(0, image.size())) if image.size() else 0


def maps(image: rbd.Image) -> list[str]:
    try:
        return map_check.differences(image.handle)
    except FileNotFoundError as failure:
        return [f"{failure.strerror}"]


def _kind(snap: dict[str, Any]) -> str:
    if snap["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_GROUP:
        return f"of the group: {snap['group'] and snap['group']['snap_name']}"
    return "trashed"


def groups_of(io: ObjectContext, labels: dict[str, str]) -> dict[str, Any]:
    """The groups of a pool; their ids and those of their snapshots get labels."""
    found: dict[str, Any] = {}
    for name in R.group_list(io):
        group = rbd.Group(io, name)
        labels[group.id()] = f"group {name}"
        rows = list(group.list_snaps())
        for row in rows:
            labels[group.get_snap_info(row["name"])["id"]] = f"group snapshot {row['name']}"
        members = sorted((row["name"], row["state"]) for row in group.list_images())
        found[name] = [members, sorted((row["name"], row["state"]) for row in rows)]
    return found


def describe(io: ObjectContext, name: str, labels: dict[str, str]) -> dict[str, Any]:
    """All that a user sees of an image, and what its object maps have wrong."""
    with rbd.Image(io, name, read_only=True) as image:
        snaps = []
        for snap in list(image.list_snaps()):
            labels[f"{snap['id']:016x}"] = snap["name"] if snap["namespace"] == 0 else _kind(snap)
            protected = snap["namespace"] == 0 and image.is_protected_snap(snap["name"])
            image.set_snap_by_id(snap["id"])
            kids = sorted(child["image"] for child in image.list_children2())
            snaps.append([labels[f"{snap['id']:016x}"], snap["size"], content(image), protected, kids, image.overlap()])
            image.set_snap(None)
        header = image.handle.header
        return {
            "size": image.size(),
            "content": content(image),
            "features": image.features(),
            "flags": image.flags(),
            "operations": image.op_features(),
            "overlap": image.overlap(),
            "parent": header.parent.exists,
            "metadata": list(image.metadata_list()),
            "group": image.group()["name"],
            "snapshots": snaps,
            "maps": maps(image) if header.has(ft.OBJECT_MAP) else None,
        }


def survey(folder: str) -> dict[str, Any]:
    with EmbeddedStore(folder) as store:
        return survey_of(store.open("rbd"))


def there(io: ObjectContext, oid: str) -> bool:
    """OSDs list names for as long as they have not dropped what they kept for removed snapshots."""
    try:
        return bool(io.read(oid, [ListSnaps()])[0].clones)
    except FileNotFoundError:
        return False


def survey_of(io: ObjectContext) -> dict[str, Any]:
    """The images, and every object and directory entry by names that do not change from run to run."""
    labels: dict[str, str] = {}
    images: dict[str, Any] = {}
    for entry in R.trash_list(io):
        labels[entry["id"]] = f"trash {entry['name']}"
    for name in R.list(io):
        try:
            with rbd.Image(io, name, read_only=True) as image:
                labels[image.id()] = name
            images[name] = describe(io, name, labels)
        except (OSError, rbd.Error) as failure:
            images[name] = f"cannot be opened: {failure}"
    groups = {}
    with suppress(rbd.Error):  # a header may be missing
        groups = groups_of(io, labels)
    rows = []
    for oid in io.objects():
        kind, *parts = oid.split(".")
        if kind == "rbd_data" and not there(io, oid):
            continue
        if kind == "rbd_data":  # its number is no snapshot
            parts[0] = labels.get(parts[0], parts[0])
        else:
            parts = [labels.get(part, part) for part in parts]
        rows.append(".".join([kind, *parts]))
        if oid in DIRECTORIES or oid.startswith("rbd_group_header."):
            for key in io.read(oid, [OmapGetKeys()])[0][0]:
                text = re.sub("^image_[0-9a-f]{16}_", "image_", key.decode(errors="replace"))  # the pool's number
                for image_id, label in labels.items():
                    text = text.replace(image_id, label)
                rows.append(f"{rows[-1].partition(':')[0]}: {text}" if oid != "rbd_children" else f"{oid}: a clone")
    trash = sorted(labels[e["id"]] for e in R.trash_list(io))
    spaces = R.namespace_list(io)
    return {"images": images, "trash": trash, "groups": groups, "namespaces": spaces, "objects": sorted(rows)}


def tidy(folder: str) -> list[str]:
    """What the check finds; when it finds something, its advice is followed."""
    findings = [str(finding) for finding in check(folder, repair=True)]
    if not findings:
        return []
    with EmbeddedStore(folder) as store:
        io = store.open("rbd")
        for finding in findings:
            if lost := re.search(r"keeps data for snapshot (\d+)", finding):
                io.snap_remove(int(lost[1]))
        follow_advice(io)
    return findings


def follow_advice(io: ObjectContext) -> None:
    for image_id in directory.removals(io):
        R.trash_remove(io, image_id, True)
    for name in R.list(io):
        with rbd.Image(io, name) as image:
            for snap in list(image.list_snaps()):
                snapshots.forget_lost_v1_children(image.handle, snap["id"])
                kids = snapshots.forget_lost_children(image.handle, snap["id"])
                if snap["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_TRASH and not kids:
                    image.remove_snap_by_id(snap["id"])
            if image.features() & ft.OBJECT_MAP and maps(image):
                image.rebuild_object_map()


def resume(name: str, folder: str) -> dict[str, Any]:
    """After a kill: what is there, what calling again does, what the check finds then, and what is there at the end."""
    found: dict[str, Any] = {"killed": survey(folder)}
    try:
        with EmbeddedStore(folder) as store:
            OPERATIONS[name].run(store.open("rbd"))
        found["again"] = "done"
    except (OSError, rbd.Error) as failure:
        found["again"] = repr(failure)
    found["check"] = tidy(folder)
    found["end"] = survey(folder)
    found["check at the end"] = [str(finding) for finding in check(folder)]
    return found


# --- the server ---------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[..., object]] = {"prepare": prepare, "run": run, "survey": survey, "resume": resume}


class Server:
    def __init__(self, module: str = "tests.fault.image_crash") -> None:
        self._module = module

    def __enter__(self) -> Server:
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
        )  # fmt: skip
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)

    def call(self, what: str, *args: object) -> Any:
        """What the function returned; None when it was killed. AssertionError when it raised."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, *args]) + "\n")
        self._process.stdin.flush()
        status, result = json.loads(self._process.stdout.readline())
        assert status in (0, signal.SIGKILL), f"{what} {args}: status {status}\n{result}"
        return result if status == 0 else None


def serve(calls: dict[str, Callable[..., object]]) -> None:
    for line in sys.stdin:
        what, *args = json.loads(line)
        with tempfile.TemporaryFile() as out:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    os.write(out.fileno(), json.dumps(calls[what](*args)).encode())
                    code = 0
                except BaseException as failure:
                    import traceback

                    os.write(out.fileno(), json.dumps("".join(traceback.format_exception(failure))).encode())
                finally:
                    os._exit(code)
            _, status = os.waitpid(pid, 0)
            out.seek(0)
            text = out.read().decode()
            print(
                json.dumps([os.WTERMSIG(status) or os.WEXITSTATUS(status), json.loads(text) if text else None]),
                flush=True,
            )


if __name__ == "__main__":
    serve(CALLS)

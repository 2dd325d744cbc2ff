"""Backups and restores, killed at any of their changes. Run as a program it is a server, as `image_crash` is."""

from __future__ import annotations

import os
from typing import Any

from librbd_py import rbd
from librbd_py.backup import prune
from librbd_py.backup.create import create
from librbd_py.backup.restore import restore, restore_onto
from librbd_py.backup.target import UNFINISHED, FolderTarget
from librbd_py.backup.vault import Vault
from librbd_py.backup.wire import RECORD
from librbd_py.store.api import ObjectContext
from librbd_py.store.embedded import EmbeddedStore
from tests.fault import image_crash
from tests.fault.image_crash import Fuse, Operation, Server, fill, survey, tidy

SET = "rbd/disk"
PART = 64 << 10


class FusedTarget(FolderTarget):
    """Burns before, within and after each change."""

    def __init__(self, path: str, fuse: Fuse) -> None:
        super().__init__(path)
        self.fuse = fuse

    def put(self, key: str, data: bytes, digest: str) -> None:
        self.fuse.burn()
        path = self._root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.parent / f"{UNFINISHED}{os.getpid()}-{path.name}"
        half.write_bytes(data[: len(data) // 2])
        self.fuse.burn()
        super().put(key, data, digest)
        self.fuse.burn()

    def delete(self, key: str) -> None:
        self.fuse.burn()
        super().delete(key)
        self.fuse.burn()


def prepare(folder: str, place: str) -> None:
    """An image with two snapshots of several parts, the first of which is backed up."""
    with EmbeddedStore(folder, create=True) as store:
        io = store.open("rbd")
        fill(io)
        with rbd.Image(io, "disk") as image:
            image.resize(1 << 20)
            image.write(os.urandom(5 * PART), 0)
            image.create_snap("three")
        create(Vault(FolderTarget(place)), io, "disk", "one", SET, part_size=PART)


def backup(folder: str, place: str, at: int) -> int:
    fuse = Fuse(at)
    with EmbeddedStore(folder) as store:
        create(Vault(FusedTarget(place, fuse)), store.open("rbd"), "disk", "three", SET, part_size=PART, parallel=1)
    return int(fuse.count)


def remove(folder: str, place: str, at: int) -> int:
    fuse = Fuse(at)
    vault = Vault(FusedTarget(place, fuse))
    prune.remove(vault, SET, [each.id for each in vault.manifests(SET)])
    return int(fuse.count)


def _restore(place: str) -> Operation:
    def run(io: ObjectContext) -> None:
        restore(Vault(FolderTarget(place)), SET, io, "back")

    return Operation(lambda io: None, run)


def restored(folder: str, place: str, at: int) -> object:
    image_crash.OPERATIONS["restore of a backup"] = _restore(place)
    return image_crash.run("restore of a backup", folder, at)


def again(folder: str, place: str) -> bool:
    """False: the image was there already, whole."""
    try:
        restored(folder, place, 0)
    except FileExistsError:
        return False
    return True


def look(place: str) -> dict[str, Any]:
    """What a check says, and which backups are complete."""
    vault = Vault(FolderTarget(place))
    report = vault.check(read=True)
    return {
        "problems": report.problems,
        "orphans": report.orphans,
        "snapshots": [each.snapshot for each in vault.manifests(SET)],
    }


def seen(folder: str) -> dict[str, Any]:
    """A survey, without the records of which backup a snapshot is of: they have ids in them."""
    found = survey(folder)
    for image in found["images"].values():
        if isinstance(image, dict):
            image["metadata"] = [row for row in image["metadata"] if not row[0].startswith(RECORD)]
    return found


def begun(folder: str, place: str) -> None:
    """The first backup, restored."""
    with EmbeddedStore(folder) as store:
        restore(Vault(FolderTarget(place)), SET, store.open("rbd"), "back", wanted="one")


def onto(folder: str, place: str, at: int) -> object:
    def run(io: ObjectContext) -> None:
        restore_onto(Vault(FolderTarget(place)), SET, io, "back", force=True)

    image_crash.OPERATIONS["restore onto"] = Operation(lambda io: None, run)
    return image_crash.run("restore onto", folder, at)


def clean(place: str) -> None:
    vault = Vault(FolderTarget(place))
    for keys in vault.check().orphans.values():
        for key in keys:
            vault.target.delete(key)


CALLS = {
    "prepare": prepare, "backup": backup, "remove": remove, "restore": restored, "look": look, "clean": clean,
    "again": again, "survey": seen, "begun": begun, "onto": onto, "tidy": tidy,
}  # fmt: skip


class BackupServer(Server):
    def __init__(self) -> None:
        super().__init__("tests.fault.backup_crash")


if __name__ == "__main__":
    image_crash.serve(CALLS)

"""`rbdpy backup`: snapshots of images to S3 or a folder, and back."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

from librbd_py.backup import create as making
from librbd_py.backup import prune as pruning
from librbd_py.backup import restore as restoring
from librbd_py.backup.target import open_target
from librbd_py.backup.vault import Report, Vault
from librbd_py.backup.wire import Manifest
from librbd_py.cli.output import Rows, Section, Table, size_text
from librbd_py.cli.registry import command, with_format, with_image, with_progress
from librbd_py.cli.session import Failure, Session, Spec, code_of, failures
from librbd_py.cli.sizes import byte_count

PLACE = "s3://bucket/prefix|file:/path"


def with_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", help="name of the set of backups [default: pool/[namespace/]image]")


def with_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="every snapshot that is not backed up yet, oldest first")
    parser.add_argument("--full", action="store_true", help="a full backup, also where an increment would do")
    parser.add_argument("--part-size", type=byte_count, default=making.PART, help="bytes in a part [default: 8M]")


def with_parallel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parallel", type=int, default=making.PARALLEL, help="transfers at a time [default: 4]")


def with_restore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backup", metavar="ID|SNAPSHOT", help="how far [default: the newest]")
    parser.add_argument("--data-pool", help="data pool of the new image")
    parser.add_argument(
        "--onto", action="store_true", help="bring an existing image to a later backup: only what came after is read"
    )
    parser.add_argument(
        "--force", action="store_true", help="with --onto: roll the image back first, if it has changed"
    )


def with_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--read", action="store_true", help="read every part and compare its checksum")
    parser.add_argument(
        "--remove-orphans", action="store_true", help="remove what belongs to no backup; no backup may be under way"
    )


def with_keep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", type=int, help="how many of the newest backups stay, with what they need")


@contextmanager
def failing(what: str) -> Iterator[None]:
    """`rbd: <what>: <words>`: which backup, part or server it was."""
    try:
        yield
    except failures() as error:
        words = getattr(error, "strerror", None) or error
        raise Failure(f"rbd: {what}: {words}", code_of(error)) from None


@contextmanager
def _vault(session: Session) -> Iterator[Vault]:
    url = session.word()
    if not url:
        raise Failure(f"rbd: a place for backups was not specified: {PLACE}", 22)
    with failing("the place for backups cannot be used"):
        target = open_target(url)
    try:
        yield Vault(target)
    finally:
        target.close()


def _set_of(session: Session) -> str:
    name = session.word()
    if not name:
        raise Failure("rbd: a set of backups was not specified (rbdpy backup ls shows them)", 22)
    return name


def _set_name(spec: Spec) -> str:
    return "/".join(part for part in (spec.pool, spec.namespace, spec.image) if part)


@command(
    "backup create",
    "Back up a snapshot of an image, as an increment to the last one where that can be.",
    with_image, with_set, with_create, with_parallel, with_progress,
    specs=(PLACE, "snap-spec"),
)  # fmt: skip
def create(session: Session) -> None:
    options = session.options
    with _vault(session) as vault:
        spec = session.spec(snap="no" if options.all else "must")
        name = options.set or _set_name(spec)
        ctx = session.context(spec)
        wanted = [spec.snap]
        if options.all:
            with session.image(spec, read_only=True) as image:
                snaps = sorted(image.list_snaps(), key=lambda snap: int(snap["id"]))
                with failing("backup failed"):
                    done = {(each.image_id, each.snapshot_id) for each in vault.manifests(name)}
                wanted = [snap["name"] for snap in snaps if (image.handle.id, snap["id"]) not in done]
        for snap in wanted:
            with failing("backup failed"), session.progress(f"Backing up {snap}") as progress:
                made = making.create(
                    vault, ctx, spec.image, snap, name, full=options.full, part_size=options.part_size,
                    parallel=options.parallel, progress=progress,
                )  # fmt: skip
            print(f"{made.id}: {_kind(made)} backup of {name}@{snap}, {size_text(made.stored)} in {made.parts} parts")
        if not wanted:
            print("nothing to back up")


def _kind(manifest: Manifest) -> str:
    return "incremental" if manifest.parent else "full"


@command("backup ls", "List the backups in a place.", with_format, specs=(PLACE, "set"))
def list_(session: Session) -> None:
    with _vault(session) as vault, failing("listing backups failed"):
        name = session.word()
        every = [each for known in ([name] if name else vault.sets()) for each in vault.manifests(known)]
    every.sort(key=lambda each: (each.set, each.created))
    if not session.plain:
        session.show(Rows("backups", [_section(each) for each in every]))
        return
    columns = [(text, "left") for text in ("SET", "ID", "KIND", "SNAPSHOT")]
    table = Table(*columns, ("SIZE", "right"), ("STORED", "right"), ("CREATED", "left"))
    for each in every:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.created))
        table.add(each.set, each.id, _kind(each), each.snapshot, size_text(each.size), size_text(each.stored), when)
    if every:
        print(table.text(), end="")


def _section(each: Manifest) -> Section:
    values = {
        "set": each.set, "id": each.id, "kind": _kind(each), "parent": each.parent, "snapshot": each.snapshot,
        "size": each.size, "stored": each.stored, "parts": each.parts, "created": int(each.created),
    }  # fmt: skip
    return Section("backup", values)


@command(
    "backup restore",
    "Make a new image of a set of backups, with their snapshots, or bring one to a later backup.",
    with_image, with_restore, with_parallel, with_progress,
    specs=(PLACE, "set", "image-spec"),
)  # fmt: skip
def restore(session: Session) -> None:
    options = session.options
    with _vault(session) as vault:
        name, spec = _set_of(session), session.spec(check="full")
        ctx = session.context(spec)
        with failing("restore failed"), session.progress("Restoring image") as progress:
            if options.onto:
                chain = restoring.restore_onto(
                    vault, name, ctx, spec.image, wanted=options.backup, force=options.force,
                    parallel=options.parallel, progress=progress,
                )  # fmt: skip
            else:
                chain = restoring.restore(
                    vault, name, ctx, spec.image, wanted=options.backup, data_pool=options.data_pool,
                    parallel=options.parallel, progress=progress,
                )  # fmt: skip
    if chain:
        print(f"{spec.text()}: {len(chain)} backups of {name}, up to {chain[-1].snapshot}")
    else:
        print(f"{spec.text()}: nothing newer to restore")


@command(
    "backup rm", "Remove backups that no other one needs.", specs=(PLACE, "set", "id"), many=True
)  # fmt: skip
def remove(session: Session) -> None:
    with _vault(session) as vault:
        name = _set_of(session)
        wanted = session.words[session.at :]
        if not wanted:
            raise Failure("rbd: the backups to remove were not specified", 22)
        with failing("removing backups failed"):
            gone = pruning.remove(vault, name, wanted)
    _say_removed(gone)


@command(
    "backup prune", "Remove old backups, but for those that newer ones need.", with_keep, specs=(PLACE, "set")
)  # fmt: skip
def prune(session: Session) -> None:
    keep = session.options.keep
    if keep is None or keep < 1:
        raise Failure("rbd: --keep was not specified: a number from 1 on", 22)
    with _vault(session) as vault:
        name = _set_of(session)
        with failing("removing backups failed"):
            gone = pruning.prune(vault, name, keep)
    _say_removed(gone)


def _say_removed(gone: list[Manifest]) -> None:
    for each in gone:
        print(f"{each.id}: removed, {_kind(each)} backup of {each.set}@{each.snapshot}")
    if not gone:
        print("nothing to remove")


@command(
    "backup check", "Check that backups are complete, and name what belongs to none.", with_check, with_format,
    specs=(PLACE, "set"),
)  # fmt: skip
def check(session: Session) -> None:
    """Exit status 1 when a backup is damaged."""
    with _vault(session) as vault:
        name = session.word()
        with failing("checking backups failed"):
            report = vault.check([name] if name else None, read=bool(session.options.read))
            if session.options.remove_orphans:
                for keys in report.orphans.values():
                    for key in keys:
                        vault.target.delete(key)
    if session.plain:
        _print_report(report, removed=bool(session.options.remove_orphans))
    else:
        orphans = [Section("orphan", {"of": what, "objects": len(keys)}) for what, keys in report.orphans.items()]
        problems = Rows("problems", report.problems, "problem")
        values = {"backups": len(report.backups), "problems": problems, "orphans": Rows("orphans", orphans)}
        session.show(Section("check", values))
    if report.problems:
        raise Failure("", 1)


def _print_report(report: Report, *, removed: bool) -> None:
    for text in report.problems:
        print(f"damaged: {text}")
    for what, keys in report.orphans.items():
        more = ", ..." if len(keys) > 1 else ""
        print(f"{'removed' if removed else 'orphan'}: {what}: {len(keys)} objects, {keys[0]}{more}")
    counted = f"{len(report.backups)} backups, {len(report.problems)} problems"
    print(f"{counted}, {size_text(report.orphan_bytes)} in orphans" if report.orphans else counted)

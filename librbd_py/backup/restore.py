"""Making an image of backups: the full one and every increment up to the wanted one, each followed by its snapshot."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from librbd_py.format import features as ft
from librbd_py.format import header as fh
from librbd_py.image import cls, metadata, snapshots
from librbd_py.image.diff import changes
from librbd_py.image.directory import CreateOptions, create_unnamed, give_name
from librbd_py.image.handle import ImageHandle
from librbd_py.image.import_source import zero
from librbd_py.image.io import before_write
from librbd_py.image.progress import Progress, report
from librbd_py.image.resize import resize
from librbd_py.image.trash import remove_from_trash
from librbd_py.store.api import ObjectContext

from .vault import Vault
from .wire import RECORD, Manifest, decode_part

PARALLEL = 4  # downloads at a time


def choose(every: list[Manifest], wanted: str | None) -> Manifest:
    """The newest; or the newest of a snapshot, or the one with that id. ENOENT."""
    found = [each for each in every if wanted in (None, each.snapshot, each.id)]
    if not found:
        raise OSError(errno.ENOENT, f"there is no backup of {wanted}" if wanted else "there are no backups")
    return max(found, key=lambda each: (each.snapshot_time, each.snapshot_id, each.created))


def restore(
    vault: Vault,
    name: str,
    ctx: ObjectContext,
    image: str,
    *,
    wanted: str | None = None,
    data_pool: str | None = None,
    parallel: int = PARALLEL,
    progress: Progress | None = None,
) -> list[Manifest]:
    """A new image from a set of backups, with a snapshot for each backup, and HEAD as the last. It has its name when it
    is complete; cut short it is in the trash as one being removed, and can be made anew. Returns what it was made of.

    ENOENT: no such backup, or a part is missing. EBADMSG: damaged. EEXIST: there is such an image."""
    every = vault.manifests(name)
    chain = vault.chain(choose(every, wanted), every)
    last = chain[-1]
    features = last.features & ft.DEFAULT  # others, such as journaling, an image is given by other means
    options = CreateOptions(last.order, features, last.stripe_unit, last.stripe_count, data_pool)
    image_id = create_unnamed(ctx, image, chain[0].size, options)
    try:
        with ImageHandle.open(ctx, image_id=image_id) as dest:
            if last.metadata:
                values = {key: value.encode(errors="surrogateescape") for key, value in last.metadata.items()}
                ctx.exec(dest.oid, "rbd", "metadata_set", cls.encode_metadata(values))
            _apply_all(vault, chain, _names(chain), dest, parallel, progress)
        give_name(ctx, image, image_id)
    except BaseException:
        remove_from_trash(ctx, image_id, force=True)
        raise
    # Last: half an image with a protected snapshot could not be taken away.
    if any(manifest.protected for manifest in chain):
        with ImageHandle.open(ctx, image_id=image_id) as dest:
            _protect(dest, chain, _names(chain))
    return chain


def restore_onto(
    vault: Vault,
    name: str,
    ctx: ObjectContext,
    image: str,
    *,
    wanted: str | None = None,
    force: bool = False,
    parallel: int = PARALLEL,
    progress: Progress | None = None,
) -> list[Manifest]:
    """Brings an image that has a snapshot of one of the backups, because it was restored from it or is the one that was
    backed up, to a later one: only what came after is read. Returns what was applied. Cut short it has the snapshots of
    what was applied wholly, and goes on from there with `force`.

    ENOENT: no such image or backup, or no snapshot to begin with. ESTALE: the image has changed since that snapshot;
    `force` rolls it back. EBADMSG: damaged."""
    every = vault.manifests(name)
    chain = vault.chain(choose(every, wanted), every)
    with ImageHandle.open(ctx, image) as dest:
        for snapshot, manifest in zip(_names(chain), chain, strict=True):
            half = dest.header.snap_named(RECORD + manifest.id, fh.NAMESPACE_USER)
            if half is not None:
                _finish(dest, half.id, manifest, snapshot)
        known = {snap: manifest for manifest in chain if (snap := _snapshot_of(dest, manifest)) is not None}
        if not known:
            raise OSError(errno.ENOENT, f"{image} has no snapshot of a backup that leads to {chain[-1].snapshot}")
        base = max(known, key=lambda snap: known[snap].number)
        first = known[base].number
        rest = chain[first + 1 :]
        if not rest:
            _protect(dest, chain[first:], _names(chain)[first:])
            return []
        if next(changes(dest, 0, dest.header.size, base), None) or dest.header.size != known[base].size:
            if not force:
                raise OSError(errno.ESTALE, f"{image} has changed since its snapshot of {known[base].snapshot}")
            snapshots.rollback(dest, base)
        _apply_all(vault, rest, _names(chain)[first + 1 :], dest, parallel, progress)
        _protect(dest, chain[first:], _names(chain)[first:])
    return rest


def _snapshot_of(dest: ImageHandle, manifest: Manifest) -> int | None:
    """The id of the snapshot that is what `manifest` holds: of the very image that was backed up, or restored."""
    snaps = dest.header.snaps
    snap = snaps.get(manifest.snapshot_id)
    if dest.id == manifest.image_id and snap is not None and snap.timestamp == manifest.snapshot_time:
        return snap.id
    values = cls.metadata(dest.ctx, dest.oid)
    made = [snap_id for snap_id in snaps if values.get(f"{RECORD}{snap_id}") == manifest.id.encode()]
    return made[-1] if made else None


def _apply_all(
    vault: Vault, chain: list[Manifest], names: list[str], dest: ImageHandle, parallel: int, progress: Progress | None
) -> None:
    total = sum(each.parts for each in chain) + 1
    done = 0
    for snapshot, manifest in zip(names, chain, strict=True):
        done = _apply(vault, manifest, dest, parallel, progress, done, total)
        _finish(dest, snapshots.create(dest, RECORD + manifest.id), manifest, snapshot)


def _finish(dest: ImageHandle, snap_id: int, manifest: Manifest, name: str) -> None:
    """A new snapshot is called by its backup until that is on record: a kill leaves none that nobody knows."""
    metadata.put(dest, f"{RECORD}{snap_id}", manifest.id)
    snapshots.rename(dest, snap_id, name)


def _protect(dest: ImageHandle, chain: list[Manifest], names: list[str]) -> None:
    for snapshot, manifest in zip(names, chain, strict=True):
        snap = dest.header.snap_named(snapshot, fh.NAMESPACE_USER)
        if manifest.protected and snap is not None and not snap.protection:
            snapshots.protect(dest, snapshot)


def _names(chain: list[Manifest]) -> list[str]:
    """Of the snapshots; an older one whose name was given again later has its backup's id added."""
    names: list[str] = []
    for number, each in enumerate(chain):
        again = any(later.snapshot == each.snapshot for later in chain[number + 1 :])
        names.append(f"{each.snapshot}-{each.id[:8]}" if again else each.snapshot)
    return names


def _apply(
    vault: Vault, manifest: Manifest, dest: ImageHandle, parallel: int, progress: Progress | None, done: int, total: int
) -> int:
    if dest.header.size != manifest.size:
        resize(dest, manifest.size)
    before_write(dest)
    for data in _ahead(vault, manifest, max(parallel, 1)):
        for offset, length, content in decode_part(data, manifest.size):
            if content is None:
                zero(dest, offset, length)
            else:
                dest.data.write(offset, bytes(content))
        done += 1
        report(progress, done, total)
    dest.data.flush()
    return done


def _ahead(vault: Vault, manifest: Manifest, parallel: int) -> Iterator[bytes]:
    """The parts in order, some of them fetched before they are asked for."""
    with ThreadPoolExecutor(parallel, thread_name_prefix="restore") as pool:
        coming: deque[Future[bytes]] = deque()
        try:
            for ref in vault.parts(manifest):
                coming.append(pool.submit(vault.part, manifest, ref))
                if len(coming) > parallel:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for each in coming:
                each.cancel()

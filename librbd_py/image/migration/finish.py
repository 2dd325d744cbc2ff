"""The end of a migration: commit drops the source, abort the destination."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from librbd_py.format import header as fh
from librbd_py.format import names
from librbd_py.format import trash as ftr
from librbd_py.format.header import MIGRATION_ABORTING, MIGRATION_EXECUTED, MIGRATION_EXECUTING, MIGRATION_PREPARED
from librbd_py.store.api import NOSNAP, ObjectContext, OmapGetByKeys

from .. import cls, group, snapshots
from ..content import read_view
from ..directory import check_removable, leads_to, other_watchers
from ..handle import ImageHandle, announce
from ..header import header_oid, id_oid, map_oid
from ..objects import exists, ignoring, remove
from ..progress import Progress, report
from ..resize import resize
from ..trash import finish_removal, restore
from .existing import objects_of
from .objects import complete
from .records import Pair, Side, find, forget, record, set_both
from .relink import move_children, move_group

CARRIED = "carried back"  # the state's description in an abort that only has to take away the destination


def commit(ctx: ObjectContext, name: str, progress: Progress | None = None) -> None:
    """Removes the source; the destination is an image as any other. ENOENT; EINVAL: it does not migrate, or not
    everything has come over; EBUSY: somebody has the source open. Called again it goes on where it was cut short."""
    pair = find(ctx, name)
    if pair.state != MIGRATION_EXECUTED:
        raise OSError(errno.EINVAL, f"the migration is in state {pair.state}: it is not executed")
    if pair.source is not None:
        _remove_source(pair.source, progress)
    elif not pair.spec.source_spec:
        _forget_trash(ctx.store.open(pair.spec.pool_id, pair.spec.pool_namespace), pair.spec.image_id)
    # Last: as long as the destination says what it came from, another commit finds what is left of that.
    forget(pair.dest)


def _remove_source(source: Side, progress: Progress | None) -> None:
    with ImageHandle.open(source.ctx, image_id=source.id, alone=True) as handle:
        if other_watchers(handle):
            raise OSError(errno.EBUSY, f"image {source.name} is open elsewhere")
        with handle.exclusive():
            _remove_snapshots(handle)
            group.leave(handle)
            check_removable(handle)
            finish_removal(handle, progress)
    _forget_trash(source.ctx, source.id)


def _forget_trash(ctx: ObjectContext, image_id: str) -> None:
    if not exists(ctx, header_oid(image_id)):
        remove(ctx, map_oid(image_id))
        with ignoring(errno.ENOENT):
            cls.trash_forget(ctx, image_id)


def _remove_snapshots(handle: ImageHandle) -> None:
    for snap in reversed([*handle.header.snaps.values()]):
        if snap.protection != fh.PROTECTION_UNPROTECTED and snap.is_user:
            snapshots.unprotect(handle, snap.name)
        snapshots.remove(handle, snap.id)


def abort(ctx: ObjectContext, name: str, progress: Progress | None = None) -> None:
    """Everything is as before `prepare`, but for what was written since: that is carried back. ENOENT; EINVAL: it does
    not migrate; EBUSY: somebody has the destination open. Called again it goes on where it was cut short."""
    try:
        pair = find(ctx, name)
    except OSError as failure:
        if failure.errno in (errno.ENOENT, errno.EINVAL) and _restored(ctx, name):
            return
        raise
    abort_pair(pair, progress)


def _restored(ctx: ObjectContext, name: str) -> bool:
    """Whether the image was on its way to the trash to migrate from there, and has its name again."""
    for image_id, entry in cls.trash_list(ctx).items():
        if entry.source == ftr.SOURCE_MIGRATION and entry.name == name and record(ctx, image_id) is None:
            with ignoring(errno.ENOENT):
                if fh.COPY_KEY in ctx.read(header_oid(image_id), [OmapGetByKeys([fh.COPY_KEY])])[0]:
                    continue  # half of a copy from another store
            if not exists(ctx, header_oid(image_id)):
                continue
            if leads_to(ctx, name, image_id):  # it was not even half way
                with ignoring(errno.EEXIST):
                    ctx.write(names.DIRECTORY, [cls.call("dir_add_image", cls.text(name), cls.text(image_id))])
                cls.trash_forget(ctx, image_id)
            else:
                restore(ctx, image_id, name, migration=True)
            return True
    return False


def abort_pair(pair: Pair, progress: Progress | None, opened: ImageHandle | None = None) -> None:
    """`opened`: the source, where the caller has it open already."""
    source, dest = pair.source, pair.dest
    if dest.spec is not None and dest.spec.state in (MIGRATION_PREPARED, MIGRATION_EXECUTING):
        with ImageHandle.open(dest.ctx, image_id=dest.id) as made:
            if other_watchers(made):
                raise OSError(errno.EBUSY, f"image {dest.name} is open elsewhere")
            with made.exclusive():
                complete(made, made.header)  # or half of an object would be carried back
    with _opened(source, opened) as handle:
        if exists(dest.ctx, dest.oid):
            _undo_dest(pair, handle, progress)
        _forget_names(dest)
        if source is None or handle is None:
            return
        with ignoring(errno.ENOENT):
            restore(source.ctx, source.id, source.name, migration=True)
        forget(source)
        handle.alone = False


@contextmanager
def _opened(source: Side | None, opened: ImageHandle | None) -> Iterator[ImageHandle | None]:
    if opened is not None or source is None:
        yield opened
        return
    with ImageHandle.open(source.ctx, image_id=source.id, alone=True) as handle, handle.exclusive():
        yield handle


def _undo_dest(pair: Pair, handle: ImageHandle | None, progress: Progress | None) -> None:
    source, dest = pair.source, pair.dest
    with ImageHandle.open(dest.ctx, image_id=dest.id, alone=True) as made:
        made.name = dest.name
        if other_watchers(made):
            raise OSError(errno.EBUSY, f"image {dest.name} is open elsewhere")
        with made.exclusive():
            known = record(dest.ctx, dest.id)
            if known is not None and (known.state, known.state_description) != (MIGRATION_ABORTING, CARRIED):
                set_both(pair, MIGRATION_ABORTING)
                announce(dest.ctx, dest.oid)
                if handle is not None and source is not None:
                    _carry_back(made, handle, progress)
                # From here on the destination falls apart: nothing of it may be carried back any more.
                set_both(pair, MIGRATION_ABORTING, CARRIED)
            if handle is not None and source is not None:
                move_children(made.refresh(), dest, handle.refresh(), source)
                move_group(dest, source)
            _remove_snapshots(made)
            group.leave(made)
            check_removable(made)
            _forget_names(dest)
            finish_removal(made, None)


def _forget_names(dest: Side) -> None:
    if leads_to(dest.ctx, dest.name, dest.id):
        remove(dest.ctx, id_oid(dest.name))
    with ignoring(errno.ENOENT):
        dest.ctx.exec(names.DIRECTORY, "rbd", "dir_remove_image", cls.text(dest.name) + cls.text(dest.id))


def _carry_back(made: ImageHandle, handle: ImageHandle, progress: Progress | None) -> None:
    """What the destination's objects hold that the source does not: they are there since somebody wrote, or since they
    were brought over, and then they are as the source's. Its size too."""
    header = made.header
    if handle.header.size != header.size:
        resize(handle, header.size)
    numbers = objects_of(made)
    for done, objno in enumerate(numbers):
        report(progress, done, len(numbers))
        for offset, length in header.layout.within(objno, 0, header.layout.object_size, header.size):
            content = read_view(made.view_at(NOSNAP), offset, length)
            if content != read_view(handle.view_at(NOSNAP), offset, length):
                handle.data.write(offset, content)
    handle.data.flush()

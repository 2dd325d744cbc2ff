"""Cutting a clone loose from its parent."""

from __future__ import annotations

import errno

from librbd_py.format import notify as nf
from librbd_py.store.api import NOSNAP

from .handle import ImageHandle
from .objects import ignoring
from .progress import Progress, report
from .proxy import perform
from .snapshots import detach_child


def flatten(handle: ImageHandle, progress: Progress | None = None) -> None:
    """Copies what is still the parent's and drops the link. EINVAL: no parent; EROFS, also when set to a snapshot.

    With deep-flatten the snapshots are cut loose too; without it they keep the parent until the last of them goes.
    """
    if not handle.read_only and handle.header.migrates:
        raise OSError(errno.EBUSY, "the image migrates: it can be flattened when that is done")
    if not handle.read_only and not handle.header.head_has_parent:
        raise OSError(errno.EINVAL, "the image has no parent")
    handle.require_writable()
    perform(handle, nf.Flatten, lambda: _flatten(handle, progress), progress, done_already=errno.EINVAL)


def _flatten(handle: ImageHandle, progress: Progress | None) -> None:
    with handle.exclusive() as header:
        overlap = header.overlap_at(NOSNAP)
        total = header.layout.objects(overlap)
        for objno in range(total):
            report(progress, objno, total)
            handle.data.copyup(objno)
        handle.data.flush()
        detach(handle)
    handle.announce()


def detach(handle: ImageHandle) -> None:
    """Ends the link of HEAD to its parent; of the child to the parent when no snapshot needs it either."""
    before = handle.header
    with handle.quiesced():
        with ignoring(errno.ENOENT):
            handle.ctx.exec(handle.oid, "rbd", "parent_detach")
        handle.refresh()
    detach_child(handle, before)


def flatten_children(handle: ImageHandle, snap_id: int) -> None:
    """Flattens every clone of a snapshot."""
    from .clones import children_of

    for child in children_of(handle, snap_id):
        ctx = handle.store.open(child.pool_id, child.pool_namespace)
        with ImageHandle.open(ctx, image_id=child.image_id) as opened:
            flatten(opened)
    handle.refresh()

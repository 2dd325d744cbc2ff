"""Giving back the space of data that is all zeros."""

from __future__ import annotations

import errno

from librbd_py.format import notify as nf

from .cls import call, u8, u64
from .handle import ImageHandle
from .objects import exists, ignoring
from .progress import Progress, report
from .proxy import perform
from .resize import map_keeper, present


def sparsify(handle: ImageHandle, sparse_size: int, progress: Progress | None = None) -> None:
    """Runs of `sparse_size` zero bytes lose their space. EINVAL: not a power of two from 4096 to the object size;
    EROFS."""
    handle.require_writable()
    header = handle.header
    if sparse_size < 4096 or sparse_size > header.layout.object_size or sparse_size & (sparse_size - 1):
        raise OSError(errno.EINVAL, f"sparse size {sparse_size} is no power of two from 4096 to the object size")
    perform(
        handle,
        lambda request: nf.Sparsify(request, sparse_size),
        lambda: _sparsify(handle, sparse_size, progress),
        progress,
    )


def _sparsify(handle: ImageHandle, sparse_size: int, progress: Progress | None) -> None:
    with handle.exclusive() as header:
        total = header.layout.objects(header.size)
        keeper = map_keeper(handle)
        hidden = header.layout.objects(header.overlap_at(handle.snap_id))
        with handle.quiesced():
            for objno in present(handle, 0, total):
                report(progress, objno, total)
                # Below a parent an empty object is what hides the parent's.
                removable = objno >= hidden
                oid = handle.objects.oid(objno)
                if not exists(handle.data_ctx, oid):
                    continue
                if removable:
                    keeper.pending(objno)
                with ignoring(errno.ENOENT):
                    handle.data_ctx.write(oid, [call("sparsify", u64(sparse_size), u8(removable))], header.snapc)
                if removable:
                    if exists(handle.data_ctx, oid):
                        keeper.exists(objno)
                    else:
                        keeper.gone(objno)

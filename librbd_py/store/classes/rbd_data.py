"""Class `rbd`, data objects: copy-up, sparsify, snapshot assertions."""

from __future__ import annotations

import errno

from librbd_py.format.encoding import DecodeError, Decoder

from .context import Context
from .rbd_common import check_exists, invalid
from .registry import method

SMALLEST_STEP = 512  # bytes
ASSERT_GREATER, ASSERT_LESS_OR_EQUAL = 0, 1


@method("rbd", "copyup", writes=True)
def copyup(context: Context, data: bytes) -> bytes:
    if not context.exists:
        context.write(0, data)
    return b""


@method("rbd", "sparse_copyup", writes=True)
def sparse_copyup(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    extents = source.map(Decoder.u64, Decoder.u64, 16)
    content = Decoder(source.blob())
    if context.exists:
        return b""
    if not extents:
        context.create()
        return b""
    pieces = [(offset, content.raw(length)) for offset, length in sorted(extents.items())]
    if not content.at_end:
        raise DecodeError(f"sparse_copyup: {content.remaining} bytes belong to no extent")
    for offset, piece in pieces:
        context.write(offset, piece)
    return b""


@method("rbd", "sparsify", writes=True)
def sparsify(context: Context, data: bytes) -> bytes:
    source = Decoder(data)
    step, remove_empty = source.u64(), source.bool()
    check_exists(context)
    if not step:
        raise invalid("a sparse size of 0 bytes")
    step *= -(-SMALLEST_STEP // step)  # finer would only cost time
    content = context.read()
    blocks = range(0, len(content), step)
    full = [at for at in blocks if content[at : at + step].strip(b"\0")]
    if not full:
        if remove_empty:
            context.remove()
        elif content:
            context.truncate(0)
        return b""
    if len(full) == len(blocks):
        return b""
    context.truncate(0)
    start = full[0]
    for at, following in zip(full, [*full[1:], None], strict=True):
        if following != at + step:
            context.write(start, content[start : at + step])
            start = following or 0
    return b""


@method("rbd", "assert_snapc_seq", writes=True)
def assert_snapc_seq(context: Context, data: bytes) -> bytes:
    """Counts as writing, so that a list with it may run on an object that is not there."""
    source = Decoder(data)
    seq, relation = source.u64(), source.u8()
    try:
        held = context.snap_seq()
    except OSError as e:
        if e.errno != errno.ENOENT:
            raise
        held = -1  # every sequence is newer than an object that is not there
    if relation == ASSERT_GREATER:
        holds = seq > held
    elif relation == ASSERT_LESS_OR_EQUAL:
        holds = seq <= held
    else:
        raise OSError(errno.EOPNOTSUPP, f"relation {relation}")
    if not holds:
        raise OSError(errno.ERANGE, f"the object's snapshot sequence is {held}, asserted with {seq}")
    return b""

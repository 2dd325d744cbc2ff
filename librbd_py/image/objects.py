"""Small helpers over the store contract that several modules share."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from librbd_py.store.api import ObjectContext, Remove

NUMBER = re.compile(r"[0-9a-f]{16}")  # of a data object, behind the prefix and a dot


@contextmanager
def ignoring(*codes: int) -> Iterator[None]:
    """Swallows an OSError with one of these errnos."""
    try:
        yield
    except OSError as failure:
        if failure.errno not in codes:
            raise


def exists(ctx: ObjectContext, oid: str) -> bool:
    try:
        ctx.stat(oid)
    except OSError as failure:
        if failure.errno == errno.ENOENT:
            return False
        raise
    return True


def remove(ctx: ObjectContext, oid: str) -> None:
    """Nothing to remove is no error."""
    with ignoring(errno.ENOENT):
        ctx.write(oid, [Remove()])

"""Object stores. `connect()` finds the one a URL means; `api` is the contract they keep."""

from __future__ import annotations

import errno
import os

from .api import Store

DEFAULT_STORE = "embedded:/var/lib/rbdpy"
STORE_VARIABLE = "RBDPY_STORE"


def default_url() -> str:
    """$RBDPY_STORE, else /var/lib/rbdpy."""
    return os.environ.get(STORE_VARIABLE) or DEFAULT_STORE


def connect(url: str | None = None) -> Store:
    """A connection of its own identity; close it.

    `embedded:/path` or a plain path: the store in that folder (made when missing). `memory:NAME`: a cluster inside this
    process, for tests. None: $RBDPY_STORE, else /var/lib/rbdpy. EINVAL for anything else, EOPNOTSUPP for Ceph.
    """
    if url is None:
        url = default_url()
    kind, colon, rest = url.partition(":")
    if colon and kind == "memory":
        from .memory import MemoryStore, named_cluster

        return MemoryStore(named_cluster(rest))
    if url == "ceph" or (colon and kind in ("ceph", "rados")):
        raise OSError(errno.EOPNOTSUPP, f"store {url!r}: Ceph clusters are not supported yet; use embedded:/path")
    path = rest if colon and kind == "embedded" else url
    if not path or (colon and kind != "embedded" and "/" not in kind):
        raise OSError(errno.EINVAL, f"{url!r} names no store; use embedded:/path or memory:name")
    # Imported late: a process that never opens it needs neither SQLite nor the compiled extension.
    from .embedded import EmbeddedStore

    return EmbeddedStore(path, create=True)

"""Object stores. `connect()` finds the one a URL means; `api` is the contract they keep."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from .api import Store

if TYPE_CHECKING:
    from .rados import ClusterOptions

DEFAULT_STORE = "embedded:/var/lib/rbdpy"
STORE_VARIABLE = "RBDPY_STORE"


def default_url() -> str:
    """$RBDPY_STORE, else the cluster that $CEPH_CONF names, as for Ceph's own tools, else /var/lib/rbdpy."""
    return os.environ.get(STORE_VARIABLE) or ("ceph" if os.environ.get("CEPH_CONF") else DEFAULT_STORE)


def is_ceph(url: str) -> bool:
    """Whether the URL means a Ceph cluster: `ceph...`, or a plain path to a file, which is its configuration (a folder
    would be an embedded store)."""
    kind = url.partition("?")[0].partition(":")[0]
    return kind in ("ceph", "rados") or ("/" in kind and os.path.isfile(url))


def connect(
    url: str | None = None, ceph: ClusterOptions | None = None, *, share: bool = True, create: bool = True
) -> Store:
    """A connection; close it. On Ceph all that mean the same cluster and user are one client unless `share` is False;
    on other stores each is its own.

    `embedded:/path` or a plain path: the store in that folder (made when missing, unless `create` is False: ENOENT).
    `ceph[:CONF][?user=NAME]`, or a plain path to a file: a Ceph cluster, as CONF (else $CEPH_CONF, else
    /etc/ceph/ceph.conf) says; other options of Ceph's may follow as `&OPTION=VALUE`; what the URL leaves open comes
    from `ceph`. `memory:NAME`: a cluster inside this process, for tests. None: `default_url()`.
    EINVAL for anything else, ENOPKG for Ceph without librados.
    """
    if url is None:
        url = default_url()
    kind, colon, rest = url.partition(":")
    if colon and kind == "memory":
        from .memory import MemoryStore, named_cluster

        return MemoryStore(named_cluster(rest))
    # Imported late: a process that never opens it needs neither librados nor SQLite nor the compiled extension.
    if is_ceph(url):
        from . import rados

        return rados.connect(rados.parse_url(rados.make_url(url) if os.path.isfile(url) else url, ceph), share=share)
    path = rest if colon and kind == "embedded" else url
    if not path or (colon and kind != "embedded" and "/" not in kind):
        raise OSError(
            errno.EINVAL, f"{url!r} names no store; use embedded:/path, ceph:/path/to/ceph.conf or memory:name"
        )
    from .embedded import EmbeddedStore

    return EmbeddedStore(path, create=create)

"""The store on a Ceph cluster, through librados (looked up at run time: the package works without it)."""

from __future__ import annotations

from .connection import ClusterOptions
from .store import RadosStore, connect, make_url, parse_url

__all__ = ["ClusterOptions", "RadosStore", "connect", "make_url", "parse_url"]

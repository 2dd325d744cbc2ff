"""The object store of one machine: a folder, used by any number of processes at once, with no server."""

from .store import EmbeddedStore

__all__ = ["EmbeddedStore"]

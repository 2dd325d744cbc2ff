"""What images are imported from: formats (raw, qcow2) in streams (files, HTTP, S3, NBD). `open_source` opens one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .api import DATA, MAX_READ, ZERO, Extent, Kind, Source, SourceSnapshot

if TYPE_CHECKING:
    from .spec import load_spec, open_source, open_stream

__all__ = [
    "DATA",
    "MAX_READ",
    "ZERO",
    "Extent",
    "Kind",
    "Source",
    "SourceSnapshot",
    "load_spec",
    "open_source",
    "open_stream",
]


def __getattr__(name: str) -> Any:
    """Formats and streams come, with HTTP and TLS, when something is opened: every command that opens an image may
    meet one in migration, and few do."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import spec

    return getattr(spec, name)

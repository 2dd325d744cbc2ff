"""What images are imported from: formats (raw, qcow2) in streams (files, HTTP, S3, NBD). `open_source` opens one."""

from __future__ import annotations

from .api import DATA, MAX_READ, ZERO, Extent, Kind, Source, SourceSnapshot
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

"""Where built images are kept, and how a build is named by what went into it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """$RBDPY_CACHE, or `.cache` beside a checkout's pyproject.toml, or ~/.cache/rbdpy. Made when missing."""
    chosen = os.environ.get("RBDPY_CACHE")
    checkout = Path(__file__).resolve().parent.parent
    if chosen:
        path = Path(chosen)
    elif (checkout / "pyproject.toml").exists():
        path = checkout / ".cache"
    else:
        path = Path.home() / ".cache" / "rbdpy"
    path.mkdir(parents=True, exist_ok=True)
    return path


def key(*parts: bytes | str) -> str:
    """16 hex digits of a hash over the parts, lengths included."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The file `name` in the cache. When missing, `build(temporary path)` makes it; it appears under its name whole."""
    path = cache_dir() / name
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            build(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path

"""Zstandard, from the system's libzstd: looked up when the first cluster needs it, so that nothing depends on it."""

from __future__ import annotations

import ctypes
import errno
from functools import cache
from typing import Any

LIBRARY = "libzstd.so.1"


class _Buffer(ctypes.Structure):
    """ZSTD_inBuffer and ZSTD_outBuffer."""

    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("at", ctypes.c_size_t)]


@cache
def _library() -> Any:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        raise OSError(errno.ENOPKG, f"{LIBRARY} is not installed: zstd clusters cannot be read") from None
    library.ZSTD_createDStream.restype = ctypes.c_void_p
    library.ZSTD_freeDStream.argtypes = [ctypes.c_void_p]
    library.ZSTD_decompressStream.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Buffer), ctypes.POINTER(_Buffer)]
    library.ZSTD_decompressStream.restype = ctypes.c_size_t
    library.ZSTD_isError.argtypes = [ctypes.c_size_t]
    library.ZSTD_isError.restype = ctypes.c_uint
    return library


def decompress(data: bytes, size: int) -> bytes | None:
    """The first `size` bytes of what was compressed, whatever follows it in `data`; None: it is damaged or shorter.
    ENOPKG, ENOMEM. Takes no more memory than the window of a frame: 128 MiB by zstd's own limit."""
    library = _library()
    stream = library.ZSTD_createDStream()
    if not stream:
        raise OSError(errno.ENOMEM, "no memory to decompress")
    target = ctypes.create_string_buffer(size)
    source = ctypes.create_string_buffer(data, len(data))
    out = _Buffer(ctypes.addressof(target), size, 0)
    given = _Buffer(ctypes.addressof(source), len(data), 0)
    try:
        while out.at < size:
            before = (out.at, given.at)
            result = library.ZSTD_decompressStream(stream, ctypes.byref(out), ctypes.byref(given))
            if library.ZSTD_isError(result) or before == (out.at, given.at):
                return None
    finally:
        library.ZSTD_freeDStream(stream)
    return target.raw

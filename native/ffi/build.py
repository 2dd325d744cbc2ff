"""cffi builder of `librbd_py._native`, API mode.

The declarations Python may call stand once, in `native/ffi/api_*.h`: the C sources include those headers and
cffi parses the same text with preprocessor lines removed. So they use plain C: no macros, no includes of use.
"""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

NATIVE = Path(__file__).resolve().parent.parent
# each may use the types of those before it
HEADERS = ("api_store.h", "api_rados.h", "api_rados_data.h", "api_engine.h", "api_export.h")
PARTS = ("striping", "store", "engine", "transport", "ffi")


def declarations() -> str:
    """The text of every api_*.h without preprocessor lines."""
    lines: list[str] = []
    for header in HEADERS:
        text = (NATIVE / "ffi" / header).read_text()
        lines += [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return "\n".join(lines)


def sources() -> list[str]:
    """Every C file of the data plane, relative to the project root as setuptools wants it."""
    root = NATIVE.parent
    return [str(path.relative_to(root)) for part in PARTS for path in sorted((NATIVE / part).glob("*.c"))]


def includes() -> str:
    return "\n".join(f'#include "ffi/{header}"' for header in HEADERS)


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "librbd_py._native",
    includes(),
    sources=sources(),
    include_dirs=["native"],
    extra_compile_args=[
        "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter", "-pthread", "-fvisibility=hidden",
        *os.environ.get("RBDPY_CFLAGS", "").split(),
    ],
    extra_link_args=["-pthread", *os.environ.get("RBDPY_LDFLAGS", "").split()],
    libraries=["dl"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)

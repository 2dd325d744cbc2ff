"""rbdpyd with data objects behind native/store/store_fault.c: python faulty_daemon.py SPEC [options of rbdpyd]"""

from __future__ import annotations

import sys
from typing import Any

from librbd_py.native import ffi, lib
from librbd_py.store import layout
from qemu_glue import daemon


class FaultyLib:
    """The extension, but layouts open with faults."""

    def __init__(self, spec: str) -> None:
        self.spec = spec.encode()

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def rbdn_layout_open(self, path: bytes, order: int, create: bool, error: Any) -> Any:
        inner = lib.rbdn_layout_open(path, order, create, error)
        return lib.rbdn_fault_open(inner, self.spec, error) if inner != ffi.NULL else inner


if __name__ == "__main__":
    layout.lib = FaultyLib(sys.argv[1])  # type: ignore[assignment]
    sys.exit(daemon.main(sys.argv[2:]))

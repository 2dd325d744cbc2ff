"""A layer looks only down: imports and includes against the table in ARCHITECTURE.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# package -> packages of ours that it may import (itself always)
PYTHON = {
    "librbd_py.native": set(),
    "librbd_py.errors": set(),
    "librbd_py.format": set(),
    "librbd_py.net": set(),
    "librbd_py.source": {"librbd_py.net"},
    "librbd_py.store": {"librbd_py.format", "librbd_py.native", "librbd_py.errors"},
    "librbd_py.control": {"librbd_py.format", "librbd_py.store", "librbd_py.errors"},
    "librbd_py.image": {
        "librbd_py.format",
        "librbd_py.source",
        "librbd_py.store",
        "librbd_py.control",
        "librbd_py.native",
        "librbd_py.errors",
    },
    "librbd_py.rados": {"librbd_py.store", "librbd_py.format", "librbd_py.errors", "librbd_py.control"},
    "librbd_py.rbd": {
        "librbd_py.image",
        "librbd_py.store",
        "librbd_py.format",
        "librbd_py.errors",
        "librbd_py.rados",
        "librbd_py.control",
    },
    "librbd_py.aio": {
        "librbd_py.rbd",
        "librbd_py.rados",
        "librbd_py.image",
        "librbd_py.errors",
        "librbd_py.store",
        "librbd_py.format",
    },
    "librbd_py.shim": {"librbd_py.rbd", "librbd_py.rados", "librbd_py"},
    "librbd_py.backup": {"librbd_py.format", "librbd_py.image", "librbd_py.source", "librbd_py.net", "librbd_py.store"},
    "librbd_py.devcluster": {"librbd_py.store", "librbd_py.native"},
    "librbd_py.cli": {"librbd_py", "qemu_glue"},
    "qemu_glue": {"librbd_py", "vm_images"},
    "vm_images": set(),
}
NATIVE = {
    "striping": set(),
    "store": {"ffi/api_store.h", "ffi/api_rados.h", "ffi/api_rados_data.h", "striping"},
    "engine": {"striping", "store", "ffi/api_store.h", "ffi/api_rados_data.h", "ffi/api_engine.h"},
    "transport": {"engine", "store/guard.h", "ffi/api_engine.h", "ffi/api_export.h"},
}


def package_of(module: str) -> str | None:
    return next((p for p in sorted(PYTHON, key=len, reverse=True) if module == p or module.startswith(p + ".")), None)


def imports(path: Path, module: str) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level and path.name != "__init__.py" else module.split(".")
            start = ".".join([*base, node.module] if node.module else base) if node.level else node.module or ""
            found += [f"{start}.{alias.name}" for alias in node.names]
    return found


def python_files() -> list[Path]:
    return [p for folder in ("librbd_py", "qemu_glue", "vm_images") for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_python_imports_look_down(path: Path) -> None:
    module = str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    package = package_of(module)
    if package is None:
        assert module == "librbd_py"
        return
    allowed = PYTHON[package] | {package}
    for name in imports(path, module):
        if name.split(".")[0] in ("librbd_py", "qemu_glue", "vm_images"):
            if name.startswith("librbd_py._native"):
                assert module == "librbd_py.native", f"{module} imports the extension"
                continue
            target = package_of(name) or name
            assert target in allowed or target.split(".")[0] in allowed, f"{module} imports {name}"


@pytest.mark.parametrize("part", NATIVE)
def test_c_includes_look_down(part: str) -> None:
    for path in sorted((ROOT / "native" / part).glob("*.[ch]")):
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            folder = name.split("/")[0] if "/" in name else part
            assert folder == part or folder in NATIVE[part] or name in NATIVE[part], f"{path.name} includes {name}"

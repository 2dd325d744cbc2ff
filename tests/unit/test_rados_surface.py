"""Names, signatures and constants of `librbd_py.rados` against the module Ceph installs."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
from typing import Any

import pytest

from librbd_py import rados

SURVEY = """
import json, rados
out = {"constants": {}, "classes": {}, "functions": {}}
for name, value in vars(rados).items():
    if name.startswith("_"):
        continue
    if isinstance(value, (int, str, list)) and name.isupper():
        out["constants"][name] = value
    elif isinstance(value, type) and value.__module__ == "rados" and not issubclass(value, BaseException):
        methods = out["classes"][name] = {}
        for key in dir(value):
            if key.startswith("_") and key not in ("__enter__", "__exit__", "__iter__"):
                continue
            method = getattr(value, key)
            if callable(method):
                doc = getattr(method, "__doc__", None) or ""
                methods[key] = doc.strip().split("\\n")[0]
            elif isinstance(method, (int, str)):
                methods[key] = method
            else:
                methods[key] = None
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    run = subprocess.run(
        ["/usr/bin/python3", "-c", SURVEY], capture_output=True, text=True, timeout=60, check=True, cwd="/"
    )
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def parameters(signature: str) -> list[tuple[str, str | None]] | None:
    """(name, default) of each parameter of a Cython signature line, without self."""
    match = re.search(r"\((.*)\)(?: -> .*)?$", signature)
    if match is None or "self" not in match[1]:
        return None
    depth, part, parts = 0, "", []
    for letter in match[1]:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += letter
    result = []
    for piece in [*parts, part]:
        left, _, default = piece.partition("=")
        name = left.split(":")[0].split()[-1]
        if name != "self":
            result.append((name, default.strip() or None))
    return result


def test_constants_have_the_same_values(theirs: dict[str, Any]) -> None:
    assert {name: getattr(rados, name, "missing") for name in theirs["constants"]} == theirs["constants"]


def test_every_class_and_method_is_there_with_its_parameters(theirs: dict[str, Any]) -> None:
    differences = []
    for class_name, methods in theirs["classes"].items():
        ours = getattr(rados, class_name, None)
        if ours is None:
            differences.append(class_name)
            continue
        for name, signature in methods.items():
            if isinstance(signature, int):
                assert getattr(ours, name) == signature
                continue
            if signature is None:
                continue  # an attribute of instances, see below
            if not hasattr(ours, name):
                differences.append(f"{class_name}.{name} is missing")
                continue
            expected = parameters(signature)
            if expected is None or name.startswith("__"):
                continue
            actual = [
                (p.name, None if p.default is inspect.Parameter.empty else p.default)
                for p in inspect.signature(getattr(ours, name)).parameters.values()
                if p.name != "self" and p.kind is not inspect.Parameter.VAR_POSITIONAL
            ]
            wanted = [(n, default_of(d)) for n, d in expected if n != "*args"]
            if [(n, d) for n, d in actual] != wanted:
                differences.append(f"{class_name}.{name}: {actual} instead of {wanted}")
    assert differences == []


def default_of(text: str | None) -> object:
    if text is None or text == "None":
        return None
    if text.startswith("LIBRADOS_"):
        return getattr(rados, text)
    return {"u''": "", "u'CEPH_ARGS'": "CEPH_ARGS", "False": False}.get(text, text if not text.isdigit() else int(text))


def test_attributes_of_instances_are_there(theirs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with rados.Rados(conf={"rbdpy_store": "memory:surface"}) as cluster:
        cluster.create_pool("p")
        with cluster.open_ioctx("p") as ioctx:
            ioctx.write("o", b"x")
            instances = {
                "Rados": cluster,
                "Ioctx": ioctx,
                "ObjectIterator": ioctx.list_objects(),
                "XattrIterator": ioctx.get_xattrs("o"),
                "OmapIterator": rados.OmapIterator(ioctx),
                "SnapIterator": ioctx.list_snaps(),
                "Snap": rados.Snap(ioctx, "s", 1),
                "Completion": ioctx.aio_write("o", b"y"),
            }
            for name, instance in instances.items():
                for key, signature in theirs["classes"][name].items():
                    assert hasattr(instance, key), f"{name}.{key} ({signature})"
        cluster.delete_pool("p")


def test_exported_names_exist() -> None:
    assert [name for name in rados.__all__ if not hasattr(rados, name)] == []

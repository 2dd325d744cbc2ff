"""Checks QMP arguments against a declared shape, with QEMU's own wording of the errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qemu_glue.qmp_wire import QMPError


@dataclass(frozen=True)
class Field:
    """One member. `kind`: str, int, bool, dict, list or "size" (int >= 0). `choices` limits a string; `low` and `high`
    bound an int."""

    kind: type | str
    required: bool = False
    default: Any = None
    choices: tuple[str, ...] = ()
    low: int = -(1 << 63)
    high: int = (1 << 63) - 1
    max_length: int = 4096
    shape: Mapping[str, Field] | None = None  # of a dict


_NAMES: dict[Any, str] = {str: "string", int: "integer", bool: "boolean", dict: "object", list: "array"}


def check(arguments: Mapping[str, Any], shape: Mapping[str, Field], prefix: str = "") -> dict[str, Any]:
    """A new dict with every member of `shape`, defaults filled in. QMPError for a missing, unexpected or
    ill-typed one."""
    for name in arguments:
        if name not in shape:
            raise QMPError(f"Parameter '{prefix}{name}' is unexpected")
    result: dict[str, Any] = {}
    for name, field in shape.items():
        if name not in arguments:
            if field.required:
                raise QMPError(f"Parameter '{prefix}{name}' is missing")
            result[name] = field.default
        else:
            result[name] = _value(arguments[name], field, prefix + name)
    return result


def _value(value: Any, field: Field, name: str) -> Any:
    kind = int if field.kind == "size" else field.kind
    # bool is an int in Python, not in QMP
    if type(value) is not kind:
        raise QMPError(f"Invalid parameter type for '{name}', expected: {_NAMES[kind]}")
    if isinstance(value, int) and not (0 if field.kind == "size" else field.low) <= value <= field.high:
        raise QMPError(f"Parameter '{name}' is out of range")
    if isinstance(value, str):
        if "\0" in value or len(value.encode("utf-8", "surrogatepass")) > field.max_length:
            raise QMPError(f"Parameter '{name}' is too long or holds a NUL")
        if field.choices and value not in field.choices:
            raise QMPError(f"Parameter '{name}' does not accept value '{value}'")
    if isinstance(value, dict) and field.shape is not None:
        return check(value, field.shape, name + ".")
    return value

"""What `rbd` prints: tables, sizes, progress, JSON and XML in Ceph's layout.

Source of the layouts: output of `rbd` 16.2.15, compared by tests/interop.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TextIO

_XML = str.maketrans({"<": "&lt;", ">": "&gt;", "&": "&amp;", "'": "&apos;", '"': "&quot;"})

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def size_text(count: int) -> str:
    """Bytes as Ceph shows them: whole units without decimals, else as many (up to 2) as keep it at 7 characters."""
    index = 0
    while index < len(UNITS) - 1 and count >> (10 * (index + 1)):
        index += 1
    unit = 1 << (10 * index)
    if count % unit == 0:
        return f"{count // unit} {UNITS[index]}"
    for precision in (2, 1):
        text = f"{count / unit:.{precision}f} {UNITS[index]}"
        if len(text) <= 7:
            return text
    return f"{count / unit:.0f} {UNITS[index]}"


class Table:
    """Columns two spaces apart. `columns`: (heading, "left" | "right"); headings are left, as in Ceph's TextTable."""

    def __init__(self, *columns: tuple[str, str], headings_as_cells: bool = False) -> None:
        self._columns = columns
        self._headings_as_cells = headings_as_cells
        self._rows: list[list[str]] = []

    def add(self, *cells: object) -> None:
        self._rows.append([str(cell) for cell in cells])

    def text(self) -> str:
        headings = [heading for heading, _ in self._columns]
        widths = [max(len(row[i]) for row in [headings, *self._rows]) for i in range(len(headings))]
        lines = []
        if not self._headings_as_cells:
            lines = ["  ".join(heading.ljust(width) for heading, width in zip(headings, widths, strict=True))]
        for row in [headings, *self._rows] if self._headings_as_cells else self._rows:
            cells = zip(row, widths, self._columns, strict=True)
            lines.append("  ".join(c.rjust(w) if align == "right" else c.ljust(w) for c, w, (_, align) in cells))
        return "\n".join(lines) + "\n"


class Section(dict[str, Any]):
    """An object with a name for XML. Values: str, int, Section, Rows."""

    def __init__(self, name: str, values: dict[str, Any] | None = None) -> None:
        super().__init__(values or {})
        self.name = name


class Rows(list[Any]):
    """An array with a name for XML; `item` names its plain elements (Sections carry their own)."""

    def __init__(self, name: str, values: Sequence[Any] = (), item: str = "") -> None:
        super().__init__(values)
        self.name = name
        self.item = item


def structured(value: Section | Rows, layout: str, pretty: bool) -> str:
    """`layout` "json" or "xml", with the newline `rbd` ends it with."""
    if layout == "json":
        import json

        if pretty:
            return json.dumps(value, indent=4, ensure_ascii=False) + "\n"
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False) + "\n"
    text = _xml(value.name, value, 0, pretty)
    return text + "\n"


def _xml(name: str, value: Any, depth: int, pretty: bool) -> str:
    indent, end = (" " * depth, "\n") if pretty else ("", "")
    if isinstance(value, dict):
        inner = "".join(_xml(key, member, depth + 1, pretty) for key, member in value.items())
    elif isinstance(value, list):
        item = getattr(value, "item", "")
        inner = "".join(_xml(getattr(member, "name", item), member, depth + 1, pretty) for member in value)
    else:
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        return f"{indent}<{name}>{shown.translate(_XML)}</{name}>{end}"
    return f"{indent}<{name}>{end}{inner}{indent}</{name}>{end}"


class Progress:
    """`Verb: 42% complete...` on standard error, rewritten in place, as `rbd` shows it; `done` or `failed` ends it.
    Call it as the library's progress callback. As a context manager it ends with what happened."""

    def __init__(self, verb: str, enabled: bool, stream: TextIO | None = None) -> None:
        self._verb = verb
        self._enabled = enabled
        self._stream = stream
        self._percent = 0

    def __call__(self, offset: int, total: int) -> int:
        percent = offset * 100 // total if total else 0
        if percent > self._percent:
            self._percent = percent
            self._print(f"\r{self._verb}: {percent}% complete...")
        return 0

    def done(self) -> None:
        self._print(f"\r{self._verb}: 100% complete...done.\n")

    def failed(self) -> None:
        self._print(f"\r{self._verb}: {self._percent}% complete...failed.\n")

    def _print(self, text: str) -> None:
        if self._enabled:
            print(text, end="", file=self._stream or sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.done()
        else:
            self.failed()

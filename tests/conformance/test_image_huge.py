"""Images of more objects than anybody can look at one by one: what there is of them is found by listing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from image_fixtures import R, cluster, io

from librbd_py import rbd
from librbd_py.format import features as ft
from librbd_py.image import raw
from librbd_py.store.api import ObjectContext
from librbd_py.store.embedded.context import EmbeddedContext

__all__ = ["cluster", "io"]

PIB = 1 << 50
G = 1 << 21
SHAPES = {"plain": (21, 0, 0), "striped": (22, G, 3)}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_diff_and_an_export_see_what_there_is(shape: str, io: ObjectContext, tmp_path: Path) -> None:
    order, unit, count = SHAPES[shape]
    size = (PIB if not isinstance(io, EmbeddedContext) else PIB // 8) + 5000  # what its index reaches
    R.create(io, "a", size, order, False, ft.LAYERING, unit, count)
    places = {0: b"first", G * 5 + G - 6: b"across two", size // 3: b"middle", size - 4: b"last"}
    with rbd.Image(io, "a") as image:
        for at, data in places.items():
            image.write(data, at)
        image.create_snap("s")
        image.write(b"late", G * 1000)
        rows: list[tuple[int, int, bool]] = []
        image.diff_iterate(0, size, None, lambda *row: rows.append(row), whole_object=False)
        for at, data in {**places, G * 1000: b"late"}.items():
            for byte in (at, at + len(data) - 1):
                assert any(start <= byte < start + length for start, length, _ in rows), (byte, rows)
        assert rows == sorted(rows) and sum(length for _, length, _ in rows) < 1 << 24
        rows.clear()
        image.diff_iterate(G * 900, size - G * 900, "s", lambda *row: rows.append(row))
        assert {start // G for start, _, _ in rows} <= {997, 1000} and rows[-1][0] == G * 1000
        with (tmp_path / "out").open("w+b") as out:
            os.ftruncate(out.fileno(), 0)
            try:
                raw.export_raw(image.handle, out.fileno())
            except OSError:  # larger than files can be here
                assert os.pread(out.fileno(), 5, 0) == b"first"
            else:
                assert os.pread(out.fileno(), 4, size - 4) == b"last"


def test_a_clone_of_a_small_image_that_grew_shows_its_parent(io: ObjectContext) -> None:
    R.create(io, "p", 3 * G, 21, False, ft.LAYERING)
    with rbd.Image(io, "p") as parent:
        parent.write(b"p" * 100, G)
        parent.create_snap("s")
    R.clone(io, "p", "s", io, "c", ft.LAYERING, 21)
    with rbd.Image(io, "c") as image:
        image.resize(PIB)
        image.write(b"c", PIB // 2)
        rows: list[tuple[int, int, bool]] = []
        image.diff_iterate(0, PIB, None, lambda *row: rows.append(row))
        assert [start // G for start, _, _ in rows] == [1, PIB // 2 // G]

"""diff_iterate; shapes seen with librbd 16.2.15."""

from __future__ import annotations

from typing import Any

import pytest
from image_fixtures import MIB, R, cluster, io, refused

from librbd_py import rbd
from librbd_py.format import features as ft
from librbd_py.store.api import ObjectContext

__all__ = ["cluster", "io"]

O = 4 * MIB  # noqa: E741  bytes of an object


def diff(
    image: rbd.Image, start: str | None, whole: bool = False, *, parent: bool = True
) -> list[tuple[int, int, bool]]:
    rows: list[Any] = []
    image.diff_iterate(0, image.size(), start, lambda *row: rows.append(row), parent, whole)
    return rows


Rows = list[tuple[int, int, bool]]


def matches(rows: Rows, wanted: Rows, must: Rows | None = None) -> bool:
    """Exactly what librbd says; or, from a store that knows better where bytes are, all of `must` and nothing beyond
    librbd's rows widened to blocks of 4 KiB."""

    def marks(rows: Rows, wide: int = 1) -> set[tuple[int, bool]]:
        return {(n, data) for at, size, data in rows for n in range(at // wide, -(-(at + size) // wide))}

    if rows == wanted:
        return True
    may = marks(wanted, 4096)
    return marks(rows, 4096) <= may and marks(must or wanted, 4096) <= marks(rows, 4096)


@pytest.fixture(params=[ft.DEFAULT, ft.LAYERING], ids=["fast-diff", "no maps"])
def image(request: pytest.FixtureRequest, io: ObjectContext) -> Any:
    R.create(io, "p", 20 * MIB, features=request.param)
    with rbd.Image(io, "p") as image:
        image.write(b"x" * 4096, 0)
        image.write(b"x" * 4096, 2 * O + 100)
        image.create_snap("s1")
        image.write(b"y" * 10, O)
        image.discard(2 * O, O)
        image.write_zeroes(100, 50)
        image.create_snap("s2")
        image.resize(30 * MIB)
        image.write(b"z", 25 * MIB)
        yield image


def test_exact(image: rbd.Image) -> None:
    written = (25 * MIB, 1, True)
    all_of_it = [(0, 4096, True), (O, 10, True), (6 * O, MIB + 1, True)]
    assert matches(diff(image, None), all_of_it, [*all_of_it[:2], written])
    assert diff(image, "s2") == [(6 * O, MIB + 1, True)]
    assert diff(image, "s1")[1:] == [(O, 10, True), (2 * O, 4196, False), (6 * O, MIB + 1, True)]
    image.set_snap("s1")
    assert matches(diff(image, None), [(0, 4096, True), (2 * O, 4196, True)])
    assert diff(image, "s1") == []
    image.set_snap("s2")
    rows = diff(image, "s1")
    assert rows[1:] == [(O, 10, True), (2 * O, 4196, False)]
    first, size, data = rows[0]
    assert data and first <= 100 and first + size >= 150 and size <= 4096


def test_whole_objects(image: rbd.Image) -> None:
    assert diff(image, None, True) == [(0, O, True), (O, O, True), (6 * O, O, True)]
    assert diff(image, "s1", True) == [(0, O, True), (O, O, True), (2 * O, O, False), (6 * O, O, True)]
    assert diff(image, "s2", True) == [(6 * O, O, True)]
    image.set_snap("s2")
    assert diff(image, "s1", True) == [(0, O, True), (O, O, True), (2 * O, O, False)]


def test_ranges_and_refusals(image: rbd.Image) -> None:
    def part(offset: int, length: int, start: str | None = None, whole: bool = False) -> list[Any]:
        rows: list[Any] = []
        image.diff_iterate(offset, length, start, lambda *row: rows.append(row), True, whole)
        return rows

    assert part(10, 4000) == part(10, 4000, None, True) == [(10, 4000, True)]
    assert part(0, 0) == []
    assert part(0, 100 * MIB) == part(0, 30 * MIB)
    refused(rbd.InvalidArgument, 22, part, 40 * MIB, 10)
    refused(rbd.ImageNotFound, 2, part, 0, MIB, "nope")
    image.set_snap("s1")
    refused(rbd.InvalidArgument, 22, part, 0, MIB, "s2")


def test_the_callback_can_stop_it(image: rbd.Image) -> None:
    def raising(offset: int, length: int, data: bool) -> None:
        raise ValueError("enough")

    refused(ValueError, None, image.diff_iterate, 0, 30 * MIB, None, raising)
    refused(rbd.IOError, 5, image.diff_iterate, 0, 30 * MIB, None, lambda *row: -5)
    image.diff_iterate(0, 30 * MIB, None, lambda *row: 7)


def test_of_a_clone(image: rbd.Image, io: ObjectContext) -> None:
    R.clone(io, "p", "s2", io, "k")
    with rbd.Image(io, "k") as child:
        child.write(b"q", 4 * O)
        assert diff(child, None, parent=False) == [(4 * O, 1, True)]
        assert matches(diff(child, None), [(0, 4096, True), (O, 10, True), (4 * O, 1, True)])
        assert diff(child, None, True, parent=False) == [(4 * O, O, True)]
        assert diff(child, None, True) == [(0, O, True), (O, O, True), (4 * O, O, True)]
        child.create_snap("ks")
        child.write(b"r", O)
        child.discard(0, O)
        hole, written = diff(child, "ks")
        assert hole == (0, 4096, False)
        assert written in ((O, 1, True), (O, 4096, True))  # stores may know changes by blocks
        assert [row[:2] for row in diff(child, "ks", True)] == [(0, O), (O, O)]

"""Diffs of many small rows: they are read together, object by object where that is possible, and mean the same."""

from __future__ import annotations

import io as files
import random
from typing import Any

import pytest
from image_fixtures import MIB, R, cluster, io

from librbd_py import rbd
from librbd_py.format.streams import Reader
from librbd_py.image import streams
from librbd_py.image.diff import changes
from librbd_py.image.snapshots import find
from librbd_py.store.api import ObjectContext

__all__ = ["cluster", "io"]

SIZE = 9 * MIB + 512
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small objects": {"order": 16},
    "striped": {"order": 20, "stripe_unit": 65536, "stripe_count": 3, "features": 3},
}


def diff(image: rbd.Image, start: str | None) -> bytes:
    out = files.BytesIO()
    streams.export_diff(image.handle, start, out.write)
    return out.getvalue()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_diff_of_many_rows(io: ObjectContext, layout: str) -> None:
    dice = random.Random(layout)
    R.create(io, "img", SIZE, **LAYOUTS[layout])
    R.create(io, "copy", SIZE, **LAYOUTS[layout])
    with rbd.Image(io, "img") as image, rbd.Image(io, "copy") as copy:
        image.write(dice.randbytes(SIZE), 0)
        image.create_snap("a")
        for block in dice.sample(range(SIZE // 4096), 300):
            image.write(dice.randbytes(4096) if block % 5 else bytes(4096), block * 4096)
        image.discard(4 * MIB, MIB)
        image.write(b"end", SIZE - 3)
        image.create_snap("b")
        image.write(b"later" * 100_000, 0)
        for start, end in ((None, "a"), ("a", "b"), ("b", None)):
            image.set_snap(end)
            streams.import_diff(copy.handle, Reader(files.BytesIO(diff(image, start))))
            assert copy.read(0, SIZE) == image.read(0, SIZE)


def test_objects_that_went_meanwhile_are_zeros(io: ObjectContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """HEAD may change while it is exported."""
    R.create(io, "img", SIZE)
    with rbd.Image(io, "img") as image:
        image.create_snap("a")
        for at in range(0, 4 * MIB, 65536):
            image.write(b"x" * 4096, at)
        rows = list(changes(image.handle, 0, SIZE, find(image.handle.header, "a").id))
        image.discard(0, 4 * MIB)
        monkeypatch.setattr(streams, "changes", lambda *args, **kwargs: iter(rows))
        made = diff(image, "a")
        assert b"x" * 512 not in made
        assert made.count(b"z") >= len(rows)

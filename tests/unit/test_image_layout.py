"""Striping arithmetic."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from librbd_py.image.layout import Layout

LAYOUTS = st.sampled_from(
    [Layout(12, 4096, 1), Layout(14, 16384, 1), Layout(14, 4096, 3), Layout(13, 512, 5), Layout(16, 65536, 2)]
)
OFFSETS = st.integers(0, 1 << 20)
LENGTHS = st.integers(0, 1 << 17)


@given(LAYOUTS, OFFSETS, LENGTHS)
def test_every_byte_is_mapped_once_and_back(layout: Layout, offset: int, length: int) -> None:
    position = 0
    for piece in layout.map(offset, length):
        assert piece.position == position and piece.length > 0
        assert piece.offset >= 0 and piece.offset + piece.length <= layout.object_size
        back = list(layout.unmap(piece.objno, piece.offset, piece.length))
        assert sum(size for _, size in back) == piece.length
        assert back[0][0] == offset + position
        position += piece.length
    assert position == length


@given(LAYOUTS, OFFSETS)
def test_used_and_objects_agree_with_the_mapping(layout: Layout, size: int) -> None:
    ends: dict[int, int] = {}
    for piece in layout.map(0, size):
        ends[piece.objno] = max(ends.get(piece.objno, 0), piece.offset + piece.length)
    assert len(ends) == layout.objects(size) and set(ends) == set(range(len(ends)))
    for objno in range(len(ends) + layout.stripe_count):
        assert layout.used(objno, size) == ends.get(objno, 0)


@given(LAYOUTS, st.integers(0, 40), OFFSETS)
def test_what_lies_below_an_overlap_is_the_front_of_an_object(layout: Layout, objno: int, limit: int) -> None:
    below = layout.within(objno, 0, layout.object_size, limit)
    assert sum(size for _, size in below) == layout.used(objno, limit)
    assert all(start + size <= limit for start, size in below)
    assert below == sorted(below)


def test_a_striped_image_of_librbd() -> None:
    layout = Layout(20, 65536, 4)
    assert layout.objects(1 << 20) == 4  # seen with librbd 16.2.15
    assert list(layout.map(65536 * 5, 10)) == [(1, 65536, 10, 0)]

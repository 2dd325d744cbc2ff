"""What clients of an image say of themselves: the record, hostile ones, and what is remembered for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from librbd_py.control import who as cw
from librbd_py.format import notify as nf
from librbd_py.format import who as fw
from librbd_py.format.encoding import DecodeError, Encoder

FULL = fw.Answer(
    "host", 12, "rbdpyd", {"vm": "uuid:1"}, "registered, locked", "exclusive", True, True, 1, 2, 3, "write", 4, 5,
    (fw.Waiting(4100, 1 << 63, 7), fw.Waiting(4101, 2, 0)),
)  # fmt: skip


def test_an_answer_arrives_as_it_was_sent() -> None:
    assert fw.Answer.decode(FULL.encode()) == FULL
    assert fw.Answer.decode(fw.Answer().encode()) == fw.Answer()


def test_the_question_is_far_from_what_librbd_knows() -> None:
    raw = nf.encode(nf.WhoAreYou(4100))
    assert raw == bytes.fromhex("0701 0c000000 52425057 0410000000000000")
    assert nf.decode(raw) == nf.WhoAreYou(4100)
    with_more = Encoder()
    with with_more.struct(7, 1):
        with_more.u32(nf.WhoAreYou.op).u64(4100).string("of a newer version")
    assert nf.decode(with_more.done()) == nf.WhoAreYou(4100)


def test_a_newer_answer_is_read_as_far_as_it_is_known() -> None:
    out = Encoder()
    with out.struct(2, 1):
        out.raw(FULL.encode()[6:]).string("more")
    assert fw.Answer.decode(out.done()) == FULL


def test_what_is_too_long_is_cut_by_who_sends_it() -> None:
    about = {str(number): "x" * 1000 for number in range(100)}
    waiting = tuple(fw.Waiting(number, 0, 0) for number in range(100))
    answer = fw.Answer("é" * 1000, about=about, waiting=waiting)
    raw = answer.encode()
    assert len(raw) <= fw.MAX_ANSWER
    read = fw.Answer.decode(raw)
    assert read.host == "é" * (fw.MAX_TEXT // 2)
    assert len(read.about) == fw.MAX_ABOUT and len(read.waiting) == fw.MAX_WAITING


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        nf.encode_response(0),
        nf.encode_response(-95),
        FULL.encode()[:-1],
        FULL.encode()[:40],
        b"\x01\x01" + b"\xff" * 20,
        FULL.encode() + bytes(fw.MAX_ANSWER),
        fw.Answer(watch_age=-2).encode(),
    ],
)
def test_anything_else_is_no_answer(raw: bytes) -> None:
    with pytest.raises(DecodeError):
        fw.Answer.decode(raw)


def raw_answer(host: str, about: int = 0, waiting: int = 0) -> bytes:
    out = Encoder()
    with out.struct(1, 1):
        out.u32(fw.MAGIC).string(host).u32(1).string("").u32(about)
        for number in range(min(about, 100)):
            out.string(str(number)).string("")
        out.string("").string("").u32(0).s64(0).s64(0).s64(0).string("").u64(0).u64(0).u32(waiting)
        out.raw(bytes(24 * min(waiting, 100)))
    return out.done()


@pytest.mark.parametrize(
    "raw",
    [
        raw_answer("x" * 300),
        raw_answer("", 17),
        raw_answer("", 1 << 31),
        raw_answer("", 0, 33),
        raw_answer("", 0, 1 << 31),
    ],
)
def test_a_hostile_answer_is_refused(raw: bytes) -> None:
    with pytest.raises(DecodeError):
        fw.Answer.decode(raw)


def test_nothing_in_an_answer_moves_a_terminal() -> None:
    assert fw.Answer.decode(raw_answer("\x1b[2Jevil\r\n\u202e")).host == "?[2Jevil???"


@given(st.binary(max_size=300))
def test_noise_is_refused_cleanly(noise: bytes) -> None:
    for raw in (noise, b"\x01\x01" + len(noise).to_bytes(4, "little") + noise):
        try:
            fw.Answer.decode(raw)
        except DecodeError:
            pass


def test_the_diary_knows_since_when(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(cw.time, "monotonic", lambda: now)
    diary = cw.Diary()
    diary.about, diary.facts = {"vm": "a"}, lambda: {"in_flight": 3}
    assert (diary.answer("s", "p").watch_age, diary.answer("s", "p").lock_age) == (fw.NEVER, fw.NEVER)
    diary.note(1, False)
    now += 1
    diary.note(1, True)
    now += 2
    diary.note(2, True)  # a new watch, the same lock
    diary.asked(nf.ClientId(4100, 7))
    now += 3
    said = diary.answer("s", "p")
    assert (said.watch_age, said.lock_age, said.in_flight, said.about) == (3000, 5000, 3, {"vm": "a"})
    assert said.waiting == (fw.Waiting(4100, 7, 3000),) and said.owner
    diary.note(2, False)
    assert diary.answer("s", "p").waiting == () and not diary.answer("s", "p").owner
    diary.note(None, False)
    assert diary.answer("s", "p").watch_age == fw.NEVER


def test_who_asked_long_ago_no_longer_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(cw.time, "monotonic", lambda: now)
    diary = cw.Diary()
    for number in range(10 * cw.MOST_ASKING):
        diary.asked(nf.ClientId(number, 0))
    assert len(diary._asked) <= cw.MOST_ASKING
    assert [who.gid for who in diary.answer("", "").waiting] == list(range(number - fw.MAX_WAITING + 1, number + 1))
    now += cw.ASKED_SECONDS
    assert diary.answer("", "").waiting == ()

"""The QMP wire: messages are found without newlines, bounded, and answered with QEMU's words."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_glue import qmp_wire
from qemu_glue.arguments import Field, check
from qemu_glue.daemon import nbd_address, parse_option
from qemu_glue.qmp_wire import QMPError, Splitter


def test_messages_are_split_however_the_bytes_arrive() -> None:
    stream = b'{"execute": "a"}\r\n{"execute":"b","arguments":{"x":"}{\\""}}{"execute":"c"}'
    for step in (1, 3, 7, len(stream)):
        splitter = Splitter()
        found = [m for at in range(0, len(stream), step) for m in splitter.feed(stream[at : at + step])]
        assert [qmp_wire.parse(m).name for m in found] == ["a", "b", "c"]


def test_endless_message_overflows_and_is_dropped() -> None:
    splitter = Splitter()
    assert splitter.feed(b'{"x": "' + b"a" * (qmp_wire.MAX_MESSAGE + 1)) == []
    assert splitter.overflow


def test_scanning_a_large_message_in_small_pieces_is_linear() -> None:
    splitter = Splitter()
    message = b'{"execute": "' + b"a" * 500_000 + b'"}'
    found = [m for at in range(0, len(message), 1000) for m in splitter.feed(message[at : at + 1000])]
    assert found == [message]
    assert splitter._scanned == 0


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (b"hello", "JSON parse error"),
        (b"[1]", "must be a JSON object"),
        (b"{}", "lacks member 'execute'"),
        (b'{"execute": 1}', "must be a string"),
        (b'{"execute": "a", "arguments": []}', "must be an object"),
        (b'{"execute": "a", "more": 1}', "'more' is unexpected"),
        (b'{"execute":"a","arguments":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nesting too deep"),
        (b"\xff\xfe{}", "JSON parse error"),
    ],
)
def test_what_is_no_command_is_refused(message: bytes, says: str) -> None:
    with pytest.raises(QMPError, match=says):
        qmp_wire.parse(message)


@given(st.binary(max_size=200))
def test_garbage_never_raises_anything_but_a_qmp_error(data: bytes) -> None:
    splitter = Splitter()
    for message in splitter.feed(data + b"\n"):
        try:
            qmp_wire.parse(message)
        except QMPError as error:
            assert error.error_class in qmp_wire.ERROR_CLASSES
            qmp_wire.failure(error, *qmp_wire.message_id(message))


def test_errors_echo_the_id_of_a_refused_message() -> None:
    assert qmp_wire.message_id(b'{"id": [1, "x"], "bad": 1}') == ([1, "x"], True)
    answer = json.loads(qmp_wire.failure(QMPError("no", "CommandNotFound"), 7, True))
    assert answer == {"error": {"class": "CommandNotFound", "desc": "no"}, "id": 7}


SHAPE = {
    "name": Field(str, required=True, max_length=4),
    "size": Field("size", default=3),
    "on": Field(bool, default=False),
    "kind": Field(str, choices=("a", "b")),
    "in": Field(dict, shape={"x": Field(int, required=True, low=1, high=9)}),
}


def test_arguments_get_their_defaults() -> None:
    assert check({"name": "n"}, SHAPE) == {"name": "n", "size": 3, "on": False, "kind": None, "in": None}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "'name' is missing"),
        ({"name": "n", "zz": 1}, "'zz' is unexpected"),
        ({"name": 5}, "Invalid parameter type for 'name', expected: string"),
        ({"name": "nnnnn"}, "too long"),
        ({"name": "a\0"}, "NUL"),
        ({"name": "n", "size": -1}, "'size' is out of range"),
        ({"name": "n", "size": True}, "expected: integer"),
        ({"name": "n", "on": 1}, "expected: boolean"),
        ({"name": "n", "kind": "c"}, "does not accept value 'c'"),
        ({"name": "n", "in": {"x": 10}}, "'in.x' is out of range"),
        ({"name": "n", "in": {"x": 1, "y": 1}}, "'in.y' is unexpected"),
        ({"name": "n", "in": {}}, "'in.x' is missing"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(QMPError, match=says):
        check(arguments, SHAPE)


def test_options_of_the_command_line_become_qmp_arguments() -> None:
    text = "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=/a,,b,writable=on,num-queues=2"
    assert parse_option(text) == {
        "type": "vhost-user-blk",
        "id": "e",
        "node-name": "n",
        "addr": {"type": "unix", "path": "/a,b"},
        "writable": True,
        "num-queues": 2,
    }
    assert nbd_address(parse_option("addr.type=unix,addr.path=/s"))["addr"] == {"type": "unix", "data": {"path": "/s"}}


@pytest.mark.parametrize("text", ["id=a,b", "num-queues=x,a=1", "{", "a=1,a.b=2", "writable=maybe"])
def test_malformed_options_are_refused(text: str) -> None:
    with pytest.raises(QMPError):
        parse_option(text)

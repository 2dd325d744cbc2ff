"""NBD handshake and options, byte by byte: what the specification grants, and what it makes of nonsense."""

from __future__ import annotations

import struct

import pytest
from nbd_client import (
    CAN_MULTI_CONN,
    ERR_INVALID,
    ERR_TOO_BIG,
    ERR_UNKNOWN,
    ERR_UNSUP,
    FIXED,
    HAS_FLAGS,
    INFO_BLOCK_SIZE,
    INFO_DESCRIPTION,
    INFO_NAME,
    NO_ZEROES,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_EXTENDED_HEADERS,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_PEEK,
    OPT_SET_META_CONTEXT,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    READ_ONLY,
    REP_ACK,
    REP_META_CONTEXT,
    REP_SERVER,
    SEND_CACHE,
    SEND_DF,
    SEND_FAST_ZERO,
    SEND_FLUSH,
    SEND_FUA,
    SEND_TRIM,
    SEND_WRITE_ZEROES,
    Client,
    Closed,
    meta_option,
    name_option,
    option,
)
from nbd_fake import FakeServer

WRITABLE = (
    HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | CAN_MULTI_CONN | SEND_CACHE | SEND_FAST_ZERO
)


def kinds(replies: list[object]) -> list[int]:
    return [reply.reply for reply in replies]  # type: ignore[attr-defined]


def test_server_greets_with_fixed_newstyle_and_no_zeroes(nbd: FakeServer) -> None:
    with Client(nbd.socket) as c:
        assert c.handshake_flags == FIXED | NO_ZEROES


@pytest.mark.parametrize("flags", [4, FIXED | 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flags_end_the_connection(nbd: FakeServer, flags: int) -> None:
    with Client(nbd.socket, flags=flags) as c:
        assert c.closed()


def test_export_name_without_no_zeroes_sends_124_zeroes(nbd: FakeServer) -> None:
    with Client(nbd.socket, flags=FIXED) as c:
        c.send(option(OPT_EXPORT_NAME))
        size, flags = struct.unpack(">QH", c.receive(10))
        assert (size, flags) == (nbd.size, WRITABLE)
        assert c.receive(124) == bytes(124)
        assert c.read(0, 512) == bytes(512)


def test_export_name_with_no_zeroes_sends_ten_bytes(nbd: FakeServer) -> None:
    with Client(nbd.socket) as c:
        c.send(option(OPT_EXPORT_NAME))
        assert struct.unpack(">QH", c.receive(10)) == (nbd.size, WRITABLE)
        assert c.read(0, 512) == bytes(512)


def test_client_without_fixed_newstyle_may_only_name_an_export(nbd: FakeServer) -> None:
    with Client(nbd.socket, flags=0) as c:
        c.send(option(OPT_EXPORT_NAME))
        assert len(c.receive(134)) == 134
    with Client(nbd.socket, flags=0) as c:
        c.send(option(OPT_LIST))
        assert c.closed()


def test_export_name_of_an_unknown_export_ends_the_connection(nbd: FakeServer) -> None:
    with Client(nbd.socket) as c:
        c.send(option(OPT_EXPORT_NAME, b"nobody"))
        with pytest.raises(Closed):
            c.receive(1)


def test_go_tells_only_what_was_asked(nbd: FakeServer) -> None:
    with Client(nbd.socket) as c:
        info = c.info()
        assert (info.size, info.flags) == (nbd.size, WRITABLE)
        assert info.name is None and info.description is None and info.block_size is None
        info = c.info(b"", [INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE, 999, INFO_NAME], go=True)
        assert (info.name, info.description, info.block_size) == (b"", b"an image in memory", (1, 4096, 32 << 20))
        assert c.read(0, 1) == b"\0"


def test_df_is_offered_with_structured_replies_only(nbd: FakeServer) -> None:
    with Client(nbd.socket) as c:
        assert c.info().flags == WRITABLE
        c.structured_replies()
        assert c.info().flags == WRITABLE | SEND_DF


def test_read_only_export_offers_no_writes(nbd: FakeServer) -> None:
    assert nbd.export(2, "ro", read_only=True) == 0
    with Client(nbd.socket) as c:
        assert c.info(b"ro").flags == HAS_FLAGS | READ_ONLY | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN | SEND_CACHE


def test_list_names_every_export_with_its_description(nbd: FakeServer) -> None:
    long = "x" * 4096
    assert nbd.export(2, "pool/image@snap") == 0
    assert nbd.export(3, long, description="long") == 0
    with Client(nbd.socket) as c:
        *servers, last = c.ask(OPT_LIST)
        assert last.reply == REP_ACK and set(kinds(servers)) == {REP_SERVER}
        listed = set()
        for server in servers:
            size = struct.unpack(">I", server.data[:4])[0]
            listed.add((server.data[4 : 4 + size], server.data[4 + size :]))
        assert listed == {(b"", b"an image in memory"), (b"pool/image@snap", b""), (long.encode(), b"long")}
        assert c.info(long.encode()).size == nbd.size


def test_export_table_refuses_a_second_name_and_a_long_one(nbd: FakeServer) -> None:
    assert nbd.export(2, "") == -17
    assert nbd.export(2, "y" * 4097) == -36


@pytest.mark.parametrize(
    "name",
    [
        b"nobody",
        b"\0",
        b"image\0",
        b"../image",
        b"/",
        b"./image",
        b"image@snap",
        b"%69mage",
        b"IMAGE",
        b"image ",
        b"\xff\xfe",
        b"z" * 4096,
        b"pool/image",
    ],
)
def test_export_names_are_compared_byte_by_byte_only(nbd: FakeServer, name: bytes) -> None:
    assert nbd.export(2, "image") == 0
    with Client(nbd.socket) as c:
        assert c.info(name).error == ERR_UNKNOWN
        assert c.info(name, go=True).error == ERR_UNKNOWN
        assert c.info(b"image", go=True).size == nbd.size


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(5),
        struct.pack(">IH", 1, 0),
        struct.pack(">IH", 0xFFFFFFFF, 0),
        struct.pack(">IHH", 0, 2, 0),
        struct.pack(">IHH", 0, 0, 0),
        name_option(b"a" * 4097),
        name_option(b"") + b"x",
    ],
)
@pytest.mark.parametrize("number", [OPT_INFO, OPT_GO])
def test_malformed_info_is_invalid_and_the_session_goes_on(nbd: FakeServer, number: int, data: bytes) -> None:
    with Client(nbd.socket) as c:
        assert kinds(c.ask(number, data)) == [ERR_INVALID]
        assert c.info(go=True).size == nbd.size
        assert c.read(4096, 16) == bytes(16)


@pytest.mark.parametrize("number", [0, OPT_PEEK, OPT_EXTENDED_HEADERS, 12, 4242, 0xFFFFFFFF])
@pytest.mark.parametrize("size", [0, 5, 65536, 65537, 1 << 20])
def test_unknown_options_are_skipped(nbd: FakeServer, number: int, size: int) -> None:
    with Client(nbd.socket) as c:
        assert kinds(c.ask(number, bytes(size))) == [ERR_UNSUP]
        assert c.info(go=True).size == nbd.size


def test_starttls_is_refused_and_nothing_behind_it_is_lost(nbd: FakeServer) -> None:
    with Client(nbd.socket) as c:
        c.send(option(OPT_STARTTLS) + option(OPT_STARTTLS) + option(OPT_STRUCTURED_REPLY))
        for _ in range(2):
            (reply,) = c.answers(OPT_STARTTLS)
            assert reply.reply == ERR_UNSUP and b"TLS" in reply.data
        assert kinds(c.answers(OPT_STRUCTURED_REPLY)) == [REP_ACK]
        assert kinds(c.ask(OPT_STARTTLS, b"x")) == [ERR_INVALID]


@pytest.mark.parametrize("number", [OPT_LIST, OPT_STRUCTURED_REPLY])
def test_options_without_data_refuse_data(nbd: FakeServer, number: int) -> None:
    with Client(nbd.socket) as c:
        assert kinds(c.ask(number, b"data")) == [ERR_INVALID]
        assert c.info().flags & SEND_DF == 0


@pytest.mark.parametrize("data", [b"", b"bye"])
def test_abort_is_acknowledged_and_ends_the_connection(nbd: FakeServer, data: bytes) -> None:
    with Client(nbd.socket) as c:
        assert kinds(c.ask(OPT_ABORT, data)) == [REP_ACK]
        assert c.closed()


def test_too_long_known_option_is_skipped_with_an_error(nbd: FakeServer) -> None:
    with Client(nbd.socket) as c:
        assert kinds(c.ask(OPT_GO, bytes(65537))) == [ERR_TOO_BIG]
        assert kinds(c.ask(OPT_LIST, bytes(1 << 20))) == [ERR_TOO_BIG]
        assert c.info(go=True).size == nbd.size


@pytest.mark.parametrize("length", [(16 << 20) + 1, 0xFFFFFFFF])
@pytest.mark.parametrize("number", [OPT_GO, 4242])
def test_absurd_option_length_ends_the_connection(nbd: FakeServer, number: int, length: int) -> None:
    with Client(nbd.socket) as c:
        c.send(option(number, length=length))
        assert c.closed()


def test_export_name_longer_than_a_string_ends_the_connection(nbd: FakeServer) -> None:
    for size in (4097, 70000):
        with Client(nbd.socket) as c:
            c.send(option(OPT_EXPORT_NAME, b"n" * size))
            assert c.closed()


def test_wrong_option_magic_ends_the_connection(nbd: FakeServer) -> None:
    with Client(nbd.socket) as c:
        c.send(b"IHAVEOPS" + option(OPT_LIST)[8:])
        assert c.closed()


def test_options_beyond_the_limit_end_the_connection(nbd: FakeServer) -> None:
    with Client(nbd.socket) as c:
        c.send(option(4242) * 4096)
        for _ in range(4096):
            assert c.option_reply().reply == ERR_UNSUP
        c.send(option(4242))
        assert c.closed()


def test_client_that_asks_and_never_reads_costs_little(nbd: FakeServer) -> None:
    for number in range(2, 16):
        assert nbd.export(number, f"{number}" * 2000) == 0
    before = nbd.rss()
    with Client(nbd.socket) as c:
        c.sock.setblocking(False)
        sent = 0
        try:
            while sent < 10000:  # options; each answer to LIST is ten times as long as the largest of them
                c.sock.send(option(OPT_LIST) * 10)
                sent += 10
        except BlockingIOError:
            pass
        with Client(nbd.socket) as other:
            assert other.info().size == nbd.size
        assert nbd.rss() - before < 8 << 20


def test_options_arrive_byte_by_byte(nbd: FakeServer) -> None:
    with Client(nbd.socket) as c:
        for byte in option(OPT_STRUCTURED_REPLY) + option(OPT_GO, name_option(b"", [INFO_BLOCK_SIZE])):
            c.send(bytes([byte]))
        assert kinds(c.answers(OPT_STRUCTURED_REPLY)) == [REP_ACK]
        assert len(c.answers(OPT_GO)) == 3


def test_whole_session_in_one_packet(nbd: FakeServer) -> None:
    with Client(nbd.socket, flags=None) as c:
        c.lengths[7] = (0, 0, 4)
        c.send(
            struct.pack(">I", FIXED | NO_ZEROES)
            + option(OPT_GO, name_option(b""))
            + struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 0, 4)
        )
        c.answers(OPT_GO)
        assert c.reply().data == bytes(4)


# metadata contexts


def test_meta_context_needs_structured_replies(nbd: FakeServer) -> None:
    with Client(nbd.socket) as c:
        assert kinds(c.select()) == [ERR_INVALID]
        assert kinds(c.ask(OPT_LIST_META_CONTEXT, meta_option(b"", []))) == [ERR_INVALID]


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ([], True, False),
        ([b"base:"], True, False),
        ([b"base:allocation"], True, True),
        ([b"x-own:thing"], False, False),
        ([b"base:nothing"], False, False),
        ([b"qemu:dirty-bitmap:x", b"base:allocation"], True, True),
        ([b"base:allocation"] * 100, True, True),
        ([b""], False, False),
        ([b"base"], False, False),
        ([b"base:allocation\0"], False, False),
    ],
)
def test_meta_context_queries(nbd: FakeServer, queries: list[bytes], listed: bool, selected: bool) -> None:
    with Client(nbd.socket) as c:
        c.structured_replies()
        replies = c.ask(OPT_LIST_META_CONTEXT, meta_option(b"", queries))
        assert kinds(replies) == [REP_META_CONTEXT] * listed + [REP_ACK]
        if listed:
            assert replies[0].data == struct.pack(">I", 0) + b"base:allocation"
        replies = c.select(queries=queries)
        assert kinds(replies) == [REP_META_CONTEXT] * selected + [REP_ACK]
        if selected:
            assert replies[0].data == struct.pack(">I", 1) + b"base:allocation"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(7),
        struct.pack(">II", 1, 0),
        struct.pack(">II", 0, 1),
        struct.pack(">III", 0, 1, 5) + b"base",
        struct.pack(">III", 0, 1, 0xFFFFFFFF),
        struct.pack(">II", 0, 0xFFFFFFFF),
        struct.pack(">II", 0, 0) + b"x",
        meta_option(b"", [b"q" * 4097]),
        meta_option(b"n" * 4097, []),
    ],
)
@pytest.mark.parametrize("number", [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT])
def test_malformed_meta_context_is_invalid(nbd: FakeServer, number: int, data: bytes) -> None:
    with Client(nbd.socket) as c:
        c.structured_replies()
        assert kinds(c.ask(number, data)) == [ERR_INVALID]
        assert c.info(go=True).size == nbd.size


def test_meta_context_of_an_unknown_export(nbd: FakeServer) -> None:
    with Client(nbd.socket) as c:
        c.structured_replies()
        assert kinds(c.select(b"nobody")) == [ERR_UNKNOWN]

"""NBD transmission: every command, every refusal, in structured and simple replies."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from nbd_client import (
    BLOCK_STATUS,
    CACHE,
    DF,
    EINVAL,
    EIO,
    ENOSPC,
    ENOTSUP,
    EOVERFLOW,
    EPERM,
    ESHUTDOWN,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    OPT_GO,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
    meta_option,
    name_option,
    option,
    request,
)
from nbd_fake import FakeServer

MIB = 1 << 20


@pytest.fixture(params=["structured", "simple"])
def client(nbd: FakeServer, request: pytest.FixtureRequest) -> Iterator[Client]:
    with Client(nbd.socket).negotiate(structured=request.param == "structured") as c:
        yield c


def test_random_writes_read_back(client: Client, nbd: FakeServer) -> None:
    rng, model = random.Random(1), bytearray(nbd.size)
    for _ in range(300):
        size = rng.choice([1, 511, 512, 4096, 4097, 65536, 200000, 300000])
        at = rng.randrange(nbd.size - size)
        if rng.random() < 0.5:
            data = rng.randbytes(size)
            client.write(at, data)
            model[at : at + size] = data
        else:
            assert client.read(at, size) == model[at : at + size]
    assert client.read(0, nbd.size) == model


def test_largest_payload_is_32_mib(nbd: FakeServer) -> None:
    assert nbd.do(f"image {64 * MIB} 0") == 0
    data = random.Random(2).randbytes(32 * MIB)
    with Client(nbd.socket).negotiate() as c:
        c.write(5, data)
        assert c.read(5, 32 * MIB) == data
        assert c.call(READ, 0, 32 * MIB + 1).error == EOVERFLOW
        assert c.call(WRITE, 0, 32 * MIB + 1, data=bytes(32 * MIB + 1)).error == EINVAL
        assert c.call(WRITE, 0, 64 * MIB, data=bytes(64 * MIB)).error == EINVAL
        assert c.read(5, 100) == data[:100]
    with Client(nbd.socket).negotiate(structured=False) as c:
        assert c.call(READ, 0, 32 * MIB + 1).error == EINVAL


@pytest.mark.parametrize("length", [(64 << 20) + 1, 0xFFFFFFFF])
def test_absurd_write_ends_the_connection(nbd: FakeServer, length: int) -> None:
    with Client(nbd.socket).negotiate() as c:
        c.start(WRITE, 0, length)
        assert c.closed()
    assert nbd.broken() == 1


def test_range_errors_are_those_of_the_specification(client: Client, nbd: FakeServer) -> None:
    end = nbd.size
    for offset, length in [(end, 1), (end - 1, 2), (2**63, 1), (2**64 - 1, 1), (2**64 - 512, 512), (2**64 - 1, 0)]:
        assert client.call(READ, offset, length).error == EINVAL
        assert client.call(TRIM, offset, length).error == EINVAL
        assert client.call(CACHE, offset, length).error == EINVAL
        assert client.call(WRITE_ZEROES, offset, length).error == ENOSPC
        assert client.call(WRITE, offset, length, data=bytes(length)).error == ENOSPC
    assert client.read(end - 1, 1) == b"\0"


def test_requests_of_length_zero_are_answered(client: Client, nbd: FakeServer) -> None:
    for command in (READ, WRITE, TRIM, WRITE_ZEROES, CACHE, FLUSH):
        for offset in (0, nbd.size if command != FLUSH else 0):
            reply = client.call(command, offset, 0)
            assert not reply.error and not reply.data
    assert client.call(BLOCK_STATUS, 0, 0).error == EINVAL


def test_unknown_commands_and_flags_are_einval(client: Client) -> None:
    for command in (8, 9, 255, 0xFFFF):
        assert client.call(command, 0, 512).error == EINVAL
    for command, flag in [
        (READ, NO_HOLE),
        (READ, REQ_ONE),
        (READ, 1 << 15),
        (WRITE, DF),
        (WRITE, NO_HOLE),
        (TRIM, NO_HOLE),
        (TRIM, FAST_ZERO),
        (FLUSH, DF),
        (CACHE, REQ_ONE),
        (WRITE_ZEROES, DF),
        (BLOCK_STATUS, DF),
    ]:
        data = b"x" * 512 if command == WRITE else None
        assert client.call(command, 0, 0 if command == FLUSH else 512, flags=flag, data=data).error == EINVAL
    assert client.read(0, 512) == bytes(512)


def test_df_belongs_to_structured_replies(client: Client) -> None:
    assert client.call(READ, 0, 65536, flags=DF).error == (0 if client.structured else EINVAL)


def test_flush_with_a_range_is_einval(client: Client) -> None:
    assert client.call(FLUSH, 1, 0).error == EINVAL
    assert client.call(FLUSH, 0, 1).error == EINVAL
    assert client.call(FLUSH).error == 0


def test_fua_is_taken_on_every_command_and_counts_for_writes(client: Client, nbd: FakeServer) -> None:
    client.write(0, b"a" * 512, FUA)
    for command in (READ, TRIM, WRITE_ZEROES, CACHE):
        assert not client.call(command, 0, 512, flags=FUA).error
    assert not client.call(FLUSH, flags=FUA).error
    read, write, discard, zeroes, flush, unmap, fua = nbd.ask("counts")[1:]
    assert (read, write, discard, zeroes, flush, unmap, fua) == (2, 1, 1, 1, 1, 1, 3)


def test_no_hole_keeps_the_space(client: Client, nbd: FakeServer) -> None:
    client.write(0, b"a" * 8192)
    assert not client.call(WRITE_ZEROES, 0, 4096, flags=NO_HOLE).error
    assert nbd.ask("counts")[6] == 0
    assert not client.call(WRITE_ZEROES, 0, 4096).error
    assert nbd.ask("counts")[6] == 1
    assert client.read(0, 8192) == bytes(4096) + b"a" * 4096


def test_fast_zero_is_refused_where_it_would_write(client: Client) -> None:
    client.write(0, b"a" * 4096)
    assert client.call(WRITE_ZEROES, 0, 4096, flags=FAST_ZERO | NO_HOLE).error == ENOTSUP
    assert client.read(0, 1) == b"a"
    assert client.call(WRITE_ZEROES, 0, 4096, flags=FAST_ZERO).error == 0
    assert client.read(0, 4096) == bytes(4096)


def test_write_zeroes_and_trim_may_be_larger_than_a_payload(nbd: FakeServer) -> None:
    assert nbd.do(f"image {200 * MIB} 0") == 0
    with Client(nbd.socket).negotiate() as c:
        c.write(0, b"x")
        assert not c.call(WRITE_ZEROES, 0, 200 * MIB).error
        assert not c.call(TRIM, 0, 200 * MIB).error
        assert c.read(0, 1) == b"\0"
        assert c.call(WRITE_ZEROES, 0, 0xFFFFFFFF).error == ENOSPC


@pytest.mark.parametrize("whole", [True, False])
def test_read_only_export_refuses_writes_and_stays_in_step(nbd: FakeServer, whole: bool) -> None:
    if whole:
        assert nbd.do(f"image {nbd.size} 1") == 0
    assert nbd.export(2, "ro", read_only=True) == 0
    with Client(nbd.socket).negotiate(b"ro") as c:
        for size in (1, 4096, 300000):
            assert c.call(WRITE, 0, size, data=b"%" * size).error == EPERM  # the payload must not be taken for requests
        assert c.call(TRIM, 0, 512).error == EPERM
        assert c.call(WRITE_ZEROES, 0, 512).error == EPERM
        assert c.call(FLUSH).error == 0
        assert c.read(0, 300000) == bytes(300000)


def test_image_that_becomes_read_only_refuses_writes(client: Client, nbd: FakeServer) -> None:
    client.write(0, b"a")
    assert nbd.do(f"image {nbd.size} 1") == 0
    assert client.call(WRITE, 0, 1, data=b"b").error == EPERM
    assert nbd.do(f"image {nbd.size} 0") == 0
    client.write(0, b"c")


def test_resize_is_seen_by_new_and_old_connections(client: Client, nbd: FakeServer) -> None:
    grown = nbd.size + 4 * MIB
    assert client.call(READ, nbd.size, 512).error == EINVAL
    assert nbd.do(f"image {grown} 0") == 0
    client.write(nbd.size, b"new" * 100)
    assert client.read(nbd.size, 300) == b"new" * 100
    with Client(nbd.socket) as other:
        assert other.info().size == grown
    assert nbd.do(f"image {MIB} 0") == 0
    assert client.call(WRITE, MIB, 1, data=b"x").error == ENOSPC
    with Client(nbd.socket) as other:
        assert other.info().size == MIB


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (5, EIO),
        (28, ENOSPC),
        (122, ENOSPC),
        (27, ENOSPC),
        (1, EPERM),
        (30, EPERM),
        (12, 12),
        (22, EINVAL),
        (108, ESHUTDOWN),
        (110, EIO),
        (95, EIO),
        (75, EIO),
        (4095, EIO),
    ],
)
def test_errors_of_the_store_become_nbd_errors(client: Client, nbd: FakeServer, failure: int, error: int) -> None:
    assert nbd.do(f"fail {failure} {failure}") == 0
    for command in (READ, WRITE, TRIM, WRITE_ZEROES, CACHE):
        assert client.call(command, 0, 512, data=bytes(512) if command == WRITE else None).error == error
    assert client.call(FLUSH).error == error
    if client.structured:
        reply = client.call(BLOCK_STATUS, 0, 512)
        assert reply.error == error and reply.message
    assert nbd.do("fail 0 0") == 0
    assert client.read(0, 512) == bytes(512)


# block status


def test_block_status_merges_neighbours_and_ends_with_the_request(nbd: FakeServer) -> None:
    with Client(nbd.socket).negotiate() as c:
        c.write(64 * 1024, b"d" * 8192)
        hole, data = 3, 0
        expected = ((65536, hole), (8192, data), (MIB - 65536 - 8192, hole))
        assert c.call(BLOCK_STATUS, 0, MIB).extents == expected
        assert c.call(BLOCK_STATUS, 0, MIB, flags=REQ_ONE).extents == ((65536, hole),)
        assert c.call(BLOCK_STATUS, 65536 + 100, 300, flags=REQ_ONE).extents == ((300, data),)
        assert c.call(BLOCK_STATUS, 65537, 65536).extents == ((8191, data), (65536 - 8191, hole))
        assert c.call(BLOCK_STATUS, nbd.size, 1).error == EINVAL
        assert c.call(BLOCK_STATUS, 0, nbd.size + 1).error == EINVAL


def test_block_status_of_a_scattered_image_is_bounded_and_makes_progress(nbd: FakeServer) -> None:
    assert nbd.do(f"image {100 * MIB} 0") == 0
    with Client(nbd.socket).negotiate() as c:
        blocks = range(0, 100 * MIB, 8192)
        for at in blocks:
            c.start(WRITE, at, 1, data=b"x")
            c.reply()
        at = 0
        seen: list[tuple[int, int]] = []
        while at < 100 * MIB:
            extents = c.call(BLOCK_STATUS, at, 100 * MIB - at).extents
            assert 1 <= len(extents) <= 4096
            seen += extents
            at += sum(size for size, _ in extents)
        assert seen == [(4096, 0), (4096, 3)] * len(blocks)


def test_many_block_status_requests_at_once_are_all_answered(nbd: FakeServer) -> None:
    with Client(nbd.socket).negotiate() as c:
        cookies = [c.start(BLOCK_STATUS, 0, MIB) for _ in range(600)]
        replies = [c.reply() for _ in cookies]
        assert sorted(reply.cookie for reply in replies) == cookies
        assert all(reply.extents == ((MIB, 3),) for reply in replies)


@pytest.mark.parametrize("selected", [None, b"other"])
def test_block_status_without_a_context_for_this_export_is_einval(nbd: FakeServer, selected: bytes | None) -> None:
    assert nbd.export(2, "other") == 0
    with Client(nbd.socket) as c:
        c.structured_replies()
        if selected is not None:
            c.select(selected)
        assert not c.info(go=True).error
        assert c.call(BLOCK_STATUS, 0, 512).error == EINVAL


def test_last_set_meta_context_counts_also_when_it_failed(nbd: FakeServer) -> None:
    for last in (meta_option(b"", []), meta_option(b"nobody", [b"base:allocation"]), b"", bytes(70000)):
        with Client(nbd.socket) as c:
            c.structured_replies()
            c.select()
            c.ask(10, last)
            assert not c.info(go=True).error
            assert c.call(BLOCK_STATUS, 0, 512).error == EINVAL


# many at once


def test_pipelined_requests_are_all_answered(client: Client, nbd: FakeServer) -> None:
    rng, model = random.Random(3), bytearray(nbd.size)
    for _ in range(5):
        writes = {}
        for slot in rng.sample(range(nbd.size // 8192), 400):
            data = rng.randbytes(rng.choice([1, 512, 4096, 8192]))
            writes[client.start(WRITE, slot * 8192, len(data), data=data)] = 0
            model[slot * 8192 : slot * 8192 + len(data)] = data
        for _ in range(len(writes)):
            reply = client.reply()
            assert not reply.error
            del writes[reply.cookie]
        reads = {client.start(READ, at, 8192): at for at in range(0, nbd.size // 4, 8192)}
        while reads:
            reply = client.reply()
            at = reads.pop(reply.cookie)
            assert reply.data == model[at : at + 8192]


@pytest.mark.parametrize("pooled", [0, 1])
def test_completions_from_other_threads_come_back(nbd: FakeServer, pooled: int) -> None:
    nbd.do(f"pooled {pooled}")
    rng, model = random.Random(4), bytearray(nbd.size)
    with Client(nbd.socket).negotiate() as c:
        for _ in range(10):
            pending = {}
            for slot in rng.sample(range(16), 16):
                data = rng.randbytes(rng.choice([100, 70000, 400000]))
                pending[c.start(WRITE, slot * MIB, len(data), data=data)] = slot
                model[slot * MIB : slot * MIB + len(data)] = data
            for _ in range(len(pending)):
                reply = c.reply()
                assert not reply.error and reply.cookie in pending
            assert not c.call(FLUSH).error
        assert c.read(0, nbd.size) == model


def test_cookies_come_back_as_they_were(nbd: FakeServer) -> None:
    with Client(nbd.socket).negotiate() as c:
        for cookie in (0, 1, 2**64 - 1, 0x0123456789ABCDEF):
            c.lengths[cookie] = (READ, 0, 3)
            c.send(request(READ, 0, 3, cookie=cookie))
            assert c.reply().cookie == cookie


def test_two_connections_see_each_others_writes(nbd: FakeServer) -> None:
    with Client(nbd.socket).negotiate() as a, Client(nbd.socket).negotiate(structured=False) as b:
        a.write(100, b"from a")
        assert b.read(100, 6) == b"from a"
        assert nbd.clients() == 2


def test_go_and_requests_may_come_in_one_packet(nbd: FakeServer) -> None:
    with Client(nbd.socket) as c:
        for cookie in range(3):
            c.lengths[cookie] = (WRITE, cookie, 1)
        c.send(option(OPT_GO, name_option(b"")) + b"".join(request(WRITE, n, 1, cookie=n) + b"w" for n in range(3)))
        c.answers(OPT_GO)
        assert sorted(c.reply().cookie for _ in range(3)) == [0, 1, 2]
        assert c.read(0, 4) == b"www\0"

"""Images on web servers: right answers are read, wrong ones are errors, and nothing waits for ever."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from web_server import Server, make_certificate, serving

from librbd_py.net import client as net_client
from librbd_py.net.connection import Url
from librbd_py.source import DATA, Extent, open_source
from librbd_py.source.http import HttpStream

DATA_BYTES = random.Random(3).randbytes(100_000)


@pytest.fixture
def web() -> Iterator[tuple[Server, str]]:
    with serving(DATA_BYTES) as pair:
        yield pair


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_client, "FIRST_PAUSE", 0.001)


def stream(url: str, **options: Any) -> HttpStream:
    return HttpStream(url, **{"attempts": 2, "try_seconds": 5.0, **options})


def test_an_image_on_a_web_server(web: tuple[Server, str]) -> None:
    server, url = web
    source = open_source({"type": "raw", "stream": {"type": "http", "url": f"{url}/a%20b?token=x"}})
    assert source.size == 100_000 and list(source.extents(5, 10)) == [Extent(5, 10, DATA)]
    for at, length in ((0, 1), (99_999, 1), (500, 70_000), (0, 100_000), (7, 0)):
        assert source.read(at, length) == DATA_BYTES[at : at + length]
    assert server.connections == 1
    source.close()
    with pytest.raises(OSError) as caught:
        source.read(0, 1)
    assert caught.value.errno == errno.EBADF


def test_long_reads_are_many_requests(web: tuple[Server, str], monkeypatch: pytest.MonkeyPatch) -> None:
    server, url = web
    monkeypatch.setattr("librbd_py.source.http.MAX_PIECE", 1000)
    found = stream(f"{url}/x")
    assert found.read(10, 99_000) == DATA_BYTES[10:99_010] and server.seen["GET /x"] == 99
    found.close()


@pytest.mark.parametrize("path", ["/closes", "/chunked", "/weak", "/no-head", "/moved", "/busy", "/short-once"])
def test_servers_that_are_merely_different(web: tuple[Server, str], path: str) -> None:
    found = stream(f"{web[1]}{path}", attempts=4)
    for at in (0, 99_000, 50):
        assert found.read(at, 1000) == DATA_BYTES[at : at + 1000]
    found.close()


@pytest.mark.parametrize(
    "path, code, words",
    [
        ("/missing", errno.ENOENT, "404"),
        ("/forbidden", errno.EACCES, "403"),
        ("/dead", errno.EIO, "500"),
        ("/loop", errno.ELOOP, "redirections"),
        ("/garbage", errno.EPROTO, "no HTTP"),
        ("/endless-headers", errno.EPROTO, "no HTTP"),
        ("/encoded", errno.EPROTO, "encoded"),
        ("/negative", errno.EPROTO, "how long"),
        ("/huge", errno.EPROTO, "how long"),
        ("/exbibytes", errno.EFBIG, "bytes"),
    ],
)
def test_what_cannot_be_opened(web: tuple[Server, str], path: str, code: int, words: str) -> None:
    with pytest.raises(OSError) as caught:
        stream(f"{web[1]}{path}?secret=1")
    assert caught.value.errno == code and words in str(caught.value) and path[:5] in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "path, code, words",
    [
        ("/no-ranges", errno.EOPNOTSUPP, "Range"),
        ("/other-range", errno.EPROTO, "asked for bytes 10 to 19"),
        ("/no-content-range", errno.EPROTO, "'nothing'"),
        ("/multipart", errno.EPROTO, "'nothing'"),
        ("/lies-total", errno.ESTALE, "100001"),
        ("/changed", errno.ESTALE, "changed"),
        ("/short", errno.EIO, "cut short"),
        ("/shorter", errno.EIO, "cut short"),
        ("/longer", errno.EFBIG, "more than 10"),
        ("/stall-body", errno.ETIMEDOUT, "time"),
    ],
)
def test_answers_that_are_wrong(web: tuple[Server, str], path: str, code: int, words: str) -> None:
    found = stream(f"{web[1]}{path}", try_seconds=0.5 if "stall" in path else 5)
    with pytest.raises(OSError) as caught:
        found.read(10, 10)
    assert caught.value.errno == code and words in str(caught.value)
    found.close()


def test_a_file_that_became_shorter(web: tuple[Server, str]) -> None:
    found = stream(f"{web[1]}/x")
    web[0].data = DATA_BYTES[:100]
    with pytest.raises(OSError) as caught:
        found.read(50_000, 10)
    assert caught.value.errno == errno.ESTALE
    found.close()


@pytest.mark.parametrize("path", ["/stall", "/drip"])
def test_nothing_waits_for_ever(web: tuple[Server, str], path: str) -> None:
    begin = time.monotonic()
    with pytest.raises(OSError) as caught:
        stream(f"{web[1]}{path}", try_seconds=0.3)
    assert caught.value.errno == errno.ETIMEDOUT and time.monotonic() - begin < 5


def test_a_server_that_ignores_ranges_costs_no_memory() -> None:
    with serving(bytes(64 << 20)) as (_, url):
        found = stream(f"{url}/no-ranges")
        tracemalloc.start()
        try:
            with pytest.raises(OSError):
                found.read(0, 10)
            assert tracemalloc.get_traced_memory()[1] < 2 << 20
        finally:
            tracemalloc.stop()
        found.close()


def test_nobody_there() -> None:
    for url, code in (("http://127.0.0.1:1/x", errno.ECONNREFUSED), ("http://none.invalid/", errno.EHOSTUNREACH)):
        with pytest.raises(OSError) as caught:
            stream(url)
        assert caught.value.errno == code


def test_a_server_that_restarts_is_found_again(web: tuple[Server, str]) -> None:
    found = stream(f"{web[1]}/closes")
    assert found.read(0, 4) == DATA_BYTES[:4]
    assert found.read(4, 4) == DATA_BYTES[4:8]
    assert web[0].connections == 2
    found.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "ftp://a/b",
        "http://",
        "http://user:pw@host/",
        "http://h:99999/",
        "http://h/a b",
        "http://h/\nX: y",
        "http://[::1/",
    ],
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(OSError) as caught:
        Url.parse(url)
    assert caught.value.errno == errno.EINVAL and "pw" not in str(caught.value)


def test_many_threads_share_a_stream(web: tuple[Server, str]) -> None:
    found = stream(f"{web[1]}/x")
    wrong: list[int] = []

    def reader(seed: int) -> None:
        pick = random.Random(seed)
        for _ in range(20):
            at = pick.randrange(99_000)
            if found.read(at, 1000) != DATA_BYTES[at : at + 1000]:
                wrong.append(at)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and web[0].connections <= 8
    found.close()


def test_certificates_are_verified(tmp_path: Path) -> None:
    good, other = make_certificate(tmp_path, "localhost"), make_certificate(tmp_path, "elsewhere")
    with serving(DATA_BYTES, good) as (_, url):
        found = stream(f"{url}/x", ca_file=str(good))
        assert found.read(1, 5) == DATA_BYTES[1:6]
        found.close()
        for authorities in (None, str(other)):
            with pytest.raises(OSError) as caught:
                stream(f"{url}/x", ca_file=authorities)
            assert caught.value.errno == errno.EPROTO and "certificate" in str(caught.value)
    with serving(DATA_BYTES, other) as (_, url), pytest.raises(OSError) as caught:
        stream(f"{url}/x", ca_file=str(other))
    assert caught.value.errno == errno.EPROTO and "certificate" in str(caught.value)
    for wrong, code in ((tmp_path / "none.pem", errno.ENOENT), (tmp_path / "bad.pem", errno.EINVAL)):
        if code == errno.EINVAL:
            wrong.write_text("no certificate")
        with pytest.raises(OSError) as caught:
            stream("https://localhost:1/x", ca_file=str(wrong))
        assert caught.value.errno == code


def test_files_are_not_left_open(web: tuple[Server, str]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in ("/x", "/missing", "/garbage", "/moved"):
        try:
            stream(f"{web[1]}{path}").close()
        except OSError:
            pass
    assert len(os.listdir("/proc/self/fd")) <= before + 4  # the server's side

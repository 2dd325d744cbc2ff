"""NBD exports as sources: of QEMU's server and of nbdkit, and of servers that lie."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from librbd_py.source import DATA, Extent, open_source
from librbd_py.source.nbd import NbdStream
from librbd_py.source.nbd_wire import Address

MIB = 1 << 20


def blocks(path: Path) -> bytes:
    """A file of 4 MiB with data in its second and last 64 KiB."""
    data = bytearray(4 * MIB)
    data[65536:131072] = random.Random(1).randbytes(65536)
    data[-65536:] = random.Random(2).randbytes(65536)
    with open(path, "wb") as file:
        file.truncate(len(data))
        for at in (65536, len(data) - 65536):
            file.seek(at)
            file.write(data[at : at + 65536])
    return bytes(data)


@contextmanager
def server(folder: Path, *argv: str | Path) -> Iterator[str]:
    """Runs it until the block ends; SOCKET in its arguments becomes a path. The URI of its default export."""
    path = folder / "nbd.sock"
    path.unlink(missing_ok=True)
    words = [str(word).replace("SOCKET", str(path)) for word in argv]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 20
            while not path.exists():
                assert process.poll() is None and time.monotonic() < end, words
                time.sleep(0.01)
            yield f"nbd+unix:///?socket={path}"
        finally:
            process.kill()


def check(uri: str, data: bytes) -> list[tuple[int, int]]:
    source = open_source({"type": "raw", "stream": {"type": "nbd", "uri": uri}})
    try:
        assert source.size == len(data)
        for at, length in ((0, 1), (65530, 100), (0, len(data)), (len(data) - 1, 1), (123, 0), (131000, 200)):
            assert source.read(at, length) == data[at : at + length]
        rows = list(source.extents(0, len(data)))
        covered = bytearray(len(data))
        for row in rows:
            assert row.kind is DATA
            covered[row.offset : row.end] = data[row.offset : row.end]
        assert covered == data
        assert sum(row.length for row in source.extents(65536 + 100, 200)) == 200
        return [(row.offset, row.length) for row in rows]
    finally:
        source.close()


EXACT = [(65536, 65536), (4 * MIB - 65536, 65536)]


def test_the_server_of_qemu(tmp_path: Path) -> None:
    data = blocks(tmp_path / "a.raw")
    with server(tmp_path, "qemu-nbd", "-t", "-r", "-f", "raw", "-k", "SOCKET", tmp_path / "a.raw") as uri:
        assert check(uri, data) == EXACT
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "a.raw", tmp_path / "a.qcow2"],
        check=True, timeout=60,
    )  # fmt: skip
    with server(tmp_path, "qemu-nbd", "-t", "-r", "-x", "my export", "-k", "SOCKET", tmp_path / "a.qcow2") as uri:
        assert check(uri.replace("///?", "///my%20export?"), data) == EXACT
        with pytest.raises(FileNotFoundError) as caught:
            NbdStream(uri.replace("///?", "///other?"))
        assert "other" in str(caught.value)


@pytest.mark.parametrize(
    "options, sparse",
    [
        ([], True),
        (["--no-sr"], False),
        (["--filter=nozero", "--filter=noextents"], False),
        (["--mask-handshake=1"], True),
    ],
)
def test_nbdkit(tmp_path: Path, options: list[str], sparse: bool) -> None:
    data = blocks(tmp_path / "a.raw")
    with server(tmp_path, "nbdkit", "-f", "-r", "-U", "SOCKET", *options, "file", tmp_path / "a.raw") as uri:
        assert check(uri, data) == (EXACT if sparse else [(0, 4 * MIB)])


def test_blocks_of_the_servers_choice(tmp_path: Path) -> None:
    data = blocks(tmp_path / "a.raw")
    limits = [f"blocksize-{name}" for name in ("minimum=4096", "preferred=65536", "maximum=128k", "error-policy=error")]
    with server(
        tmp_path, "nbdkit", "-f", "-r", "-U", "SOCKET", "--filter=blocksize-policy", "file", tmp_path / "a.raw", *limits
    ) as uri:
        assert check(uri, data) == EXACT


def test_errors_of_the_server_have_its_errno(tmp_path: Path) -> None:
    blocks(tmp_path / "a.raw")
    error = ["error-pread=ENOSPC", "error-pread-rate=100%"]
    for no_structured in ([], ["--no-sr"]):
        argv = ["nbdkit", "-f", "-r", "-U", "SOCKET", *no_structured, "--filter=error", "file", tmp_path / "a.raw"]
        with server(tmp_path, *argv, *error) as uri:
            stream = NbdStream(uri)
            with pytest.raises(OSError) as caught:
                stream.read(0, 10)
            assert caught.value.errno == errno.ENOSPC and uri in str(caught.value)
            stream.close()


def test_a_server_that_was_killed_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = blocks(tmp_path / "a.raw")
    argv = ["nbdkit", "-f", "-r", "-U", "SOCKET", "file", tmp_path / "a.raw"]
    monkeypatch.setattr("librbd_py.source.nbd.FIRST_PAUSE", 0.01)
    with server(tmp_path, *argv) as uri:
        stream = NbdStream(uri)
    with server(tmp_path, *argv):
        assert stream.read(65536, 10) == data[65536 : 65536 + 10]
    os.truncate(tmp_path / "a.raw", 3 * MIB)
    with server(tmp_path, *argv), pytest.raises(OSError) as caught:
        stream.read(65536, 10)
    assert caught.value.errno == errno.ESTALE
    with pytest.raises(OSError) as caught:
        stream.read(65536, 10)
    assert caught.value.errno in (errno.ECONNREFUSED, errno.ENOENT)
    stream.close()
    with pytest.raises(OSError) as caught:
        stream.read(0, 1)
    assert caught.value.errno == errno.EBADF


def test_several_threads_take_turns(tmp_path: Path) -> None:
    data = blocks(tmp_path / "a.raw")
    with server(tmp_path, "qemu-nbd", "-t", "-r", "-f", "raw", "-e", "1", "-k", "SOCKET", tmp_path / "a.raw") as uri:
        stream = NbdStream(uri)
        wrong: list[int] = []

        def reader(seed: int) -> None:
            pick = random.Random(seed)
            for _ in range(50):
                at = pick.randrange(4 * MIB - 5000)
                if stream.read(at, 5000) != data[at : at + 5000]:
                    wrong.append(at)

        threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong
        stream.close()


@pytest.mark.parametrize(
    "uri",
    ["", "http://a/b", "nbd:///x", "nbd+unix:///x", "nbd://h/?socket=/a", "nbd+unix://h/?socket=/a", "nbd+ssh://h/", "nbd://h:99999/",
     "nbd://h/" + "x" * 5000],
)  # fmt: skip
def test_what_is_no_uri(uri: str) -> None:
    with pytest.raises(OSError) as caught:
        Address.parse(uri)
    assert caught.value.errno == errno.EINVAL


def test_uris() -> None:
    assert Address.parse("nbd://h") == Address("nbd://h", "h", 10809, "", False, "")
    found = Address.parse("nbds+tcp://[::1]:5/a%2Fb/c")
    assert (found.host, found.port, found.tls, found.export) == ("::1", 5, True, "a/b/c")
    assert Address.parse("nbd+unix:///e?socket=/run/x%20y").path == "/run/x y"


# --- servers that lie


class Liar:
    """A greeting and the options as they should be, then what `answer` sends to the first request; or other options."""

    def __init__(
        self, folder: Path, answer: Callable[[socket.socket, bytes], object], change: dict[Any, bytes]
    ) -> None:
        self.path = folder / "liar.sock"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(4)
        self.answer = answer
        self.change = change
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            with client:
                client.settimeout(10)
                try:
                    self.serve(client)
                except OSError:
                    pass

    def serve(self, client: socket.socket) -> None:
        client.sendall(self.change.get("greeting", b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)))
        client.recv(4)
        while True:
            _, option, length = struct.unpack(">8sII", self.exactly(client, 16))
            self.exactly(client, length)
            if option in self.change:
                client.sendall(self.change[option])
            elif option == 8:
                client.sendall(reply(8, 1))
            elif option == 10:
                client.sendall(reply(10, 4, struct.pack(">I", 7) + b"base:allocation") + reply(10, 1))
            elif option == 7:
                client.sendall(reply(7, 3, struct.pack(">HQH", 0, 1 << 20, 3)) + reply(7, 1))
            if option == 7:
                break
        while True:
            self.answer(client, self.exactly(client, 28))

    def exactly(self, client: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = client.recv(size - len(data))
            if not part:
                raise OSError(errno.ECONNRESET, "gone")
            data += part
        return data

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(20)


def reply(option: int, kind: int, data: bytes = b"", magic: int = 0x3E889045565A9) -> bytes:
    return struct.pack(">QIII", magic, option, kind, len(data)) + data


def chunk(request: bytes, kind: int, data: bytes, flags: int = 1, cookie: int | None = None) -> bytes:
    number = int.from_bytes(request[8:16], "big") if cookie is None else cookie
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, number, len(data)) + data


@contextmanager
def lying(
    folder: Path,
    answer: Callable[[socket.socket, bytes], object] = lambda *_: None,
    change: dict[Any, bytes] | None = None,
) -> Iterator[str]:
    liar = Liar(folder, answer, change or {})
    try:
        yield f"nbd+unix:///x?socket={liar.path}"
    finally:
        liar.close()


HUGE = struct.pack(">QIII", 0x3E889045565A9, 7, 3, 0xFFFFFFFF)
EXPORT = struct.pack(">HQH", 0, 1 << 20, 3)


@pytest.mark.parametrize(
    "option, sent, code",
    [
        ("greeting", b"HTTP/1.1 400 Bad Request", errno.EPROTO),
        ("greeting", b"NBDMAGIC" + bytes(200), errno.EPROTO),
        ("greeting", b"NBDMAGICIHAVEOPT\0\0", errno.EOPNOTSUPP),
        ("greeting", b"NBDMAGIC", errno.ETIMEDOUT),
        (7, HUGE, errno.EPROTO),
        (7, reply(7, 1), errno.EPROTO),
        (7, reply(7, 3, EXPORT, magic=5) + reply(7, 1), errno.EPROTO),
        (7, reply(8, 3, EXPORT) + reply(7, 1), errno.EPROTO),
        (7, reply(7, 3, EXPORT) * 100, errno.EPROTO),
        (7, reply(7, 3, struct.pack(">HQH", 0, 1 << 63, 3)) + reply(7, 1), errno.EFBIG),
        (7, reply(7, 3, EXPORT) + reply(7, 3, struct.pack(">HIII", 3, 3, 3, 3)) + reply(7, 1), errno.EPROTO),
        (7, reply(7, 3, EXPORT) + reply(7, 3, struct.pack(">HIII", 3, 512, 512, 1)) + reply(7, 1), errno.EPROTO),
        (7, reply(7, (1 << 31) + 1), errno.EOPNOTSUPP),
        (7, reply(7, (1 << 31) + 2, b"no"), errno.EACCES),
        (7, reply(7, (1 << 31) + 6, b"who?"), errno.ENOENT),
    ],
)
def test_a_handshake_that_is_wrong(tmp_path: Path, option: Any, sent: bytes, code: int) -> None:
    with lying(tmp_path, change={option: sent}) as uri, pytest.raises(OSError) as caught:
        NbdStream(uri, attempts=1, try_seconds=0.5)
    assert caught.value.errno == code


def data_chunk(at: int, data: bytes) -> bytes:
    return struct.pack(">Q", at) + data


WRONG: list[Callable[[bytes], bytes]] = [
    lambda r: b"\0" * 64,
    lambda r: chunk(r, 1, data_chunk(0, b"x" * 100), cookie=99),
    lambda r: chunk(r, 1, data_chunk(0, b"x" * 99)),
    lambda r: chunk(r, 1, data_chunk(0, b"x" * 101)),
    lambda r: chunk(r, 1, data_chunk(1, b"x" * 100)),
    lambda r: chunk(r, 1, data_chunk((1 << 64) - 1, b"x" * 100)),
    lambda r: chunk(r, 1, data_chunk(0, b"")),
    lambda r: chunk(r, 2, struct.pack(">QI", 0, 0xFFFFFFFF)),
    lambda r: chunk(r, 2, struct.pack(">QI", 0, 0)),
    lambda r: chunk(r, 2, b"x" * 5),
    lambda r: chunk(r, 0, b""),
    lambda r: chunk(r, 0, b"x"),
    lambda r: chunk(r, 5, struct.pack(">III", 7, 100, 0)),
    lambda r: chunk(r, 0x8001, b"x"),
    lambda r: chunk(r, 0x8001, b"x" * 60000),
    lambda r: struct.pack(">IHHQI", 0x668E33EF, 1, 1, 1, 0xFFFFFFFF) + bytes(100),
    lambda r: chunk(r, 2, struct.pack(">QI", 0, 60), flags=0) * 2,
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_an_answer_that_is_wrong(tmp_path: Path, number: int) -> None:
    with lying(tmp_path, lambda client, request: client.sendall(WRONG[number](request))) as uri:
        stream = NbdStream(uri, attempts=1, try_seconds=2)
        with pytest.raises(OSError) as caught:
            stream.read(0, 100)
        assert caught.value.errno == errno.EPROTO
        stream.close()


def test_answers_in_parts_and_errors_within(tmp_path: Path) -> None:
    def parts(client: socket.socket, request: bytes) -> None:
        client.sendall(chunk(request, 1, data_chunk(60, b"y" * 40), flags=0))
        client.sendall(chunk(request, 2, struct.pack(">QI", 0, 50), flags=0))
        client.sendall(chunk(request, 1, data_chunk(50, b"z" * 10), flags=0) + chunk(request, 0, b""))

    with lying(tmp_path, parts) as uri:
        stream = NbdStream(uri, attempts=1, try_seconds=2)
        assert stream.read(0, 100) == bytes(50) + b"z" * 10 + b"y" * 40
        stream.close()
    (tmp_path / "liar.sock").unlink()

    def failing(client: socket.socket, request: bytes) -> None:
        client.sendall(chunk(request, 1, data_chunk(0, b"y" * 40), flags=0))
        client.sendall(chunk(request, 0x8002, struct.pack(">IH", 12, 2) + b"no" + bytes(8)))

    with lying(tmp_path, failing) as uri:
        stream = NbdStream(uri, attempts=1, try_seconds=2)
        with pytest.raises(OSError) as caught:
            stream.read(0, 100)
        assert caught.value.errno == errno.ENOMEM and "no" in str(caught.value)
        stream.close()


@pytest.mark.parametrize(
    "data", [b"", struct.pack(">I", 7), struct.pack(">III", 8, 4096, 0), struct.pack(">III", 7, 0, 0), b"x" * 13]
)
def test_a_status_that_is_wrong(tmp_path: Path, data: bytes) -> None:
    with lying(tmp_path, lambda client, request: client.sendall(chunk(request, 5, data))) as uri:
        stream = NbdStream(uri, attempts=1, try_seconds=2)
        with pytest.raises(OSError) as caught:
            list(stream.extents(0, 8192))
        assert caught.value.errno == errno.EPROTO
        stream.close()


def test_a_hole_that_is_not_called_zeros_is_data(tmp_path: Path) -> None:
    def status(client: socket.socket, request: bytes) -> None:
        offset = int.from_bytes(request[16:24], "big")
        rows = (4096, 1, 1 << 31, 3) if offset < 4096 else (1 << 31, 3)
        client.sendall(chunk(request, 5, struct.pack(f">I{len(rows)}I", 7, *rows)))

    with lying(tmp_path, status) as uri:
        stream = NbdStream(uri, attempts=1, try_seconds=2)
        assert list(stream.extents(0, 8192)) == [Extent(0, 4096, DATA)]
        stream.close()


def test_a_server_that_says_nothing(tmp_path: Path) -> None:
    release = threading.Event()
    with lying(tmp_path, lambda *_: release.wait(20)) as uri:
        stream = NbdStream(uri, attempts=1, try_seconds=0.3)
        begin = time.monotonic()
        with pytest.raises(OSError) as caught:
            stream.read(0, 100)
        assert caught.value.errno == errno.ETIMEDOUT and time.monotonic() - begin < 5
        release.set()
        stream.close()

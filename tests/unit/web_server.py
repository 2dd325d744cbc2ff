"""A web server that answers range requests, and does so wrongly in every way one asks for by the path."""

from __future__ import annotations

import re
import ssl
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WHOLE = {"/no-ranges", "/other-range", "/lies-total", "/no-content-range", "/multipart"}


class Server(ThreadingHTTPServer):
    """`data` is the file at any path. `seen` counts requests, `connections` those that were opened."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data = data
        self.etag = '"one"'
        self.detour = ""  # answers as at this path, whatever was asked for
        self.seen: Counter[str] = Counter()
        self.connections = 0
        self.release = threading.Event()  # ends what stalls

    def get_request(self) -> Any:
        self.connections += 1
        return super().get_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away when they have seen enough."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        server = self.server
        path = server.detour or self.path.partition("?")[0]
        server.seen[f"{self.command} {path}"] += 1
        count = server.seen[f"{self.command} {path}"]
        data = server.data
        if path == "/missing":
            return self.reply(404, {}, b"nothing here")
        if path == "/forbidden" or (path == "/no-head" and head):
            return self.reply(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
        if path.startswith("/loop"):
            return self.reply(302, {"Location": "/loop"}, b"")
        if path == "/moved":
            return self.reply(301, {"Location": "/fine"}, b"")
        if path == "/busy" and count <= 2:
            return self.reply(503, {}, b"slow down")
        if path == "/dead":
            return self.reply(500, {}, b"broken")
        if path == "/garbage":
            self.wfile.write(b"\0\xff no http at all\r\n\r\n")
            self.close_connection = True
            return None
        if path == "/endless-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(5000)))
            self.close_connection = True
            return None
        if path == "/stall" or (path == "/stall-body" and not head):
            if path == "/stall-body":
                self.wfile.write(b"HTTP/1.1 206 x\r\nContent-Range: bytes 0-9/100000\r\nContent-Length: 10\r\n\r\n12")
                self.wfile.flush()
            server.release.wait(20)
            self.close_connection = True
            return None
        if path == "/drip":
            try:
                for _ in range(2000):
                    self.wfile.write(b"H")
                    self.wfile.flush()
                    if server.release.wait(0.01):
                        break
            except OSError:
                pass
            self.close_connection = True
            return None
        headers = {"ETag": server.etag}
        if path == "/encoded":
            headers["Content-Encoding"] = "gzip"
        if path == "/weak":
            headers = {"ETag": f'W/"{count}"'}
        if head:
            size: object = len(data)
            if path == "/negative":
                size = -5
            if path == "/huge":
                size = 1 << 80
            if path == "/exbibytes":
                size = (1 << 62) + 1
            headers["Content-Length"] = str(size)
            return self.reply(200, headers, None)
        if path == "/changed":
            headers["ETag"] = '"two"'
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not found or path == "/no-ranges":
            return self.reply(200, headers, data)
        first, last = int(found[1]), min(int(found[2]), len(data) - 1)
        if first >= len(data):
            return self.reply(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
        total = len(data) + (path == "/lies-total")
        part = data[first : last + 1]
        if path == "/other-range":
            first, last = first + 1, last + 1
        headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        if path == "/no-content-range":
            del headers["Content-Range"]
        if path == "/multipart":
            headers = {"Content-Type": "multipart/byteranges; boundary=x", "ETag": server.etag}
        if path == "/longer":
            part += b"more"
        if path == "/short" or (path == "/short-once" and count == 1):
            headers["Content-Length"] = str(len(part))
            self.reply(206, headers, part[:-1])
            self.close_connection = True
            return None
        if path == "/shorter":
            part = part[:-1]
        if path == "/chunked":
            headers["Transfer-Encoding"] = "chunked"
            return self.reply(206, headers, b"%x\r\n%b\r\n0\r\n\r\n" % (len(part), part))
        if path == "/closes":
            headers["Connection"] = "close"
        return self.reply(206, headers, part)

    def reply(self, status: int, headers: dict[str, str], body: bytes | None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers and "Transfer-Encoding" not in headers:
            self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving(data: bytes, certificate: Path | None = None) -> Iterator[tuple[Server, str]]:
    """A server and its URL, until the block ends."""
    server = Server(data)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    host = "localhost" if certificate is not None else "127.0.0.1"
    try:
        yield server, f"http{'s' if certificate else ''}://{host}:{server.server_address[1]}"
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


def make_certificate(folder: Path, name: str) -> Path:
    """A key and a certificate of its own for that name, in one file."""
    path, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}", "-keyout", key, "-out", path],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    path.write_text(path.read_text() + key.read_text())
    return path

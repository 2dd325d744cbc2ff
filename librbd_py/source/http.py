"""The `http` stream: a file on a web server that answers range requests. `S3Stream` is the same with signatures."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn
from urllib.parse import urljoin

from librbd_py.net.client import Answer, Client, code_of
from librbd_py.net.connection import Url

from .api import Extent
from .checks import bounded
from .spec_values import optional_text, text
from .stream import all_data

MAX_PIECE = 8 << 20  # bytes of one request
REDIRECTS = 5
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


class HttpStream:
    """Spec: {"type": "http", "url": URL}; ours besides: "ca_file", authorities for https instead of the system's.

    The size is what the server says when it is opened, and so is which version of the file is read: every answer is
    checked against both. ESTALE: the file changed. EOPNOTSUPP: the server cannot be asked for parts of it. EPROTO: it
    contradicts itself. EIO: answers are cut short, again and again."""

    def __init__(self, url: str, *, ca_file: str | None = None, **options: Any) -> None:
        """`options` go to `Client`."""
        self._options = {"ca_file": ca_file, **options}
        self._client = Client(Url.parse(url), **self._options)
        try:
            answer = self._look()
            size = answer.length() if answer.status == 200 else _total(answer)
            if size is None:
                self._refuse(errno.EPROTO, "the server does not say how long the file is")
            if answer.headers.get("content-encoding", "identity") != "identity":
                self._refuse(errno.EPROTO, "the server sends the file encoded, not as it is")
            self._size = bounded(size, self._client.url.text)
            self._version = _version(answer)
        except BaseException:
            self._client.close()
            raise

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> HttpStream:
        return cls(text(spec, "url", "the stream"), ca_file=optional_text(spec, "ca_file", "the stream"))

    @property
    def size(self) -> int:
        return self._size

    @property
    def version(self) -> str | None:
        """What the server calls the state of the file that is read."""
        return self._version

    def _headers(self, method: str, more: Mapping[str, str]) -> dict[str, str]:
        """Of one attempt."""
        return {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "rbdpy", **more}

    def _look(self) -> Answer:
        """HEAD, also where it leads to; servers and presigned URLs that refuse it are asked for the first byte."""
        for _ in range(REDIRECTS + 1):
            answer = self._request("HEAD", {}, statuses=frozenset({200}))
            if answer.status in (403, 405, 501):
                answer = self._request("GET", {"Range": "bytes=0-0"}, most=1, statuses=frozenset({206}))
            if answer.status in (200, 206):
                return answer
            if answer.status not in (301, 302, 303, 307, 308) or "location" not in answer.headers:
                self._fail(answer)
            self._follow(answer.headers["location"])
        return self._refuse(errno.ELOOP, f"more than {REDIRECTS} redirections")

    def _request(self, method: str, more: Mapping[str, str], **bounds: Any) -> Answer:
        return self._client.request(method, self._client.url.target, lambda: self._headers(method, more), **bounds)

    def _follow(self, location: str) -> None:
        old = self._client.url
        url = Url.parse(urljoin(f"{old.scheme}://{old.authority}{old.target}", location))
        if old.scheme == "https" and url.scheme != "https":
            self._refuse(errno.EPROTO, f"it leads to {url.text}, which is not encrypted")
        self._client.close()
        self._client = Client(url, **self._options)

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        while length:
            part = self._part(offset, min(length, MAX_PIECE))
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _part(self, offset: int, length: int) -> bytes:
        last = offset + length - 1
        whole = length == self._size
        good = frozenset({200, 206} if whole else {206})
        answer = self._request("GET", {"Range": f"bytes={offset}-{last}"}, exact=length, statuses=good)
        if answer.status == 200 and not whole:
            self._refuse(errno.EOPNOTSUPP, "the server does not answer requests for a part of a file (Range)")
        if answer.status == 416:
            self._refuse(errno.ESTALE, f"the file ends before {last}: it changed")
        if answer.status not in (200, 206):
            self._fail(answer)
        if _version(answer) != self._version:
            self._refuse(errno.ESTALE, "the file changed while it was read")
        if answer.status == 206:
            found = _RANGE.fullmatch(answer.headers.get("content-range", ""))
            if not found or (int(found[1]), int(found[2])) != (offset, last):
                said = answer.headers.get("content-range", "nothing")[:100]
                self._refuse(errno.EPROTO, f"asked for bytes {offset} to {last} the server sent {said!r}")
            if found[3] not in ("*", str(self._size)):
                self._refuse(errno.ESTALE, f"the file has {found[3]} bytes now, it had {self._size}")
        return answer.body

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return all_data(offset, length)

    def _fail(self, answer: Answer) -> NoReturn:
        self._refuse(code_of(answer.status), f"the server answers {answer.status}{self._words(answer)}")

    def _words(self, answer: Answer) -> str:
        """What more the server says of an error."""
        return ""

    def _refuse(self, code: int, words: str) -> NoReturn:
        raise OSError(code, f"{self._client.url.text}: {words}")

    def close(self) -> None:
        self._client.close()


def _version(answer: Answer) -> str | None:
    """A weak ETag names no bytes."""
    tag = answer.headers.get("etag")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("last-modified")


def _total(answer: Answer) -> int | None:
    found = _RANGE.fullmatch(answer.headers.get("content-range", ""))
    return int(found[3]) if found and found[3] != "*" else None

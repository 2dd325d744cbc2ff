"""S3: signatures of version 4 (AWS' documentation, "Authenticating Requests: Using the Authorization Header") and the
few requests that images need. Works with radosgw and others, addressed by path or by virtual host."""

from __future__ import annotations

import configparser
import errno
import hashlib
import hmac
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote
from xml.etree import ElementTree

from .client import Answer, Client, code_of
from .connection import Url

DEFAULT_REGION = "us-east-1"
EMPTY = hashlib.sha256(b"").hexdigest()
MAX_LISTING = 4 << 20  # bytes of one page of a listing
_ALGORITHM = "AWS4-HMAC-SHA256"
_SAFE = "-_.~"
_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,80})</Code>")


@dataclass(frozen=True)
class Credentials:
    """`secret` and `token` are never part of a message."""

    access: str
    secret: str = field(repr=False)
    token: str = field(default="", repr=False)
    region: str = DEFAULT_REGION

    @classmethod
    def from_environment(cls, region: str | None = None) -> Credentials:
        """AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, else the profile AWS_PROFILE of AWS_SHARED_CREDENTIALS_FILE
        (~/.aws/credentials). EACCES: there are none."""
        region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or DEFAULT_REGION
        access, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
        if access and secret:
            return cls(access, secret, os.environ.get("AWS_SESSION_TOKEN", ""), region)
        path = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
        parser = configparser.RawConfigParser()
        try:
            parser.read(path)
            row = parser[os.environ.get("AWS_PROFILE") or "default"]
            return cls(row["aws_access_key_id"], row["aws_secret_access_key"], row.get("aws_session_token", ""), region)
        except (KeyError, configparser.Error, UnicodeDecodeError):
            raise OSError(
                errno.EACCES, f"no S3 keys: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write {path}"
            ) from None


def sign(
    method: str,
    authority: str,
    target: str,
    headers: Mapping[str, str],
    payload: str,
    keys: Credentials,
    now: float | None = None,
) -> dict[str, str]:
    """The headers to add: all of `headers`, Host and what begins with x-amz- are signed. `target` is path and query as
    they are sent, `payload` the body's SHA-256 in hexadecimal, `now` seconds since 1970."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    added = {"x-amz-content-sha256": payload, "x-amz-date": stamp}
    if keys.token:
        added["x-amz-security-token"] = keys.token
    signed = {name.lower(): " ".join(value.split()) for name, value in {**headers, **added, "host": authority}.items()}
    names = ";".join(sorted(signed))
    path, _, query = target.partition("?")
    pairs = sorted((quote(k, safe=_SAFE), quote(v, safe=_SAFE)) for k, v in parse_qsl(query, keep_blank_values=True))
    request = "\n".join(
        [
            method,
            encoded(unquote(path)),
            "&".join(f"{name}={value}" for name, value in pairs),
            *(f"{name}:{signed[name]}" for name in sorted(signed)),
            "",
            names,
            payload,
        ]
    )
    scope = f"{stamp[:8]}/{keys.region}/s3/aws4_request"
    text = "\n".join([_ALGORITHM, stamp, scope, hashlib.sha256(request.encode()).hexdigest()])
    key = f"AWS4{keys.secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    added["Authorization"] = (
        f"{_ALGORITHM} Credential={keys.access}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return added


def encoded(path: str) -> str:
    """A path as S3 signs and takes it."""
    return quote(path, safe=_SAFE + "/")


def words_of(answer: Answer) -> str:
    """What S3 calls an error, as ` (NoSuchKey)`; empty: it does not say."""
    found = _CODE.search(answer.body.decode("utf-8", "replace"))
    return f" ({found[1]})" if found else ""


@dataclass(frozen=True)
class Listed:
    key: str
    size: int


class Bucket:
    """Objects of a bucket. Any number of threads. OSError: ENOENT (no such bucket, or object), EACCES, and what
    `Client` raises."""

    def __init__(
        self, endpoint: str, bucket: str, keys: Credentials, *, virtual_host: bool = False, **options: Any
    ) -> None:
        """`endpoint`: http(s)://HOST[:PORT]; `options` go to `Client`."""
        if not re.fullmatch(r"[a-z0-9A-Z][a-zA-Z0-9._-]{1,254}", bucket):
            raise OSError(errno.EINVAL, f"{bucket!r} cannot be the name of a bucket")
        url = Url.parse(endpoint.rstrip("/"))
        if virtual_host:
            url = Url(url.scheme, f"{bucket}.{url.host}", url.port, url.target)
        self.name = bucket
        self._base = "/" if virtual_host else f"/{bucket}/"
        self._keys = keys
        self._client = Client(url, **options)

    def put(self, key: str, data: bytes, *, digest: str | None = None) -> None:
        """The object is there as a whole afterwards, in the place of what was. `digest`: its SHA-256, if known."""
        answer = self._request("PUT", key, body=data, payload=digest or hashlib.sha256(data).hexdigest())
        self._check(answer, key, 200)

    def get(self, key: str, most: int) -> bytes:
        """EFBIG: it has more than `most` bytes."""
        answer = self._request("GET", key, most=most)
        self._check(answer, key, 200)
        return answer.body

    def size(self, key: str) -> int:
        answer = self._request("HEAD", key)
        self._check(answer, key, 200)
        return answer.length() or 0

    def delete(self, key: str) -> None:
        """An object that is not there is no error."""
        self._check(self._request("DELETE", key), key, 200, 204, 404)

    def create(self) -> None:
        """Of one that is there: nothing."""
        self._check(self._request("PUT", "", body=b"", payload=EMPTY), "", 200, 409)

    def list(self, prefix: str) -> Iterator[Listed]:
        """By key, a page at a time."""
        token = ""
        while True:
            query = {"list-type": "2", "max-keys": "1000", "prefix": prefix}
            if token:
                query["continuation-token"] = token
            answer = self._request("GET", "", query=query, most=MAX_LISTING)
            self._check(answer, "", 200)
            rows, following = _page(answer.body)
            yield from rows
            if not following:
                return
            if following == token:
                raise OSError(errno.EPROTO, f"{self._client.url.text}: the listing does not go on")
            token = following

    def _request(
        self,
        method: str,
        key: str,
        *,
        query: Mapping[str, str] | None = None,
        body: bytes | None = None,
        payload: str = EMPTY,
        most: int = 0,
    ) -> Answer:
        target = self._base + encoded(key)
        if query:
            target += "?" + "&".join(f"{name}={quote(value, safe=_SAFE)}" for name, value in sorted(query.items()))
        authority = self._client.url.authority
        return self._client.request(
            method,
            target,
            lambda: {"User-Agent": "rbdpy", **sign(method, authority, target, {}, payload, self._keys)},
            body,
            most=most,
            statuses=frozenset({200}),
        )

    def _check(self, answer: Answer, key: str, *good: int) -> None:
        if answer.status not in good:
            where = f"{self._client.url.scheme}://{self._client.url.authority}{self._base}{key}"
            raise OSError(code_of(answer.status), f"{where}: the server answers {answer.status}{words_of(answer)}")

    def close(self) -> None:
        self._client.close()


def _page(body: bytes) -> tuple[list[Listed], str]:
    """Objects, and how to ask for the next page. EPROTO."""
    problem = OSError(errno.EPROTO, "the object store's listing cannot be read")
    if b"<!DOCTYPE" in body or b"<!ENTITY" in body:
        raise problem
    rows = []
    token = ""
    try:
        root = ElementTree.fromstring(body)
        for child in root:
            name = child.tag.rpartition("}")[2]
            if name == "Contents":
                row = {each.tag.rpartition("}")[2]: each.text or "" for each in child}
                rows.append(Listed(row["Key"], int(row["Size"])))
            elif name == "NextContinuationToken":
                token = child.text or ""
    except (ElementTree.ParseError, KeyError, ValueError):
        raise problem from None
    return rows, token

"""Signatures of S3 against the examples in AWS' documentation, and listings that are wrong."""

from __future__ import annotations

import calendar
import errno
import re
from pathlib import Path

import pytest

from librbd_py.net.s3 import EMPTY, Bucket, Credentials, _page, sign

KEYS = Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
HOST = "examplebucket.s3.amazonaws.com"
NOW = calendar.timegm((2013, 5, 24, 0, 0, 0))
WELCOME = "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072"


@pytest.mark.parametrize(
    "method, target, headers, payload, signature",
    [
        (
            "GET",
            "/test.txt",
            {"Range": "bytes=0-9"},
            EMPTY,
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
        ),
        (
            "PUT",
            "/test$file.text",
            {"Date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY"},
            WELCOME,
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
        ),
        ("GET", "/?lifecycle", {}, EMPTY, "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
        ("GET", "/?max-keys=2&prefix=J", {}, EMPTY, "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
    ],
)
def test_the_documented_examples(
    method: str, target: str, headers: dict[str, str], payload: str, signature: str
) -> None:
    added = sign(method, HOST, target, headers, payload, KEYS, NOW)
    assert re.search("Signature=(.*)", added["Authorization"])[1] == signature  # type: ignore[index]
    assert added["x-amz-date"] == "20130524T000000Z"


def test_secrets_are_in_no_message() -> None:
    keys = Credentials("A", "very secret", "a token")
    assert "secret" not in repr(keys).replace("secret=", "") and "token" not in repr(keys)


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    with pytest.raises(OSError) as caught:
        Credentials.from_environment()
    assert caught.value.errno == errno.EACCES
    path.write_text("[default]\naws_access_key_id = d\naws_secret_access_key = e%f\n[p]\naws_access_key_id = broken\n")
    assert Credentials.from_environment() == Credentials("d", "e%f")
    monkeypatch.setenv("AWS_PROFILE", "p")
    with pytest.raises(OSError):
        Credentials.from_environment()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_REGION", "r")
    assert Credentials.from_environment() == Credentials("a", "b", "", "r")
    assert Credentials.from_environment("x").region == "x"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<a>",
        b"<a><Contents><Key>k</Key></Contents></a>",
        b"<a><Contents><Key>k</Key><Size>x</Size></Contents></a>",
        b'<!DOCTYPE a [<!ENTITY b "b">]><a>&b;</a>',
    ],
)
def test_a_listing_that_is_wrong(body: bytes) -> None:
    with pytest.raises(OSError) as caught:
        _page(body)
    assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize("name", ["", "a", "a/b", "a b", "-", "x" * 300])
def test_names_of_buckets(name: str) -> None:
    with pytest.raises(OSError) as caught:
        Bucket("http://127.0.0.1:1", name, KEYS)
    assert caught.value.errno == errno.EINVAL

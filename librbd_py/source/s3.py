"""The `s3` stream: an object in a bucket."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from librbd_py.net.client import Answer
from librbd_py.net.s3 import DEFAULT_REGION, EMPTY, Credentials, sign, words_of

from .http import HttpStream
from .spec_values import optional_text, text

CONFIG = "config://"  # before the path of a key that the monitors keep


class S3Stream(HttpStream):
    """Spec: {"type": "s3", "url": URL, "access_key": KEY, "secret_key": KEY}; a key may be `config://PATH`. The URL is
    http(s)://HOST/BUCKET/OBJECT or http(s)://BUCKET.HOST/OBJECT. Ours besides: "region", "session_token", "ca_file".

    librbd signs as version 2 did, which newer servers refuse; here it is version 4."""

    def __init__(self, url: str, keys: Credentials, **options: Any) -> None:
        self._keys = keys
        super().__init__(url, **options)

    @classmethod
    def of(cls, spec: Mapping[str, Any], secret: Callable[[str], str] | None = None) -> S3Stream:
        keys = []
        for name in ("access_key", "secret_key"):
            value = text(spec, name, "the stream")
            if value.startswith(CONFIG) and secret is not None:
                value = secret(value.removeprefix(CONFIG))
            keys.append(value)
        token = optional_text(spec, "session_token", "the stream") or ""
        region = optional_text(spec, "region", "the stream") or DEFAULT_REGION
        url, ca_file = text(spec, "url", "the stream"), optional_text(spec, "ca_file", "the stream")
        return cls(url, Credentials(keys[0], keys[1], token, region), ca_file=ca_file)

    def _headers(self, method: str, more: Mapping[str, str]) -> dict[str, str]:
        url = self._client.url
        return {**super()._headers(method, more), **sign(method, url.authority, url.target, more, EMPTY, self._keys)}

    def _words(self, answer: Answer) -> str:
        return words_of(answer)

"""Ceph's source specs: the JSON that `rbd migration prepare --import-only --source-spec` takes."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from typing import Any

from .api import Source
from .file import FileStream
from .http import HttpStream
from .nbd import NbdStream
from .qcow import QcowSource
from .raw import RawSource
from .s3 import S3Stream
from .spec_values import section
from .stream import Stream

MAX_SPEC = 1 << 20  # characters

OpenNative = Callable[[Mapping[str, Any]], Source]
Secret = Callable[[str], str]  # what `config://PATH` stands for


def load_spec(spec: str) -> dict[str, Any]:
    """EBADMSG: no JSON object."""
    try:
        found = json.loads(spec) if len(spec) <= MAX_SPEC else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise OSError(errno.EBADMSG, "the source spec is no JSON object")
    return found


def open_source(spec: Mapping[str, Any], *, native: OpenNative | None = None, secret: Secret | None = None) -> Source:
    """`native` opens images of a store (this package does not know them); `secret` looks up `config://` keys.

    EINVAL: something is missing or wrong in the spec. ENOSYS: an unknown type of format, snapshot or stream, as librbd
    answers. Otherwise what the stream or the format say, always as OSError."""
    kind = _kind(spec, "the format")
    if kind == "native":
        if native is None:
            raise OSError(errno.ENOSYS, "images of a store cannot be opened here")
        return native(spec)
    if kind == "raw":
        return RawSource.of(spec, lambda each: open_stream(section(each, "stream", "a part"), secret))
    if kind == "qcow":
        return QcowSource.of(spec, lambda each: open_stream(section(each, "stream", "the format"), secret))
    raise OSError(errno.ENOSYS, f"'{kind}' is no format of a source that is known here")


def open_stream(spec: Mapping[str, Any], secret: Secret | None = None) -> Stream:
    """As `open_source`, of a "stream" object."""
    kind = _kind(spec, "the stream")
    if kind == "file":
        return FileStream.of(spec)
    if kind == "http":
        return HttpStream.of(spec)
    if kind == "nbd":
        return NbdStream.of(spec)
    if kind == "s3":
        return S3Stream.of(spec, secret)
    raise OSError(errno.ENOSYS, f"'{kind}' is no type of stream that is known here")


def _kind(spec: Mapping[str, Any], what: str) -> str:
    kind = spec.get("type")
    if not isinstance(kind, str):
        raise OSError(errno.EINVAL, f"{what} of the source spec has no 'type'")
    return kind

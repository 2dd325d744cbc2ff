"""S3 and HTTP against a real server (radosgw): objects as images, a bucket's requests, what it refuses."""

from __future__ import annotations

import errno
import hashlib
import random
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from librbd_py.devcluster import DevCluster, S3Access
from librbd_py.net import client as net_client
from librbd_py.net.s3 import Bucket, Credentials
from librbd_py.source import open_source
from librbd_py.source.http import HttpStream

DATA = random.Random(8).randbytes(300_000)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_client, "FIRST_PAUSE", 0.001)


@pytest.fixture
def bucket(s3_server: S3Access) -> Iterator[Bucket]:
    made = open_bucket(s3_server)
    made.create()
    yield made
    for row in list(made.list("")):
        made.delete(row.key)
    made.close()


def open_bucket(access: S3Access, name: str = "test-source", **options: Any) -> Bucket:
    return Bucket(access.endpoint, name, Credentials(access.access_key, access.secret_key), **options)


def spec(access: S3Access, key: str, **change: Any) -> dict[str, Any]:
    stream = {
        "type": "s3",
        "url": f"{access.endpoint}/test-source/{key}",
        "access_key": access.access_key,
        "secret_key": access.secret_key,
    }
    return {"type": "raw", "stream": stream | change}


def test_an_object_is_an_image(s3_server: S3Access, bucket: Bucket) -> None:
    for key, sent in (("image.raw", "image.raw"), ("a dir/ü+~(1).raw", "a%20dir/%C3%BC%2B~(1).raw")):
        bucket.put(key, DATA)
        source = open_source(spec(s3_server, sent))
        assert source.size == len(DATA)
        for at, length in ((0, 10), (299_999, 1), (1000, 200_000), (0, 300_000)):
            assert source.read(at, length) == DATA[at : at + length]
        source.close()


def test_a_qcow_image_in_s3(s3_server: S3Access, bucket: Bucket, tmp_path: Path) -> None:
    raw, path = tmp_path / "a.raw", tmp_path / "a.qcow2"
    raw.write_bytes((DATA + bytes(1 << 20) + b"end").ljust(2 << 20, b"\0"))
    argv = ["qemu-img", "convert", "-f", "raw", "-c", "-O", "qcow2", str(raw), str(path)]
    subprocess.run(argv, check=True, timeout=60)
    bucket.put("a.qcow2", path.read_bytes())
    source = open_source({**spec(s3_server, "a.qcow2"), "type": "qcow"})
    assert source.read(0, 2 << 20) == raw.read_bytes()
    source.close()


def test_keys_may_be_kept_by_the_monitors(s3_server: S3Access, bucket: Bucket) -> None:
    bucket.put("x", b"abc")
    kept = {"rbd/a": s3_server.access_key, "rbd/s": s3_server.secret_key}
    given = spec(s3_server, "x", access_key="config://rbd/a", secret_key="config://rbd/s")
    source = open_source(given, secret=kept.__getitem__)
    assert source.read(0, 3) == b"abc"
    source.close()


@pytest.mark.parametrize(
    "key, change, code, words",
    [
        ("none", {}, errno.ENOENT, ""),
        ("x", {"secret_key": "wrong"}, errno.EACCES, "SignatureDoesNotMatch"),
        ("x", {"access_key": "NOBODY"}, errno.EACCES, "InvalidAccessKeyId"),
        ("x", {"access_key": None}, errno.EINVAL, "access_key"),
        ("x", {"secret_key": 5}, errno.EINVAL, "secret_key"),
        ("x", {"url": "no url"}, errno.EINVAL, "URL"),
    ],
)
def test_what_is_refused(
    s3_server: S3Access, bucket: Bucket, key: str, change: dict[str, Any], code: int, words: str
) -> None:
    bucket.put("x", b"abc")
    with pytest.raises(OSError) as caught:
        open_source(spec(s3_server, key, **change))
    assert caught.value.errno == code and words in str(caught.value)
    assert s3_server.secret_key not in str(caught.value)


def test_an_object_that_was_replaced(s3_server: S3Access, bucket: Bucket) -> None:
    bucket.put("x", DATA)
    source = open_source(spec(s3_server, "x"))
    bucket.put("x", DATA[::-1])
    with pytest.raises(OSError) as caught:
        source.read(0, 10)
    assert caught.value.errno == errno.ESTALE
    source.close()


def presigned(access: S3Access, key: str) -> str:
    """A URL that needs no keys for some minutes: signature version 2 in the query, as radosgw takes."""
    import base64
    import hmac
    from urllib.parse import quote

    expires = int(time.time()) + 600
    text = f"GET\n\n\n{expires}\n/test-source/{key}"
    signature = base64.b64encode(hmac.digest(access.secret_key.encode(), text.encode(), "sha1")).decode()
    return (
        f"{access.endpoint}/test-source/{key}?AWSAccessKeyId={access.access_key}&Expires={expires}"
        f"&Signature={quote(signature, safe='')}"
    )


def test_a_presigned_url_is_read_over_http(s3_server: S3Access, bucket: Bucket) -> None:
    """The server's HTTP, with HEAD refused, as the signature is for GET."""
    bucket.put("x", DATA)
    url = presigned(s3_server, "x")
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert answer.read() == DATA
    stream = HttpStream(url)
    assert stream.size == len(DATA) and stream.read(5, 100_000) == DATA[5:100_005]
    stream.close()


def test_the_requests_of_a_bucket(bucket: Bucket) -> None:
    bucket.create()
    keys = [f"p/{number:04}" for number in range(25)] + ["q/&<ü>"]
    for key in keys:
        bucket.put(key, key.encode(), digest=hashlib.sha256(key.encode()).hexdigest())
    assert [(row.key, row.size) for row in bucket.list("p/")] == [(key, len(key)) for key in keys[:-1]]
    assert [row.key for row in bucket.list("q")] == keys[-1:] and list(bucket.list("r")) == []
    assert bucket.get(keys[-1], 100) == keys[-1].encode() and bucket.size(keys[0]) == 6
    for call in (lambda: bucket.get("none", 10), lambda: bucket.size("none")):
        with pytest.raises(FileNotFoundError):
            call()
    with pytest.raises(OSError) as caught:
        bucket.get(keys[0], 5)
    assert caught.value.errno == errno.EFBIG
    bucket.delete(keys[0])
    bucket.delete(keys[0])
    with pytest.raises(OSError) as caught:
        bucket.put("x", b"abc", digest=hashlib.sha256(b"abd").hexdigest())
    assert caught.value.errno == errno.EINVAL  # the server checks what it was told


def test_a_listing_of_several_pages(bucket: Bucket) -> None:
    keys = [f"many/{number:05}" for number in range(1003)]
    for key in keys:
        bucket.put(key, b"")
    assert [row.key for row in bucket.list("many/")] == keys


def test_there_is_no_such_bucket(s3_server: S3Access) -> None:
    other = open_bucket(s3_server, "no-such-bucket")
    for call in (lambda: list(other.list("")), lambda: other.put("x", b""), lambda: other.get("x", 1)):
        with pytest.raises(FileNotFoundError):
            call()
    other.close()


def test_a_server_that_is_away_for_a_moment(new_ceph_cluster: Callable[..., DevCluster]) -> None:
    with pytest.raises(OSError) as caught:
        new_ceph_cluster().start_s3()
    assert caught.value.errno == errno.EINVAL
    cluster = new_ceph_cluster(auth="cephx")
    bucket = open_bucket(cluster.start_s3())
    bucket.create()
    bucket.put("x", b"before")
    cluster.daemon("rgw.a").kill()
    assert cluster.status().daemons["rgw.a"] == "absent"
    with pytest.raises(OSError) as caught:
        bucket.get("x", 10)
    assert caught.value.errno == errno.ECONNREFUSED
    assert cluster.s3 is not None and cluster.start_s3() == cluster.s3
    assert cluster.start_s3() == cluster.s3
    assert bucket.get("x", 10) == b"before"
    bucket.close()

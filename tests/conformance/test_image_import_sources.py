"""Every kind of source goes through a whole import: prepared, used and written to, cut short, executed, committed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from image_fixtures import MIB, Cluster, R, cluster, io
from test_image_migration import content, maps_are_right

from librbd_py import rbd
from librbd_py.devcluster import S3Access
from librbd_py.net.s3 import Bucket, Credentials
from librbd_py.store.api import ObjectContext

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from test_source_nbd import server as nbd_server
from web_server import Server, serving

__all__ = ["cluster", "io"]
SIZE = 6 * MIB


def run(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A QCOW image with compressed clusters, zeros, and two snapshots, and its HEAD as a raw file."""
    folder = tmp_path_factory.mktemp("sources")
    qcow, raw, packed = folder / "image.qcow2", folder / "image.raw", folder / "packed.qcow2"
    run("qemu-img", "create", "-f", "qcow2", qcow, str(SIZE))
    for number in range(3):
        write = ["-c", f"write -P {number + 1} {number}M 1M", "-c", f"write -P {number + 10} 5M 64k"]
        run("qemu-io", "-f", "qcow2", *write, "-c", f"discard {number}M 128k", qcow)
        if number < 2:
            run("qemu-img", "snapshot", "-c", f"s{number}", qcow)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", qcow, raw)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, packed)
    for number in range(2):
        out = folder / f"s{number}.raw"
        run("qemu-img", "convert", "-l", f"snapshot.name=s{number}", "-O", "raw", qcow, out)
    return {"qcow": qcow, "raw": raw, "packed": packed, "s0": folder / "s0.raw", "s1": folder / "s1.raw"}


KINDS = [(kind, where) for kind in ("raw", "qcow", "packed") for where in ("file", "http", "s3")] + [("raw", "nbd")]


class Origin:
    """A source that is reachable as long as this is open."""

    def __init__(self, kind: str, where: str, files: dict[str, Path], folder: Path, s3: S3Access | None) -> None:
        self.web: Server | None = None
        self._stack = ExitStack()
        file = files[kind]
        stream: dict[str, Any]
        if where == "file":
            stream = {"type": "file", "file_path": str(file)}
        elif where == "http":
            self.web, url = self._stack.enter_context(serving(file.read_bytes()))
            stream = {"type": "http", "url": f"{url}/image"}
        elif where == "nbd":
            words = ("qemu-nbd", "-t", "-r", "-e", "8", "-f", "raw", "-k", "SOCKET", file)
            stream = {"type": "nbd", "uri": self._stack.enter_context(nbd_server(folder, *words))}
        else:
            assert s3 is not None
            keys = {"access_key": s3.access_key, "secret_key": s3.secret_key}
            bucket = Bucket(s3.endpoint, "imports", Credentials(s3.access_key, s3.secret_key))
            bucket.create()
            bucket.put(kind, file.read_bytes())
            self._stack.callback(bucket.close)
            stream = {"type": "s3", "url": f"{s3.endpoint}/imports/{kind}", **keys}
        self.spec = json.dumps({"type": "raw" if kind == "raw" else "qcow", "stream": stream})

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(params=KINDS, ids="/".join)
def origin(request: pytest.FixtureRequest, files: dict[str, Path], tmp_path: Path) -> Iterator[tuple[str, Origin]]:
    kind, where = request.param
    s3 = request.getfixturevalue("s3_server") if where == "s3" else None
    made = Origin(kind, where, files, tmp_path, s3)
    yield kind, made
    made.close()


def expected(kind: str, files: dict[str, Path]) -> dict[str, bytes]:
    snaps = ("s0", "s1") if kind == "qcow" else ()
    return {name: files[name].read_bytes() for name in snaps} | {"": files["raw"].read_bytes()}


def test_it_is_imported_while_it_is_used(
    origin: tuple[str, Origin], files: dict[str, Path], cluster: Cluster, io: ObjectContext
) -> None:
    kind, source = origin
    before = expected(kind, files)
    R.migration_prepare_import(source.spec, io, "a")
    assert content(io, "a") == before
    with rbd.Image(io, "a") as image:
        image.write(b"meanwhile", MIB - 4)
        image.discard(4 * MIB, 2 * MIB)
        image.create_snap("mine")
        image.write(b"later", 5 * MIB)
        head = bytearray(before[""])
        head[MIB - 4 : MIB + 5] = b"meanwhile"
        head[4 * MIB :] = bytes(2 * MIB)
        after = {**before, "mine": bytes(head)}
        head[5 * MIB : 5 * MIB + 5] = b"later"
        after[""] = bytes(head)
        R.migration_execute(io, "a")
        assert image.read(0, SIZE) == after[""]
    R.migration_commit(io, "a")
    source.close()
    assert content(io, "a") == after
    maps_are_right(io, "a")


@pytest.mark.parametrize("path", ["/dead", "/garbage", "/missing", "/short", "/changed"])
def test_a_source_that_fails_in_the_middle(
    path: str, files: dict[str, Path], cluster: Cluster, io: ObjectContext, tmp_path: Path
) -> None:
    """What came stays, what is missing is an error, and when the source is well again the import goes on."""
    source = Origin("qcow", "http", files, tmp_path, None)
    try:
        R.migration_prepare_import(source.spec, io, "a")
        with rbd.Image(io, "a") as image:
            image.write(b"here", 0)
        web = source.web
        assert web is not None
        web.detour = path
        with pytest.raises(rbd.Error):
            R.migration_execute(io, "a")
        with rbd.Image(io, "a") as image:
            assert image.read(0, 4) == b"here"
            with pytest.raises(rbd.Error):
                image.read(5 * MIB, 4096)
        web.detour = ""
        wanted = expected("qcow", files)
        wanted[""] = b"here" + wanted[""][4:]
        assert content(io, "a") == wanted
        R.migration_execute(io, "a")
        R.migration_commit(io, "a")
        assert content(io, "a") == wanted
    finally:
        source.close()

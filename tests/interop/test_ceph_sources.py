"""The same source spec given to librbd (import-only live migration) and to us: both see the same snapshots and bytes.

Left out is what librbd 16 does wrong: clusters of zeros that keep their place in the file (QEMU's `write -z`), where it
reads what was there before. An image with raw snapshots it can prepare and read, but not execute (ERANGE).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from librbd_py.devcluster import S3Access
from librbd_py.image.native_source import open_any
from librbd_py.net.s3 import Bucket, Credentials
from librbd_py.source import Source
from librbd_py.store import connect

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from web_server import serving

MIB = 1 << 20
Rbd = Callable[..., str]


@pytest.fixture
def rbd(ceph_conf: str) -> Rbd:
    def run(*words: str | Path) -> str:
        argv = ["timeout", "60", "rbd", "-c", ceph_conf, *map(str, words)]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

    return run


def content(source: Source, snapshot: int | None) -> bytes:
    size = source.size if snapshot is None else source.snapshots[snapshot].size
    return b"".join(source.read(at, min(MIB, size - at), snapshot) for at in range(0, size, MIB))


def agree(rbd: Rbd, ceph_conf: str, pool: str, spec: dict[str, Any], folder: Path, *, execute: bool = True) -> None:
    """librbd imports it and exports each snapshot; what it has is what our source reads."""
    image = f"{pool}/imported"
    rbd("migration", "prepare", "--import-only", "--source-spec", json.dumps(spec), image)
    if execute:
        rbd("migration", "execute", "--no-progress", image)
        rbd("migration", "commit", "--no-progress", image)
    snaps = json.loads(rbd("snap", "ls", "--format", "json", image))
    with connect(f"ceph:{ceph_conf}") as store:
        source = open_any(spec, store)
        try:
            ours = [(snap.name, snap.size) for snap in source.snapshots]
            theirs = [(snap["name"], snap["size"]) for snap in snaps]
            assert ours == theirs
            for point in (None, *range(len(ours))):
                out = folder / "exported"
                rbd("export", "--no-progress", image + ("" if point is None else f"@{snaps[point]['name']}"), out)
                assert out.read_bytes() == content(source, point), f"snapshot {point}"
                out.unlink()
        finally:
            source.close()


def raw(folder: Path, seed: int, size: int) -> Path:
    pick = random.Random(seed)
    data = bytearray(size)
    for _ in range(5):
        at = pick.randrange(size - 70_000)
        data[at : at + 70_000] = pick.randbytes(70_000)
    path = folder / f"{seed}.raw"
    path.write_bytes(data)
    return path


def file_spec(path: Path, **more: Any) -> dict[str, Any]:
    return {"type": "raw", "stream": {"type": "file", "file_path": str(path)}, **more}


def test_a_raw_file(rbd: Rbd, ceph_conf: str, ceph_pool: str, tmp_path: Path) -> None:
    agree(rbd, ceph_conf, ceph_pool, file_spec(raw(tmp_path, 1, 5 * MIB)), tmp_path)


def test_a_raw_file_with_snapshots(rbd: Rbd, ceph_conf: str, ceph_pool: str, tmp_path: Path) -> None:
    rows = [file_spec(raw(tmp_path, n, size), name=f"s{n}") for n, size in ((1, 9 * MIB), (2, 5 * MIB), (3, 6 * MIB))]
    spec = file_spec(raw(tmp_path, 4, 7 * MIB), snapshots=rows)
    agree(rbd, ceph_conf, ceph_pool, spec, tmp_path, execute=False)


def qcow(folder: Path) -> Path:
    path = folder / "image.qcow2"

    def run(*words: str | Path) -> None:
        subprocess.run([str(word) for word in words], check=True, capture_output=True, timeout=60)

    run("qemu-img", "create", "-f", "qcow2", path, "6M")
    for number in range(3):
        write = ["-c", f"write -P {number + 1} {number}M 1M", "-c", f"write -P {number + 10} 5M 64k"]
        run("qemu-io", "-f", "qcow2", *write, "-c", f"discard {number}M 128k", path)
        if number < 2:
            run("qemu-img", "snapshot", "-c", f"s{number}", path)
    return path


def test_a_qcow_file(rbd: Rbd, ceph_conf: str, ceph_pool: str, tmp_path: Path) -> None:
    spec = {"type": "qcow", "stream": {"type": "file", "file_path": str(qcow(tmp_path))}}
    agree(rbd, ceph_conf, ceph_pool, spec, tmp_path)


def test_over_http(rbd: Rbd, ceph_conf: str, ceph_pool: str, tmp_path: Path) -> None:
    with serving(raw(tmp_path, 5, 3 * MIB).read_bytes()) as (_, url):
        spec = {"type": "raw", "stream": {"type": "http", "url": f"{url}/image.raw"}}
        agree(rbd, ceph_conf, ceph_pool, spec, tmp_path)


def test_from_s3(rbd: Rbd, ceph_conf: str, ceph_pool: str, tmp_path: Path, s3_server: S3Access) -> None:
    bucket = Bucket(s3_server.endpoint, "interop", Credentials(s3_server.access_key, s3_server.secret_key))
    bucket.create()
    bucket.put("image.qcow2", qcow(tmp_path).read_bytes())
    stream = {"type": "s3", "url": f"{s3_server.endpoint}/interop/image.qcow2"}
    keys = {"access_key": s3_server.access_key, "secret_key": s3_server.secret_key}
    agree(rbd, ceph_conf, ceph_pool, {"type": "qcow", "stream": stream | keys}, tmp_path)
    bucket.delete("image.qcow2")
    bucket.close()


def test_another_image_of_the_cluster(rbd: Rbd, ceph_conf: str, ceph_pool: str, tmp_path: Path) -> None:
    image = f"{ceph_pool}/origin"
    rbd("import", "--no-progress", raw(tmp_path, 6, 5 * MIB), image)
    rbd("snap", "create", f"{image}@one")
    spec = {"type": "native", "pool_name": ceph_pool, "image_name": "origin", "snap_name": "one"}
    agree(rbd, ceph_conf, ceph_pool, spec, tmp_path)

"""A backup and a restore while the S3 server is killed and comes back: they wait for it, and what is there is right."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from librbd_py import rbd
from librbd_py.backup.create import create
from librbd_py.backup.restore import restore
from librbd_py.backup.target import ATTEMPTS, S3Target
from librbd_py.backup.vault import Vault
from librbd_py.devcluster import DevCluster
from librbd_py.net.s3 import Bucket, Credentials
from librbd_py.store.embedded import EmbeddedStore

MIB = 1 << 20


class Shaken(S3Target):
    """Kills the server before the third request of a kind, and starts it again beside the request."""

    def __init__(self, bucket: Bucket, cluster: DevCluster) -> None:
        super().__init__(bucket, "")
        self._cluster = cluster
        self.left = {"put": 3, "get": 3}
        self.starting: list[threading.Thread] = []

    def shake(self, kind: str) -> None:
        self.left[kind] -= 1
        if not self.left[kind]:
            self._cluster.daemon("rgw.a").kill()
            self.starting.append(threading.Thread(target=self._cluster.start_s3))
            self.starting[-1].start()

    def put(self, key: str, data: bytes, digest: str) -> None:
        self.shake("put")
        super().put(key, data, digest)

    def get(self, key: str, most: int) -> bytes:
        self.shake("get")
        return super().get(key, most)


def test_a_server_that_dies_and_comes_back(new_ceph_cluster: Callable[..., DevCluster], tmp_path: Path) -> None:
    cluster = new_ceph_cluster(auth="cephx")
    access = cluster.start_s3()
    bucket = Bucket(
        access.endpoint, "shaken", Credentials(access.access_key, access.secret_key), attempts=ATTEMPTS
    )  # fmt: skip
    bucket.create()
    target = Shaken(bucket, cluster)
    vault = Vault(target)
    try:
        with EmbeddedStore(f"{tmp_path}/s", create=True) as store:
            io = store.open("rbd")
            rbd.RBD().create(io, "p", 4 * MIB)
            with rbd.Image(io, "p") as image:
                image.write(bytes(range(256)) * (12 << 10), 5)
                image.create_snap("one")
                content = image.read(0, 4 * MIB)
            made = create(vault, io, "p", "one", "p", part_size=MIB // 2, parallel=1)
            assert made.parts == 7 and vault.check(read=True).problems == []
            target.left["get"] = 3
            restore(vault, "p", io, "q", parallel=1)
            with rbd.Image(io, "q", "one") as image:
                assert image.read(0, 4 * MIB) == content
        assert target.left["put"] < 0 and target.left["get"] < 0 and len(target.starting) >= 2
    finally:
        for thread in target.starting:
            thread.join(60)
        bucket.close()

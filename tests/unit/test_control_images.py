"""Many images that want their exclusive locks at once through the C engine."""

from __future__ import annotations

import threading
from pathlib import Path

from librbd_py import rados, rbd
from librbd_py.control.pool import control_pool
from librbd_py.image.datapath import READ, WRITE, NativeImage

IMAGES = 40  # more than the control plane has threads
PATIENCE = 60.0
BLOCK = 4096


def test_writes_parked_on_many_images_all_get_their_lock(tmp_path: Path) -> None:
    url = f"embedded:{tmp_path / 'store'}"
    with rados.Rados(conf={"rbdpy_store": url}) as one, rados.Rados(conf={"rbdpy_store": url}) as two:
        with one.open_ioctx("rbd") as ours, two.open_ioctx("rbd") as theirs:
            names = [f"disk{number}" for number in range(IMAGES)]
            for name in names:
                rbd.RBD().create(ours, name, 1 << 20)
            owners = [rbd.Image(ours, name) for name in names]
            waiters = [rbd.Image(theirs, name) for name in names]
            for image in owners:
                image.write(b"a" * BLOCK, 0)
            results: list[int] = []
            done = threading.Semaphore(0)

            def completed(result: int, mismatch: int) -> None:
                results.append(result)
                done.release()

            for image in waiters:
                data = image.handle.data
                assert isinstance(data, NativeImage)
                data.aio(WRITE, 0, BLOCK, b"b" * BLOCK, completed)
            for _ in waiters:
                assert done.acquire(timeout=PATIENCE)
            assert results == [0] * IMAGES
            assert [image.is_exclusive_lock_owner() for image in owners] == [False] * IMAGES
            assert control_pool().threads < IMAGES

            buffers = [bytearray(BLOCK) for _ in owners]
            for image, buffer in zip(owners, buffers, strict=True):
                data = image.handle.data
                assert isinstance(data, NativeImage)
                data.aio(READ, 0, BLOCK, buffer, completed)
            for _ in owners:
                assert done.acquire(timeout=PATIENCE)
            assert buffers == [bytearray(b"b" * BLOCK)] * IMAGES
            for image in (*owners, *waiters):
                image.close()

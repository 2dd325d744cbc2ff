"""Fixtures of the wire tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_fake import FakeServer
from vhost_server import Server, fake_server


@pytest.fixture
def nbd(tmp_path: Path) -> Iterator[FakeServer]:
    """The NBD server over 16 MiB of memory, exported under the default name."""
    server = FakeServer(tmp_path)
    try:
        assert server.export(1, description="an image in memory") == 0
        yield server
        server.end()
    finally:
        server.kill()


@pytest.fixture
def vhost(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A vhost-user-blk export over memory, 4 queues; parametrised indirectly with its modes."""
    server = fake_server(tmp_path, *getattr(request, "param", ()))
    yield server
    server.close()

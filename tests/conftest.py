"""What all tests share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def ceph_conf() -> str:
    """The ceph.conf of a cluster to be used freely."""
    return os.environ["RBDPY_TEST_CEPH_CONF"]

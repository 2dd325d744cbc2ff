"""What all tests share: Ceph clusters, started for the first test that asks, gone when the run ends in whatever way."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from librbd_py.devcluster import DevCluster, Options, S3Access, scratch
from librbd_py.devcluster.admin import Admin
from librbd_py.store import layout as native_layout
from librbd_py.store.embedded import store as embedded_store

_numbers = itertools.count(1)


class Existing(DevCluster):
    """Somebody else's cluster, by its ceph.conf: used, never started or stopped."""

    def __init__(self, conf: str) -> None:
        super().__init__(Path(conf).parent)
        self._conf = os.path.abspath(conf)

    @property
    def conf(self) -> str:
        return self._conf


@pytest.fixture(scope="module", autouse=True)
def nothing_left_open() -> Iterator[None]:
    """A module whose tests leave an embedded store or a layout open fails by itself, instead of a later one that counts
    them. The stores are closed."""
    before, layouts = set(embedded_store._stores), set(native_layout._open)
    yield
    left = set(embedded_store._stores) - before
    for store in left:
        store.close()
    open_still = set(native_layout._open) - layouts
    assert not left and not open_still, f"left open: {[store.path for store in left]}, layouts {sorted(open_still)}"


@pytest.fixture(scope="session")
def ceph_cluster() -> Iterator[DevCluster]:
    """The cluster of this run, with authentication; the one of $RBDPY_TEST_CEPH_CONF when that is set. Every test may
    use it and none may break it; a test that cares what else is in a pool takes `ceph_pool` or makes its own."""
    conf = os.environ.get("RBDPY_TEST_CEPH_CONF")
    if conf:
        yield Existing(conf)
        return
    with scratch(Options(auth="cephx")) as cluster:
        yield cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that failed says which daemon of the shared cluster has ended, and its last words."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("ceph_cluster")
    running = report.when != "teardown"  # the last test's ends with the cluster gone
    if report.failed and running and isinstance(cluster, DevCluster) and not isinstance(cluster, Existing):
        report.sections += [("ended daemons of the cluster", text) for text in ended(cluster)]
    return report


def ended(cluster: DevCluster) -> list[str]:
    """The daemons of the cluster that are not running, each with what it printed last."""
    states = cluster.status().daemons
    return [f"{name} is {state}: {cluster.daemon(name).tail()}" for name, state in states.items() if state != "running"]


@pytest.fixture(scope="session")
def ceph_conf(ceph_cluster: DevCluster) -> str:
    """The path of its ceph.conf."""
    return ceph_cluster.conf


@pytest.fixture(scope="session")
def s3_server(ceph_cluster: DevCluster) -> Iterator[S3Access]:
    """A real S3 server: radosgw on the cluster of this run, or on one of its own beside somebody else's. Each module
    has a bucket of its own."""
    if isinstance(ceph_cluster, Existing):
        with scratch(Options(auth="cephx")) as cluster:
            yield cluster.start_s3()
    else:
        yield ceph_cluster.start_s3()


@pytest.fixture
def ceph_pool(ceph_cluster: DevCluster) -> Iterator[str]:
    """An empty pool of `ceph_cluster`."""
    if not isinstance(ceph_cluster, Existing):
        gone = ended(ceph_cluster)
        assert not gone, "\n".join(gone)  # better than waiting for it
    name = f"test-{next(_numbers)}"
    with Admin(ceph_cluster.conf) as admin:
        admin.mon("osd pool create", pool=name)
        admin.mon("osd pool application enable", pool=name, app="rbd")
    yield name
    with Admin(ceph_cluster.conf) as admin:
        admin.mon("osd pool delete", pool=name, pool2=name, yes_i_really_really_mean_it=True)


@pytest.fixture
def new_ceph_cluster() -> Iterator[Callable[..., DevCluster]]:
    """`new_ceph_cluster(osds=3, ...)` starts one that the test may break: half a second."""
    with ExitStack() as stack:

        def make(**options: Any) -> DevCluster:
            return stack.enter_context(scratch(Options(**options)))

        yield make

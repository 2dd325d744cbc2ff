"""A Ceph cluster in trouble under a guest's load: requests wait and go on, no error, nothing lost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster_load import PATIENCE, Load, served

from librbd_py.devcluster import DevCluster

NewCluster = Callable[..., DevCluster]
CUT = 120.0 if os.environ.get("RBDPY_SOAK") else 7.0  # seconds without a network


def go_on(load: Load) -> None:
    """Requests are answered again, all of them well."""
    load.wait_for_replies(500)
    load.stop()
    assert load.errors == []


def test_an_osd_is_killed_and_comes_back(new_ceph_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_ceph_cluster(osds=3)
    with served(cluster, tmp_path) as stack:
        load = Load(stack.client("image", PATIENCE))
        for name in ("osd.0", "osd.2"):
            load.wait_for_replies(200)
            cluster.faults.kill(name)
            load.wait_for_replies(200)
            cluster.faults.revive(name)
            cluster.faults.wait_clean()
        go_on(load)
        assert load.longest < 10
        load.verify(stack.client("image", PATIENCE))
        load.verify_through_library(cluster)


def test_the_monitor_is_restarted(new_ceph_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_ceph_cluster(osds=3, auth="cephx")
    with served(cluster, tmp_path) as stack:
        load = Load(stack.client("image", PATIENCE))
        load.wait_for_replies(200)
        cluster.faults.kill("mon.a")
        load.wait_for_replies(500)  # nobody needs it
        cluster.faults.revive("mon.a")
        cluster.faults.restart("osd.0")  # the new monitor is listened to
        go_on(load)
        assert load.longest < 10
        load.verify(stack.client("image", PATIENCE))


def test_an_osd_of_three_hangs(new_ceph_cluster: NewCluster, tmp_path: Path) -> None:
    """Others find out after 4 seconds and go on without it."""
    cluster = new_ceph_cluster(osds=3)
    with served(cluster, tmp_path) as stack:
        load = Load(stack.client("image", PATIENCE))
        load.wait_for_replies(200)
        cluster.faults.freeze("osd.1")
        cluster.faults.wait_down(1)
        load.wait_for_replies(500)
        cluster.faults.thaw("osd.1")
        cluster.faults.wait_up(1)
        go_on(load)
        assert load.longest < 15
        load.verify(stack.client("image", PATIENCE))


@pytest.mark.parametrize("names", [["osd.0"], ["osd.0", "mon.a"]], ids=["the OSD", "all"])
def test_the_network_is_cut(new_ceph_cluster: NewCluster, tmp_path: Path, names: list[str]) -> None:
    """For longer than a watch lives: the lock is still ours afterwards."""
    cluster = new_ceph_cluster()
    with served(cluster, tmp_path) as stack:
        load = Load(stack.client("image", 2 * CUT + PATIENCE))
        load.wait_for_replies(200)
        for name in names:
            cluster.faults.freeze(name)
        begun = time.monotonic()
        time.sleep(CUT)  # the trouble itself
        assert load.longest < CUT and load.errors == []
        for name in names:
            cluster.faults.thaw(name)
        load.wait_for_replies(500)
        assert load.longest >= CUT - 1
        assert time.monotonic() - begun < CUT + 20
        go_on(load)
        load.verify(stack.client("image", PATIENCE))
        load.verify_through_library(cluster)


def test_connections_break_again_and_again(new_ceph_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_ceph_cluster(auth="cephx")  # one OSD: those that lose each other's connections wait ever longer
    with served(cluster, tmp_path) as stack:
        load = Load(stack.client("image", PATIENCE))
        load.wait_for_replies(200)
        cluster.faults.inject_socket_failures(100)
        load.wait_for_replies(800)
        cluster.faults.inject_socket_failures(0)
        go_on(load)
        load.verify(stack.client("image", PATIENCE))
        load.verify_through_library(cluster)

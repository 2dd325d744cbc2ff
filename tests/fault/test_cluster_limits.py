"""A Ceph cluster that takes no more data, or that shuts this client out: requests fail at once by name, none hangs."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path

import nbd_client
import pytest
from cluster_load import PATIENCE, SECTOR, SIZE, Load, create, opened, served, stamp
from nbd_client import FLUSH, TRIM, WRITE, Client
from stack import Stack

from librbd_py import rados, rbd
from librbd_py.devcluster import DevCluster

NewCluster = Callable[..., DevCluster]
SOON = 5.0  # seconds until a client that was shut out knows
MIB = 1 << 20


def client_address(cluster: DevCluster) -> str:
    """Of the daemon: who watches the image."""
    with opened(cluster, read_only=True) as image:
        watchers = [row["addr"] for row in image.watchers_list()]
        locker = image.list_lockers()["lockers"][0][2]
    assert locker in watchers
    return str(locker)


# --- full


@pytest.mark.parametrize("osds", [1, 3])
def test_a_full_cluster_is_enospc_to_a_guest(new_ceph_cluster: NewCluster, tmp_path: Path, osds: int) -> None:
    cluster = new_ceph_cluster(osds=osds)
    with served(cluster, tmp_path) as stack:
        client = stack.client("image", SOON)
        client.write(0, stamp(0, 1))
        cluster.faults.fill()
        assert client.call(WRITE, 8 * MIB, SECTOR, data=stamp(1, 1)).error == nbd_client.ENOSPC
        assert client.call(WRITE, 12 * MIB, SECTOR, data=stamp(1, 1), flags=nbd_client.FUA).error == nbd_client.ENOSPC
        assert client.read(0, SECTOR) == stamp(0, 1)
        assert client.read(8 * MIB, SECTOR) == bytes(SECTOR)
        client.write(0, stamp(0, 2))  # takes no more room
        assert not client.call(FLUSH).error
        assert not client.call(TRIM, 0, 4 * MIB).error  # gives some back
        cluster.faults.fill(False)
        client.write(8 * MIB, stamp(2, 2))
        assert client.read(8 * MIB, SECTOR) == stamp(2, 2)
        assert client.read(0, SECTOR) == bytes(SECTOR)


def test_a_full_cluster_under_load(new_ceph_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_ceph_cluster()
    with served(cluster, tmp_path) as stack:
        load = Load(stack.client("image", PATIENCE))
        cluster.faults.fill()
        load.wait_for_replies(300)
        cluster.faults.fill(False)
        load.wait_for_replies(300)
        load.stop()
        assert {code for _, code in load.errors} <= {nbd_client.ENOSPC}
        assert load.longest < SOON
        load.verify(stack.client("image", PATIENCE))
        load.verify_through_library(cluster)


def test_a_full_quota(new_ceph_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_ceph_cluster(mgr=True, auth="cephx")
    with served(cluster, tmp_path) as stack:
        client = stack.client("image", SOON)
        client.write(0, bytes(range(256)) * (MIB // 256))
        cluster.faults.quota("rbd", MIB // 2)
        cluster.faults.wait_full("rbd")
        assert client.call(WRITE, 8 * MIB, SECTOR, data=stamp(1, 1)).error == nbd_client.ENOSPC  # NBD has no other
        assert client.read(256, 256) == bytes(range(256))
        client.write(0, stamp(0, 2))
        with opened(cluster) as image, pytest.raises(rbd.DiskQuotaExceeded) as caught:
            image.write(stamp(1, 1), 8 * MIB)
        assert caught.value.errno == errno.EDQUOT
        cluster.faults.quota("rbd", 0)
        cluster.faults.wait_full("rbd", False)
        client.write(8 * MIB, stamp(2, 2))
        assert client.read(8 * MIB, SECTOR) == stamp(2, 2)


def test_what_a_full_cluster_lets_one_do(new_ceph_cluster: NewCluster, tmp_path: Path) -> None:
    """Operations that need room are refused; those that give room back are not."""
    cluster = new_ceph_cluster()
    create(cluster)
    with rados.Rados(conf={"rbdpy_store": cluster.url}) as client, client.open_ioctx("rbd") as ioctx:
        with rbd.Image(ioctx, "image") as image:
            image.write(b"x" * MIB, 0)
            image.create_snap("s")
        rbd.RBD().create(ioctx, "removed", SIZE)
        rbd.RBD().remove(ioctx, "removed")  # the pool has an object for what is removed
        cluster.faults.fill()
        begun = time.monotonic()
        with pytest.raises((rbd.NoSpace, rbd.OSError)) as caught:
            rbd.RBD().create(ioctx, "another", SIZE)
        assert caught.value.errno == errno.ENOSPC
        with rbd.Image(ioctx, "image") as image:
            assert image.read(0, 4) == b"xxxx"
            with pytest.raises(rbd.OSError) as refused:
                image.write(b"y" * MIB, 8 * MIB)
            assert refused.value.errno == errno.ENOSPC
            image.remove_snap("s")
        rbd.RBD().remove(ioctx, "image")
        assert rbd.RBD().list(ioctx) == []
        assert time.monotonic() - begun < 20


# --- shut out


def all_refused(stack: Stack, load: Load | None, begun: float) -> None:
    """What was in flight, what comes now, and what comes from a new connection."""
    if load is not None:
        assert load.wait_for_error(SOON) == nbd_client.ESHUTDOWN
        assert time.monotonic() - begun < SOON
        load.stop()
        assert {code for _, code in load.errors} == {nbd_client.ESHUTDOWN}
    client = stack.client("image", SOON)
    while not client.call(nbd_client.WRITE, 0, SECTOR, data=stamp(0, 1)).error:  # OSDs learn it a moment later
        assert time.monotonic() - begun < SOON
    for kind, data in ((nbd_client.WRITE, stamp(0, 1)), (nbd_client.READ, b""), (nbd_client.FLUSH, b"")):
        length = SECTOR if kind != nbd_client.FLUSH else 0
        assert client.call(kind, 0, length, data=data).error == nbd_client.ESHUTDOWN, kind


def held(stack: Stack) -> Client:
    """A client after whose write the daemon holds the image's lock."""
    client = stack.client("image", PATIENCE)
    client.write(0, stamp(0, 0))
    return client


def test_blocklisted_under_load(new_ceph_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_ceph_cluster(auth="cephx")
    with served(cluster, tmp_path) as stack:
        held(stack)
        load = Load(stack.client("image", PATIENCE))
        load.wait_for_replies(200)
        address = client_address(cluster)
        begun = time.monotonic()
        cluster.faults.blocklist(address)
        all_refused(stack, load, begun)


def test_blocklisted_when_idle(new_ceph_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_ceph_cluster()
    with served(cluster, tmp_path) as stack:
        held(stack)
        begun = time.monotonic()
        cluster.faults.blocklist(client_address(cluster))
        all_refused(stack, None, begun)


def test_blocklisted_while_an_osd_hangs(new_ceph_cluster: NewCluster, tmp_path: Path) -> None:
    """Requests wait for an OSD that does not answer; the monitors' word must be enough."""
    cluster = new_ceph_cluster()
    with served(cluster, tmp_path) as stack:
        held(stack)
        load = Load(stack.client("image", PATIENCE))
        load.wait_for_replies(200)
        address = client_address(cluster)
        cluster.faults.freeze("osd.0")
        time.sleep(0.5)  # every request now waits
        begun = time.monotonic()
        cluster.faults.blocklist(address)
        all_refused(stack, load, begun)
        begun = time.monotonic()
        assert stack.stop() == 0
        assert time.monotonic() - begun < SOON


def test_blocklisted_while_the_lock_is_taken(new_ceph_cluster: NewCluster, tmp_path: Path) -> None:
    """The first write waits for the image's lock, and the lock for an OSD that does not answer."""
    cluster = new_ceph_cluster()
    with served(cluster, tmp_path) as stack:
        client = stack.client("image", PATIENCE)
        assert client.read(0, SECTOR) == bytes(SECTOR)
        with opened(cluster, read_only=True) as image:
            (address,) = {row["addr"] for row in image.watchers_list()}
        cluster.faults.freeze("osd.0")
        client.start(WRITE, 0, SECTOR, data=stamp(0, 1))
        time.sleep(0.5)  # it waits now
        begun = time.monotonic()
        cluster.faults.blocklist(address)
        assert client.reply().error == nbd_client.ESHUTDOWN
        assert time.monotonic() - begun < SOON
        all_refused(stack, None, time.monotonic())
        assert stack.stop() == 0
        assert time.monotonic() - begun < 2 * SOON


def test_blocklisted_while_the_cluster_is_full(new_ceph_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_ceph_cluster()
    with served(cluster, tmp_path) as stack:
        held(stack)
        address = client_address(cluster)
        cluster.faults.fill()
        begun = time.monotonic()
        cluster.faults.blocklist(address)
        all_refused(stack, None, begun)


def test_a_daemon_that_was_shut_out_can_be_stopped_and_another_takes_over(
    new_ceph_cluster: NewCluster, tmp_path: Path
) -> None:
    cluster = new_ceph_cluster()
    with served(cluster, tmp_path) as stack:
        held(stack).write(0, stamp(0, 7))
        cluster.faults.blocklist(client_address(cluster))
        all_refused(stack, None, time.monotonic())
        begun = time.monotonic()
        with opened(cluster) as image:
            assert image.read(0, SECTOR) == stamp(0, 7)
            image.write(stamp(0, 8), 0)
        assert stack.stop() == 0
        assert time.monotonic() - begun < 20
    with opened(cluster, read_only=True) as image:
        assert image.read(0, SECTOR) == stamp(0, 8)

"""What only the store on Ceph has: connections that are shared, and what happens to them."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from librbd_py import rados as face
from librbd_py import rbd
from librbd_py.image import cls
from librbd_py.store import connect, rados
from librbd_py.store.api import Append, AssertExists, ObjectContext, Read, WriteFull
from librbd_py.store.rados import ClusterOptions, RadosStore

_numbers = itertools.count(1)
FOREVER = 30  # seconds: what a hang is


@pytest.fixture
def url(ceph_conf: str) -> str:
    return rados.make_url(ceph_conf)


@pytest.fixture
def pool(ceph_conf: str) -> Iterator[str]:
    name = f"connection-{os.getpid()}-{next(_numbers)}"
    with rados.connect(ClusterOptions(ceph_conf), share=False) as store:
        store.pool_create(name)
        yield name
        store.pool_remove(name)


@pytest.fixture
def alone(ceph_conf: str) -> Iterator[Callable[[], RadosStore]]:
    """Stores on connections of their own."""
    made: list[RadosStore] = []

    def make() -> RadosStore:
        made.append(rados.connect(ClusterOptions(ceph_conf), share=False))
        return made[-1]

    yield make
    for store in made:
        store.close()


class Heard:
    """What a watch was told."""

    def __init__(self, io: ObjectContext, oid: str, answer: bytes | None = b"ok") -> None:
        self.payloads: list[bytes] = []
        self.errors: list[OSError] = []
        self.told = threading.Event()
        self.lost = threading.Event()
        self._answer = answer
        self.watch = io.watch(oid, self._notified, self._failed)

    def _notified(self, notify_id: int, gid: int, cookie: int, payload: bytes) -> bytes | None:
        self.payloads.append(payload)
        self.told.set()
        return self._answer

    def _failed(self, cookie: int, failure: OSError) -> None:
        self.errors.append(failure)
        self.lost.set()


def in_thread(job: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(job())
        except OSError as failure:
            results.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_one_cluster_and_user_is_one_client(url: str, ceph_conf: str) -> None:
    with connect(url) as one, connect(f"{url}?user=admin") as two, connect(ceph_conf) as three:
        assert one.client == two.client == three.client
        for apart in ("log_max_recent=100", "rbdpy_connection=2"):
            with connect(f"{url}?{apart}") as other:
                assert other.client.gid != one.client.gid
        with face.Rados(conffile=ceph_conf) as cluster:
            assert cluster.get_instance_id() != one.client.gid  # a program may fence one of its two with the other
            with face.Rados(conffile=ceph_conf) as second:
                assert second.get_addrs() != cluster.get_addrs()
        before = one.client
    with connect(url) as again:
        assert again.client.gid != before.gid  # the last user had closed it


def test_stores_on_one_connection_close_apart(url: str, pool: str) -> None:
    one, two = connect(url), connect(url)
    io = two.open(pool)
    io.write("o", [WriteFull(b"x")])
    first, second = Heard(one.open(pool), "o"), Heard(io, "o")
    one.close()
    one.close()
    with pytest.raises(OSError) as caught:
        one.pools()
    assert caught.value.errno == errno.ENOTCONN
    with pytest.raises(OSError) as caught:
        first.watch.check()
    assert caught.value.errno == errno.ENOTCONN
    assert io.notify("o", b"hello").acks == {(two.client.gid, second.watch.cookie): b"ok"}
    assert (first.payloads, second.payloads) == ([], [b"hello"])
    two.close()
    with pytest.raises(OSError) as caught:
        io.read("o", [Read()])
    assert caught.value.errno == errno.ENOTCONN


def test_closing_does_not_wait_for_a_call_of_another_thread(alone: Callable[[], RadosStore], pool: str) -> None:
    watcher, caller = alone(), alone()
    io = caller.open(pool)
    io.write("o", [WriteFull(b"x")])
    silent = Heard(watcher.open(pool), "o", answer=None)
    thread, results = in_thread(lambda: io.notify("o", b"", FOREVER * 1000))
    assert silent.told.wait(FOREVER)
    begun = time.monotonic()
    caller.close()
    assert time.monotonic() - begun < 5
    assert thread.is_alive()
    silent.watch.close()  # now nobody is waited for
    thread.join(FOREVER)
    assert not thread.is_alive() and len(results) == 1


def test_a_signal_ends_waiting(alone: Callable[[], RadosStore], pool: str) -> None:
    watcher, caller = alone(), alone()
    io = caller.open(pool)
    io.write("o", [WriteFull(b"x")])
    silent = Heard(watcher.open(pool), "o", answer=None)

    def interrupt() -> None:
        assert silent.told.wait(FOREVER)
        os.kill(os.getpid(), signal.SIGINT)

    thread, _ = in_thread(interrupt)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        io.notify("o", b"", FOREVER * 1000)
    assert time.monotonic() - begun < 5
    thread.join(FOREVER)
    assert io.read("o", [Read()]) == [b"x"]


def test_images_keep_the_connection_of_a_closed_store(alone: Callable[[], RadosStore], pool: str) -> None:
    store = alone()
    data = store.open(pool).native_data("rbd_data.x", 22)
    store.close()
    assert store.connection.handle is not None
    data.close()
    data.close()
    assert store.connection.handle is None


def test_a_refused_client_is_not_given_to_others(url: str, pool: str, alone: Callable[[], RadosStore]) -> None:
    with connect(url) as fenced:
        io = fenced.open(pool)
        io.write("o", [WriteFull(b"x")])
        heard = Heard(io, "o")
        other = alone()
        other.blocklist_add(fenced.client.address, 60)
        other.open(pool).read("o", [AssertExists()])  # which tells the OSD of the map that lists it
        with pytest.raises(OSError) as caught:
            io.write("o", [Append(b"y")])
        assert caught.value.errno == errno.ESHUTDOWN
        with connect(url) as fresh:
            assert fresh.client != fenced.client
            assert fresh.open(pool).read("o", [Read()]) == [b"x"]
            fresh.blocklist_remove(fenced.client.address)
        assert heard.lost.wait(FOREVER)
        assert heard.errors[0].errno in (errno.ESHUTDOWN, errno.ENOTCONN)


def test_what_the_ring_cannot_hold_loses_the_watch(alone: Callable[[], RadosStore], pool: str) -> None:
    store = alone()
    io = store.open(pool)
    io.write("o", [WriteFull(b"x")])
    heard = Heard(io, "o")
    thread, results = in_thread(lambda: io.notify("o", bytes(65537), 2000))
    assert heard.lost.wait(FOREVER)
    assert (heard.payloads, heard.errors[0].errno) == ([], errno.ENOTCONN)
    with pytest.raises(OSError) as caught:
        heard.watch.check()
    assert caught.value.errno == errno.ENOTCONN
    heard.watch.close()
    again = Heard(io, "o")
    thread.join(FOREVER)
    assert results[0].acks == {}
    assert io.notify("o", bytes(65536)).acks == {(store.client.gid, again.watch.cookie): b"ok"}


def test_a_callback_must_not_wait_for_a_notify(alone: Callable[[], RadosStore], pool: str) -> None:
    io = alone().open(pool)
    io.write("o", [WriteFull(b"x")])
    caught: list[int | None] = []

    def callback(notify_id: int, gid: int, cookie: int, payload: bytes) -> bytes:
        try:
            io.notify("o", b"again")
        except OSError as failure:
            caught.append(failure.errno)
        assert io.read("o", [AssertExists()]) == [None]  # other calls are fine
        watch.close()
        return b"done"

    watch = io.watch("o", callback)
    assert list(io.notify("o", b"first", 2000).acks.values()) in ([b"done"], [])
    assert caught == [errno.EDEADLK]


CHILD = """
import errno, os, sys
from librbd_py.store import connect
from librbd_py.store.api import Read, WriteFull
store = connect(sys.argv[1])
io = store.open(sys.argv[2])
io.write("o", [WriteFull(b"parent")])
watch = io.watch("o", lambda *a: b"")
child = os.fork()
if child == 0:
    try:
        io.read("o", [Read()])
    except OSError as failure:
        assert failure.errno == errno.EBADFD, failure
    watch.close()
    store.close()
    with connect(sys.argv[1]) as own:
        assert own.client != store.client
        own.open(sys.argv[2]).write("o", [WriteFull(b"child")])
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert io.read("o", [Read()]) == [b"child"]
assert watch.check() < 30
print("fine")
"""


def test_a_fork_leaves_the_parents_connection_alone(url: str, pool: str) -> None:
    # It ends without closing anything, too.
    done = subprocess.run(
        [sys.executable, "-c", CHILD, url, pool], capture_output=True, text=True, timeout=FOREVER, check=False
    )
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


def test_the_face_of_rados_on_a_cluster(ceph_conf: str, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CEPH_ARGS", "--log-max-recent=77 --objecter-inflight-ops=55")
    with face.Rados(conffile=ceph_conf, conf={"objecter_inflight_ops": "66"}) as cluster:
        assert cluster.conf_get("objecter_inflight_ops") == "66"
        assert cluster.conf_get("log_max_recent") == "77"
        assert cluster.conf_get("objecter_timeout") == "10.000000"
        assert cluster.conf_get("no such option") is None
        assert cluster.pool_exists(pool) and pool in cluster.list_pools()
        assert set(cluster.get_cluster_stats()) == {"kb", "kb_used", "kb_avail", "num_objects"}
        result, output, _ = cluster.mon_command(json.dumps({"prefix": "osd pool ls", "format": "json"}), b"")
        assert result == 0 and pool in json.JSONDecoder().raw_decode(output.decode().lstrip())[0]
        assert cluster.mon_command('{"prefix": "no such thing"}', b"")[0] == -errno.EINVAL
        assert cluster.osd_command(0, '{"prefix": "version"}', b"")[0] == 0
        assert cluster.osd_command(99, '{"prefix": "version"}', b"")[0] < 0
        assert cluster.wait_for_latest_osdmap() == 0
        with cluster.open_ioctx(pool) as ioctx:
            assert ioctx.application_list() == ["rbd"]
            ioctx.application_metadata_set("rbd", "owner", "us")
            assert ioctx.application_metadata_get("rbd", "owner") == "us"
            ioctx.application_metadata_remove("rbd", "owner")
            assert ioctx.application_metadata_list("rbd") == []
            assert "num_rd_kb" in ioctx.get_stats()
            ioctx.write_full("object", b"0123456789" * 50_000)
            assert len(ioctx.read("object", 1 << 20)) == 500_000
            completion = ioctx.aio_read("object", 4, 3, lambda done, data: None)
            completion.wait_for_complete()
            assert [found.key for found in ioctx.list_objects()] == ["object"]


def test_an_image_through_the_environment(ceph_conf: str, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a program written for Ceph's modules finds it."""
    monkeypatch.setenv("RBDPY_STORE", "ceph")
    monkeypatch.setenv("CEPH_CONF", ceph_conf)
    with face.Rados(conffile="") as cluster, cluster.open_ioctx(pool) as ioctx:
        rbd.RBD().create(ioctx, "a", 1 << 22)
        with rbd.Image(ioctx, "a") as image:
            image.write(b"hello", 4096)
            assert image.read(4094, 9) == b"\0\0hello\0\0"
            assert image.handle.objects.native is not None  # moved by C
        monkeypatch.delenv("RBDPY_STORE")
        with face.Rados(conffile=ceph_conf) as other, other.open_ioctx(pool) as again:
            assert rbd.RBD().list(again) == ["a"]


def test_what_a_cluster_says_of_new_images(ceph_conf: str, pool: str) -> None:
    """Options of the cluster, the program and the pool; the first image makes sure that the pool can hold images."""
    conf = {
        "rbd_default_features": "layering,exclusive-lock",
        "rbd_default_order": "20",
        "rbd_default_stripe_unit": "65536",
        "rbd_default_stripe_count": "3",
        "rbd_default_clone_format": "2",
    }
    data = f"{pool}-data"
    with face.Rados(conffile=ceph_conf, conf=conf) as cluster, cluster.open_ioctx(pool) as ioctx:
        cluster.create_pool(data)
        R = rbd.RBD()
        R.create(ioctx, "a", 1 << 22)
        with rbd.Image(ioctx, "a") as image:
            assert (image.features(), image.stat()["order"]) == (1 | 4 | 2, 20)
            assert (image.stripe_unit(), image.stripe_count()) == (65536, 3)
            image.create_snap("s")
        R.clone(ioctx, "a", "s", ioctx, "child")  # unprotected
        R.config_set(ioctx, "rbd_default_order", "23")
        R.config_set(ioctx, "rbd_default_data_pool", data)
        R.create(ioctx, "b", 1 << 22, features=1)
        R.clone(ioctx, "a", "s", ioctx, "child of b")
        with rbd.Image(ioctx, "b") as image, rbd.Image(ioctx, "child of b") as child:
            assert (image.stat()["order"], image.features()) == (23, 1 | 2 | 128)
            assert image.data_pool_id() == child.data_pool_id() == cluster.pool_lookup(data)
        for name in (pool, data):
            with cluster.open_ioctx(name) as where:
                assert where.read("rbd_info") == b"overwrite validated"
        with pytest.raises(rbd.InvalidArgument):
            R.config_set(ioctx, "rbd_default_order", "many")
        nonsense = cls.encode_metadata({"conf_rbd_default_order": b"many"})  # an older client's
        ioctx.execute("rbd_info", "rbd", "metadata_set", nonsense)
        with pytest.raises(rbd.InvalidArgument):
            R.create(ioctx, "c", 1 << 22)
        cluster.delete_pool(data)

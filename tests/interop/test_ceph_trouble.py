"""A cluster in trouble under an open image: I/O waits and goes on, or ends with the right errno; nothing hangs."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from librbd_py import rbd
from librbd_py.devcluster import DevCluster
from librbd_py.store import rados
from librbd_py.store.rados import ClusterOptions, RadosStore

MIB = 1 << 20
BLOCK = 4096
R = rbd.RBD()
PATIENCE = 60  # seconds: what a hang is


class Writer:
    """Writes blocks one after the other in a thread and keeps count."""

    def __init__(self, image: rbd.Image) -> None:
        self._image = image
        self._stop = threading.Event()
        self.written = 0
        self.failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set() and not self.failures:
            try:
                self._image.write(b"%08d" % self.written * (BLOCK // 8), self.written % 1000 * BLOCK)
                self.written += 1
            except rbd.Error as failure:
                self.failures.append(failure)

    def more(self, count: int = 20) -> None:
        """Waits for so many more."""
        goal, end = self.written + count, time.monotonic() + PATIENCE
        while self.written < goal:
            assert not self.failures and time.monotonic() < end, (self.failures, self.written, goal)
            time.sleep(0.005)

    def end(self) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive() and self.failures == []
        for number in range(max(0, self.written - 900), self.written):
            assert self._image.read(number % 1000 * BLOCK, 8) == b"%08d" % number


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    """Two copies: with one, an OSD that was frozen never gets its lease back."""
    from librbd_py.devcluster import Options, scratch

    with scratch(Options(osds=2)) as made:
        yield made


@pytest.fixture
def store(cluster: DevCluster) -> Iterator[RadosStore]:
    with rados.connect(ClusterOptions(cluster.conf), share=False) as made:
        yield made


@pytest.fixture
def image(store: RadosStore) -> Iterator[rbd.Image]:
    io = store.open("rbd")
    R.create(io, "a", 16 * MIB)
    image = rbd.Image(io, "a")
    image.write(b"own", 0)
    yield image
    image.close()
    with rados.connect(store.connection.options, share=False) as other:
        R.remove(other.open("rbd"), "a")


def test_an_osd_is_lost_and_comes_back(cluster: DevCluster, image: rbd.Image) -> None:
    writer = Writer(image)
    writer.more()
    cluster.faults.kill("osd.0")
    writer.more()
    cluster.faults.revive("osd.0")
    writer.more()
    writer.end()
    assert image.is_exclusive_lock_owner()


def test_the_monitor_comes_back(cluster: DevCluster, image: rbd.Image) -> None:
    writer = Writer(image)
    cluster.faults.restart("mon.a")
    writer.more()
    writer.end()
    image.create_snap("s")  # a snapshot's id comes from the monitor
    image.remove_snap("s")


def test_silence_for_longer_than_a_watch_lives(cluster: DevCluster, image: rbd.Image) -> None:
    writer = Writer(image)
    writer.more()
    for name in ("osd.0", "osd.1"):
        cluster.faults.freeze(name)
    time.sleep(8)  # the cluster gives a watch 6 s
    at = writer.written
    for name in ("osd.0", "osd.1"):
        cluster.faults.thaw(name)
    writer.more(at + 50 - writer.written)
    writer.end()
    end = time.monotonic() + PATIENCE
    while len(list(image.watchers_list())) != 1:
        assert time.monotonic() < end
        time.sleep(0.05)
    image.write(b"x", 0)
    assert image.is_exclusive_lock_owner()


def test_a_full_cluster_says_so(cluster: DevCluster, image: rbd.Image) -> None:
    image.write(b"before", 0)
    cluster.faults.fill()
    try:
        for attempt in (lambda: image.write(b"x" * BLOCK, 8 * MIB), lambda: image.write(b"x" * BLOCK, 0)):
            with pytest.raises(rbd.NoSpace):
                attempt()
        assert image.read(0, 6) == b"before"
    finally:
        cluster.faults.fill(False)
    _until(lambda: _accepts(image), "room again")
    assert image.read(8 * MIB, 4) == b"good"


def _accepts(image: rbd.Image) -> bool:
    try:
        image.write(b"good", 8 * MIB)
    except rbd.NoSpace:
        return False
    return True


def _until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_a_fenced_client_ends_in_every_state(cluster: DevCluster, store: RadosStore, image: rbd.Image) -> None:
    reader = rbd.Image(store.open("rbd"), "a", read_only=True)
    cluster.faults.blocklist(store.client.address, 60)
    begun = time.monotonic()
    for call in (
        lambda: image.read(0, 1),
        lambda: image.write(b"x", 0),
        lambda: image.flush(),
        lambda: image.discard(0, 4 * MIB),
        lambda: image.create_snap("s"),
        lambda: image.resize(MIB),
        lambda: reader.read(0, 1),
    ):
        with pytest.raises(rbd.ConnectionShutdown) as caught:
            call()
        assert caught.value.errno == errno.ESHUTDOWN
    _until(lambda: _fenced(image), "the image to learn of it")
    assert time.monotonic() - begun < 5
    reader.close()
    image.close()
    store.close()
    assert time.monotonic() - begun < 10


def _fenced(image: rbd.Image) -> bool:
    """Not by the cluster any more: the gate is closed."""
    try:
        image.write(b"x", 0)
    except rbd.ConnectionShutdown as failure:
        return "fenced" in str(failure)
    return False

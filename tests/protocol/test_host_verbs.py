"""The host service without guests: what the hook's verbs do to sockets and connections, in every order, and what those
who connect can do to it."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from nbd_client import Client, Closed
from qemu.qmp import ExecuteError

from librbd_py import rados, rbd
from librbd_py.devcluster import DevCluster
from librbd_py.devcluster.faults import Faults
from qemu_glue.client import Daemon
from qemu_glue.host.ask import ServiceError, ask

MIB = 1 << 20
UUID = str(uuid4())  # services look for it among all processes of the machine
OTHER = "99999999-2222-4333-8444-555555555555"
CLIENTS: list[Client] = []  # of this test: closed at its end, however it ends
PATIENCE = 20.0  # seconds for what happens at once on an idle machine


class Host:
    """A store with images, a service, its folder of sockets."""

    def __init__(self, folder: Path, run: str) -> None:
        self.url = f"embedded:{folder / 'store'}"
        self.run = Path(run)
        self.daemon = Daemon(folder, self.url, ("--host", "--run", run, "--user", "root", "--pools", "rbd"))
        self.create("disk", "other")

    def create(self, *names: str) -> None:
        with rados.Rados(conf={"rbdpy_store": self.url}) as cluster, cluster.open_ioctx("rbd") as ioctx:
            for name in names:
                rbd.RBD().create(ioctx, name, 4 * MIB)

    def remove(self, name: str) -> None:
        with rados.Rados(conf={"rbdpy_store": self.url}) as cluster, cluster.open_ioctx("rbd") as ioctx:
            rbd.RBD().remove(ioctx, name)

    async def prepare(self, *disks: dict[str, Any], uuid: str = UUID) -> dict[str, str]:
        answer = await self.daemon.execute("rbd-vm-prepare", {"uuid": uuid, "name": "v", "disks": list(disks)})
        sockets: dict[str, str] = answer["sockets"]
        return sockets

    async def tell(self, verb: str, uuid: str = UUID) -> None:
        await self.daemon.execute(f"rbd-vm-{verb}", {"uuid": uuid})

    async def vms(self) -> list[dict[str, Any]]:
        vms: list[dict[str, Any]] = await self.daemon.execute("rbd-vm-query")
        return vms

    async def connected(self) -> list[str]:
        """Images that somebody has open."""
        return [disk["image"] for vm in await self.vms() for disk in vm["disks"] if disk["clients"]]

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon.pid}/fd"))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="rh") as run:
        yield Host(tmp_path, run)
        while CLIENTS:
            CLIENTS.pop().close()


def nbd(target: str = "vda", image: str = "disk", **more: Any) -> dict[str, Any]:
    return {"target": target, "transport": "nbd", "pool": "rbd", "image": image, **more}


async def until(holds: Callable[[], Awaitable[Any] | Any], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        answer = holds()
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer:
            return
        assert time.monotonic() < end, what
        await asyncio.sleep(0.01)


async def connect(path: str) -> Client:
    def work() -> Client:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(PATIENCE)
            sock.connect(path)
            client = Client(sock).negotiate()
            CLIENTS.append(client)
            return client
        except BaseException:
            sock.close()
            raise

    return await asyncio.to_thread(work)


async def read(client: Client) -> bytes:
    return await asyncio.to_thread(client.read, 0, 512)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_a_vm_comes_and_goes(host: Host) -> None:
    async def work() -> None:
        async with host.daemon:
            sockets = await host.prepare(nbd(), nbd("vdb", "other"))
            assert sockets["vda"] == f"{host.run}/{UUID}/vda.sock"
            assert os.stat(sockets["vda"]).st_mode & 0o777 == 0o660
            assert os.stat(host.run / UUID).st_mode & 0o777 == 0o750
            client = await connect(sockets["vda"])
            await until(lambda: _is(host, ["rbd/disk"]), "the image to be opened")
            await host.tell("started")
            client.close()
            await until(lambda: _empty(host), "the image to be closed")
            await host.tell("stopped")
            await host.tell("release")
            await until(lambda: not (host.run / UUID).exists(), "the VM to be forgotten")
            assert await host.vms() == []

    run(work())


async def _empty(host: Host) -> bool:
    return not await host.connected()


def test_a_release_never_cuts_a_disk_that_is_used(host: Host) -> None:
    """It follows a refused `prepare` too, of a VM that may run here."""

    async def work() -> None:
        async with host.daemon:
            sockets = await host.prepare(nbd())
            client = await connect(sockets["vda"])
            with pytest.raises(ExecuteError, match="image rbd/none"):
                await host.prepare(nbd(), nbd("vdb", "none"))
            await host.tell("stopped")
            await host.tell("release")
            await read(client)
            await until(lambda: _is(host, ["rbd/disk"]), "the image to be opened")
            client.close()
            await until(lambda: not (host.run / UUID).exists(), "the VM to be forgotten")
            assert await host.vms() == []

    run(work())


def test_prepare_again_keeps_who_is_connected(host: Host) -> None:
    async def work() -> None:
        async with host.daemon:
            sockets = await host.prepare(nbd(), nbd("vdb", "other"))
            first, second = await connect(sockets["vda"]), await connect(sockets["vdb"])
            assert await host.prepare(nbd()) == {"vda": sockets["vda"]}
            await read(first)
            await read(second)  # its socket is gone, its connection is not
            assert not Path(sockets["vdb"]).exists()
            first.close()
            second.close()
            changed = await host.prepare(nbd(image="other"))
            again = await connect(changed["vda"])
            await until(lambda: _is(host, ["rbd/other"]), "the other image")
            again.close()

    run(work())


async def _is(host: Host, images: list[str]) -> bool:
    return await host.connected() == images


@pytest.mark.parametrize("verb", ["started", "stopped", "release", "reconnect"])
def test_verbs_for_a_vm_nobody_knows(host: Host, verb: str) -> None:
    async def work() -> None:
        async with host.daemon:
            await host.prepare(nbd(), uuid=OTHER)
            await host.tell(verb)
            assert [vm["uuid"] for vm in await host.vms()] == [OTHER]
            with pytest.raises(ExecuteError, match="uuid"):
                await host.tell(verb, "..")

    run(work())


def test_reconnect_makes_a_running_vm_known(host: Host) -> None:
    async def work() -> None:
        async with host.daemon:
            await host.daemon.execute("rbd-vm-reconnect", {"uuid": UUID, "name": "v", "disks": [nbd()], "sockets": []})
            (await connect(f"{host.run}/{UUID}/vda.sock")).close()

    run(work())


def test_a_killed_service_listens_on_the_same_sockets(host: Host) -> None:
    async def work() -> None:
        await host.daemon.start()
        try:
            sockets = await host.prepare(nbd())
            await host.prepare(nbd(image="other"), uuid=OTHER)
            await host.tell("release", OTHER)
            client = await connect(sockets["vda"])
            await asyncio.to_thread(client.write, 0, b"x" * 512)
            host.daemon.kill()
            await host.daemon.disconnect()
            with pytest.raises((Closed, ConnectionError)):
                await read(client)
            client.close()
            await host.daemon.start()
            assert [vm["uuid"] for vm in await host.vms()] == [UUID]
            again = await connect(sockets["vda"])
            assert await read(again) == b"x" * 512
            begin = time.monotonic()
            await asyncio.to_thread(again.write, 0, b"y" * 512)  # takes the lock of the daemon before
            assert time.monotonic() - begin < 5
            again.close()
        finally:
            await host.daemon.stop()
        assert not Path(sockets["vda"]).exists()

    run(work())


def test_an_image_that_went_after_prepare(host: Host) -> None:
    async def work() -> None:
        async with host.daemon:
            sockets = await host.prepare(nbd(image="other"))
            await asyncio.to_thread(host.remove, "other")
            with pytest.raises((Closed, ConnectionError)):
                await connect(sockets["vda"])
            event = await host.daemon.event("RBD_DISK_REFUSED", PATIENCE)
            assert event["image"] == "rbd/other"
            assert event["pid"] == os.getpid()
            assert await host.connected() == []

    run(work())


def test_images_have_sockets_by_themselves(host: Host) -> None:
    async def work() -> None:
        async with host.daemon:
            folder = host.run / "image/nbd/rbd"
            await until(lambda: (folder / "disk.sock").exists(), "the socket of an image")
            await asyncio.to_thread(host.create, "later", "..", "ä b\n", "x" * 200)
            await until(lambda: len(list(folder.iterdir())) == 6, "sockets of new images")
            for path in folder.iterdir():
                (await connect(str(path))).close()
            answer = await host.daemon.execute(
                "rbd-image-socket", {"pool": "rbd", "image": "x" * 200, "transport": "nbd"}
            )
            assert Path(answer["path"]) in list(folder.iterdir())
            await until(lambda: _empty(host), "all to be closed")
            await asyncio.to_thread(host.remove, "later")
            await until(lambda: not (folder / "later.sock").exists(), "the socket to go with its image")

    run(work())


def test_silent_front_ends_are_few_and_open_nothing(host: Host) -> None:
    async def work() -> None:
        async with host.daemon:
            sockets = await host.prepare({**nbd(), "transport": "vhost-user"}, nbd("vdb", "other"))
            await until(lambda: (host.run / "image/nbd/rbd/other.sock").exists(), "the images' sockets")
            client = await connect(sockets["vdb"])  # what stays open once an image was
            client.close()
            await until(lambda: _empty(host), "the image to be closed")
            before = host.descriptors
            flood = []
            for _ in range(200):
                sock = socket.socket(socket.AF_UNIX)
                sock.setblocking(False)
                try:
                    sock.connect(sockets["vda"])
                except BlockingIOError:  # the queue is full
                    sock.close()
                    await asyncio.sleep(0.01)
                else:
                    flood.append(sock)
            assert await host.connected() == []
            assert host.descriptors - before < 100
            client = await connect(sockets["vdb"])  # others are served meanwhile
            await read(client)
            client.close()
            for sock in flood:
                sock.close()
            await until(lambda: host.descriptors <= before + 2, "the descriptors to come back")

    run(work())


def test_clients_that_come_and_go_leave_nothing(host: Host) -> None:
    async def work() -> None:
        async with host.daemon:
            sockets = await host.prepare(nbd())
            (await connect(sockets["vda"])).close()
            await until(lambda: _empty(host), "the first to be closed")
            before = host.descriptors
            for number in range(30):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.settimeout(PATIENCE)
                    sock.connect(sockets["vda"])
                    if number % 3:
                        sock.sendall(b"\xff" * number)
                    if number % 2:
                        sock.recv(1)
            client = await connect(sockets["vda"])
            await read(client)
            for _ in range(30):  # one stays, others come and go
                (await connect(sockets["vda"])).close()
            await read(client)
            client.close()
            await until(lambda: host.descriptors <= before + 2, "the descriptors to come back")

    run(work())


def test_a_store_that_hangs_keeps_no_other_vm_waiting(host: Host, new_ceph_cluster: Callable[..., DevCluster]) -> None:
    cluster = new_ceph_cluster()
    with rados.Rados(conf={"rbdpy_store": cluster.url}) as client, client.open_ioctx("rbd") as ioctx:
        rbd.RBD().create(ioctx, "far", 4 * MIB)

    async def work() -> None:
        async with host.daemon:
            far = nbd(image="far", store=cluster.url)
            await host.prepare(far, uuid=OTHER)
            faults = Faults(cluster)
            faults.freeze("osd.0")
            try:
                begin = time.monotonic()
                arguments = {"uuid": OTHER, "disks": [far]}
                path = str(host.daemon.socket)
                hooks = [asyncio.to_thread(ask, path, "rbd-vm-prepare", arguments, PATIENCE) for _ in range(3)]
                refusals = asyncio.gather(*hooks, return_exceptions=True)
                await asyncio.sleep(0.1)
                sockets = await host.prepare(nbd())
                assert not refusals.done(), "it waited for the other"
                (await connect(sockets["vda"])).close()
                for refusal in await refusals:
                    assert isinstance(refusal, ServiceError)
                    assert "does not answer" in str(refusal)
                assert time.monotonic() - begin < PATIENCE
                assert OTHER in [vm["uuid"] for vm in await host.vms()], "it was known before"
            finally:
                faults.thaw("osd.0")
            await host.prepare(far, uuid=OTHER)

    run(work())

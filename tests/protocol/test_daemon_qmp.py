"""The daemon's QMP: qemu.qmp drives it, commands have qemu-storage-daemon's shapes, errors leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError

from librbd_py import rados, rbd
from qemu_glue.client import Daemon

MIB = 1 << 20


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    url = f"embedded:{tmp_path / 'store'}"
    with rados.Rados(conf={"rbdpy_store": url}) as cluster, cluster.open_ioctx("rbd") as ioctx:
        rbd.RBD().create(ioctx, "disk", 16 * MIB)
        with rbd.Image(ioctx, "disk") as image:
            image.write(b"x" * 4096, 0)
            image.create_snap("s")
    return Daemon(tmp_path, url)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


NODE = {"driver": "rbd", "node-name": "d0", "pool": "rbd", "image": "disk"}


def nbd(folder: Path) -> dict[str, Any]:
    return {"addr": {"type": "unix", "data": {"path": str(folder / "nbd.sock")}}}


def vhost(folder: Path, **more: Any) -> dict[str, Any]:
    address = {"type": "unix", "path": str(folder / "vu.sock")}
    return {"type": "vhost-user-blk", "id": "v", "node-name": "d0", "writable": True, "addr": address, **more}


def test_nodes_and_exports_come_and_go(daemon: Daemon, tmp_path: Path) -> None:
    async def work() -> None:
        async with daemon as d:
            await d.execute("blockdev-add", NODE)
            (node,) = await d.execute("query-named-block-nodes")
            assert node["node-name"] == "d0"
            assert node["drv"] == "rbd"
            assert node["image"]["virtual-size"] == 16 * MIB
            await d.execute("nbd-server-start", nbd(tmp_path))
            await d.execute(
                "block-export-add", {"type": "nbd", "id": "n", "node-name": "d0", "name": "disk", "writable": True}
            )
            await d.execute("block-export-add", vhost(tmp_path))
            exports = await d.execute("query-block-exports")
            assert [(e["id"], e["type"], e["shutting-down"]) for e in exports] == [
                ("n", "nbd", False),
                ("v", "vhost-user-blk", False),
            ]
            uri = f"nbd+unix:///disk?socket={tmp_path / 'nbd.sock'}"
            shown = await asyncio.to_thread(subprocess.run, ["nbdinfo", "--size", uri], capture_output=True, text=True)
            assert shown.stdout.strip() == str(16 * MIB), shown.stderr
            (stats,) = await d.execute("query-blockstats")
            assert stats["node-name"] == "d0"
            with pytest.raises(ExecuteError, match="busy"):
                await d.execute("blockdev-del", {"node-name": "d0"})
            await d.execute("block-export-del", {"id": "v"})
            await d.execute("block-export-del", {"id": "n"})
            await d.execute("nbd-server-stop")
            await d.execute("blockdev-del", {"node-name": "d0"})
            assert await d.execute("query-named-block-nodes") == []
            assert not (tmp_path / "vu.sock").exists()
            assert not (tmp_path / "nbd.sock").exists()

    run(work())


def test_event_tells_that_an_export_is_gone(daemon: Daemon, tmp_path: Path) -> None:
    async def work() -> None:
        async with daemon as d:
            await d.execute("blockdev-add", NODE)
            await d.execute("block-export-add", vhost(tmp_path))
            assert d._qmp is not None
            with d._qmp.listener("BLOCK_EXPORT_DELETED") as events:
                await d.execute("block-export-del", {"id": "v"})
                event = await asyncio.wait_for(events.get(), 5)
            assert event["data"] == {"id": "v"}

    run(work())


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("blockdev-add", {**NODE, "driver": "file"}, "Unknown driver 'file'"),
        ("blockdev-add", {**NODE, "bogus": 1}, "'bogus' is unexpected"),
        ("blockdev-add", {**NODE, "image": "nope"}, "error opening image rbd/nope"),
        ("blockdev-add", {**NODE, "pool": "nope"}, "no pool"),
        ("blockdev-add", {**NODE, "snapshot": "nope"}, "error opening"),
        ("blockdev-add", {**NODE, "node-name": "1bad"}, "Invalid node-name"),
        ("blockdev-del", {"node-name": "nope"}, "Cannot find"),
        ("block-export-add", {"type": "fuse", "id": "e", "node-name": "d0"}, "does not accept value 'fuse'"),
        ("block-export-add", {"type": "nbd", "id": "e", "node-name": "d0"}, "Cannot find|NBD server not running"),
        ("block-export-del", {"id": "nope"}, "is not found"),
        ("nbd-server-stop", {}, "NBD server not running"),
        ("nbd-server-start", {"addr": {"type": "vsock", "data": {}}}, "does not accept value 'vsock'"),
        ("block_resize", {"node-name": "d0", "size": -1}, "out of range"),
        ("nonsense", {}, "The command nonsense has not been found"),
    ],
)
def test_refused_commands_say_why_and_change_nothing(
    daemon: Daemon, command: str, arguments: dict[str, Any], says: str
) -> None:
    async def work() -> None:
        async with daemon as d:
            with pytest.raises(ExecuteError, match=says):
                await d.execute(command, arguments)
            assert await d.execute("query-named-block-nodes") == []
            assert await d.execute("query-block-exports") == []

    run(work())


def test_snapshot_node_is_read_only(daemon: Daemon, tmp_path: Path) -> None:
    async def work() -> None:
        async with daemon as d:
            await d.execute("blockdev-add", {**NODE, "snapshot": "s"})
            with pytest.raises(ExecuteError, match="read-only"):
                await d.execute("block-export-add", vhost(tmp_path))
            await d.execute("block-export-add", vhost(tmp_path, writable=False))
            with pytest.raises(ExecuteError, match="read-only"):
                await d.execute("block_resize", {"node-name": "d0", "size": MIB})

    run(work())


def test_daemon_killed_and_started_again_serves_the_same(daemon: Daemon, tmp_path: Path) -> None:
    async def work() -> None:
        await daemon.start()
        await daemon.execute("blockdev-add", NODE)
        await daemon.execute("nbd-server-start", nbd(tmp_path))
        await daemon.execute("block-export-add", {"type": "nbd", "id": "n", "node-name": "d0", "writable": True})
        await daemon.execute("block-export-add", vhost(tmp_path))
        daemon.kill()
        await daemon.disconnect()
        await daemon.start()
        assert [e["id"] for e in await daemon.execute("query-block-exports")] == ["n", "v"]
        assert await daemon.stop() == 0

    run(work())


def test_garbage_on_the_control_socket_is_answered_and_survived(daemon: Daemon) -> None:
    async def work() -> None:
        async with daemon as d:
            answers = await asyncio.to_thread(
                talk, str(d.socket), b'nonsense\n{"execute":"quit"}\n' + b"[" * 100_000 + b"\n"
            )
            assert "QMP" in json.loads(answers[0])
            assert json.loads(answers[1])["error"]["class"] == "GenericError"
            assert json.loads(answers[2])["error"]["class"] == "CommandNotFound"
            await d.execute("query-version")

    run(work())


def talk(path: str, data: bytes) -> list[str]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(path)
        sock.sendall(data)
        received = b""
        while received.count(b"\n") < 3:
            part = sock.recv(65536)
            if not part:
                break
            received += part
    return received.decode().splitlines()

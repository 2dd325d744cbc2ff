"""Steps are undone in reverse, whoever fails or cancels; and the daemon's throttle takes QEMU's arguments."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from librbd_py import rados, rbd
from qemu_glue.client import Daemon
from qemu_glue.qmp import CommandFailed, Connection, Late, MachineError, Steps


def test_steps_are_undone_in_reverse_and_what_cannot_be_is_named() -> None:
    happened: list[str] = []

    async def step(name: str, error: Exception | None = None) -> str:
        happened.append(name)
        if error:
            raise error
        return name

    async def run() -> None:
        async with Steps() as steps:
            assert await steps.run("a", step("a"), lambda: step("-a")) == "a"
        assert happened == ["a"]
        with pytest.raises(Late) as late:
            async with Steps() as steps:
                await steps.run("b", step("b"), lambda: step("-b"))
                await steps.run("c", step("c"), lambda: step("-c", OSError(5, "stuck")))
                await steps.run("d", step("d", Late("too late")), lambda: step("-d"))
        assert happened == ["a", "b", "c", "d", "-d", "-c", "-b"]
        assert len(late.value.left) == 1
        assert "stuck" in str(late.value)
        happened.clear()
        with pytest.raises(CommandFailed):
            async with Steps() as steps:
                await steps.run("e", step("e", CommandFailed("e", "GenericError", "no")), lambda: step("-e"))
        assert happened == ["e"]  # what was refused is not undone

    asyncio.run(run())


def test_a_cancelled_step_is_undone_although_the_undo_is_cancelled_too() -> None:
    happened: list[str] = []

    async def run() -> None:
        begun, undoing, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def do() -> None:
            begun.set()
            await asyncio.Event().wait()

        async def undo() -> None:
            undoing.set()
            await go_on.wait()
            happened.append("undone")

        async def work() -> None:
            async with Steps() as steps:
                await steps.run("x", do(), undo)

        task = asyncio.create_task(work())
        await begun.wait()
        task.cancel()
        await undoing.wait()
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert happened == ["undone"]


def test_block_set_io_throttle_limits_a_node_of_the_daemon(tmp_path: Path) -> None:
    url = f"embedded:{tmp_path / 'store'}"
    with rados.Rados(conf={"rbdpy_store": url}) as cluster, cluster.open_ioctx("rbd") as ioctx:
        rbd.RBD().create(ioctx, "disk", 1 << 24)

    async def run() -> None:
        async with Daemon(tmp_path, url) as daemon, await Connection.open(tmp_path / "rbdpyd.sock") as qmp:
            await daemon.execute("blockdev-add", {"driver": "rbd", "node-name": "d", "pool": "rbd", "image": "disk"})
            none = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
            name = (await qmp.execute("query-block"))[0]["qdev"]
            await qmp.execute("block_set_io_throttle", {**none, "id": name, "iops": 100, "bps": 1 << 20})
            shown = (await qmp.execute("query-block"))[0]["inserted"]
            assert (shown["iops"], shown["bps"]) == (100, 1 << 20)
            with pytest.raises(MachineError, match="only totals"):
                await qmp.execute("block_set_io_throttle", {**none, "id": name, "iops_wr": 1})
            await qmp.execute("block_set_io_throttle", {**none, "device": name})
            assert (await qmp.execute("query-block"))[0]["inserted"]["iops"] == 0

    asyncio.run(run())

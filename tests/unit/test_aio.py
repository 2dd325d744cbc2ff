"""The asyncio face, on the memory store and on the engine over the embedded store."""

from __future__ import annotations

import asyncio
import errno
import itertools
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from librbd_py import aio, rados, rbd
from librbd_py.aio import AsyncGroup, AsyncImage, AsyncIoctx, AsyncRados, AsyncRBD
from librbd_py.image.datapath import NativeImage

PATIENCE = 30.0
BLOCK = 4096
MIB = 1 << 20
_names = itertools.count()


@pytest.fixture(params=["memory", "embedded"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory:aio{next(_names)}" if request.param == "memory" else f"embedded:{tmp_path / 'store'}"


def run(url: str, story: Callable[[AsyncIoctx], Awaitable[None]]) -> None:
    """`story` with a context on a pool that is there; no task and no future may be left behind."""

    async def main() -> None:
        async with asyncio.timeout(PATIENCE * 2), AsyncRados(conf={"rbdpy_store": url}) as cluster:
            if not await cluster.pool_exists("rbd"):
                await cluster.create_pool("rbd")
            async with await cluster.open_ioctx("rbd") as ioctx:
                await story(ioctx)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


async def image_of(ioctx: AsyncIoctx, size: int = 8 * MIB) -> AsyncImage:
    name = f"disk{next(_names)}"
    await AsyncRBD().create(ioctx, name, size)
    return AsyncImage(ioctx, name)


# --- rados -----------------------------------------------------------------------------------------------------------


def test_objects(url: str) -> None:
    async def story(ioctx: AsyncIoctx) -> None:
        await asyncio.gather(*(ioctx.write_full(f"o{number}", bytes([number])) for number in range(50)))
        found = sorted([o.key async for o in ioctx.list_objects() if o.key.startswith("o")])
        assert found == sorted(f"o{number}" for number in range(50))
        assert await ioctx.read("o7") == b"\x07"
        await ioctx.set_xattr("o7", "k", b"v")
        assert await ioctx.get_xattrs("o7") == [("k", b"v")]
        with pytest.raises(rados.ObjectNotFound):
            await ioctx.stat("none")

    run(url, story)


def test_a_watch_is_an_iterator_of_notifies(url: str) -> None:
    async def story(ioctx: AsyncIoctx) -> None:
        await ioctx.write("o", b"")
        async with await ioctx.watch("o") as watch:
            assert watch.get_id() > 0
            first = asyncio.create_task(ioctx.notify("o", "one"))
            got = await anext(watch)
            assert got.data == b"one"
            assert not first.done()
            await got.ack(b"yes")
            await got.ack(b"twice")
            assert await first is True
            second = asyncio.create_task(ioctx.notify("o", "two"))
            assert (await anext(watch)).data == b"two"
        assert await second is True  # closing acks what was left
        with pytest.raises(StopAsyncIteration):
            await anext(watch)
        assert watch.get_id() == 0

    run(url, story)


def test_a_lost_watch_ends_the_iteration(url: str) -> None:
    async def story(ioctx: AsyncIoctx) -> None:
        await ioctx.write("o", b"")
        async with await ioctx.watch("o") as watch:
            await ioctx.remove_object("o")
            with pytest.raises(rados.NotConnected):
                await anext(watch)

    run(url, story)


# --- images ----------------------------------------------------------------------------------------------------------


def test_data_of_an_image(url: str) -> None:
    async def story(ioctx: AsyncIoctx) -> None:
        async with await image_of(ioctx) as image:
            blocks = [bytes([1 + number % 255]) * BLOCK for number in range(200)]
            written = await asyncio.gather(*(image.write(b, at * BLOCK) for at, b in enumerate(blocks)))
            assert written == [BLOCK] * 200
            read = await asyncio.gather(*(image.read(at * BLOCK, BLOCK) for at in range(200)))
            assert read == blocks
            await image.write_zeroes(BLOCK, BLOCK)
            await image.discard(4 * MIB, 4 * MIB)
            await image.flush()
            assert await image.read(0, 3 * BLOCK) == blocks[0] + bytes(BLOCK) + blocks[2]
            assert await image.read(8 * MIB - 10, 100) == bytes(10)
            assert await image.write(b"", 0) == 0
            assert await image.compare_and_write(0, blocks[0][:512], b"x" * 512) is None
            assert await image.read(0, 513) == b"x" * 512 + blocks[0][:1]

    run(url, story)


def test_failures_are_those_of_the_synchronous_face(url: str) -> None:
    async def story(ioctx: AsyncIoctx) -> None:
        with pytest.raises(rbd.ImageNotFound):
            await AsyncImage(ioctx, "none").open()
        async with await image_of(ioctx) as image:
            with pytest.raises(rbd.InvalidArgument) as caught:
                await image.read(9 * MIB, 1)
            assert caught.value.errno == errno.EINVAL
            with pytest.raises(rbd.IncompleteWriteError):
                await image.write(b"ab", 8 * MIB - 1)
            with pytest.raises(TypeError):
                await image.write("text", 0)  # type: ignore[arg-type]
            with pytest.raises(OverflowError):
                await image.read(-1, 1)
            await image.create_snap("s")
            name = await image.get_name()
            async with AsyncImage(ioctx, name, "s") as old:
                for change in (old.write(b"x", 0), old.discard(0, 1), old.write_zeroes(0, 1)):
                    with pytest.raises(rbd.ReadOnlyImage):
                        await change
                await old.flush()
            await image.remove_snap("s")
        with pytest.raises(rbd.InvalidArgument):
            await image.read(0, 1)
        with pytest.raises(rbd.InvalidArgument):
            await AsyncImage(ioctx, "unopened").read(0, 1)

    run(url, story)


def test_an_operation_is_awaited_or_watched(url: str) -> None:
    async def story(ioctx: AsyncIoctx) -> None:
        rbds = AsyncRBD()
        async with await image_of(ioctx) as image:
            for at in range(0, 8 * MIB, MIB):
                await image.write(b"p" * BLOCK, at)
            await image.create_snap("s")
            await image.protect_snap("s")
            await rbds.clone(ioctx, await image.get_name(), "s", ioctx, "child")
            async with AsyncImage(ioctx, "child") as child:
                seen = [step async for step in child.flatten()]
                assert seen
                assert seen[-1][0] <= seen[-1][1]
                assert seen == sorted(seen)
                assert await child.read(7 * MIB, BLOCK) == b"p" * BLOCK
                calls: list[tuple[int, int]] = []
                await child.resize(MIB, on_progress=lambda done, total: calls.append((done, total)))
                assert await child.size() == MIB
                grow = child.resize(2 * MIB)
                await asyncio.gather(grow, grow)
                assert await child.size() == 2 * MIB
                with pytest.raises(rbd.ImageNotFound):
                    async for _ in child.rollback_to_snap("none"):
                        pass
            await rbds.remove(ioctx, "child")
            await image.unprotect_snap("s")
            assert [snap["name"] for snap in await image.list_snaps()] == ["s"]
            await image.remove_snap("s")
        assert "child" not in await rbds.list(ioctx)

    run(url, story)


def test_updates_tell_of_changes_by_others(url: str) -> None:
    async def story(ioctx: AsyncIoctx) -> None:
        async with await image_of(ioctx) as image:
            name = await image.get_name()
            for arguments in ({}, {"read_only": True}):
                async with AsyncImage(ioctx, name, **arguments) as other, other.updates() as news:
                    await image.create_snap(f"s{len(arguments)}")
                    await asyncio.wait_for(anext(news), PATIENCE)

    run(url, story)


def test_cancelling_a_request_leaves_nothing_behind(url: str) -> None:
    async def story(ioctx: AsyncIoctx) -> None:
        async with await image_of(ioctx) as image:
            for _ in range(20):
                tasks = [asyncio.create_task(image.write(b"c" * BLOCK, at * BLOCK)) for at in range(20)]
                await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(isinstance(r, int | asyncio.CancelledError) for r in results)
            await image.write(b"d" * BLOCK, 0)
            assert await image.read(0, BLOCK) == b"d" * BLOCK

    run(url, story)


def test_an_image_whose_opening_was_cancelled_is_closed_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opening, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    open_image, close_image = rbd.Image._open, rbd.Image.close

    def slow_open(self: rbd.Image) -> None:
        opening.set()
        go_on.wait(PATIENCE)
        open_image(self)

    def close(self: rbd.Image) -> None:
        close_image(self)
        closed.set()

    async def story(ioctx: AsyncIoctx) -> None:
        image = await image_of(ioctx)
        monkeypatch.setattr(rbd.Image, "_open", slow_open)
        monkeypatch.setattr(rbd.Image, "close", close)
        task = asyncio.create_task(image.open())
        await asyncio.to_thread(opening.wait, PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        assert await asyncio.to_thread(closed.wait, PATIENCE)

    run(url, story)


def test_closing_waits_for_what_is_under_way(url: str) -> None:
    async def story(ioctx: AsyncIoctx) -> None:
        image = await (await image_of(ioctx)).open()
        writes = [asyncio.create_task(image.write(b"w" * BLOCK, at * BLOCK)) for at in range(64)]
        while not any(task.done() for task in writes):
            await asyncio.sleep(0)
        for task in writes[32:]:
            task.cancel()
        await image.close()
        results = await asyncio.gather(*writes, return_exceptions=True)
        assert all(not isinstance(r, Exception) or isinstance(r, rbd.InvalidArgument) for r in results)

    run(url, story)


def test_requests_of_the_engine_take_no_threads(tmp_path: Path) -> None:
    async def story(ioctx: AsyncIoctx) -> None:
        async with await image_of(ioctx) as image:
            await image.write(b"f" * BLOCK, 0)
            await image.read(0, BLOCK)
            assert isinstance(image.sync.handle.data, NativeImage)

            def refuse(*args: Any, **kwargs: Any) -> Any:
                raise AssertionError("a thread was asked")

            image._run = refuse  # type: ignore[method-assign]
            try:
                await asyncio.gather(*(image.write(b"g" * BLOCK, at * BLOCK) for at in range(100)))
                assert await image.read(99 * BLOCK, BLOCK) == b"g" * BLOCK
                await image.flush()
            finally:
                del image._run

    run(f"embedded:{tmp_path / 'store'}", story)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (AsyncImage, rbd.Image),
        (AsyncRBD, rbd.RBD),
        (AsyncGroup, rbd.Group),
        (AsyncIoctx, rados.Ioctx),
        (AsyncRados, rados.Rados),
    ],
)
def test_what_is_offered_there_is_offered_here(ours: type, theirs: type) -> None:
    """By the same name, unless it is asynchronous by other means, or has nothing to wait for."""
    instead = {"aio_open_image", "require_not_closed", "require_state", "require_ioctx_open", "dup"}
    instead |= {"get_locator_key", "set_osdmap_full_try", "unset_osdmap_full_try", "alignment"}
    instead |= {"conf_parse_argv", "conf_parse_env", "version", "stop_following", "blacklist_add"}
    operations = {n for n in dir(theirs) if "omap" in n or n.endswith(("_op", "_write_op", "_read_op"))}
    missing = []
    for name in dir(theirs):
        method = getattr(theirs, name)
        if name.startswith(("_", "aio_", "monitor_", "service_")) or not callable(method):
            continue
        if "Not supported" in (method.__doc__ or "") or name in instead or name in operations:
            continue
        if name == "get_inconsistent_pgs":
            continue
        if not hasattr(ours, name):
            missing.append(name)
    assert missing == []
    assert aio.__all__

"""`Machine` for programs without asyncio: the same calls, each of which waits. Its loop runs on a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from qemu_glue.qmp import disks, machine, migration, snapshot
from qemu_glue.qmp.connection import COMMAND_SECONDS, CONNECT_SECONDS, Address, Event
from qemu_glue.qmp.disks import DiskSpec
from qemu_glue.qmp.errors import Disconnected
from qemu_glue.qmp.images import GroupRef, ImageRef
from qemu_glue.qmp.migration import Migrated
from qemu_glue.qmp.snapshot import Quiesce, Taken

T = TypeVar("T")


class _Loop:
    """One event loop on a daemon thread, made at first use and shared by all machines of the process."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Ctrl-C cancels the call, which undoes what it has done, and then goes on."""
        with self._guard:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            concurrent.futures.wait([future])
            raise


_LOOP = _Loop()


class Machine:
    """`with Machine.connect(PATH) as machine`. As `qemu_glue.qmp.Machine`, call for call, from any thread."""

    def __init__(self, inner: machine.Machine) -> None:
        self.inner = inner

    @classmethod
    def connect(
        cls, address: Address, *, agent: str | Path | None = None, deadline: float = CONNECT_SECONDS
    ) -> Machine:
        return cls(_LOOP.run(machine.Machine.connect(address, agent=agent, deadline=deadline)))

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, deadline: float = COMMAND_SECONDS
    ) -> Any:
        return _LOOP.run(self.inner.execute(command, arguments, deadline))

    def status(self) -> str:
        return _LOOP.run(self.inner.status())

    def pause(self) -> None:
        _LOOP.run(self.inner.pause())

    def resume(self) -> None:
        _LOOP.run(self.inner.resume())

    def power_down(self, deadline: float) -> None:
        _LOOP.run(self.inner.power_down(deadline))

    def quit(self, deadline: float = 10.0) -> None:
        _LOOP.run(self.inner.quit(deadline))

    def attach(self, disk: DiskSpec) -> None:
        _LOOP.run(self.inner.attach(disk))

    def detach(self, name: str, deadline: float = disks.UNPLUG_SECONDS) -> None:
        _LOOP.run(self.inner.detach(name, deadline))

    def resize(self, name: str, size: int, image: ImageRef | Callable[[int], object]) -> None:
        """A function is called on a thread of its own."""
        if isinstance(image, ImageRef):
            _LOOP.run(self.inner.resize(name, size, image))
            return
        function = image
        _LOOP.run(self.inner.resize(name, size, lambda size: asyncio.to_thread(function, size)))

    def disks(self) -> list[str]:
        return _LOOP.run(self.inner.disks())

    def snapshot(
        self,
        name: str,
        images: Sequence[ImageRef | GroupRef],
        quiesce: Quiesce = Quiesce.AGENT,
        limit: float = snapshot.LIMIT_SECONDS,
    ) -> Taken:
        return _LOOP.run(self.inner.snapshot(name, images, quiesce, limit))

    def migrate(
        self,
        destination: Machine,
        uri: str,
        *,
        deadline: float = migration.MIGRATE_SECONDS,
        bandwidth: int | None = None,
        downtime: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Migrated:
        """`progress` is called on the thread of the connections."""
        return _LOOP.run(
            self.inner.migrate(
                destination.inner, uri, deadline=deadline, bandwidth=bandwidth, downtime=downtime, progress=progress
            )
        )

    def wait_event(self, *names: str, deadline: float, wanted: Callable[[Event], bool] = lambda event: True) -> Event:
        return _LOOP.run(self.inner.wait_event(*names, deadline=deadline, wanted=wanted))

    def events(self, *names: str) -> Iterator[Event]:
        """Events for as long as the machine lives; those from the first next() on."""
        source = self.inner.events(*names)

        async def following() -> Event | None:
            try:
                return await anext(source)
            except (StopAsyncIteration, Disconnected):
                return None

        while (event := _LOOP.run(following())) is not None:
            yield event

    def close(self) -> None:
        _LOOP.run(self.inner.close())

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

"""Something done in steps, each with its undo: it happens whole or not at all, and says what it could not take back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

from qemu_glue.qmp.errors import CommandFailed, MachineError

T = TypeVar("T")
UNDO_SECONDS = 15.0  # for one undo

Undo = Callable[[], Awaitable[object]]


class Steps:
    """`async with Steps() as steps: await steps.run("what", do(), undo)`.

    Leaving the block with an exception, cancellation too, runs the undos of the steps begun, the last first, each
    with a deadline; further cancellations wait until that is over. An undo that fails does not stop the others: it is
    named in `left` of the exception (or, for one that is no MachineError, in a note). A step that was refused
    (CommandFailed) had no effect and is not undone; one that ended in any other way may have had, so undos must bear
    that there is nothing to undo."""

    def __init__(self) -> None:
        self._undos: list[tuple[str, Undo]] = []
        self.done: list[str] = []

    async def run(self, what: str, do: Awaitable[T], undo: Undo | None = None) -> T:
        if undo is not None:
            self._undos.append((what, undo))
        try:
            result = await do
        except CommandFailed:
            if undo is not None:
                self._undos.pop()
            raise
        self.done.append(what)
        return result

    def keep(self) -> None:
        """From here on nothing is taken back."""
        self._undos.clear()

    async def __aenter__(self) -> Steps:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is None:
            self.keep()
            return
        left = await uncancelled(self._roll_back())
        if isinstance(error, MachineError):
            error.left += left
        else:
            for text in left:
                error.add_note(f"left behind: {text}")

    async def _roll_back(self) -> list[str]:
        left: list[str] = []
        while self._undos:
            what, undo = self._undos.pop()
            try:
                await asyncio.wait_for(_awaited(undo), UNDO_SECONDS)
            except TimeoutError:
                left.append(f"{what}: not undone within {UNDO_SECONDS:.0f} s")
            except Exception as error:
                left.append(f"{what}: {error}")
        return left


async def _awaited(undo: Undo) -> None:
    await undo()


async def uncancelled(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` to its end, whoever cancels meanwhile; then the cancellation goes on. `work` must bound itself."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise
            cancelled = True
        except BaseException:
            break
    if cancelled and task.exception() is None:
        raise asyncio.CancelledError
    return task.result()

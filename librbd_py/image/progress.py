"""How far a long operation has come, told to whoever started it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], object]  # done, total


def report(progress: Progress | None, done: int, total: int) -> None:
    """Tells `progress`. A negative number from it ends the operation between two objects: OSError with that errno
    (-ECANCELED by custom), as librbd's AsyncObjectThrottle does; the operation can be started again."""
    if progress is not None:
        answer = progress(done, total)
        if isinstance(answer, int) and answer < 0:
            raise OSError(-answer, "cancelled by the progress callback")

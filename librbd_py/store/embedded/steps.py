"""Named points inside multi-step changes, where a test may stop the process.

Every change that touches more than one file is a sequence of these; `tests/fault` kills a process at each of them and
looks at what is left.
"""

from __future__ import annotations

from collections.abc import Callable

hook: Callable[[str], None] | None = None


def step(name: str) -> None:
    if hook is not None:
        hook(name)

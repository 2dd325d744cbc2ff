"""Loggers of the standard library that cost nothing until something is said: importing `logging` takes as long as all
else that `rbdpy ls` imports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logging import Logger

INFO, WARNING = 20, 30  # of logging


class _Later:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        import logging

        found = getattr(logging.getLogger(self._name), attribute)
        setattr(self, attribute, found)
        return found


def logger(name: str) -> Logger:
    """What `logging.getLogger(name)` is, as far as methods go."""
    later: Any = _Later(name)
    return later  # type: ignore[no-any-return]

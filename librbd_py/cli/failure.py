"""The one way a command ends with an error."""

from __future__ import annotations

import os


class Failure(Exception):
    """Ends the command: `text` goes to standard error, `code` (a positive errno) is the exit status."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def code_of(error: BaseException) -> int:
    """Exit status for a failure: its errno, EIO when it has none."""
    return getattr(error, "errno", None) or 5


def reason(error: BaseException | int) -> str:
    """`(2) No such file or directory`, as Ceph writes an errno."""
    code = error if isinstance(error, int) else code_of(error)
    return f"({code}) {os.strerror(code)}"

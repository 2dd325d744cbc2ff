"""What goes wrong with a machine. Every failure is an OSError with an errno and a sentence; what could not be undone is
in `left`."""

from __future__ import annotations

import errno

MAX_TEXT = 500  # characters of QEMU's own words that are repeated


class MachineError(OSError):
    """`left`: what is left behind, a sentence each; empty when everything is as it was."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.left: list[str] = []

    def __str__(self) -> str:
        text = self.strerror or ""
        return f"{text} (left behind: {'; '.join(self.left)})" if self.left else text


class CommandFailed(MachineError):
    """The other side refused a command and did nothing of it. `error_class` is QMP's ("GenericError",
    "DeviceNotFound", ...)."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        description = printable(description)
        code = errno.ENODEV if error_class == "DeviceNotFound" else errno.EINVAL
        super().__init__(code, f"{command}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description


class Disconnected(MachineError):
    """The connection ended: the process on the other side is gone, or somebody else closed it."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.ECONNRESET, text)


class Late(MachineError):
    """A deadline passed. Whether the command still takes effect is not known."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.ETIMEDOUT, text)


def printable(text: object) -> str:
    """Words of the other side, safe to show: no control characters, bounded."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:MAX_TEXT])

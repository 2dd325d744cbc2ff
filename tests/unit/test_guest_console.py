"""What a guest prints, cut at every place."""

from __future__ import annotations

from qemu_glue.guest import ConsoleText


def test_pieces_make_the_same_text() -> None:
    printed = "GUEST-DISKS vda=1 \r\n50 %\r60 % \u00e4\r\n"
    data = printed.encode()
    for first in range(len(data) + 1):
        for second in range(first, len(data) + 1):
            console = ConsoleText()
            pieces = [data[:first], data[first:second], data[second:]]
            assert "".join(console.add(piece) for piece in pieces) == "GUEST-DISKS vda=1 \n50 %\r60 % \u00e4\n"

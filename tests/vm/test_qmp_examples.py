"""The examples run as they are, and say what they promise."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.vm
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hotplug", "the guest gave it back"),
        ("resize", "has grown from 64 to 96 MiB"),
        ("consistent_snapshot", "2 file systems"),
        ("migrate", "the guest goes on: running"),
        ("watch_events", "RESUME"),
    ],
)
def test_example(name: str, says: str) -> None:
    command = [sys.executable, "-m", f"qemu_glue.examples.{name}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert says in done.stdout

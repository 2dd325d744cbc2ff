"""A VM that arrives suspended with a disk that does not start: it is left alone until it is resumed, and woken then.

The libvirtd is real, its domain is one of libvirt's own test driver: what is tested is what happens to it, and when.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qemu_glue.host import deaf
from qemu_glue.libvirt import client
from tests.libvirt.hosts import Machine

VM = "test"  # the one domain of test:///default
SECONDS = 60.0

EVENTS = """
import sys, libvirt
libvirt.virEventRegisterDefaultImpl()
connection = libvirt.open(sys.argv[1])
names = {libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "suspended", libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed"}
show = lambda connection, domain, event, detail, opaque: print(names.get(event, event), flush=True)
connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, show, None)
print("ready", flush=True)
while True:
    libvirt.virEventRunDefaultImpl()
"""

PROCESSOR = """
import ctypes, select, sys
ctypes.CDLL(None).prctl(15, b"CPU 0/TCG", 0, 0, 0)  # PR_SET_NAME
print("up", flush=True)
sys.stdin.readline()  # that of a suspended machine sleeps
while not select.select([sys.stdin], [], [], 0.01)[0]:
    pass
"""


@contextmanager
def program(text: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """It has printed its first line."""
    argv = [sys.executable, "-c", text, *words]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() in ("ready\n", "up\n")
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def uri(machine: Machine) -> str:
    host = machine.host("gamma")
    host.start_libvirtd()
    return f"test+unix:///default?socket={host.folder}/sock/libvirt-sock"


class Silence:
    """A connection that says nothing. Counts how often it was asked."""

    def __init__(self) -> None:
        self.lasts = True
        self.looks = 0

    def __call__(self) -> bool:
        self.looks += 1
        return self.lasts

    async def asked(self, times: int, task: asyncio.Task[None]) -> None:
        goal = self.looks + times
        while self.looks < goal:
            assert not task.done(), "it has given up"
            await asyncio.sleep(0.01)


def run(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("run\n")
    process.stdin.flush()


def test_it_is_woken_when_it_is_resumed_and_not_before(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deaf, "PAUSE", 0.02)

    async def scenario(pid: int, processor: subprocess.Popen[str]) -> None:
        silent = Silence()
        task = asyncio.create_task(deaf.wake(uri, VM, pid, "a socket", silent))
        await silent.asked(2 * deaf.ANYWAY, task)  # libvirt was asked, too
        assert "is suspended and resumed" not in caplog.text
        await asyncio.to_thread(client.resume, uri, VM, SECONDS)
        run(processor)
        await task

    with program(EVENTS, uri) as events, program(PROCESSOR) as processor, caplog.at_level(logging.WARNING):
        client.suspend(uri, VM, SECONDS)
        asyncio.run(asyncio.wait_for(scenario(processor.pid, processor), SECONDS))
        assert client.running(uri, VM, SECONDS)
        assert events.stdout is not None
        # The first two are this test's own; nothing was done to it between them.
        assert [events.stdout.readline().strip() for _ in range(4)] == ["suspended", "resumed"] * 2


def test_it_is_left_alone_when_its_disk_is_there_at_last(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deaf, "PAUSE", 0.02)

    async def scenario(pid: int) -> None:
        silent = Silence()
        task = asyncio.create_task(deaf.wake(uri, VM, pid, "a socket", silent))
        await silent.asked(deaf.ANYWAY // 2, task)
        silent.lasts = False
        await task

    with program(EVENTS, uri), program(PROCESSOR) as processor, caplog.at_level(logging.WARNING):
        client.suspend(uri, VM, SECONDS)
        asyncio.run(asyncio.wait_for(scenario(processor.pid), SECONDS))
        assert "is suspended and resumed" not in caplog.text
        assert not client.running(uri, VM, SECONDS)

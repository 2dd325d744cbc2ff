"""libvirt's hook: every operation, with the service up, down, hung, slow and refusing; domains that are ours, are not,
and are made to hurt. What it answers libvirt decides over a guest's life."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_glue.host.config import Config
from qemu_glue.host.setup import HOOK, hook_program, plan
from qemu_glue.libvirt import domain, hook

UUID = "11111111-2222-4333-8444-555555555555"
OPERATIONS = ("prepare", "start", "started", "stopped", "release", "reconnect", "migrate", "restore", "future", "")
TOLD = {operation: operation for operation in ("prepare", "started", "stopped", "release", "reconnect")}
TOLD["migrate"] = "incoming"  # what the service hears of
STATES = ("up", "down", "hung", "slow", "refusing", "silent-end", "nonsense")
PATIENCE = 0.4  # seconds the hook waits for the service here; 5 in life

OURS = f"""<domain type='kvm' id='3'><name>v0</name><uuid>{UUID}</uuid>
 <metadata><rbdpy:disks xmlns:rbdpy='{domain.NAMESPACE}'>
  <rbdpy:disk target='vda' pool='rbd' image='vm1' queues='2'/>
  <rbdpy:disk target='vdb' transport='nbd' pool='rbd' namespace='n' image='vm2' store='ceph' readonly='yes'/>
 </rbdpy:disks></metadata><devices/></domain>"""
OTHERS = f"<domain type='kvm'><name>v1</name><uuid>{UUID}</uuid><devices/></domain>"
HOSTILE = {
    "doctype": f"<!DOCTYPE d [<!ENTITY a 'x'>]>{OURS}",
    "laughs": "<!DOCTYPE d [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;'>]>"
    + OURS.replace("v0", "&b;"),
    "deep": OURS.replace("<devices/>", "<a>" * 5000 + "</a>" * 5000),
    "cut": OURS[:-20],
    "large": OURS.replace("<devices/>", "<devices>" + " " * (5 << 20) + "</devices>"),
    "many": OURS.replace("</rbdpy:disks>", "<rbdpy:disk target='vdc' pool='rbd' image='x'/>" * 3000 + "</rbdpy:disks>"),
    "twice": OURS.replace("vdb", "vda"),
    "target": OURS.replace("'vda'", "'../../etc'"),
    "name": OURS.replace("image='vm1'", "image='a/../../b'"),
    "uuid": OURS.replace(UUID, "../" * 12),
    "encoding": f"<?xml version='1.0' encoding='nobody-knows'?>{OURS}",
    "bytes": OURS.replace("v0", "\udcff\udc80"),
}


class Service:
    """Speaks QMP as the host service does, in one of STATES."""

    def __init__(self, path: Path, state: str) -> None:
        self.state = state
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(str(path))
        self._sock.listen(8)
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._sock.accept()
            except OSError:
                return
            self._open.append(client)
            with client.makefile("rwb", buffering=0) as file:
                try:
                    self._talk(file)
                except OSError:
                    pass
            if self.state != "hung":
                client.close()

    def _talk(self, file: Any) -> None:
        if self.state in ("hung", "silent-end"):
            return
        if self.state == "nonsense":
            file.write(b"220 mail ready\n")
            return
        file.write(b'{"QMP": {"version": {}, "capabilities": []}}\n')
        for number in range(2):
            command = json.loads(file.readline())
            if number == 0:
                file.write(b'{"return": {}, "id": 0}\n')
                continue
            self.heard.append((command["execute"], command["arguments"]))
            if self.state == "slow":
                time.sleep(PATIENCE / 4)
                file.write(b'{"event": "RBD_DISK_CONNECTED", "data": {}}\n')
            if self.state == "refusing":
                file.write(b'{"error": {"class": "GenericError", "desc": "disk vda: no such image"}, "id": 1}\n')
            else:
                file.write(b'{"return": {}, "id": 1}\n')

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        for client in self._open:
            client.close()
        self._thread.join(10)


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "host.json"
        self.settings = Config(run=str(folder))
        self.config.write_text(self.settings.text())
        self.service: Service | None = None

    def serve(self, state: str) -> None:
        if state != "down":
            self.service = Service(Path(self.settings.qmp), state)

    @property
    def heard(self) -> list[tuple[str, dict[str, Any]]]:
        return self.service.heard if self.service else []


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(hook, "SECONDS", PATIENCE)
    made = World(tmp_path)
    yield made
    if made.service:
        made.service.close()


class Stdin:
    def __init__(self, text: str) -> None:
        self.buffer = io.BytesIO(text.encode("utf-8", "surrogateescape"))


def run(world: World, monkeypatch: pytest.MonkeyPatch, operation: str, text: str) -> int:
    monkeypatch.setattr(sys, "stdin", Stdin(text))
    words = ["v0", operation, "begin", "-"] if operation else ["v0"]
    return hook.main(words, str(world.config))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_our_domain(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    operation: str,
    state: str,
) -> None:
    world.serve(state)
    start = time.monotonic()
    code = run(world, monkeypatch, operation, OURS)
    took = time.monotonic() - start
    said = capfd.readouterr()
    assert said.out == ""  # libvirt takes it for a new XML
    refused = operation == "prepare" and state not in ("up", "slow")
    assert code == (1 if refused else 0)
    assert took < 10 * PATIENCE
    if operation in TOLD and state in ("up", "slow", "refusing"):
        assert [name for name, _ in world.heard] == [f"rbd-vm-{TOLD[operation]}"]
        assert world.heard[0][1]["uuid"] == UUID
    else:
        assert world.heard == []
    if refused:
        assert said.err.startswith("rbdpy: ")
        assert len(said.err.splitlines()) == 1
        reason = {"down": "does not run", "hung": "does not answer", "refusing": "no such image"}
        assert reason.get(state, "") in said.err
        assert "Traceback" not in said.err


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_other_domains_are_none_of_its_business(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    operation: str,
    state: str,
) -> None:
    world.serve(state)
    assert run(world, monkeypatch, operation, OTHERS) == 0
    assert world.heard == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("operation", TOLD)
def test_hostile_domains(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], operation: str, kind: str
) -> None:
    world.serve("up")
    start = time.monotonic()
    code = run(world, monkeypatch, operation, HOSTILE[kind])
    assert time.monotonic() - start < 5
    said = capfd.readouterr()
    assert code == (1 if operation == "prepare" else 0)
    assert said.out == ""
    assert said.err.startswith("rbdpy: ")
    assert len(said.err) < 1000
    assert world.heard == []


def test_what_the_service_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.serve("up")
    run(world, monkeypatch, "prepare", OURS)
    ((_, told),) = world.heard
    first, second = told["disks"]
    assert told["name"] == "v0"
    assert (first["target"], first["transport"], first["image"], first["queues"]) == ("vda", "vhost-user", "vm1", 2)
    assert (second["namespace"], second["store"], second["read-only"]) == ("n", "ceph", True)


def test_a_disk_on_an_images_socket_is_ours_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.serve("up")
    path = f"{world.folder}/image/vhost-user/rbd/vm1.sock"
    text = OTHERS.replace("<devices/>", f"<devices><disk><source type='unix' path='{path}'/></disk></devices>")
    assert run(world, monkeypatch, "prepare", text) == 0
    ((_, told),) = world.heard
    assert told["disks"] == []
    assert told["sockets"] == [path]
    other = OTHERS.replace("<devices/>", "<devices><disk><source file='/var/lib/libvirt/image/x'/></disk></devices>")
    assert run(world, monkeypatch, "prepare", other) == 0
    assert len(world.heard) == 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_damaged_configuration(world: World, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    world.config.write_text("{")
    assert run(world, monkeypatch, operation, OTHERS) == 0
    assert run(world, monkeypatch, operation, OURS) == (1 if operation == "prepare" else 0)


def test_the_mark_is_the_namespace() -> None:
    assert hook.OURS[0] == domain.NAMESPACE.encode()
    assert hook.SIZE_LIMIT == domain.SIZE_LIMIT


@pytest.mark.parametrize("folder", ["", "a long ' folder" * 9], ids=["plain", "odd"])
def test_the_installed_program(tmp_path: Path, folder: str) -> None:
    """As setup writes it; it uses nothing that is installed with the package, and ends though its input does not."""
    text = next(entry.text for entry in plan(Config()) if entry.path == HOOK)  # type: ignore[union-attr]
    if folder:
        python = tmp_path / folder / "python"
        python.parent.mkdir()
        python.symlink_to(sys.executable)
        text = hook_program(str(python), str(Path(hook.__file__).parents[2]))
        assert text.startswith("#!/bin/sh\n")
    program = tmp_path / "rbdpy"
    program.write_text(text.replace("main()", 'main(None, "/nowhere", 0.5)'))
    program.chmod(0o755)
    for operation, code in (("prepare", 1), ("release", 0), ("reconnect", 0), ("start", 0)):
        begin = time.monotonic()
        done = subprocess.run([program, "v0", operation, "begin", "-"], input=OTHERS, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        with subprocess.Popen([program, "v0", operation, "begin", "-"], stdin=subprocess.PIPE) as hung:
            assert hung.wait(20) == code
        assert time.monotonic() - begin < 20
    ours = subprocess.run([program, "v0", "prepare", "begin", "-"], input=OURS, capture_output=True, text=True)
    assert ours.returncode == 1
    assert ours.stdout == ""
    assert "does not run (/run/rbdpy/rbdpyd.sock)" in ours.stderr

"""Scratch clusters: what is written for them, what is refused, whose processes are signalled. None is started here."""

from __future__ import annotations

import base64
import configparser
import errno
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from librbd_py.cli.main import main
from librbd_py.devcluster import DevCluster, Options, cluster, options, ports, programs
from librbd_py.devcluster.processes import Daemon, started_at

SLEEP = ["/usr/bin/sleep", "1000"]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon("osd.0", tmp_path / "osd.0.process", tmp_path / "osd.0.out")
    yield made
    made.kill()


# --- files


def test_a_key_is_what_cephx_expects() -> None:
    first, second = (base64.b64decode(options.new_key()) for _ in range(2))
    kind, seconds, nanoseconds, length = struct.unpack_from("<HIIH", first)
    assert (kind, length, len(first)) == (1, 16, 28)
    assert abs(seconds - time.time()) < 60 and nanoseconds < 10**9
    assert first[12:] != second[12:]


def test_a_keyring_says_what_each_may_do() -> None:
    text = options.keyring({"client.admin": "QQ==", "osd.3": "Qg=="})
    assert '[client.admin]\n\tkey = QQ==\n\tcaps mon = "allow *"\n' in text
    assert '[osd.3]\n\tkey = Qg==\n\tcaps mon = "allow profile osd"\n' in text


def test_a_configuration_names_only_loopback_and_its_folder(tmp_path: Path) -> None:
    given = Options(osds=3, auth="cephx", settings=(("osd heartbeat grace", "9"),))
    text = options.configuration(given, tmp_path, "an fsid", (11000, 11001), range(11008, 11100))
    parsed = configparser.ConfigParser(interpolation=None, strict=True)
    parsed.read_string(text)
    common = parsed["global"]
    assert common["mon host"] == "[v2:127.0.0.1:11000,v1:127.0.0.1:11001]"
    assert common["public addr"] == "127.0.0.1" and common["auth client required"] == "cephx"
    assert (common["osd pool default size"], common["osd pool default min size"]) == ("3", "2")
    assert common["osd heartbeat grace"] == "9"
    assert (common["ms bind port min"], common["ms bind port max"]) == ("11008", "11099")
    paths = [value for section in parsed.values() for value in section.values() if value.startswith("/")]
    assert len(paths) > 8 and all(path.startswith(f"{tmp_path}/") for path in paths)


def test_options_survive_a_file() -> None:
    given = Options(osds=5, auth="cephx", pools=("a", "b"), settings=(("x", "y"),), mgr=True)
    assert Options.from_json(given.to_json()) == given
    assert given.daemons == ["mon.a", "mgr.x", "osd.0", "osd.1", "osd.2", "osd.3", "osd.4"]
    for values in ({}, {**given.to_json(), "osds": "many"}, {**given.to_json(), "pools": 3}):
        with pytest.raises(OSError, match="no options"):
            Options.from_json(values)


@pytest.mark.parametrize(
    "wrong",
    [{"osds": 0}, {"osds": 99}, {"auth": "kerberos"}, {"objectstore": "tape"}, {"size": 2}, {"osds": 2, "min_size": 3}],
)
def test_options_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(OSError) as caught:
        Options(**wrong)  # type: ignore[arg-type]
    assert caught.value.errno == errno.EINVAL


def test_ports_that_are_taken_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def free(address: str, port: int) -> bool:
        asked.append(port)
        return len(asked) > 5

    monkeypatch.setattr(ports, "_free", free)
    (v2, v1), osds = ports.choose("127.0.0.1")
    assert v2 not in asked[:5] and v1 == v2 + 1 and v1 < osds.start and osds.stop <= ports.HIGHEST
    monkeypatch.setattr(ports, "_free", lambda address, port: False)
    with pytest.raises(OSError) as caught:
        ports.choose("127.0.0.1")
    assert caught.value.errno == errno.EADDRINUSE


# --- what is refused


def test_without_ceph_one_sentence_names_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(programs, "ALSO_IN", str(tmp_path))
    assert main(["devcluster", "start", "--dir", str(tmp_path / "c")]) == errno.ENOPKG
    said = capsys.readouterr().err
    assert "Debian packages ceph-mon ceph-osd ceph-base" in said and said.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    made = DevCluster(tmp_path)
    with pytest.raises(OSError) as caught:
        made.start()
    assert caught.value.errno == errno.ENOTEMPTY
    assert not made.stop()
    assert [entry.name for entry in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(("name", "code"), [("x" * 90, errno.ENAMETOOLONG), ("a b", errno.EINVAL), ("$x", 22)])
def test_a_folder_that_cannot_be(name: str, code: int) -> None:
    with pytest.raises(OSError) as caught:
        DevCluster(Path("/nowhere") / name).start()
    assert caught.value.errno == code


@pytest.mark.parametrize("text", ["", "[]", "{", '{"osds": 1}'])
def test_a_damaged_mark(tmp_path: Path, text: str) -> None:
    (tmp_path / cluster.MARK).write_text(text)
    for call in (DevCluster(tmp_path).status, DevCluster(tmp_path).stop, DevCluster(tmp_path).start):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    assert (tmp_path / cluster.MARK).read_text() == text


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("stop", "status"):
        assert main(["devcluster", verb, "--dir", str(tmp_path / "none")]) == errno.ENOENT
    assert capsys.readouterr().err.count("no scratch cluster in") == 2


# --- processes


def test_a_daemon_is_spawned_frozen_thawed_and_killed(daemon: Daemon) -> None:
    assert daemon.state == "absent" and not daemon.kill() and not daemon.send(signal.SIGCONT)
    daemon.spawn(SLEEP, {})
    record = daemon.record()
    assert record is not None and daemon.state == "running"
    assert os.getsid(record[0]) == record[0]  # Ctrl-C is not for it
    assert daemon.send(signal.SIGSTOP)
    daemon.wait_for_state("frozen")
    assert daemon.send(signal.SIGCONT)
    daemon.wait_for_state("running")
    assert daemon.kill()
    assert daemon.state == "absent" and started_at(record[0]) is None  # no zombie


def test_signals_are_not_blocked_in_a_daemon(daemon: Daemon) -> None:
    daemon.spawn(["/usr/bin/grep", "SigBlk", "/proc/self/status"], {})
    daemon.wait_for_state("absent")
    assert daemon.tail() == "SigBlk:\t0000000000000000"


def test_a_process_with_the_pid_of_a_dead_daemon_is_not_signalled(daemon: Daemon) -> None:
    with subprocess.Popen(SLEEP) as foreign:
        found = started_at(foreign.pid)
        assert found is not None
        daemon.file.write_text(f"{foreign.pid} {found[0] - 1}\n")
        assert daemon.state == "absent"
        assert not daemon.kill() and not daemon.send(signal.SIGKILL)
        assert foreign.poll() is None
        daemon.file.write_text(f"{foreign.pid} {found[0]}\n")
        assert daemon.state == "running"
        foreign.kill()


def test_a_zombie_is_absent(daemon: Daemon) -> None:
    daemon.spawn(["/usr/bin/true"], {})
    record = daemon.record()
    assert record is not None
    os.waitid(os.P_PID, record[0], os.WEXITED | os.WNOWAIT)
    found = started_at(record[0])
    assert found is not None and found[1] == "Z"
    assert daemon.state == "absent" and not daemon.kill()
    daemon.reap()
    assert started_at(record[0]) is None


@pytest.mark.parametrize("text", ["", "1", "x y", "1 2 3", "99999999999999999999 1"])
def test_a_damaged_record_is_nobody(daemon: Daemon, text: str) -> None:
    daemon.file.write_text(text)
    assert daemon.state == "absent" and not daemon.kill()


def test_a_name_with_brackets_hides_nothing(tmp_path: Path) -> None:
    script = tmp_path / ") Z 1 (("
    script.symlink_to(sys.executable)
    with subprocess.Popen([str(script), "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        found = started_at(process.pid)
        assert found is not None and found[1] in "RSD" and found[0] > 1000

"""A connection that the command begins while it still starts."""

from __future__ import annotations

import configparser
import socket
import subprocess
import sys
from pathlib import Path

import pytest

BEGUN = """
import sys
from librbd_py.native import ffi, lib
from librbd_py.store.rados import connection as c
conf = sys.argv[1]
assert lib.rbdn_rados_early(conf.encode()) == 0
assert lib.rbdn_rados_early(conf.encode()) == -16  # one at a time
error = ffi.new("int *")
assert lib.rbdn_rados_early_take(b"/another", error) == ffi.NULL and error[0] == 0
c.Connection._new = None  # calling it would fail
made = c.Connection(c.ClusterOptions(conf).resolved())
assert made.client.gid and made.fsid
assert lib.rbdn_rados_early_take(conf.encode(), error) == ffi.NULL and error[0] == 0  # taken
made.release()
"""


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=60)


def same(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """As the command that connects when it has read its arguments."""
    plain, quick = run("-m", "librbd_py.cli.main", *words), run("-m", "librbd_py.cli", *words)
    assert (quick.returncode, quick.stdout, quick.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    return quick


def test_it_is_the_one_that_is_used(ceph_conf: str) -> None:
    out = run("-c", BEGUN, ceph_conf)
    assert (out.returncode, out.stderr) == (0, "")


def test_commands(ceph_conf: str, ceph_pool: str) -> None:
    image = f"{ceph_pool}/early"
    assert run("-m", "librbd_py.cli", "--conf", ceph_conf, "create", image, "--size", "8M").returncode == 0
    assert same("--conf", ceph_conf, "ls", ceph_pool).stdout == "early\n"
    assert same("--conf", ceph_conf, "info", f"{ceph_pool}/none").returncode == 2
    assert run("-m", "librbd_py.cli", "--conf", ceph_conf, "snap", "create", f"{image}@s").returncode == 0
    # The watch of the command before is gone, though its process tidied nothing up: nothing keeps the image.
    assert "none" in run("-m", "librbd_py.cli", "--conf", ceph_conf, "status", image).stdout
    assert run("-m", "librbd_py.cli", "--conf", ceph_conf, "snap", "purge", image).returncode == 0
    assert run("-m", "librbd_py.cli", "--conf", ceph_conf, "rm", image).returncode == 0


def test_the_environment_names_the_cluster(ceph_conf: str, ceph_pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RBDPY_STORE", raising=False)
    monkeypatch.setenv("CEPH_CONF", ceph_conf)
    assert same("ls", ceph_pool).returncode == 0
    assert same("ls", "no-such-pool").returncode == 2


def test_a_monitor_alone_is_enough(ceph_conf: str, ceph_pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RBDPY_STORE", "CEPH_CONF"):
        monkeypatch.delenv(name, raising=False)
    config = configparser.ConfigParser(strict=False)
    config.read_string(Path(ceph_conf).read_text())
    monitor = config["global"]["mon host"].strip("[]").split(",")[0].removeprefix("v2:")
    words = ("-m", "librbd_py.cli", "-m", monitor, "-k", config["client"]["keyring"], "ls")
    assert run(*words, ceph_pool).returncode == 0
    assert run(*words, "no-such-pool").returncode == 2


def test_a_connection_that_nobody_needed(ceph_conf: str) -> None:
    """The command ends meanwhile."""
    assert same("--conf", ceph_conf, "ls", "a/b/c/d@e").returncode != 0


def test_what_goes_wrong_is_said_in_the_same_words(tmp_path: Path) -> None:
    with socket.socket() as taken:  # nobody answers there
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        conf = tmp_path / "ceph.conf"
        conf.write_text(
            "[global]\nauth client required = none\nauth cluster required = none\nauth service required = none\n"
            f"mon host = 127.0.0.1:{port}\nclient mount timeout = 1\n"
        )
        assert same("--conf", conf, "ls").returncode == 110
    assert same("--conf", tmp_path / "none", "ls").returncode == 2

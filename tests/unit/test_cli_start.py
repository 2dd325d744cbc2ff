"""How the command starts: what it connects to before it has read its arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from librbd_py.cli.start import cluster_of


@pytest.mark.parametrize(
    ("argv", "store", "conf"),
    [
        (["--conf", "/c", "ls"], "", "/c"),
        (["ls", "-c", "/c"], "", "/c"),
        (["--conf=/c", "info", "image"], "embedded:/s", "/c"),
        (["ls"], "ceph:/c", "/c"),
        (["--store", "ceph:/c", "ls"], "embedded:/s", "/c"),
        # More is said of the cluster, or another: connected when all is read.
        (["--conf", "/c", "--id", "vm", "ls"], "", ""),
        (["--conf", "/c", "-n", "client.vm", "ls"], "", ""),
        (["--conf", "/c", "--rbd_default_pool=x", "ls"], "", ""),
        (["--conf", "/c", "--keyring=/k", "ls"], "", ""),
        (["ls"], "ceph:/c?user=vm", ""),
        (["ls"], "ceph:/with%20space", ""),
        (["ls"], "ceph", ""),
        (["ls"], "", ""),
        (["ls"], "embedded:/s", ""),
        (["--conf"], "", ""),
        (["--conf", "/c", "run", "program.py"], "", ""),
        (["--help", "--conf", "/c"], "", ""),
    ],
)
def test_what_is_connected_to(
    argv: list[str], store: str, conf: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RBDPY_STORE", store)
    monkeypatch.delenv("CEPH_ARGS", raising=False)
    monkeypatch.delenv("CEPH_CONF", raising=False)
    assert cluster_of(argv) == conf
    monkeypatch.setenv("CEPH_ARGS", "--id vm")
    assert cluster_of(argv) == ""


@pytest.mark.parametrize(
    ("argv", "store", "conf"),
    [
        (["ls"], "", "/env"),
        (["ls"], "ceph", "/env"),
        (["ls"], "ceph:/c", "/c"),
        (["-c", "/c", "ls"], "", "/c"),
        (["ls"], "embedded:/s", ""),
        (["--store", "/s", "ls"], "", ""),
        (["ls"], "ceph?user=vm", ""),
    ],
)
def test_ceph_conf_of_the_environment(argv: list[str], store: str, conf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBDPY_STORE", store)
    monkeypatch.delenv("CEPH_ARGS", raising=False)
    monkeypatch.setenv("CEPH_CONF", "/env")
    assert cluster_of(argv) == conf


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("words", [["ls", "--conf", "/missing"], ["ls", "a/b/c/d@e"], ["nonsense"], ["help", "ls"]])
def test_it_ends_as_it_would_without(words: list[str], tmp_path: Path) -> None:
    """Output, messages and exit code, though nothing is tidied up at the end."""
    store = ["--store", f"embedded:{tmp_path / 'store'}"]
    plain, quick = run("librbd_py.cli.main", *store, *words), run("librbd_py.cli", *store, *words)
    assert (quick.returncode, quick.stdout, quick.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_all_of_a_long_output_is_written(tmp_path: Path) -> None:
    """To a pipe, too, which takes 64 KiB at once."""
    out = run("librbd_py.cli", "--store", f"embedded:{tmp_path / 'store'}", "help")
    assert out.returncode == 0
    assert out.stdout.endswith("for help on a specific command.\n")


def test_a_program_ends_in_its_own_way(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import atexit, sys\natexit.register(print, 'last words')\nsys.exit(7)\n")
    out = run("librbd_py.cli", "--store", f"embedded:{tmp_path / 'store'}", "run", program)
    assert (out.returncode, out.stdout) == (7, "last words\n")

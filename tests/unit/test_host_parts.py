"""The host service's parts that need no guest: names of sockets, who may connect, who connected, what setup writes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_glue.host import setup
from qemu_glue.host.access import Allowed, check_reachable, qemu_user
from qemu_glue.host.config import CONFIG, Config, load
from qemu_glue.host.names import LONGEST, component, image_socket
from qemu_glue.host.peer import Identity, parse_command_line, peer_of, vms_running

UUID = str(uuid4())  # services look for it among all processes of the machine


# --- names


@given(st.text(min_size=1, max_size=64), st.text(min_size=1, max_size=64))
def test_two_names_never_have_one_path(one: str, other: str) -> None:
    paths = [image_socket("/run/rbdpy", "nbd", "rbd", "", name) for name in (one, other)]
    assert (paths[0] == paths[1]) == (one == other)
    for path in paths:
        assert len(path.encode()) <= LONGEST
        assert path.isascii()
        assert path.isprintable()
        assert path.count("/") == 6
        assert not any(part.startswith(".") for part in path.split("/"))


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../../x", "x" * 4096, "\n", "ä" * 2000, "~", "%", "\ud800"])
def test_hostile_names(name: str) -> None:
    path = image_socket("/run/rbdpy", "vhost-user", name, name, name)
    assert os.path.normpath(path) == path
    assert len(path) <= LONGEST
    assert path.count("/") == 6


def test_plain_names_stay_readable() -> None:
    path = image_socket("/run/rbdpy", "nbd", "rbd", "", "vm-1.disk_2")
    assert path == "/run/rbdpy/image/nbd/rbd/vm-1.disk_2.sock"
    assert component("a/b", 40) == "a%2Fb"
    assert component("", 40).startswith("~")


def test_a_namespace_is_no_pool() -> None:
    assert image_socket("/r", "nbd", "a", "b", "i") == "/r/image/nbd/a%2Fb/i.sock"  # a pool's name has no "/"


# --- who connected


@pytest.mark.parametrize(
    ("words", "identity"),
    [
        (["-uuid", UUID, "-name", "guest=v0,debug-threads=on"], Identity(UUID, "v0", False)),
        (["--uuid", UUID.upper(), "-name", "v0"], Identity(UUID, "v0", False)),
        (["-name", "guest=a,,b,debug-threads=on", "-incoming", "defer"], Identity("", "a,b", True)),
        (["-name", "debug-threads=on"], Identity()),
        (["-uuid", "../../etc", "-name", "x\ny"], Identity("", "x?y", False)),
        (["-uuid"], Identity()),
        (["-incoming"], Identity()),
        (["-name", "n" * 9999], Identity("", "n" * 256, False)),
    ],
)
def test_what_a_command_line_says(words: list[str], identity: Identity) -> None:
    assert parse_command_line(b"\0".join(w.encode() for w in ["qemu", *words])) == identity


def test_the_program_name_is_no_option() -> None:
    assert parse_command_line(b"-uuid\0" + UUID.encode()) == Identity()


@given(st.binary(max_size=300))
def test_any_bytes_are_a_command_line(line: bytes) -> None:
    identity = parse_command_line(line)
    assert identity.name.isprintable()
    assert identity.key


def test_the_kernel_says_who_it_is(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    program = f"import socket,sys; s=socket.socket(1); s.connect({path!r}); sys.stdin.read()"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        command = [sys.executable, "-c", program, "-uuid", UUID, "-name", "guest=v7"]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            sock, _ = listener.accept()
            with sock:
                peer = peer_of(sock)
                assert (peer.pid, peer.uid) == (process.pid, os.getuid())
                assert peer.identity == Identity(UUID, "v7", False)
                assert UUID in vms_running()
                peer.close()
                process.kill()
                process.wait()
                with pytest.raises(OSError, match="gone"):
                    peer_of(sock)
    assert UUID not in vms_running()


# --- who may connect


def test_qemu_conf_decides(tmp_path: Path) -> None:
    conf = tmp_path / "qemu.conf"
    conf.write_text('#user = "nobody"\n  user = "root"   # ours\ngroup="+65534"\nuserx = "y"\n')
    allowed = qemu_user(conf=str(conf))
    assert (allowed.uid, allowed.gid) == (0, 65534)
    assert qemu_user("nobody", "root", str(conf)).gid == 0
    with pytest.raises(OSError, match="not there"):
        qemu_user("no-such-user-here", conf=str(conf))
    assert qemu_user(conf=str(tmp_path / "none")).uid >= 0


def test_a_socket_that_qemu_cannot_reach_is_found(tmp_path: Path) -> None:
    someone = Allowed(54321, 54322, frozenset({54322}))
    folder = Path("/tmp") / f"rbdpy-reach-{os.getpid()}"
    folder.mkdir(0o755)
    path = folder / "s"
    try:
        path.touch(0o600)
        with pytest.raises(OSError, match="cannot connect"):
            check_reachable(str(path), someone)
        os.chown(path, -1, 54322)
        path.chmod(0o660)
        check_reachable(str(path), someone)
        folder.chmod(0o700)
        with pytest.raises(OSError, match="cannot enter"):
            check_reachable(str(path), someone)
        check_reachable(str(path), Allowed(0, 0, frozenset()))
    finally:
        path.unlink()
        folder.rmdir()


# --- setup


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mode, path.read_text() if path.is_file() else "")
        for path in sorted(folder.rglob("*"))
    }


def test_setup_is_idempotent_and_remove_takes_all_away(tmp_path: Path) -> None:
    said: list[str] = []
    config = Config(store="embedded:/srv/x", pools=("a", "b"))
    setup.set_up(config, said.append, dry_run=True, prefix=str(tmp_path))
    assert tree(tmp_path) == {}
    setup.set_up(config, said.append, prefix=str(tmp_path))
    first = tree(tmp_path)
    assert any("restart it once" in line for line in said)
    assert load(f"{tmp_path}{CONFIG}") == config
    assert "--pools" in config.arguments()
    hook = tmp_path / setup.HOOK.lstrip("/")
    assert hook.stat().st_mode & 0o777 == 0o755
    said.clear()
    setup.set_up(config, said.append, prefix=str(tmp_path))
    assert said == ["nothing to do: all is there"]
    assert tree(tmp_path) == first
    setup.remove(config, said.append, prefix=str(tmp_path))
    assert [path for path in tree(tmp_path) if (tmp_path / path).is_file()] == []


def test_setup_leaves_others_files_alone(tmp_path: Path) -> None:
    other = tmp_path / setup.UNIT.lstrip("/")
    other.parent.mkdir(parents=True)
    other.write_text("[Unit]\n")
    with pytest.raises(FileExistsError, match="not written by rbdpy"):
        setup.set_up(Config(), print, prefix=str(tmp_path))
    assert [path for path in tree(tmp_path) if (tmp_path / path).is_file()] == [setup.UNIT.lstrip("/")]
    setup.remove(Config(), print, prefix=str(tmp_path))
    assert other.read_text() == "[Unit]\n"


@pytest.mark.parametrize("text", ["{", "[]", '{"run": 1}', '{"pools": 1}', "\0"])
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "host.json").write_text(text)
    with pytest.raises(OSError, match=r"host\.json"):
        load(str(tmp_path / "host.json"))

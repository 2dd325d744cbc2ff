"""How a Ceph cluster is named, and what is said when it cannot be reached. No cluster is needed."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from librbd_py import rados as face
from librbd_py.cli.main import store_of
from librbd_py.store import connect, default_url, is_ceph, rados
from librbd_py.store.rados import ClusterOptions, connection, make_url, parse_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ceph", ClusterOptions()),
        ("ceph:/etc/ceph/b.conf", ClusterOptions("/etc/ceph/b.conf")),
        ("ceph:b.conf?user=vm", ClusterOptions("b.conf", "client.vm")),
        ("rados:/b?user=client.vm", ClusterOptions("/b", "client.vm")),
        ("ceph?user=a%26b", ClusterOptions(None, "client.a&b")),
        ("ceph:/with%20space%3F", ClusterOptions("/with space?")),
        ("ceph?rbdpy_connection=2", ClusterOptions(hints=(("rbdpy_connection", "2"),))),
        (
            "ceph?mon_host=[::1]:6789&keyring=/k",
            ClusterOptions(options=(("keyring", "/k"), ("mon_host", "[::1]:6789"))),
        ),
    ],
)
def test_urls(url: str, expected: ClusterOptions) -> None:
    assert is_ceph(url)
    assert parse_url(url) == expected


@pytest.mark.parametrize("url", ["ceph?user=", "ceph?user", "ceph?=x", "ceph:/c?user=a&", "cephs:/c", "embedded:/x"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(OSError) as caught:
        parse_url(url)
    assert caught.value.errno == errno.EINVAL


def test_a_url_wins_over_what_the_program_says() -> None:
    base = ClusterOptions("/base", "client.base", (("keyring", "/base"), ("log_file", "/l")), (("x", "y"),), "other")
    assert parse_url("ceph", base) == base
    told = parse_url("ceph:/url?user=url&keyring=/url", base)
    assert told == ClusterOptions(
        "/url", "client.url", (("keyring", "/url"), ("log_file", "/l")), (("x", "y"),), "other"
    )


def test_urls_can_be_made() -> None:
    url = make_url("/a b?c", user="x&y", keyring="/k", nothing="")
    assert parse_url(url) == ClusterOptions("/a b?c", "client.x&y", (("keyring", "/k"),))
    assert make_url() == "ceph"


def test_the_environment_names_the_file_and_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CEPH_CONF", raising=False)
    monkeypatch.delenv("CEPH_ARGS", raising=False)
    assert ClusterOptions().resolved() == ClusterOptions(None, "client.admin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CEPH_CONF", "some.conf")
    for words in ("--id vm", "--id=vm", "--user vm --debug-ms=0", "-n client.vm", "--name=client.vm --keyring k"):
        monkeypatch.setenv("CEPH_ARGS", words)
        told = tuple(words.split())
        assert ClusterOptions().resolved() == ClusterOptions(str(tmp_path / "some.conf"), "client.vm", words=told)
        assert ClusterOptions("/b", "client.c").resolved() == ClusterOptions("/b", "client.c", words=told)
    monkeypatch.setenv("CEPH_ARGS", "--id 'unclosed")
    with pytest.raises(OSError, match="CEPH_ARGS") as caught:
        ClusterOptions().resolved()
    assert caught.value.errno == errno.EINVAL


def test_the_command_line_names_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RBDPY_STORE", raising=False)
    monkeypatch.delenv("CEPH_CONF", raising=False)
    assert default_url() == "embedded:/var/lib/rbdpy"
    assert store_of({}) is None
    assert store_of({"id": "vm"}) is None
    assert store_of({"mon": "1.2.3.4:1", "id": "vm"}) == "ceph?user=vm&mon_host=1.2.3.4:1"
    assert store_of({"store": "embedded:/x", "id": "vm"}) == "embedded:/x"
    assert store_of({"conf": "/c", "id": "vm", "keyring": "/k e"}) == "ceph:/c?user=vm&keyring=/k%20e"
    assert store_of({"store": "ceph:/c?user=a", "mon": "1.2.3.4:1"}) == "ceph:/c?user=a&mon_host=1.2.3.4:1"
    monkeypatch.setenv("CEPH_CONF", "/env")
    assert default_url() == "ceph"
    assert store_of({"id": "vm"}) == "ceph?user=vm"
    assert store_of({}) is None
    monkeypatch.setenv("RBDPY_STORE", "/folder")
    assert default_url() == "/folder"
    assert store_of({"id": "vm"}) is None
    monkeypatch.setenv("RBDPY_STORE", "ceph")
    assert store_of({"id": "vm"}) == "ceph?user=vm"
    assert store_of({}) is None


def test_a_machine_without_librados_is_told_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        @staticmethod
        def rbdn_rados_load() -> int:
            return -errno.ENOSYS

    monkeypatch.setattr(connection, "lib", Nothing)
    with pytest.raises(OSError, match=r"librados is not installed: .* the Debian package librados2") as caught:
        connect("ceph:/none")
    assert caught.value.errno == errno.ENOPKG
    with pytest.raises(face.OSError, match="librados2"):
        face.Rados(conf={"rbdpy_store": "ceph:/none"}).connect()


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"/none\.conf"):
        rados.connect(ClusterOptions("/none.conf"))
    conf = tmp_path / "ceph.conf"
    conf.write_text("[global]\nmon host = 127.0.0.1:1\n")
    assert is_ceph(str(conf)) and not is_ceph(str(tmp_path))
    with pytest.raises(OSError, match="no option 'nonsense'") as caught:
        connect(f"ceph:{conf}?nonsense=1")
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="client_mount_timeout=x"):
        connect(f"ceph:{conf}?client_mount_timeout=x")


def test_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    conf = tmp_path / "ceph.conf"
    conf.write_text("[global]\nmon host = v1:127.0.0.1:1\nclient mount timeout = 1\nauth client required = none\n")
    with pytest.raises(TimeoutError, match=r"ceph\.conf as client\.vm"):
        connect(f"{make_url(str(conf), user='vm')}")

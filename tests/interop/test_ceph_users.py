"""Users of a cluster with authentication: keyrings, and what a user may not do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from librbd_py import rados, rbd
from librbd_py.cli.main import main
from librbd_py.devcluster import DevCluster
from librbd_py.devcluster.admin import Admin
from librbd_py.store import connect
from librbd_py.store.rados import make_url

R = rbd.RBD()


class Users:
    def __init__(self, conf: str, folder: Path, pool: str) -> None:
        self.conf = conf
        self.folder = folder
        self.pool = pool

    def keyring(self, name: str, where: str) -> str:
        """The file of a new user who may use images there."""
        path = self.folder / f"{name}.keyring"
        with Admin(self.conf) as admin:
            caps = ["mon", "profile rbd", "osd", f"profile rbd {where}"]
            (row,) = admin.mon("auth get-or-create", entity=f"client.{name}", caps=caps)
        path.write_text(f"[client.{name}]\n\tkey = {row['key']}\n")
        return str(path)

    def rbdpy(self, user: str, keyring: str, *words: str) -> int:
        return main(["-c", self.conf, "--id", user, "--keyring", keyring, *words])


@pytest.fixture
def users(ceph_cluster: DevCluster, ceph_pool: str, tmp_path: Path) -> Iterator[Users]:
    yield Users(ceph_cluster.conf, tmp_path, ceph_pool)
    with Admin(ceph_cluster.conf) as admin:
        for path in tmp_path.glob("*.keyring"):
            admin.mon("auth del", entity=f"client.{path.stem}")


def test_a_user_of_one_pool(users: Users) -> None:
    keyring = users.keyring("vm", f"pool={users.pool}")
    with connect(make_url(users.conf, user="vm", keyring=keyring)) as store:
        io = store.open(users.pool)
        R.create(io, "a", 1 << 22)
        with rbd.Image(io, "a") as image:
            image.write(b"mine", 0)  # with the lock
            image.create_snap("s")
            assert image.is_exclusive_lock_owner()
        assert list(io.objects())
        with pytest.raises(PermissionError) as caught:
            list(store.open("rbd").objects())
        assert caught.value.errno == errno.EPERM
        with pytest.raises(OSError) as refused:
            store.pool_create("another")
        assert refused.value.errno in (errno.EPERM, errno.EACCES)
    with connect(make_url(users.conf)) as store:
        with rbd.Image(store.open(users.pool), "a", snapshot="s") as image:
            assert image.read(0, 4) == b"mine"


def test_a_user_of_one_namespace(users: Users, capsys: pytest.CaptureFixture[str]) -> None:
    keyring = users.keyring("tenant", f"pool={users.pool} namespace=tenant")
    with connect(make_url(users.conf)) as store:
        R.namespace_create(store.open(users.pool), "tenant")
        R.create(store.open(users.pool), "others", 1 << 20)
    where = f"{users.pool}/tenant"
    assert users.rbdpy("tenant", keyring, "create", "--size", "1M", f"{where}/a") == 0
    assert users.rbdpy("tenant", keyring, "ls", where) == 0
    assert capsys.readouterr().out == "a\n"
    assert users.rbdpy("tenant", keyring, "ls", users.pool) == errno.EPERM
    assert users.rbdpy("tenant", keyring, "info", f"{users.pool}/others") == errno.EPERM
    with connect(make_url(users.conf, user="tenant", keyring=keyring)) as store:
        with rbd.Image(store.open(users.pool, "tenant"), "a") as image:
            image.write(b"x", 0)
            image.resize(2 << 20)
            assert (image.read(0, 1), image.size()) == (b"x", 2 << 20)


def test_who_is_not_known(users: Users, capsys: pytest.CaptureFixture[str]) -> None:
    keyring = users.keyring("vm", f"pool={users.pool}")
    assert users.rbdpy("nobody", keyring, "ls", users.pool) != 0
    assert "client.nobody" in capsys.readouterr().err
    wrong = users.folder / "wrong"
    wrong.write_text("[client.vm]\n\tkey = AQBnKEJnAAAAABAAVkr0wPBMt8ZmN0vN8cFqzA==\n")
    with pytest.raises(OSError, match=r"as client\.vm") as caught:
        connect(make_url(users.conf, user="vm", keyring=str(wrong)))
    assert caught.value.errno in (errno.EACCES, errno.EPERM)
    # As the tools of Ceph are told; librados looks once in the life of a process.
    told = {**os.environ, "CEPH_ARGS": f"--id vm --keyring {keyring}"}
    for pool, code in ((users.pool, 0), ("rbd", errno.EPERM)):
        command = [sys.executable, "-m", "librbd_py.cli.main", "-c", users.conf, "ls", pool]
        assert subprocess.run(command, env=told, stderr=subprocess.DEVNULL, timeout=60).returncode == code
    with rados.Rados(conffile=users.conf, rados_id="vm", conf={"keyring": keyring}) as cluster:
        assert cluster.pool_exists(users.pool)
        with cluster.open_ioctx("rbd") as ioctx, pytest.raises(rados.PermissionError):
            ioctx.read("o")


def test_a_clone_where_the_user_may_not_look_is_believed(users: Users, ceph_cluster: DevCluster) -> None:
    """By Ceph's permissions.sh: the snapshot is in use, and stays protected."""
    keyring = users.keyring("images", f"pool={users.pool}")
    with connect(make_url(users.conf)) as admin:
        other = f"{users.pool}-clones"
        admin.pool_create(other)
        try:
            R.create(admin.open(users.pool), "parent", 1 << 22)
            with rbd.Image(admin.open(users.pool), "parent") as image:
                image.create_snap("s")
                image.protect_snap("s")
            R.config_set(admin.open(other), "rbd_default_clone_format", "1")
            R.clone(admin.open(users.pool), "parent", "s", admin.open(other), "child")
            with connect(make_url(users.conf, user="images", keyring=keyring)) as store:
                with rbd.Image(store.open(users.pool), "parent") as image:
                    with pytest.raises(rbd.ImageBusy):
                        image.unprotect_snap("s")
                    assert image.is_protected_snap("s")
        finally:
            admin.pool_remove(other)

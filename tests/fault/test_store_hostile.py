"""An embedded store whose folder somebody else prepared, damaged or half removed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from librbd_py.store.api import Create, Read, SnapContext, WriteFull
from librbd_py.store.embedded import EmbeddedStore, check


@contextmanager
def refused(*codes: int) -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno in codes, caught.value
    assert str(caught.value.strerror) != os.strerror(caught.value.errno or 0), "says nothing about what to do"
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors were left open"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with one object and one image's data, closed."""
    with EmbeddedStore(tmp_path / "store", create=True) as store:
        io = store.open("rbd")
        io.write("o", [WriteFull(b"content")])
        io.native_data("rbd_data.abc", 16).close()
        io.write(f"rbd_data.abc.{0:016x}", [WriteFull(b"data")])
    return tmp_path / "store"


def replace_by_link(victim: Path) -> None:
    aside = victim.parent.parent / f"aside-{victim.name}"
    victim.rename(aside)
    victim.symlink_to(aside)


@pytest.mark.parametrize("name", ["store.json", "meta.db", "run", "data"])
def test_symbolic_links_in_the_store_are_refused(path: Path, name: str) -> None:
    replace_by_link(path / name)
    with refused(errno.ELOOP):
        EmbeddedStore(path, create=True)


def test_a_symbolic_link_as_the_store_is_refused(path: Path) -> None:
    link = path.parent / "link"
    link.symlink_to(path)
    with refused(errno.ELOOP):
        EmbeddedStore(link)


def test_a_symbolic_link_as_a_layout_is_refused(path: Path) -> None:
    replace_by_link(path / "data" / "1")
    with EmbeddedStore(path) as store, refused(errno.ELOOP, errno.ENOTDIR):
        store.open("rbd").read(f"rbd_data.abc.{0:016x}", [Read()])


def test_links_in_run_lead_nowhere(path: Path) -> None:
    target = path.parent / "precious"
    target.write_text("keep me")
    for name in ("watch.db", "watch.db-wal", "4200.lock", "4200.sock"):
        (path / "run" / name).unlink(missing_ok=True)
        (path / "run" / name).symlink_to(target)
    with EmbeddedStore(path) as store:
        io = store.open("rbd")
        io.watch("o", lambda *call: b"")
        assert len(io.notify("o", b"").acks) == 1
    assert target.read_text() == "keep me"
    (path / "run" / "guard").unlink()
    (path / "run" / "guard").symlink_to(target)
    with refused(errno.ELOOP):
        EmbeddedStore(path)


@pytest.mark.parametrize("name", [".", "run", "data"])
@pytest.mark.parametrize("mode", [0o755, 0o701, 0o770])
def test_folders_that_others_may_enter_are_refused(path: Path, name: str, mode: int) -> None:
    (path / name).chmod(mode)
    with refused(errno.EACCES):
        EmbeddedStore(path)


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_an_empty_folder_is_closed_to_others(tmp_path: Path, mode: int) -> None:
    made = tmp_path / "made"
    made.mkdir()
    made.chmod(mode)
    EmbeddedStore(made, create=True).close()
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    used = tmp_path / "used"
    used.mkdir()
    used.chmod(mode)
    (used / "store.json").write_text("{}")
    with refused(errno.EACCES):
        EmbeddedStore(used, create=True)
    assert stat.S_IMODE(used.stat().st_mode) == mode


@pytest.mark.parametrize("name", [".", "run", "data", "meta.db", "store.json"])
def test_what_belongs_to_somebody_else_is_refused(path: Path, name: str) -> None:
    os.chown(path / name, 12345, 12345)
    with refused(errno.EACCES):
        EmbeddedStore(path)


@pytest.mark.parametrize("name", ["meta.db", "store.json"])
def test_files_that_others_can_write_or_name_are_refused(path: Path, name: str) -> None:
    (path / name).chmod(0o666)
    with refused(errno.EACCES):
        EmbeddedStore(path)
    (path / name).chmod(0o600)
    os.link(path / name, path.parent / "second name")
    with refused(errno.EACCES):
        EmbeddedStore(path)


def fifo(victim: Path) -> None:
    victim.unlink()
    os.mkfifo(victim, 0o600)


def folder(victim: Path) -> None:
    victim.unlink()
    victim.mkdir(0o700)


@pytest.mark.parametrize("name", ["meta.db", "store.json"])
@pytest.mark.parametrize("make", [fifo, folder])
def test_what_is_no_file_is_refused_without_waiting(path: Path, name: str, make: Callable[[Path], None]) -> None:
    make(path / name)
    with refused(errno.EACCES):
        EmbeddedStore(path)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", errno.EUCLEAN),
        ("{", errno.EUCLEAN),
        ("[]", errno.EUCLEAN),
        ("null", errno.EUCLEAN),
        ('{"version": 1}', errno.EUCLEAN),
        ('{"version": "1", "fsid": "x"}', errno.EUCLEAN),
        ('{"version": 1, "fsid": 7}', errno.EUCLEAN),
        ('{"version": 1, "fsid": "../../x"}', errno.EUCLEAN),
        ("[" * 50_000, errno.EUCLEAN),
        ("\udcff\udcfe", errno.EUCLEAN),
        (" " * 100_000, errno.EFBIG),
        ('{"version": 2, "fsid": "6f1f0f63-4f5c-4b1c-9f0c-3b9f6f3c2c11"}', errno.EPROTONOSUPPORT),
    ],
)
def test_a_damaged_store_json_is_explained(path: Path, text: str, code: int) -> None:
    (path / "store.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with refused(code):
        EmbeddedStore(path)


def test_a_database_of_garbage_is_explained(path: Path) -> None:
    for content in (b"garbage" * 10_000, b"SQLite format 3\0" + b"\xff" * 5000):
        for name in ("meta.db-wal", "meta.db-shm"):
            (path / name).unlink(missing_ok=True)
        (path / "meta.db").write_bytes(content)
        with refused(errno.EUCLEAN):
            EmbeddedStore(path)
        with refused(errno.EUCLEAN):
            EmbeddedStore(path, create=True)
        assert any(f.severity == "error" and f.where == "meta.db" for f in check.check(path))


def test_an_empty_or_foreign_database_is_not_taken_over(path: Path) -> None:
    (path / "meta.db").write_bytes(b"")
    with refused(errno.EUCLEAN):
        EmbeddedStore(path)
    with sqlite3.connect(path / "meta.db") as c:
        c.execute("CREATE TABLE other(x)")
        c.execute("PRAGMA application_id=5")
    c.close()
    for create in (False, True):
        with refused(errno.EUCLEAN):
            EmbeddedStore(path, create=create)


def test_a_database_of_a_newer_version_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path / "meta.db") as c:
        c.execute("PRAGMA user_version=99")
    c.close()
    with refused(errno.EPROTONOSUPPORT):
        EmbeddedStore(path)


def test_a_missing_database_is_not_replaced_by_an_empty_one(path: Path) -> None:
    (path / "meta.db").unlink()
    with refused(errno.EUCLEAN):
        EmbeddedStore(path)


def test_a_folder_with_other_things_does_not_become_a_store(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(0o700)
    (home / "letter.txt").write_text("dear all")
    with refused(errno.ENOTEMPTY):
        EmbeddedStore(home, create=True)
    with refused(errno.ENOENT):
        EmbeddedStore(home)
    assert [p.name for p in home.iterdir()] == ["letter.txt"]
    with refused(errno.ENOENT):
        EmbeddedStore(tmp_path / "nowhere")
    with refused(errno.ENOTDIR):
        EmbeddedStore(home / "letter.txt", create=True)


def test_run_is_volatile(path: Path) -> None:
    shutil.rmtree(path / "run")
    with EmbeddedStore(path) as store:
        io = store.open("rbd")
        io.watch("o", lambda *call: b"")
        assert len(io.notify("o", b"").acks) == 1
    (path / "run" / "watch.db").write_bytes(b"left by a power cut" * 1000)
    (path / "run" / "watch.db-wal").write_bytes(b"torn" * 1000)
    (path / "run" / "4101.lock").touch()
    with EmbeddedStore(path) as store:
        io = store.open("rbd")
        io.watch("o", lambda *call: b"")
        assert len(io.notify("o", b"").acks) == 1


def test_the_umask_does_not_matter(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        for number, mask in enumerate((0, 0o077)):
            os.umask(mask)
            with EmbeddedStore(tmp_path / f"s{number}", create=True) as store:
                store.open("rbd").write("o", [Create()])
                store.open("rbd").watch("o", lambda *call: b"")
                store.open("rbd").native_data("rbd_data.abc", 16).close()
            for folder, _, files in os.walk(tmp_path / f"s{number}"):
                assert os.stat(folder).st_mode & 0o777 == 0o700, folder
                for name in files:
                    assert not os.stat(os.path.join(folder, name)).st_mode & 0o077, (folder, name)
    finally:
        os.umask(old)


def test_the_description_names_what_it_is(path: Path) -> None:
    content = json.loads((path / "store.json").read_text())
    assert content["version"] == 1
    with EmbeddedStore(path) as store:
        assert store.fsid == content["fsid"]


def test_a_damaged_image_does_not_keep_others_from_losing_their_snapshots(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with EmbeddedStore(path) as store:
        io = store.open("rbd")
        io.native_data("rbd_data.xyz", 16).close()
        snap = io.snap_create()
        for image in ("abc", "xyz"):
            io.write(f"rbd_data.{image}.{0:016x}", [WriteFull(b"1")])
            io.write(f"rbd_data.{image}.{0:016x}", [WriteFull(b"2")], SnapContext(snap, (snap,)))
        store.layouts.close()
        (path / "data" / "1" / "index").write_bytes(b"damaged")
        io.snap_remove(snap)
        assert "clearing up" in caplog.text
        assert not (path / "data" / "2" / f"clone.{snap}").exists()
        assert (path / "data" / "1" / f"clone.{snap}").exists()
    with EmbeddedStore(path) as store:
        assert store.open("rbd").read(f"rbd_data.xyz.{0:016x}", [Read()]) == [b"2"]

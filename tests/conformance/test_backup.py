"""Backups of snapshots, full and incremental, in a folder and a real S3; restored to the byte; damage of every kind."""

from __future__ import annotations

import errno
import json
import os
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_fixtures import MIB, R, cluster, io, refused

from librbd_py import rbd
from librbd_py.backup.create import create
from librbd_py.backup.prune import prune, remove
from librbd_py.backup.restore import restore, restore_onto
from librbd_py.backup.target import FolderTarget, S3Target, Target, open_target
from librbd_py.backup.vault import Vault
from librbd_py.backup.wire import LEAST_PART, MAGIC, Manifest, Part, decode_part, digest_of, folder_of
from librbd_py.cli.main import main
from librbd_py.devcluster import S3Access
from librbd_py.format import features as ft
from librbd_py.image import metadata
from librbd_py.net.s3 import Bucket, Credentials
from librbd_py.store.api import ObjectContext
from librbd_py.store.embedded import EmbeddedStore
from librbd_py.store.memory import MemoryCluster, MemoryStore

__all__ = ["cluster", "io"]

SET = "rbd/p"
SNAPS = ("one", "two", "three")


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault(FolderTarget(f"{tmp_path}/backups"))


def make(io: ObjectContext, name: str = "p", **options: Any) -> None:
    pick = random.Random(4)
    R.create(io, name, 6 * MIB, order=20, **options)
    with rbd.Image(io, name) as image:
        metadata.put(image.handle, "note", "an image")
        image.write(pick.randbytes(2 * MIB + 333), 100)
        image.write(bytes(MIB), 4 * MIB)
        image.create_snap("one")
        image.write(pick.randbytes(70_000), 4 * MIB + 10)
        image.discard(MIB, MIB)
        image.resize(9 * MIB)
        image.write(b"end", 9 * MIB - 3)
        image.create_snap("two")
        image.protect_snap("two")
        image.resize(5 * MIB)
        image.write(bytes(5000), 2 * MIB)
        image.write(b"x", 3 * MIB)
        image.create_snap("three")
        image.write(b"later", 0)


def contents(io: ObjectContext, name: str, snaps: tuple[str, ...] = SNAPS) -> dict[str, bytes]:
    with rbd.Image(io, name, read_only=True) as image:
        assert [snap["name"] for snap in sorted(image.list_snaps(), key=lambda s: int(s["id"]))] == list(snaps)
        found = {}
        for snap in snaps:
            image.set_snap(snap)
            found[snap] = image.read(0, image.size())
        return found


def contents_of(io: ObjectContext, name: str, snaps: tuple[str, ...]) -> dict[str, bytes]:
    """As `contents`, of some of the snapshots."""
    return {snap: data for snap, data in contents(io, name).items() if snap in snaps}


def back_up(vault: Vault, io: ObjectContext, *snaps: str, **options: Any) -> list[Manifest]:
    return [create(vault, io, "p", snap, SET, **{"part_size": 1 * MIB, **options}) for snap in snaps]


def clean(vault: Vault) -> None:
    report = vault.check(read=True)
    assert report.problems == [] and report.orphans == {}


# --- there and back


@pytest.mark.parametrize("features", [ft.DEFAULT, ft.LAYERING], ids=["fast-diff", "no maps"])
def test_every_snapshot_comes_back(io: ObjectContext, vault: Vault, features: int) -> None:
    make(io, features=features)
    made = back_up(vault, io, *SNAPS)
    assert [each.parent for each in made] == ["", made[0].id, made[1].id]
    assert made[0].stored > 2 * MIB > 1.9 * MIB > made[1].stored + made[2].stored
    assert vault.sets() == [SET] and vault.manifests(SET) == made
    chain = restore(vault, SET, io, "q")
    assert chain == made and contents(io, "q") == contents(io, "p")
    with rbd.Image(io, "q") as image:
        assert image.read(0, 5 * MIB) == contents(io, "p")["three"] and image.size() == 5 * MIB
        assert image.metadata_get("note") == "an image" and image.features() & features == features
        assert image.is_protected_snap("two") and not image.is_protected_snap("one")
        image.unprotect_snap("two")
    clean(vault)
    refused(FileExistsError, errno.EEXIST, restore, vault, SET, io, "q")
    restore(vault, SET, io, "r", wanted="two")
    assert contents(io, "r", SNAPS[:2]) == {k: v for k, v in contents(io, "p").items() if k != "three"}
    restore(vault, SET, io, "s", wanted=made[0].id)
    assert contents(io, "s", ("one",)) == {"one": contents(io, "p")["one"]}


def test_a_real_s3(io: ObjectContext, s3_server: S3Access) -> None:
    make(io)
    keys = Credentials(s3_server.access_key, s3_server.secret_key)
    bucket = Bucket(s3_server.endpoint, "test-backup", keys)
    bucket.create()
    vault = Vault(S3Target(bucket, "here/and there"))
    try:
        made = back_up(vault, io, *SNAPS)
        bucket.put("elsewhere", b"not ours")
        clean(vault)
        restore(vault, SET, io, "q")
        assert contents(io, "q") == contents(io, "p")
        bucket.delete(f"here/and there/data/{made[1].id}/" + next(iter(vault.parts(made[1]))).key("").split("/")[-1])
        assert len(vault.check().problems) == 1
        remove(vault, SET, [each.id for each in made])
        assert [row.key for row in bucket.list("")] == ["elsewhere"]
    finally:
        for row in list(bucket.list("")):
            bucket.delete(row.key)
        bucket.close()


def test_what_was_striped_and_what_was_a_clone(io: ObjectContext, vault: Vault) -> None:
    make(io, stripe_unit=65536, stripe_count=4)
    back_up(vault, io, *SNAPS)
    restore(vault, SET, io, "q")
    assert contents(io, "q") == contents(io, "p")
    with rbd.Image(io, "q") as image:
        assert (image.stripe_unit(), image.stripe_count()) == (65536, 4)
        image.unprotect_snap("two")
    R.clone(io, "p", "two", io, "c")
    with rbd.Image(io, "c") as image:
        image.write(b"mine", MIB)
        image.create_snap("one")
        image.write(b"more", 3 * MIB)
        image.create_snap("two")
    for snap in ("one", "two"):
        create(vault, io, "c", snap, "c")
    restore(vault, "c", io, "d")
    assert contents(io, "d", ("one", "two")) == contents(io, "c", ("one", "two"))


def test_what_had_a_data_pool_and_much_that_is_gone(io: ObjectContext, vault: Vault) -> None:
    R.create(io, "p", 1 << 36, data_pool="data", features=ft.DEFAULT)
    with rbd.Image(io, "p") as image:
        image.write(b"x" * 5000, 1 << 35)
        image.write(b"y", (1 << 36) - 1)
        image.create_snap("one")
        image.resize(MIB)
        image.create_snap("two")
        image.resize(1 << 36)
        image.write(b"z", 1 << 34)
        image.create_snap("three")
    back_up(vault, io, *SNAPS)
    restore(vault, SET, io, "q", data_pool="other")
    with rbd.Image(io, "q") as image:
        assert image.size() == 1 << 36 and image.read(1 << 34, 2) == b"z\0" and image.read((1 << 36) - 1, 1) == b"\0"
        image.set_snap("one")
        assert image.read(1 << 35, 5001) == b"x" * 5000 + b"\0" and image.read((1 << 36) - 1, 1) == b"y"


def test_from_one_store_to_another(io: ObjectContext, vault: Vault, tmp_path: Path) -> None:
    make(io)
    back_up(vault, io, *SNAPS)
    with EmbeddedStore(f"{tmp_path}/other", create=True) as store:
        there = store.open("rbd")
        restore(vault, SET, there, "p")
        assert contents(there, "p") == contents(io, "p")


# --- what it is an increment to


def test_an_increment_needs_its_snapshot(io: ObjectContext, vault: Vault) -> None:
    make(io)
    first, second = back_up(vault, io, "one", "two")
    with rbd.Image(io, "p") as image:
        image.unprotect_snap("two")
        image.remove_snap("two")
    (third,) = back_up(vault, io, "three")
    assert third.parent == first.id and second.parent == first.id
    restore(vault, SET, io, "q")
    assert contents(io, "q", ("one", "three")) == contents(io, "p", ("one", "three"))
    restore(vault, SET, io, "r", wanted="two")
    refused(FileExistsError, errno.EEXIST, back_up, vault, io, "three")
    (full,) = back_up(vault, io, "three", full=True)
    assert not full.parent and full.id != third.id
    with rbd.Image(io, "p") as image:
        image.remove_snap("one")
        image.remove_snap("three")
        image.create_snap("one")
    (anew,) = back_up(vault, io, "one")
    assert not anew.parent and anew.id not in {first.id, third.id}
    refused(FileNotFoundError, errno.ENOENT, back_up, vault, io, "three")
    refused(FileNotFoundError, errno.ENOENT, create, vault, io, "none", "one", SET)
    clean(vault)


def test_snapshots_with_one_name(io: ObjectContext, vault: Vault) -> None:
    R.create(io, "p", MIB)
    with rbd.Image(io, "p") as image:
        image.create_snap("daily")
        (first,) = back_up(vault, io, "daily")
        image.rename_snap("daily", "old")
        image.write(b"x", 5)
        image.create_snap("daily")
        back_up(vault, io, "daily")
    restore(vault, SET, io, "q")
    assert contents(io, "q", (f"daily-{first.id[:8]}", "daily"))["daily"][5] == ord("x")


def test_another_image_of_the_same_name(io: ObjectContext, vault: Vault) -> None:
    make(io)
    (first,) = back_up(vault, io, "one")
    R.rename(io, "p", "old")
    make(io)
    (second,) = back_up(vault, io, "three")
    assert not second.parent and second.image_id != first.image_id
    restore(vault, SET, io, "q", wanted=second.id)
    assert contents(io, "q", ("three",))["three"] == contents(io, "p")["three"]


def test_what_was_sent_before_is_not_sent_again(io: ObjectContext, vault: Vault) -> None:
    class Breaks(FolderTarget):
        left = 2

        def put(self, key: str, data: bytes, digest: str) -> None:
            if not self.left:
                raise OSError(errno.ENOSPC, "full")
            self.left -= 1
            super().put(key, data, digest)

    make(io)
    target = Breaks(str(vault.target._root))  # type: ignore[attr-defined]
    refused(OSError, errno.ENOSPC, back_up, Vault(target), io, "one", parallel=1)
    assert vault.sets() == [] and refused_restore(vault, io)
    report = vault.check()
    assert next(iter(report.orphans)).startswith("unfinished backup") and report.orphan_bytes > MIB
    target.left = 100
    (made,) = back_up(Vault(target), io, "one")
    assert 100 - target.left == made.parts - 2 + len(made.indexes) + 1
    clean(vault)


def refused_restore(vault: Vault, io: ObjectContext) -> bool:
    refused(FileNotFoundError, errno.ENOENT, restore, vault, SET, io, "q")
    return True


# --- onto an image


def test_a_restored_image_follows(io: ObjectContext, vault: Vault) -> None:
    make(io)
    first, second = back_up(vault, io, "one", "two")
    restore(vault, SET, io, "q", wanted="one")
    assert restore_onto(vault, SET, io, "q", wanted="one") == []
    assert restore_onto(vault, SET, io, "q") == [second]
    assert contents(io, "q", SNAPS[:2]) == contents_of(io, "p", SNAPS[:2])
    (third,) = back_up(vault, io, "three")
    with rbd.Image(io, "q") as image:
        assert image.is_protected_snap("two")
        image.write(b"mine", MIB)
    refused(OSError, errno.ESTALE, restore_onto, vault, SET, io, "q")
    assert restore_onto(vault, SET, io, "q", force=True) == [third]
    assert contents(io, "q") == contents(io, "p")
    with rbd.Image(io, "q") as image:
        assert image.read(0, 5 * MIB) == contents(io, "p")["three"] and image.size() == 5 * MIB
    made = create(vault, io, "q", "three", "of the copy")
    assert not [key for key in made.metadata if "backup" in key] and first.id != made.id


def test_the_image_itself_goes_forward_again(io: ObjectContext, vault: Vault) -> None:
    make(io)
    back_up(vault, io, *SNAPS)
    expected = contents(io, "p")
    with rbd.Image(io, "p") as image:
        image.remove_snap("three")
    refused(OSError, errno.ESTALE, restore_onto, vault, SET, io, "p")
    assert [each.snapshot for each in restore_onto(vault, SET, io, "p", force=True)] == ["three"]
    assert contents(io, "p") == expected


def test_an_image_that_has_nothing_to_do_with_it(io: ObjectContext, vault: Vault) -> None:
    make(io)
    back_up(vault, io, "one")
    make(io, "other")
    refused(FileNotFoundError, errno.ENOENT, restore_onto, vault, SET, io, "other")
    refused(FileNotFoundError, errno.ENOENT, restore_onto, vault, SET, io, "none")


# --- removing


def test_removing_and_pruning(io: ObjectContext, vault: Vault) -> None:
    make(io)
    first, second, third = back_up(vault, io, *SNAPS)
    refused(OSError, errno.EBUSY, remove, vault, SET, [first.id])
    refused(FileNotFoundError, errno.ENOENT, remove, vault, SET, ["0" * 24])
    assert prune(vault, SET, 1) == [] and len(vault.manifests(SET)) == 3
    remove(vault, SET, [third.id])
    assert vault.manifests(SET) == [first, second]
    with rbd.Image(io, "p") as image:
        image.create_snap("four")
    (fourth,) = back_up(vault, io, "four", full=True)
    assert prune(vault, SET, 2) == []
    assert prune(vault, SET, 1) == [first, second]
    assert vault.manifests(SET) == [fourth]
    clean(vault)
    restore(vault, SET, io, "q")
    assert contents(io, "q", ("four",))["four"][:5] == b"later"


# --- damage


def files(vault: Vault) -> list[Path]:
    root: Path = vault.target._root  # type: ignore[attr-defined]
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_any_file_that_is_damaged_is_found(tmp_path: Path) -> None:
    """Each file in turn: cut short, a bit turned, longer, empty, gone, a folder in its place."""

    def cut(path: Path) -> None:
        os.truncate(path, path.stat().st_size - 1)

    def turn(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def longer(path: Path) -> None:
        path.write_bytes(path.read_bytes() + b"x")

    def folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    vault = Vault(FolderTarget(f"{tmp_path}/backups"))
    with MemoryStore(MemoryCluster()) as store:
        store.pool_create("rbd")
        io = store.open("rbd")
        make(io)
        back_up(vault, io, *SNAPS, part_size=2 * MIB)
        damages = (cut, turn, longer, lambda path: path.write_bytes(b""), Path.unlink, folder)
        for path in files(vault):
            whole = path.read_bytes()
            for damage in damages:
                damage(path)
                gone = not path.is_file() and "manifests" in str(path)
                report = vault.check(read=True)
                problem = bool(report.problems) or (gone and bool(report.orphans))
                assert problem, (path, damage)
                if not (gone and "000002" in path.name):  # without its manifest the last backup is none
                    with pytest.raises(OSError) as caught:
                        restore(vault, SET, io, "q")
                    assert caught.value.errno in (errno.EBADMSG, errno.ENOENT, errno.EISDIR), (path, damage)
                    assert list(R.list(io)) == ["p"]
                if path.is_dir():
                    path.rmdir()
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(whole)
        clean(vault)
        restore(vault, SET, io, "q")
        assert contents(io, "q") == contents(io, "p")
        assert R.trash_list(io) is not None and len(list(R.trash_list(io))) == 0


def test_things_that_are_not_ours_are_named(io: ObjectContext, vault: Vault) -> None:
    make(io)
    (made,) = back_up(vault, io, "one")
    target: Target = vault.target
    for key in (
        "README",
        "data/strange",
        f"data/{made.id}/.unfinished-1-x",
        "manifests/note.txt",
        f"data/{'0' * 24}/x",
    ):
        target.put(key, b"?", "")
    report = vault.check()
    assert report.problems == [] and report.orphan_bytes == 5
    assert {name: len(keys) for name, keys in report.orphans.items()} == {
        f"left over in backup {made.id}": 1, "unfinished backup " + "0" * 24: 1, "no part of a backup": 3,
    }  # fmt: skip


def rewritten(vault: Vault, made: Manifest, **change: Any) -> None:
    body = json.loads(made.encode().split(b"\n", 1)[1]) | change
    data = json.dumps(body).encode()
    vault.target.put(made.key, digest_of(data).encode() + b"\n" + data, "")


@pytest.mark.parametrize(
    "change",
    [
        {"size": -1}, {"size": 1 << 63}, {"size": "5"}, {"size": True}, {"parts": 1 << 36}, {"parts": 0}, {"id": "x"},
        {"id": "0" * 24}, {"parent": "0" * 24}, {"parent": None}, {"number": 5}, {"set": ""}, {"set": "../.."},
        {"set": "rbd/other"}, {"indexes": ["../../etc/passwd"]}, {"indexes": {}}, {"indexes": ["0" * 64] * 9},
        {"metadata": []}, {"metadata": {"a": 5}}, {"snapshot": ""}, {"created": "now"}, {"more": 1}, {"order": 1 << 70},
    ],
)  # fmt: skip
def test_a_manifest_that_lies_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    vault = Vault(FolderTarget(f"{tmp_path}/b"))
    made = Manifest(
        "a" * 24, SET, 0, "", 1.0, "id", "p", 4, "one", 1.0, False, MIB, 22, 1 << 22, 1, 61, MIB, 1, 100, ["b" * 64], {}
    )
    rewritten(vault, made)
    assert vault.manifests(SET) == [made]
    rewritten(vault, made, **change)
    refused(OSError, errno.EBADMSG, vault.manifests, SET)


def test_a_manifest_of_a_later_version(tmp_path: Path) -> None:
    vault = Vault(FolderTarget(f"{tmp_path}/b"))
    data = b'{"rbdpy-backup": 2}'
    vault.target.put(f"{folder_of(SET)}000000-{'a' * 24}.json", digest_of(data).encode() + b"\n" + data, "")
    refused(OSError, errno.EOPNOTSUPP, vault.manifests, SET)


def test_increments_that_go_in_a_circle(tmp_path: Path) -> None:
    """Numbers fall from each to what it needs, so there is no circle to follow."""
    vault = Vault(FolderTarget(f"{tmp_path}/b"))
    base: list[Any] = [1.0, "id", "p", 4, "one", 1.0, False, MIB, 22, 1 << 22, 1, 61, MIB, 0, 0, []]
    one = Manifest("a" * 24, SET, 1, "b" * 24, *base)
    other = Manifest("b" * 24, SET, 1, "a" * 24, *base)
    alone = Manifest("c" * 24, SET, 1, "c" * 24, *base)
    every = [one, other, alone]
    for each in every:
        refused(OSError, errno.EBADMSG, vault.chain, each, every)


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 1 << 62))
def test_a_part_of_any_bytes(data: bytes, size: int) -> None:
    for whole in (data, MAGIC + data, MAGIC + b"\1\0\0\0" + data):
        try:
            end = 0
            for offset, length, content in decode_part(whole, size):
                assert end <= offset and length > 0 and offset + length <= size
                assert content is None or len(content) == length
                end = offset + length
        except OSError as failure:
            assert failure.errno == errno.EBADMSG


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50), st.booleans()), max_size=20))
def test_a_part_holds_what_was_put_in(rows: list[tuple[int, int, bool]]) -> None:
    part, image, at = Part(), bytearray(b"?" * 3000), 0
    expected = bytearray(image)
    for gap, length, zero in rows:
        at += gap
        data = None if zero else bytes([length]) * length
        part.add(at, length, data)
        expected[at : at + length] = data or bytes(length)
        at += length
    for offset, length, content in decode_part(part.encode(), 3000):
        image[offset : offset + length] = content if content is not None else bytes(length)
    assert image == expected


def test_memory_is_bounded(tmp_path: Path) -> None:
    vault = Vault(FolderTarget(f"{tmp_path}/backups"))
    with EmbeddedStore(f"{tmp_path}/s", create=True) as store:
        io = store.open("rbd")
        R.create(io, "p", 256 * MIB)
        with rbd.Image(io, "p") as image:
            for at in range(0, 64 * MIB, 4 * MIB):
                image.write(os.urandom(4 * MIB), at)
            image.create_snap("one")
        tracemalloc.start()
        try:
            back_up(vault, io, "one", parallel=2)
            restore(vault, SET, io, "q", parallel=2)
            assert tracemalloc.get_traced_memory()[1] < 40 * MIB
        finally:
            tracemalloc.stop()
        assert contents(io, "q", ("one",)) == contents(io, "p", ("one",))


@pytest.mark.parametrize("size", [0, LEAST_PART - 1, LEAST_PART + 1, 65 * MIB])
def test_sizes_of_parts(vault: Vault, size: int) -> None:
    with MemoryStore(MemoryCluster()) as store:
        store.pool_create("rbd")
        refused(OSError, errno.EINVAL, back_up, vault, store.open("rbd"), "one", part_size=size)


@pytest.mark.parametrize("name", ["", "/", "a//b", "../a", "a/..", "x" * 1000])
def test_names_of_sets(name: str) -> None:
    refused(OSError, errno.EINVAL, folder_of, name)


@pytest.mark.parametrize(
    "url, code",
    [
        ("", errno.EINVAL), ("http://x/", errno.EINVAL), ("file:", errno.EINVAL), ("s3://", errno.EINVAL),
        ("s3://bucket/x?style=odd", errno.EINVAL), ("s3://bucket/x?colour=red", errno.EINVAL), ("s3://b", errno.EINVAL),
        ("file:/dev/null/x", errno.ENOTDIR), ("s3://bucket/x?endpoint=ftp://h", errno.EINVAL),
    ],
)  # fmt: skip
def test_places_that_are_none(monkeypatch: pytest.MonkeyPatch, url: str, code: int) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(OSError) as caught:
        open_target(url)
    assert caught.value.errno == code


# --- the command


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    folder = f"{tmp_path}/store"
    with EmbeddedStore(folder, create=True) as store:
        make(store.open("rbd"))

    def run(*words: str, code: int = 0) -> str:
        assert main(["--store", folder, *words]) == code
        out, err = capsys.readouterr()
        return str(out) + (str(err) if code else "")

    yield run


def test_the_commands(shell: Any, tmp_path: Path) -> None:
    place = f"file:{tmp_path}/b"
    said = shell("backup", "create", place, "p@one", "--no-progress")
    assert "full backup of rbd/p@one, 2.1 MiB in 1 parts" in said or "full backup of rbd/p@one" in said
    said = shell("backup", "create", place, "p", "--all")
    assert said.count("incremental backup") == 2 and "@two" in said and "@three" in said
    assert shell("backup", "create", place, "p", "--all") == "nothing to back up\n"
    rows = json.loads(shell("backup", "ls", place, "--format", "json"))
    assert [(row["snapshot"], row["kind"]) for row in rows] == [
        ("one", "full"), ("two", "incremental"), ("three", "incremental"),
    ]  # fmt: skip
    assert "rbd/p  " in shell("backup", "ls", place) and shell("backup", "ls", place, "other") == ""
    assert shell("backup", "check", place, "--read") == "3 backups, 0 problems\n"
    assert "3 backups of rbd/p, up to three" in shell("backup", "restore", place, "rbd/p", "q")
    assert "1 backups" in shell("backup", "restore", place, "rbd/p", "r", "--backup", "one")
    assert "exists" in shell("backup", "restore", place, "rbd/p", "q", code=17)
    assert "2 backups of rbd/p, up to three" in shell("backup", "restore", place, "rbd/p", "r", "--onto")
    assert "nothing newer" in shell("backup", "restore", place, "rbd/p", "r", "--onto")
    assert "needed by" in shell("backup", "rm", place, "rbd/p", rows[0]["id"], code=16)
    assert "nothing to remove" in shell("backup", "prune", place, "rbd/p", "--keep", "1")
    (tmp_path / "b" / "data" / "stray").write_bytes(b"x")
    assert "orphan: no part of a backup" in shell("backup", "check", place)
    assert "removed: " in shell("backup", "check", place, "--remove-orphans")
    assert shell("backup", "check", place) == "3 backups, 0 problems\n"
    for path in (tmp_path / "b" / "data" / rows[2]["id"]).iterdir():
        path.unlink()
    assert "damaged: rbd/p: " in shell("backup", "check", place, code=1)
    assert json.loads(shell("backup", "check", place, "--format", "json", code=1))["problems"]
    assert "removed" in shell("backup", "rm", place, "rbd/p", rows[2]["id"], rows[1]["id"], rows[0]["id"])
    assert shell("backup", "ls", place) == ""


@pytest.mark.parametrize(
    "words, code",
    [
        (("create",), 22), (("create", "file:{b}"), 22), (("create", "file:{b}", "p"), 22), (("ls",), 22),
        (("create", "file:{b}", "p@none"), 2), (("create", "file:{b}", "p@one", "--part-size", "5"), 22),
        (("restore", "file:{b}"), 22), (("restore", "file:{b}", "rbd/p"), 22),
        (("restore", "file:{b}", "rbd/p", "q"), 2),
        (("rm", "file:{b}", "rbd/p"), 22), (("rm", "file:{b}", "rbd/p", "x"), 2), (("prune", "file:{b}", "rbd/p"), 22),
        (("ls", "gopher:x"), 22),
    ],
)  # fmt: skip
def test_what_is_wrong_has_a_status(shell: Any, tmp_path: Path, words: tuple[str, ...], code: int) -> None:
    assert "rbd: " in shell("backup", *(word.replace("{b}", f"{tmp_path}/b") for word in words), code=code)

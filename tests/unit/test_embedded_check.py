"""`rbdpy store check` on an embedded store: each kind of damage is found and explained; safe ones are mended."""

from __future__ import annotations

import shutil
import sqlite3
import struct
from pathlib import Path

import pytest

from librbd_py.format import object_map
from librbd_py.store.api import Create, Exec, OmapSet, Read, SetXattr, SnapContext, Write, WriteFull
from librbd_py.store.embedded import EmbeddedStore, check
from librbd_py.store.embedded.check import Finding

ORDER = 16
ID = "abc123"
HEADER, MAP, PREFIX = f"rbd_header.{ID}", f"rbd_object_map.{ID}", f"rbd_data.{ID}"


def text(value: str) -> bytes:
    return struct.pack("<I", len(value)) + value.encode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound store: an image with an object map, and an object with a clone."""
    with EmbeddedStore(tmp_path / "store", create=True) as store:
        io = store.open("rbd")
        create = struct.pack("<QBQ", 10 << ORDER, ORDER, 0x0D) + text(PREFIX)
        io.write("rbd_id.image", [WriteFull(text(ID))])
        io.exec("rbd_directory", "rbd", "dir_add_image", text("image") + text(ID))
        io.write(HEADER, [Create(exclusive=True), Exec("rbd", "create", create)])
        io.exec(MAP, "rbd", "object_map_resize", struct.pack("<QB", 10, 0))
        io.write(f"{PREFIX}.{2:016x}", [WriteFull(b"data"), SetXattr("a", b"b")])
        io.write("o", [WriteFull(b"x" * 70_000), OmapSet({b"k": b"v"}), SetXattr("a", b"b")])
        snap = io.snap_create()
        io.write("o", [Write(0, b"y")], SnapContext(snap, (snap,)))
        io.snap_remove(io.snap_create())
    assert check.check(tmp_path / "store") == []
    return tmp_path / "store"


def sql(path: Path, *statements: str) -> None:
    c = sqlite3.connect(path / "meta.db")
    with c:
        for statement in statements:
            assert c.execute(statement).rowcount != 0, statement
    c.close()


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    assert findings[0].what and findings[0].advice and findings[0].where
    return findings[0]


MENDED = {
    "UPDATE counters SET value=0 WHERE name='folder'": "was given",
    "UPDATE counters SET value=1 WHERE name='version'": "was given",
    "INSERT INTO objects VALUES (900, 77, '', 'lost', 0, 1, 0, 0, 1, 0)": "pool 77, which does not exist",
    "INSERT INTO objects VALUES (900, 1, '', 'empty', 0, 0, 0, 0, 1, 0)": "neither exists nor has clones",
    "INSERT INTO objects VALUES (900, 1, '', 'rbd_data.no.0000000000000000', 2, 0, 0, 0, 1, 0)": "image does not exist",
    "INSERT INTO chunks VALUES (900 << 12, x'00')": "which nothing owns",
    "INSERT INTO xattrs VALUES (900, x'61', x'62')": "which nothing owns",
    "INSERT INTO omap VALUES (-900, x'61', x'62')": "which nothing owns",
    "DELETE FROM clone_snaps": "does not list clone",
    "INSERT INTO clone_snaps VALUES (1, 2, 1)": "does not serve it",
    f"UPDATE objects SET oid='{PREFIX}.{7:016x}' WHERE kind=2": "has attributes but no data",
}


@pytest.mark.parametrize("damage", MENDED)
def test_what_can_be_mended_is_mended(path: Path, damage: str) -> None:
    sql(path, damage)
    found = only(check.check(path))
    assert MENDED[damage] in found.what and not found.repaired and "--repair" in found.advice
    mended = only(check.check(path, repair=True))
    assert mended.repaired
    assert check.check(path) == []
    with EmbeddedStore(path) as store:
        io = store.open("rbd")
        assert io.read("o", [Read()], 1) == [b"x" * 70_000]
        assert io.read(f"{PREFIX}.{2:016x}", [Read()]) == [b"data"]


FOUND = {
    "UPDATE objects SET size=-1 WHERE oid='o'": "impossible",
    "UPDATE objects SET kind=9 WHERE oid='o'": "impossible",
    "UPDATE objects SET size=5 WHERE oid='o'": "behind its end",
    "UPDATE clones SET snaps='[2,1]'": "list of snapshots",
    "UPDATE clones SET snaps='{'": "list of snapshots",
    "UPDATE clones SET overlap='[[0,99999999]]'": "list of snapshots",
    "UPDATE removed_snaps SET last=99": "ever given",
    "INSERT INTO removed_snaps VALUES (1, 1, 2)": "overlap",
    "UPDATE layouts SET header='rbd_header.gone'": "does not exist",
    "UPDATE layouts SET objorder=3": "impossible",
    "UPDATE layouts SET objorder=17": "cannot be opened",
    "UPDATE layouts SET folder=0": "is missing",
    "UPDATE objects SET oid='rbd_id.other' WHERE oid='rbd_id.image'": "does not hold its id",
    f"UPDATE objects SET oid='rbd_header.zzz' WHERE oid='{HEADER}'": "is missing",
    f"UPDATE objects SET oid='lost' WHERE oid='{MAP}'": "is missing although",
    "DELETE FROM omap WHERE key=CAST('name_image' AS BLOB)": "which is another image",
    f"DELETE FROM omap WHERE key=CAST('id_{ID}' AS BLOB)": "has a header and no name",
    "UPDATE omap SET value=x'00' WHERE key=CAST('name_image' AS BLOB)": "is damaged",
    "UPDATE omap SET value=x'00' WHERE key=CAST('size' AS BLOB)": "size is damaged",
    "UPDATE omap SET value=x'0c' WHERE key=CAST('order' AS BLOB)": "laid out with order 16",
    "UPDATE omap SET key=CAST('parent' AS BLOB), value=x'0202' WHERE key=CAST('snap_seq' AS BLOB)": "parent",
    "UPDATE omap SET value=x'0000100000000000' WHERE key=CAST('size' AS BLOB)": "the image has 16",
}


@pytest.mark.parametrize("damage", FOUND)
def test_what_cannot_be_mended_is_explained(path: Path, damage: str) -> None:
    sql(path, damage)
    findings = check.check(path)
    assert any(FOUND[damage] in found.what for found in findings), findings
    again = check.check(path, repair=True)
    assert any(FOUND[damage] in found.what for found in again), "repair removed what it cannot mend"


def test_damaged_pages_are_found(path: Path) -> None:
    database = bytearray((path / "meta.db").read_bytes())
    for page in range(8, len(database) // 4096):
        database[page * 4096 + 20 : page * 4096 + 200] = b"\xff" * 180
    (path / "meta.db").write_bytes(database)
    findings = check.check(path)
    assert findings and all(found.severity == "error" and found.where == "meta.db" for found in findings)


def test_missing_pieces_are_found(path: Path) -> None:
    shutil.rmtree(path / "data" / "1")
    assert "missing" in check.check(path)[0].what
    shutil.rmtree(path / "data")
    assert "missing" in only(check.check(path)).what
    (path / "meta.db").unlink()
    assert "missing" in only(check.check(path)).what


def test_a_description_is_written_again(path: Path) -> None:
    for damage in (b"", b'{"version": 1, "fsid": "no"}'):
        (path / "store.json").write_bytes(damage)
        assert only(check.check(path)).where == "store.json"
        assert only(check.check(path, repair=True)).repaired
        EmbeddedStore(path).close()


def test_folders_without_an_image(path: Path) -> None:
    (path / "data" / "7").mkdir(0o700)  # cut off before it was committed
    (path / "data" / "7" / "index").touch()
    (path / "data" / "trash-1").mkdir(0o700)
    (path / "data" / "something").mkdir(0o700)
    (path / "stranger").touch()
    notes = {f.where: f.severity for f in check.check(path)}
    assert notes == {"data/7": "note", "data/trash-1": "note", "data/something": "warning", "stranger": "warning"}
    check.check(path, repair=True)
    assert sorted(p.name for p in (path / "data").iterdir()) == ["1", "something"]
    shutil.rmtree(path / "data" / "something")
    (path / "stranger").unlink()
    # A folder whose number was given may be an image that an older backup of meta.db does not know.
    sql(path, "UPDATE counters SET value=9 WHERE name='folder'")
    (path / "data" / "8").mkdir(0o700)
    found = only(check.check(path, repair=True))
    assert found.severity == "warning" and "backup" in found.advice
    assert (path / "data" / "8").exists()


def test_damage_in_an_images_files_is_found(path: Path) -> None:
    index = path / "data" / "1" / "index"
    content = bytearray(index.read_bytes())
    content[4096 + 2 * 16 + 12] = 77  # state of object 2
    index.write_bytes(content)
    assert any("object 2" in found.what for found in check.check(path))
    content[:100] = bytes(100)
    index.write_bytes(content)
    assert any("cannot be opened" in found.what for found in check.check(path))


def test_a_map_that_hides_objects_is_found(path: Path) -> None:
    """One the layout does not keep: as when the bytes came from elsewhere. Readers would see zeros."""
    sql(path, f"UPDATE objects SET kind=0 WHERE oid='{MAP}'")
    wrong = object_map.encode(bytes(10))
    sql(
        path,
        f"UPDATE objects SET size={len(wrong)} WHERE oid='{MAP}'",
        f"INSERT INTO chunks SELECT id << 12, x'{wrong.hex()}' FROM objects WHERE oid='{MAP}'",
    )
    assert "absent" in only(check.check(path)).what


def test_a_database_of_another_version_is_left_alone(path: Path) -> None:
    sql(path, "PRAGMA user_version=9")
    assert "version 9" in only(check.check(path, repair=True)).what

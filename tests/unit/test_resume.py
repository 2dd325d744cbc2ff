"""Imports and exports that were broken off go on, and end with the same bytes; also after the process was killed."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from librbd_py import rados, rbd
from librbd_py.cli.main import main
from librbd_py.image import raw, resume

MIB = 1 << 20
SIZE = 24 * MIB + 4096
# The command in a process that ends, as a killed one does, when a mark was set for the second time.
KILLED = """
import os, sys
from librbd_py.cli.main import main
from librbd_py.image import raw, resume
raw.AT_ONCE, resume.EVERY = 4 << 20, 6 << 20
for kind in (resume.Import, resume.Export):
    def mark(self, offset, kind=kind, before=kind._mark):
        before(self, offset)
        if offset > 12 << 20:
            os._exit(9)
    kind._mark = mark
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(raw, "AT_ONCE", 4 * MIB)
    monkeypatch.setattr(resume, "EVERY", 6 * MIB)
    return f"embedded:{tmp_path / 'store'}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    dice, made = random.Random(7), bytearray(SIZE)
    for at in range(0, SIZE, 3 * MIB):
        made[at + 5000 : at + 2 * MIB] = dice.randbytes(2 * MIB - 5000)
    (tmp_path / "in").write_bytes(made[:SIZE])
    return tmp_path / "in"


def killed(url: str, *words: str) -> None:
    argv = [sys.executable, "-c", KILLED, "--store", url, *words, "--no-progress"]
    assert subprocess.run(argv, timeout=60, check=False).returncode == 9


def run(url: str, *words: str, code: int = 0) -> None:
    assert main(["--store", url, *words, "--no-progress"]) == code


def metadata(url: str) -> list[str]:
    with rados.Rados(conf={"rbdpy_store": url}) as cluster, cluster.open_ioctx("rbd") as ioctx:
        with rbd.Image(ioctx, "img") as image:
            return [key for key, _ in image.metadata_list()]


def test_an_import_goes_on(url: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(url, "import", "--resume", str(source), "img")
    assert metadata(url) == [resume.KEY]
    begun: list[int] = []
    import_raw = raw.import_raw

    def watched(*args: object, begin: int = 0, **named: object) -> None:
        begun.append(begin)
        import_raw(*args, begin=begin, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(raw, "import_raw", watched)
    run(url, "import", "--resume", str(source), "img")
    assert len(begun) == 1 and begun[0] > 12 * MIB
    assert metadata(url) == []
    run(url, "export", "img", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == source.read_bytes()
    run(url, "import", "--resume", str(source), "img", code=errno.EEXIST)  # it is whole


def test_an_import_of_something_else_does_not_go_on(url: str, source: Path) -> None:
    killed(url, "import", "--resume", str(source), "img")
    with source.open("r+b") as file:
        os.pwrite(file.fileno(), b"changed", 0)
    os.utime(source, ns=(1, 1))
    run(url, "import", "--resume", str(source), "img", code=errno.ESTALE)
    run(url, "import", str(source), "img", code=errno.EEXIST)
    assert metadata(url) == [resume.KEY]


def test_an_export_goes_on(url: str, source: Path, tmp_path: Path) -> None:
    run(url, "import", str(source), "img")
    run(url, "snap", "create", "img@s")
    out = tmp_path / "out"
    killed(url, "export", "--resume", "img@s", str(out))
    assert out.stat().st_size > 12 * MIB
    with out.open("r+b") as file:
        os.pwrite(file.fileno(), b"torn", file.seek(0, os.SEEK_END))  # what a mark does not vouch for is not believed
    run(url, "export", "--resume", "img@s", str(out))
    assert out.read_bytes() == source.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "store"]


def test_an_export_of_something_else_does_not_go_on(url: str, source: Path, tmp_path: Path) -> None:
    run(url, "import", str(source), "img")
    for name in ("s", "t"):
        run(url, "snap", "create", f"img@{name}")
    killed(url, "export", "--resume", "img@s", str(tmp_path / "out"))
    run(url, "export", "--resume", "img@t", str(tmp_path / "out"), code=errno.ESTALE)
    (tmp_path / "other").write_bytes(b"mine")
    run(url, "export", "--resume", "img@s", str(tmp_path / "other"), code=errno.EEXIST)
    assert (tmp_path / "other").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "words",
    [
        ("export", "--resume", "img", "out"),
        ("export", "--resume", "img@s", "-"),
        ("export", "--resume", "--export-format", "2", "img", "out"),
        ("import", "--resume", "--export-format", "2", "in", "img"),
        ("import", "--resume", "-", "img"),
    ],
)
def test_what_cannot_go_on_is_refused(url: str, source: Path, words: tuple[str, ...]) -> None:
    place = str(source.parent)
    run(url, *(f"{place}/{word}" if word in ("in", "out") else word for word in words), code=errno.EINVAL)

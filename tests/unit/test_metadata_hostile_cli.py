"""The same damage as in test_metadata_hostile.py under the verbs of `rbdpy`: each ends within a second, with an exit
code and, when that is not 0, words; nothing of Python is shown."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_metadata_hostile import NUMBER, SECOND, VALUES, Damage, damage, records, world

from librbd_py.cli.main import main
from librbd_py.store import memory
from librbd_py.store.api import ObjectContext

SOAK = bool(os.environ.get("RBDPY_SOAK"))
_numbers = itertools.count(1)

LOOKS = """
ls|ls -l|info disk|info base|info base@s|info coming|snap ls disk --all|snap ls base|du|du disk|status base|
status coming|children base --all|children base@s|image-meta ls base|image-meta get base key|config image ls base|
config pool ls rbd|config image get base rbd_cache|lock ls base|lock why disk|diff disk|diff disk --whole-object|
export disk {out} --no-progress|export-diff disk@one {out} --no-progress|export coming {out} --no-progress|
object-map check disk --no-progress|group ls|group image ls group|group snap ls group|trash ls|trash ls --all --long|
trash purge schedule ls|trash purge schedule status|namespace ls|pool stats|snap limit set disk --limit 20|
store check|store check --snapshots --format json
""".replace("\n", "")

CHANGES = """
resize disk --size 2M --no-progress|resize disk --size 512K --allow-shrink --no-progress|
snap create disk@two --no-progress|
snap rename disk@one disk@two|snap rm disk@one --no-progress|snap purge disk --no-progress|
snap rollback disk@one --no-progress|snap protect disk@one|snap unprotect base@s|snap limit clear disk|
flatten disk --no-progress|feature disable disk object-map|feature disable disk exclusive-lock object-map fast-diff|
object-map rebuild disk --no-progress|sparsify disk --no-progress|image-meta set base k v|image-meta rm base key|
config image set base rbd_cache true|config image rm base rbd_cache|config pool set rbd rbd_cache false|
lock add base other --shared tag|lock rm base cookie client.1|cp disk copied --no-progress|
deep cp disk copied --no-progress|clone base@s second|create new --size 1M|mv disk renamed|rm disk --no-progress|
trash mv disk|trash restore {trash}|trash rm {trash} --force --no-progress|trash purge --no-progress|
namespace rm rbd/space|namespace create rbd/more|group create more|group image add group base|group image rm group disk|
group snap create group@again|group snap rm group@together|group snap rename group@together later|
group snap rollback group@together --no-progress|group rename group renamed|group rm group|
migration prepare base elsewhere|migration execute coming --no-progress|migration commit coming --no-progress|
migration abort coming --no-progress|bench disk --io-type write --io-total 64K --io-size 4K|
trash purge schedule add 1d|import-diff {diff} disk --no-progress
""".replace("\n", "")

DIFF = b"rbd diff v1\ns" + (1 << 20).to_bytes(8, "little") + b"w" + bytes(8) + (5).to_bytes(8, "little") + b"helloe"


@contextmanager
def damaged(number: int, which: int) -> Iterator[tuple[str, ObjectContext, Damage | None]]:
    """A store's URL, and what was damaged in it; None when this value makes no sense there."""
    name = f"hostile{next(_numbers)}"
    try:
        with world(memory.named_cluster(name)) as io:
            where = records(io)[number] if number < NUMBER else None
            yield f"memory:{name}", io, where if where is not None and damage(io, where, which) else None
    finally:
        del memory._clusters[name]


def some_of(which: int) -> range:
    """The records that a value is tried on."""
    return range(NUMBER) if SOAK else range(which % 2, NUMBER, 2)


class TooLong(BaseException):
    """Nothing on the way takes it for its own."""


def stop(*_: object) -> None:
    raise TooLong


class Ending:
    """Runs commands; what is wrong with how one ended."""

    def __init__(self, capfd: pytest.CaptureFixture[str], diff: str) -> None:
        self._capfd, self._diff, self._out = capfd, diff, diff + ".out"
        self.codes: list[tuple[str, int, str]] = []

    def __call__(self, url: str, io: ObjectContext, line: str) -> str:
        trash = next((str(key)[2:] for key in ids(io)), "none")
        Path(self._out).unlink(missing_ok=True)
        words = line.format(trash=trash, diff=self._diff, out=self._out).split()
        self._capfd.readouterr()
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 4 * SECOND)
        try:
            code = main(["--store", url, *words])
        except TooLong:
            return f"{line}: does not end"
        except SystemExit as left:  # of a command line that is not understood
            return f"{line}: {left!r}, {self._capfd.readouterr().err[-200:]}"
        except Exception as other:
            return f"{line}: {other!r}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = time.monotonic() - began
        output, errors = self._capfd.readouterr()
        self.codes.append((line, code, errors))
        if seconds > SECOND:
            return f"{line}: {seconds:.1f} s"
        if "Traceback" in errors or "Errno" in errors:
            return f"{line}: {errors[-300:]}"
        silent = line == "trash purge schedule ls"  # as of `rbd`, where there is none
        return "" if code == 0 or silent or (output + errors).strip() else f"{line}: {code} without a word"


def ids(io: ObjectContext) -> list[str]:
    from librbd_py.image import cls

    try:
        return [f"id{image_id}" for image_id in cls.trash_list(io)]
    except OSError:
        return []


@pytest.fixture
def ending(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Ending]:
    path = tmp_path / "diff"
    path.write_bytes(DIFF)
    before = signal.signal(signal.SIGALRM, stop)
    yield Ending(capfd, str(path))
    signal.signal(signal.SIGALRM, before)


def test_each_command_line_is_understood(ending: Ending) -> None:
    """In a world without damage, or the rest would prove nothing."""
    wrong = []
    for line in [*LOOKS.split("|"), *CHANGES.split("|")]:
        with damaged(NUMBER, 0) as (url, io, _):
            wrong.append(ending(url, io, line))
    assert not any(wrong), "\n".join(filter(None, wrong))
    print([row for row in ending.codes if row[1]])


@pytest.mark.parametrize(
    ("oid", "key", "line"),
    [
        ("rbd_group_header.", b"snapshot_", "snap purge disk --no-progress"),
        ("rbd_trash", b"id_", "trash purge --no-progress"),
    ],
)
def test_commands_that_had_no_words_for_it(oid: str, key: bytes, line: str, ending: Ending) -> None:
    """Found by soak."""
    with world() as io:
        found = records(io)
    rows = [(name, row or b"") for name, _, row in found]
    number = next(at for at, (name, row) in enumerate(rows) if name.startswith(oid) and row.startswith(key))
    with damaged(number, 3) as (url, io, where):
        assert where is not None and ending(url, io, line) == ""
    assert ending.codes[-1][1] == 5


@pytest.mark.parametrize("which", range(VALUES))
def test_commands_that_look_at_damaged_records(which: int, ending: Ending) -> None:
    """Each record with each value meets some of them, in turns; by soak all."""
    lines = LOOKS.split("|")
    wrong = []
    for number in some_of(which):
        with damaged(number, which) as (url, io, where):
            some = lines if SOAK else [lines[(number * 3 + turn + which * 5) % len(lines)] for turn in range(3)]
            wrong += [f"{where}: {text}" for line in some if where and (text := ending(url, io, line))]
    assert not wrong, "\n".join(wrong[:40])


@pytest.mark.parametrize("which", range(VALUES))
def test_commands_that_change_damaged_records(which: int, ending: Ending) -> None:
    lines = CHANGES.split("|")
    wrong = []
    for number in some_of(which + 1):
        for turn in range(len(lines) if SOAK else 1):
            with damaged(number, which) as (url, io, where):
                if where and (text := ending(url, io, lines[(number + turn + which * 7) % len(lines)])):
                    wrong.append(f"{where}: {text}")
    assert not wrong, "\n".join(wrong[:40])

"""Schedules for emptying the trash, kept in the pools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from librbd_py import store
from librbd_py.cli.main import main
from librbd_py.image import purge_schedule
from librbd_py.image.purge_schedule import Item
from librbd_py.store.api import Store

DAY = 86400.0


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"embedded:{tmp_path / 'store'}"


def said(url: str, capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["--store", url, *words]) == code
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("interval", "start", "before"),
    [
        ("1d", "", 10 * DAY),
        ("1d", "06:00", 9 * DAY + 6 * 3600),
        ("1d", "02:00", 10 * DAY + 2 * 3600),
        ("1d", "02:00:00+01:00", 10 * DAY + 3600),
        ("1d", "02:00:00-02:00", 10 * DAY + 4 * 3600),
        ("2h", "01:30", 10 * DAY + 3.5 * 3600),
        ("30m", "", 10 * DAY + 5 * 3600),
    ],
)
def test_moments(interval: str, start: str, before: float) -> None:
    assert Item.parse(interval, start).before(10 * DAY + 5 * 3600 + 60) == before


@pytest.mark.parametrize(("interval", "start"), [("5x", ""), ("0d", ""), ("", ""), ("1d", "25:00"), ("1d", "noon")])
def test_what_is_no_schedule(interval: str, start: str) -> None:
    with pytest.raises(OSError, match="Invalid"):
        Item.parse(interval, start)


def test_levels(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = ("trash", "purge", "schedule")
    said(url, capsys, "create", "x", "--size", "1M")
    said(url, capsys, "namespace", "create", "rbd/ns1")
    assert said(url, capsys, *schedule, "ls", code=2) == ""
    assert said(url, capsys, *schedule, "ls", "-R", "--format", "json") == "[]\n"
    said(url, capsys, *schedule, "add", "-p", "rbd", "1d", "01:30")
    said(url, capsys, *schedule, "add", "-p", "rbd/ns1", "2d")
    said(url, capsys, *schedule, "add", "3h")
    assert said(url, capsys, *schedule, "ls", "-p", "rbd") == "every 1d starting at 01:30:00\n"
    assert said(url, capsys, *schedule, "ls") == "every 3h\n"
    rows = json.loads(said(url, capsys, *schedule, "ls", "-R", "--format", "json"))
    assert [(row["pool"], row["namespace"], row["items"][0]["interval"]) for row in rows] == [
        ("-", "-", "3h"),
        ("rbd", "-", "1d"),
        ("rbd", "ns1", "2d"),
    ]
    status = said(url, capsys, *schedule, "status").splitlines()
    assert len(status) == 3 and any("ns1" in line for line in status)
    said(url, capsys, *schedule, "rm", "-p", "rbd/ns1", "2d")
    said(url, capsys, *schedule, "rm", "-p", "rbd/ns1", "2d", code=2)
    said(url, capsys, *schedule, "rm")
    said(url, capsys, *schedule, "rm", "-p", "rbd", "1d", "01:30:00")
    assert said(url, capsys, *schedule, "ls", "-R", "--format", "json") == "[]\n"
    said(url, capsys, *schedule, "add", "-p", "rbd", "5x", code=22)


def test_what_is_due_is_purged(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gone", "kept"):
        said(url, capsys, "create", name, "--size", "1M")
    said(url, capsys, "trash", "mv", "gone")
    said(url, capsys, "trash", "mv", "kept", "--expires-at", "2100-01-01")
    said(url, capsys, "trash", "purge", "schedule", "add", "-p", "rbd", "1d")
    opened: Store = store.connect(url)
    try:
        now = 20_000 * DAY * 1.5 + 5
        assert purge_schedule.run(opened, now) == []  # it is new
        assert purge_schedule.run(opened, now + 60) == []
        assert len(said(url, capsys, "trash", "ls").splitlines()) == 2
        assert purge_schedule.run(opened, now + DAY) == [("rbd", "", 0)]
        assert said(url, capsys, "trash", "ls").split()[1:] == ["kept"]
        assert purge_schedule.run(opened, now + DAY + 60) == []
    finally:
        opened.close()
    assert said(url, capsys, "trash", "purge", "schedule", "run") == ""

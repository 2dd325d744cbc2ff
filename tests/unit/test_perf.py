"""Statistics of images as Ceph's manager gives them, and as `rbd` shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from librbd_py.cli.cmd_perf import METRICS, read_counts, shown
from librbd_py.cli.failure import Failure
from librbd_py.cli.main import main

ANSWER = {
    "timestamp": 1795467564.0,
    "stat_descriptors": ["read_ops", "write_ops", "write_bytes", "read_bytes", "write_latency", "read_latency"],
    "pool_descriptors": {"0": "rbd", "1": "other/ns"},
    "stats": [{"0/vm": [1.0, 7476.0, 30629888.0, 0.0, 1127761.9, 12.5]}, {"1/a/b": [0.0, 0.0, 0.0, 0.0, 0.0, 2e9]}],
}


def test_an_answer() -> None:
    first, second = read_counts(json.dumps(ANSWER))
    assert first[:3] == ("rbd", "", "vm") and second[:3] == ("other", "ns", "a/b")
    assert [shown(key, first[3][key]) for key in METRICS] == [
        "7.48k/s",
        "1/s",
        "29 MiB/s",
        "0 B/s",
        "1.13 ms",
        "12.50 ns",
    ]
    assert shown("read_latency", second[3]["read_latency"]) == "2.00 s"
    assert shown("read_ops", 2000) == "2k/s" and shown("read_ops", 1_500_000) == "1.50M/s"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", json.dumps(ANSWER | {"pool_descriptors": {}}), json.dumps(ANSWER | {"stats": [{"0/vm": [1]}]})],
)
def test_what_is_no_answer(text: str) -> None:
    with pytest.raises(Failure):
        read_counts(text)


def test_a_folder_has_no_manager(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--store", f"embedded:{tmp_path / 'store'}", "perf", "image", "iostat"]) == 95
    assert "query-blockstats" in capsys.readouterr().err

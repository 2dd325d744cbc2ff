"""Every fuzz target for some seconds, from its seeds: a smoke test. `make fuzz` is the long one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem.removeprefix("fuzz_") for path in (ROOT / "native/fuzz").glob("fuzz_*.c"))


@pytest.mark.parametrize("name", NAMES)
def test_target_finds_nothing(name: str, tmp_path: Path) -> None:
    subprocess.run([ROOT / "native/fuzz/build.sh", name], check=True, capture_output=True, timeout=300)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    seeds = ROOT / "build/fuzz" / f"seeds_{name}"
    done = subprocess.run(
        [
            ROOT / "build/fuzz" / f"fuzz_{name}",
            "-runs=20000",
            "-max_total_time=10",
            "-max_len=2048",
            "-seed=1",
            "-timeout=10",
            f"-artifact_prefix={tmp_path}/",
            corpus,
            seeds,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]

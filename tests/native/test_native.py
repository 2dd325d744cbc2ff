"""The C tests, one case per program; `make asan` and `make tsan` run the same under the sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NAMES = sorted(path.stem.removeprefix("test_") for path in HERE.glob("test_*.c"))


@pytest.mark.parametrize("name", NAMES)
def test_program_passes(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [HERE / "run", "plain", name],
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr

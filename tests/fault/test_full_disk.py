"""The disk under the store becomes full: see full_disk.py. Needs root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from full_disk import CASES

ROOT = Path(__file__).parents[2]
DISK_BYTES = 80 << 20
PROGRAM = ["unshare", "-m", "--propagation", "private", sys.executable, "-m", "full_disk"]


@pytest.mark.parametrize("case", CASES)
def test_a_full_disk_under(case: str, tmp_path: Path) -> None:
    image, mount_point = tmp_path / "image", tmp_path / "mount"
    mount_point.mkdir(0o700)
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True)
    paths = [ROOT / "tests/fault", ROOT / "tests/protocol", ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    # Mount and loop device go with the namespace, however the process ends.
    done = subprocess.run(
        [*PROGRAM, image, mount_point, case], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{case} passed" in done.stdout

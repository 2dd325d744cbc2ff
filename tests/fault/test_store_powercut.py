"""Power cuts on ext4 and XFS under the embedded store's metadata: see store_powercut.py. Needs root.

`RBDPY_STORE_CUTS` is the number of cuts at random moments on each file system (default 6), `RBDPY_SEED` seeds them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CUTS = int(os.environ.get("RBDPY_STORE_CUTS", "6"))
IMAGE_BYTES = 320 << 20  # the smallest XFS makes is 300 MiB; sparse
SHM = Path("/dev/shm")
PROGRAM = ["unshare", "-m", "--propagation", "private", sys.executable, "-m", "tests.fault.store_powercut"]


@pytest.mark.parametrize("mkfs", [["mkfs.ext4", "-q", "-F"], ["mkfs.xfs", "-q"]], ids=["ext4", "xfs"])
def test_acknowledged_metadata_survives_a_power_cut(mkfs: list[str]) -> None:
    roomy = SHM.is_dir() and shutil.disk_usage(SHM).free > 2 * IMAGE_BYTES
    with tempfile.TemporaryDirectory(prefix="rbdpy-store-cut-", dir=SHM if roomy else None) as name:
        image, mount_point = Path(name) / "image", Path(name) / "mount"
        mount_point.mkdir(0o700)
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        subprocess.run([*mkfs, image], check=True)
        # Mounts and loop device go with the namespace, however the process ends.
        done = subprocess.run(
            [*PROGRAM, image, mount_point, str(CUTS), os.environ.get("RBDPY_SEED", "1")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120 + 2 * CUTS,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{CUTS} random moments cut" in done.stdout

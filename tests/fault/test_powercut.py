"""Power cuts on ext4 and XFS: see powercut.c. Needs root (loop devices, mounts in a namespace of its own).

`RBDPY_CUTS` is the number of cuts over both file systems (default 200), `RBDPY_SEED` seeds the programs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CUTS = int(os.environ.get("RBDPY_CUTS", "200"))
IMAGE_BYTES = 320 << 20  # the smallest XFS makes is 300 MiB; sparse
SHM = Path("/dev/shm")


def run(*command: str | Path, timeout: float = 60) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{command[0]}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def program() -> Path:
    return Path(run(ROOT / "tests/native/run", "plain", "build", "tests/fault/powercut.c", timeout=120).strip())


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory when there is room: the disk under the loop device is not what is tested."""
    roomy = SHM.is_dir() and shutil.disk_usage(SHM).free > 2 * IMAGE_BYTES
    with tempfile.TemporaryDirectory(prefix="rbdpy-powercut-", dir=SHM if roomy else None) as name:
        yield Path(name)


@pytest.mark.parametrize(
    ("fstype", "mkfs", "fsck"),
    [
        ("ext4", ["mkfs.ext4", "-q", "-F"], ["e2fsck", "-f", "-n"]),
        ("xfs", ["mkfs.xfs", "-q"], ["xfs_repair", "-n"]),
    ],
)
def test_every_sector_is_legal_after_each_cut(
    fstype: str, mkfs: list[str], fsck: list[str], program: Path, folder: Path
) -> None:
    cuts = max(1, CUTS // 2)
    image, mount_point = folder / "image", folder / "mount"
    mount_point.mkdir()
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    run(*mkfs, image)
    # Mounts and loop device go with the process, however it ends.
    said = run(
        program, fstype, image, mount_point, str(cuts), os.environ.get("RBDPY_SEED", "1"), timeout=60 + cuts * 0.5
    )
    assert f"{fstype}: {cuts} cuts" in said
    run(*fsck, image)

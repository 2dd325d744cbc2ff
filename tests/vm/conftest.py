"""One rig a test: a store in a folder of its own and what boots on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_glue.accel import accelerator
from tests.vm.rig import Rig
from vm_images.cache import cache_dir
from vm_images.initramfs import initramfs
from vm_images.kernel import kernel


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    chosen = kernel()
    ramdisk = initramfs(chosen)
    accel, _ = accelerator(chosen.vmlinuz, ramdisk, cache_dir())
    return Rig(tmp_path, f"embedded:{tmp_path / 'store'}", chosen, ramdisk, accel)

"""Debian's cloud kernel, unpacked from its package without installing it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vm_images.cache import cache_dir

META_PACKAGE = "linux-image-cloud-amd64"


@dataclass(frozen=True)
class Kernel:
    version: str  # as uname -r says
    vmlinuz: Path
    modules: Path  # the folder `kernel` below lib/modules/<version>


class BuildError(RuntimeError):
    """A guest could not be built; the text says which step and what it printed."""


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Runs a build step; BuildError with its output when it fails or is missing."""
    words = [str(word) for word in command]
    try:
        environment = {**os.environ, **(env or {})}
        done = subprocess.run(
            words, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except FileNotFoundError:
        raise BuildError(f"{words[0]} is not installed (`make setup` installs what is needed)") from None
    if done.returncode:
        raise BuildError(f"{' '.join(words)} failed ({done.returncode}):\n{done.stdout}")
    return done.stdout


def kernel() -> Kernel:
    """The newest cloud kernel the machine's Debian offers, from the cache when it was unpacked before."""
    root = cache_dir() / "kernel"
    if not root.exists():
        _download(root)
    version = next((root / "lib/modules").iterdir()).name
    return Kernel(version, root / f"boot/vmlinuz-{version}", root / f"lib/modules/{version}/kernel")


def _download(root: Path) -> None:
    depends = run("apt-cache", "depends", META_PACKAGE)
    names = [line.split()[-1] for line in depends.splitlines() if "Depends:" in line and "linux-image" in line]
    if not names:
        raise BuildError(f"apt knows no {META_PACKAGE}: run `apt-get update`")
    folder = Path(tempfile.mkdtemp(prefix=".kernel.", dir=root.parent))
    try:
        # apt drops its rights to read the folder; mkdtemp made it 0700
        folder.chmod(0o755)
        run("apt-get", "download", "-q", names[0], cwd=folder)
        package = next(folder.glob("*.deb"))
        run("dpkg-deb", "-x", package, folder / "root")
        package.unlink()
        (folder / "root").rename(root)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

"""Two hosts for the tests of this folder, made once in a run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.libvirt.hosts import Host, Machine
from vm_images.cache import cache_dir


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    # Short: paths of sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="rbdpy-lv-", ignore_cleanup_errors=True) as folder:
        with Machine(Path(folder), cache_dir() / "libvirt-capabilities") as made:
            yield made


@pytest.fixture(scope="session")
def hosts(machine: Machine) -> tuple[Host, Host]:
    """Namespaces, network; no libvirtd yet."""
    return machine.host("alpha"), machine.host("beta")

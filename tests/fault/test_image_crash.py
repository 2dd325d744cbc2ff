"""Operations on images, killed at any of their changes: called again they finish, or find that they are done, and what
is left over is found and named by the store's check, whose advice takes it away.

A sample of the changes here; `make soak` kills at every one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.image_crash import OPERATIONS, Server

SAMPLE = 1000 if os.environ.get("RBDPY_SOAK") else 3


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_killed_operation_is_finished_by_another_call(name: str, server: Server, tmp_path: Path) -> None:
    base, folder = str(tmp_path / "base"), str(tmp_path / "store")
    server.call("prepare", name, base)
    shutil.copytree(base, folder)
    count = server.call("run", name, folder, 0)
    after = server.call("survey", folder)
    assert after != server.call("survey", base), "the operation does nothing"
    first = sum(name.encode()) % count  # not the same ones for all
    for step in range(min(count, SAMPLE)):
        at = 1 + (first + step * count // min(count, SAMPLE)) % count
        shutil.rmtree(folder)
        shutil.copytree(base, folder)
        changes = server.call("run", name, folder, at)
        if changes is not None:  # some runs set a timestamp or ask for the lock once more than others
            assert changes < at, f"not killed at {at} of {changes}"
            continue
        found = server.call("resume", name, folder)
        assert found["end"] == after, f"killed at {at} of {count}, again: {found['again']}, check: {found['check']}"
        assert found["check at the end"] == [], f"killed at {at} of {count}, again: {found['again']}"

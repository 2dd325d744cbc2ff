"""A cluster for as long as a block of code, or its process, lives."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cluster import DevCluster
from .options import Options


@contextmanager
def scratch(options: Options | None = None, parent: Path | None = None) -> Iterator[DevCluster]:
    """Started in a new folder (in `parent`, else in the folder for temporary files); gone afterwards, also when this
    process is killed. What DevCluster.start() raises."""
    cluster = DevCluster(Path(tempfile.mkdtemp(prefix="rbdpy-ceph-", dir=parent)))
    with subprocess.Popen(
        [sys.executable, "-m", "librbd_py.devcluster.guard", str(cluster.folder)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    ) as guard:
        try:
            cluster.start(options)
            yield cluster
        finally:
            cluster.stop()
            assert guard.stdin is not None
            guard.stdin.close()

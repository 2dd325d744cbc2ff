"""Where Ceph's programs are, and what to say when they are not."""

from __future__ import annotations

import errno
import os
import shutil

PACKAGES = {"ceph-mon": "ceph-mon", "ceph-osd": "ceph-osd", "ceph-mgr": "ceph-mgr", "monmaptool": "ceph-base",
            "radosgw": "radosgw", "radosgw-admin": "ceph-common"}  # fmt: skip
ALSO_IN = "/usr/sbin:/usr/local/sbin:/sbin"  # not in every user's PATH


def find(names: list[str]) -> dict[str, str]:
    """Their paths. ENOPKG naming Debian's packages when one is missing."""
    where = os.environ.get("PATH", os.defpath) + os.pathsep + ALSO_IN
    found = {name: shutil.which(name, path=where) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        packages = " ".join(dict.fromkeys(PACKAGES[name] for name in missing))
        raise OSError(
            errno.ENOPKG,
            f"{' and '.join(missing)} not installed: a Ceph cluster needs the Debian packages {packages} "
            f"(apt-get install --no-install-recommends {packages})",
        )
    return {name: path for name, path in found.items() if path is not None}


def environment() -> dict[str, str]:
    """For Ceph's programs: ours without what would send them elsewhere."""
    return {name: value for name, value in os.environ.items() if name not in ("CEPH_ARGS", "CEPH_CONF", "LD_PRELOAD")}

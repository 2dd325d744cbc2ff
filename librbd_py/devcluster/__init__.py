"""A scratch Ceph cluster on this machine, made of Debian's packages: loopback only, own ports, own folder, no
systemd, any user.

For tests, `make boot STORE=ceph` and people who want to try something; what it holds is meant to be thrown away.
"""

from __future__ import annotations

from .cluster import DevCluster, Status
from .faults import Faults
from .gateway import S3Access
from .options import Options
from .scratch import scratch

__all__ = ["DevCluster", "Faults", "Options", "S3Access", "Status", "scratch"]

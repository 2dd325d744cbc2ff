from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("RBDPY_TEST_CEPH_CONF") else ["test_ceph_images.py", "test_ceph_lock.py"]

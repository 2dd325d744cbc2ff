"""`import rados` finds this library's when this folder is on PYTHONPATH."""

import sys

from librbd_py import rados

sys.modules[__name__] = rados

"""`import rbd` finds this library's when this folder is on PYTHONPATH."""

import sys

from librbd_py import rbd

sys.modules[__name__] = rbd

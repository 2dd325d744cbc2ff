"""Object classes: the methods an OSD would run beside the object. `find()` is the whole interface.

Each method is `method(context, input bytes) -> output bytes`; failure is OSError with the errno a real OSD answers. A
DecodeError that escapes means the input did not parse: the executor answers EINVAL. Methods are grouped in one file per
theme; importing a file registers its methods.
"""

from __future__ import annotations

from .registry import Method, find

__all__ = ["Method", "find"]

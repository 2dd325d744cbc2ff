"""Class `hello`: the example every OSD has, with which programs try out `execute`."""

from __future__ import annotations

import errno

from .context import Context
from .rbd_common import invalid
from .registry import method

LONGEST = 100


def _greeting(name: bytes) -> bytes:
    if len(name) > LONGEST:
        raise invalid("a name that long")
    return b"Hello, %s!" % (name or b"world")


@method("hello", "say_hello", writes=False)
def say_hello(context: Context, data: bytes) -> bytes:
    return _greeting(data)


@method("hello", "record_hello", writes=True)
def record_hello(context: Context, data: bytes) -> bytes:
    greeting = _greeting(data)
    if context.exists:
        raise OSError(errno.EEXIST, "the object exists")
    context.write_full(greeting)
    return b""


@method("hello", "replay", writes=False)
def replay(context: Context, data: bytes) -> bytes:
    """What record_hello wrote. ENOENT."""
    context.stat()
    return context.read()

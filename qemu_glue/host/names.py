"""Paths of image sockets. An image name may be anything up to 4096 bytes; a socket's path has 107.

RUN/image/vhost-user/POOL/IMAGE.sock and RUN/image/nbd/POOL/IMAGE.sock, where POOL is POOL or POOL/NAMESPACE. A name is
one path component: what is not a letter, digit, "_", "-" or "." is %XX of its UTF-8, so is a dot in front; what is too
long then is "~" and the first 112 bits of its SHA-256. No two names have one path: "~" itself is written %7E.
"""

from __future__ import annotations

import hashlib

from qemu_glue.sockets import SUN_PATH

SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.")
POOL_MAX = 36  # bytes of the first component: more would leave too little for images
HASHED = 29  # bytes of "~" and 28 hex digits
LONGEST = SUN_PATH - len(".4194304")  # sockets are bound under another name first, with a pid; any has the same path


def component(name: str, limit: int) -> str:
    """One path component of at most `limit` (>= HASHED) bytes."""
    raw = name.encode("utf-8", "surrogatepass")
    text = "".join(chr(b) if b in SAFE and (at or b != 0x2E) else f"%{b:02X}" for at, b in enumerate(raw))
    if 0 < len(text) <= limit:
        return text
    return "~" + hashlib.sha256(raw).hexdigest()[: HASHED - 1]


def image_socket(run: str, transport: str, pool: str, namespace: str, image: str) -> str:
    """At most LONGEST bytes, unless `run` is too long by itself."""
    folder = f"{run}/image/{transport}/{component(f'{pool}/{namespace}' if namespace else pool, POOL_MAX)}/"
    return folder + component(image, max(HASHED, LONGEST - len(folder.encode()) - len(".sock"))) + ".sock"

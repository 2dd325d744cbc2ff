"""An export of the null store: reads leave buffers as they are, writes are dropped. What remains is the transport.

usage: python -m tests.bench.null_server nbd|vhost SOCKET. Serves until it is terminated.
"""

from __future__ import annotations

import signal
import sys

from librbd_py.native import check, ffi, lib
from qemu_glue import exports

ORDER = 22
SIZE = 1 << 30
HEAD = 0xFFFFFFFFFFFFFFFE  # STORE_NOSNAP


def main(kind: str, path: str) -> None:
    exports.start_reactors()
    error = ffi.new("int *")
    store = lib.rbdn_null_open(ORDER, error)
    check(error[0], "cannot open the null store")
    config = ffi.new("rbdn_view_config *")
    config.size, config.order, config.store = SIZE, ORDER, store
    config.stripe_unit, config.stripe_count, config.snap_id = 1 << ORDER, 1, HEAD
    view = lib.rbdn_view_new(config, error)
    check(error[0], "cannot make the view")
    image = lib.rbdn_image_new(1, view, error)
    check(error[0], "cannot make the image")
    if kind == "nbd":
        server = exports.NBDServer()
        export = server.export(1, image, "", writable=True)
        server.listen_unix(path)
    else:
        export = exports.vhost_user_blk(1, image, path, writable=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    export.stop(True)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main(*sys.argv[1:])

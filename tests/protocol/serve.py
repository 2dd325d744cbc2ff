"""The package's engine over a layout in a folder, exported for front ends: NBD or vhost-user-blk.

usage: serve.py nbd|vhost SOCKET FOLDER SIZE [REACTORS]. Prints "ready"; then commands on stdin, an answer line each:
    stats | resize BYTES | readonly 0|1 | fence | stop 0|1     "ok", the numbers, or "error ERRNO"
End of input stops the export, closes everything and exits with 0.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from librbd_py.native import check, ffi, lib
from qemu_glue import exports

ORDER = 22
NOSNAP = 0xFFFFFFFFFFFFFFFE


class Image:
    def __init__(self, folder: Path, size: int) -> None:
        error = ffi.new("int *")
        self.store = lib.rbdn_layout_open(str(folder).encode(), ORDER, not folder.exists(), error)
        if not self.store:
            check(error[0], "cannot open the layout")
        self.size, self.read_only = size, False
        view = self._view()
        self.handle = lib.rbdn_image_new(1, view, error)
        lib.rbdn_view_put(view)
        if not self.handle:
            check(error[0], "cannot make the image")

    def _view(self) -> object:
        config, error = ffi.new("rbdn_view_config *"), ffi.new("int *")
        config.size, config.order, config.store = self.size, ORDER, self.store
        config.stripe_unit, config.stripe_count = 1 << ORDER, 1
        config.snap_id, config.read_only = NOSNAP, self.read_only
        config.discard_granularity = 65536
        view = lib.rbdn_view_new(config, error)
        if not view:
            check(error[0], "cannot make the view")
        return view

    def change(self, *, size: int | None = None, read_only: bool | None = None) -> None:
        self.size = self.size if size is None else size
        self.read_only = self.read_only if read_only is None else read_only
        view = self._view()
        check(lib.rbdn_image_publish(self.handle, view), "cannot publish")
        lib.rbdn_view_put(view)

    def close(self) -> None:
        check(lib.rbdn_image_close(self.handle), "cannot close the image")
        lib.rbdn_store_close(self.store)


def command(image: Image, export: exports.Export, words: list[str]) -> str:
    match words:
        case ["stats"]:
            s = export.stats()
            return f"{s.clients} {s.accepted} {s.broken} {s.resubmitted} {s.dirty_pages}"
        case ["resize", size]:
            image.change(size=int(size))
        case ["readonly", value]:
            image.change(read_only=value == "1")
        case ["fence"]:
            check(lib.rbdn_image_fence(image.handle, -108), "cannot fence")
        case ["stop", hard]:
            export.stop(hard == "1")
        case _:
            return "error 38"
    return "ok"


def free(export: exports.Export) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            return export.free()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def main(kind: str, path: str, folder: str, size: str, reactors: str = "2") -> None:
    exports.start_reactors(int(reactors))
    image = Image(Path(folder), int(size))
    server = None
    if kind == "nbd":
        server = exports.NBDServer()
        export = server.export(1, image.handle, "", writable=True, description="a layout")
        server.listen_unix(path)
    else:
        export = exports.vhost_user_blk(1, image.handle, path, writable=True)
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer = command(image, export, line.split())
        except OSError as error:
            answer = f"error {error.errno}"
        print(answer, flush=True)
    export.stop(True)
    free(export)
    if server is not None:
        server.stop()
    image.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""serve_vhost.py SOCKET STORE SIZE [queues=N] [ro=1]: an export of the real engine in a process of its own.

STORE: `null` (reads zeroes, drops writes), a folder (objects of the embedded store; kept), or `fault,SPEC,FOLDER`
(native/store/store_fault.c). Commands are lines on stdin, answered by one line each, as by
tests/native/vhost_server.c:

  block | unblock     the gate: writes wait
  resize BYTES
  stop soft|hard      waits for the end of the export and frees it
  stats               clients accepted broken resubmitted dirty_pages, then requests completed, then 0
  events              "type:value" of those not read yet
"""

from __future__ import annotations

import select
import socket
import sys
from pathlib import Path
from typing import Any

from librbd_py.native import check, ffi, lib

ORDER = 22
STOPPED = 6
HEAD = 0xFFFFFFFFFFFFFFFE  # STORE_NOSNAP


def fail_on(err: Any, what: str) -> None:
    check(err[0], what)


def open_store(name: str) -> Any:
    err = ffi.new("int *")
    if name == "null":
        store = lib.rbdn_null_open(ORDER, err)
    elif name.startswith("fault,"):
        _, spec, folder = name.split(",", 2)
        store = lib.rbdn_fault_open(open_store(folder), spec.encode(), err)
    else:
        folder_path = Path(name)
        fresh = not folder_path.exists()
        store = lib.rbdn_layout_open(str(folder_path).encode(), ORDER, fresh, err)
    fail_on(err, f"open {name}")
    return store


class Disk:
    """A store, an image of it and its export."""

    def __init__(self, store: Any, size: int) -> None:
        self.store, self.size = store, size
        check(lib.rbdn_runtime_start(0), "runtime")
        err = ffi.new("int *")
        view = self.view(size)
        self.image = lib.rbdn_image_new(1, view, err)
        fail_on(err, "image")
        lib.rbdn_view_put(view)

    def view(self, size: int) -> Any:
        config = ffi.new(
            "rbdn_view_config *",
            {
                "size": size,
                "order": ORDER,
                "stripe_unit": 1 << ORDER,
                "stripe_count": 1,
                "store": self.store,
                "snap_id": HEAD,
                "discard_granularity": 65536,
            },
        )
        err = ffi.new("int *")
        view = lib.rbdn_view_new(config, err)
        fail_on(err, "view")
        return view

    def resize(self, size: int) -> None:
        view = self.view(size)
        check(lib.rbdn_image_publish(self.image, view), "publish")
        lib.rbdn_view_put(view)

    def export(self, path: str, queues: int, read_only: bool) -> Any:
        err = ffi.new("int *")
        Path(path).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            listener.listen(8)
            config = ffi.new(
                "rbdn_vhost_config *",
                {
                    "num_queues": queues,
                    "queue_size_max": 256,
                    "read_only": read_only,
                    "write_cache": 1,
                    "serial": b"serve",
                    "logical_block_size": 512,
                },
            )
            export = lib.rbdn_vhost_start(7, self.image, listener.fileno(), config, err)
        fail_on(err, "export")
        return export


def next_event() -> tuple[int, int] | None:
    event = ffi.new("rbdn_event *")
    return (event.type, event.value) if lib.rbdn_event_next(event) > 0 else None


def stop(export: Any, hard: bool) -> str:
    check(lib.rbdn_export_stop(export, hard), "stop")
    while True:
        event = next_event()
        if event is None:
            select.select([lib.rbdn_event_fd()], [], [], 10)
        elif event[0] == STOPPED:
            check(lib.rbdn_export_free(export), "free")
            return "ok"


def stats(disk: Disk, export: Any) -> str:
    out, done = ffi.new("rbdn_export_stats *"), ffi.new("rbdn_stats *")
    lib.rbdn_export_stats_get(export, out)
    check(lib.rbdn_image_stats(disk.image, done), "stats")
    return f"{out.clients} {out.accepted} {out.broken} {out.resubmitted} {out.dirty_pages} {sum(done.ops)} 0"


def main() -> None:
    path, store_name, size, *rest = sys.argv[1:]
    options = dict(option.split("=") for option in rest)
    store = open_store(store_name)
    disk = Disk(store, int(size))
    export = disk.export(path, int(options.get("queues", 4)), options.get("ro") == "1")
    print("ready", flush=True)
    stopped = False
    for line in sys.stdin:
        word, *args = line.split()
        if word in ("block", "unblock"):
            if word == "block":
                check(lib.rbdn_image_block(disk.image, 1, 10000), "block")
            else:
                check(lib.rbdn_image_unblock(disk.image, 1), "unblock")
            answer = "ok"
        elif word == "resize":
            disk.resize(int(args[0]))
            answer = "ok"
        elif word == "stop":
            answer = stop(export, args[0] == "hard")
            stopped = True
        elif word == "stats":
            answer = stats(disk, export)
        elif word == "events":
            found = iter(next_event, None)
            answer = " ".join(f"{kind}:{value}" for kind, value in found)
        else:
            answer = "unknown"
        print(answer, flush=True)
    if not stopped:
        stop(export, True)
    check(lib.rbdn_image_close(disk.image), "close")
    lib.rbdn_store_close(store)


if __name__ == "__main__":
    main()

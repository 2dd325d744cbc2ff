"""A client in a process of its own: `control_child.py URL OID`. Commands on stdin, one answer line on stdout each."""

from __future__ import annotations

import sys
from collections.abc import Callable

from librbd_py.control.driver import HeaderControl
from librbd_py.format import notify as nf
from librbd_py.store import connect
from librbd_py.store.api import ObjectContext, Read, WriteFull


class Quiet:
    def header_updated(self) -> None:
        pass

    def post_acquire(self) -> None:
        pass

    def pre_release(self, final: bool) -> None:
        pass

    def lost(self, failure: OSError) -> None:
        pass

    def peer_op(self, message: nf.Message, reply: Callable[[int | None], None]) -> None:
        reply(None)


class Counting(Quiet):
    """Adds one to a number in an object at each turn, in two steps that only an owner can do safely."""

    def __init__(self, ctx: ObjectContext) -> None:
        self.ctx = ctx
        self.value = 0
        self.turns = 0

    def post_acquire(self) -> None:
        self.value = int(self.ctx.read("counter", [Read()])[0])

    def pre_release(self, final: bool) -> None:
        self.ctx.write("counter", [WriteFull(str(self.value + 1).encode())])
        self.turns += 1


def main() -> None:
    url, oid = sys.argv[1:]
    store = connect(url)
    ctx = store.open("rbd")
    image = Counting(ctx)
    control = HeaderControl(ctx, oid, image)
    control.open()
    print(f"ready {store.client.gid} {store.client.address}", flush=True)
    for line in sys.stdin:
        command, *rest = line.split()
        try:
            if command == "acquire":
                control.acquire(float(rest[0]))
                print("ok", flush=True)
            elif command == "turns":
                for _ in range(int(rest[0])):
                    control.acquire(60.0)
                print("ok", flush=True)
            elif command == "owner":
                print(control.is_owner, flush=True)
            elif command == "quit":
                break
        except OSError as failure:
            print(failure.errno, flush=True)
    control.close()
    store.close()
    print(image.turns, flush=True)


main()

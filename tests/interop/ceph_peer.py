"""Ceph's own `rados` and `rbd` modules in a process of /usr/bin/python3, driven by JSON lines: [name of a Program's
method] or ["ask", expression] -> {"result": ...} or {"error": [class, errno, text]}.
"""

from __future__ import annotations

import json
import os
import signal
import site
import subprocess
import sys
from pathlib import Path
from typing import Any


class Peer:
    """`timeout`: seconds the whole life of the process may take, so that a hung cluster ends the test."""

    def __init__(self, conf: str, pool: str, data_pool: str, timeout: int = 120) -> None:
        command = ["timeout", "-k", "5", str(timeout), "/usr/bin/python3", __file__, conf, pool, data_pool]
        ours = [str(Path(__file__).parents[2]), *site.getsitepackages()]
        environment = {**os.environ, "RBDPY_PEER_PATH": json.dumps(ours)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )

    def ask(self, expression: str) -> Any:
        """The value of an expression there; it sees `rados`, `rbd`, `program`, `io`, `open` (name -> image, kept)."""
        return self.call("ask", expression)

    def call(self, method: str, *arguments: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([method, *arguments]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"Ceph's side ended in {method} with {self._process.wait()}"
        answer = json.loads(line)
        assert "error" not in answer, f"Ceph's side: {method}: {answer['error']}"
        return answer["result"]

    def kill(self) -> None:
        """As a host that loses its power."""
        assert self._process.stdin is not None and self._process.stdout is not None
        # `timeout` leads a process group of its own.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def use_our_rbd(program: Any) -> dict[str, Any]:
    """Our module on an Ioctx of Ceph's. Our extension was built for the stable ABI, cffi is that of our environment."""
    folders = json.loads(os.environ["RBDPY_PEER_PATH"])
    sys.path += folders
    from librbd_py import rbd

    io = program.io
    rbd.RBD().create(io, "through theirs", 1 << 20)
    with rbd.Image(io, "through theirs") as image:
        image.write(b"hello", 0)
        image.create_snap("s")
    with program.image("through theirs", read_only=True) as image:
        theirs = [image.id(), image.size(), bytes(image.read(0, 5)).decode(), len(list(image.list_snaps()))]
    with rbd.Image(io, "through theirs", read_only=True) as image:
        ours = [image.id(), image.size(), bytes(image.read(0, 5)).decode(), len(list(image.list_snaps()))]
    other = program.cluster.open_ioctx(io.get_pool_name())
    other.set_namespace("space")
    rbd.RBD().create(other, "inside", 1 << 20)
    listed = program.r.list(other)
    rbd.RBD().remove(other, "inside")
    other.close()
    return {"ours": ours, "theirs": theirs, "listed": listed, "client": program.cluster.get_instance_id()}


def main(conf: str, pool: str, data_pool: str) -> None:
    import rados  # type: ignore[import-not-found]
    import rbd  # type: ignore[import-not-found]

    sys.path.insert(0, str(Path(__file__).parent))
    from ceph_program import Program

    program = Program((rados, rbd), conf, pool, data_pool)
    images: dict[str, Any] = {}

    def opened(name: str) -> Any:
        if name not in images:
            images[name] = program.image(name)
        return images[name]

    known = {"rados": rados, "rbd": rbd, "program": program, "io": program.io, "open": opened, "images": images}
    others = {"use_our_rbd": lambda: use_our_rbd(program), "ask": lambda expression: _plain(eval(expression, known))}
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            answer: dict[str, Any] = {"result": (others.get(method) or getattr(program, method))(*arguments)}
        except Exception as failure:
            answer = {"error": [type(failure).__name__, getattr(failure, "errno", None), str(failure)]}
        print(json.dumps(answer), flush=True)
    for image in images.values():
        image.close()
    program.close()


def _plain(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value


if __name__ == "__main__":
    main(*sys.argv[1:])

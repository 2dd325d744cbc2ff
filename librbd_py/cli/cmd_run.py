"""`rbdpy run`: programs written for Ceph's `rbd` and `rados` modules, unedited, on this library."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import librbd_py
from librbd_py.cli.failure import Failure
from librbd_py.cli.registry import command
from librbd_py.cli.session import Session

SHIM = Path(__file__).parents[1] / "shim"


def run_program(store: str | None, overrides: dict[str, str], arguments: list[str]) -> None:
    """Becomes the program: Python with its file, `-m MODULE` or `-c CODE`, in which `import rbd, rados` finds ours, in
    the processes it starts too. What is set for the environment says which store it works on. Returns for `--path`
    only. Failure: nothing to run."""
    if arguments[:1] == ["--path"]:
        print(SHIM)
        return
    if not arguments:
        raise Failure("rbd: a program was not specified", 22)
    environment = dict(os.environ)
    # The package itself may be found by what only this interpreter knows (an editable installation).
    folders = [str(SHIM), str(Path(librbd_py.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(folder for folder in folders if folder)
    if store:
        environment["RBDPY_STORE"] = store
    if overrides:
        words = [f"--{option}={value}" for option, value in overrides.items()]
        environment["CEPH_ARGS"] = " ".join([environment.get("CEPH_ARGS", ""), *map(shlex.quote, words)]).strip()
    if not arguments[0].startswith("-") and not os.path.exists(arguments[0]):
        raise Failure(f"rbd: {arguments[0]}: No such file or directory", 2)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *arguments], environment)


@command(
    "run",
    "Run a Python program written for Ceph's rbd and rados modules: `import rbd, rados` finds this library. --path "
    "prints the folder that does it, for PYTHONPATH.",
    specs=("program",),
    many=True,
)
def run(session: Session) -> None:
    run_program(session.store, session.overrides, list(session.options.specs))

"""`rbdpy run`: a program with `import rbd, rados` runs on ours, unedited."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import rados
import rbd

with rados.Rados(conffile="") as cluster:
    cluster.create_pool("images")
    with cluster.open_ioctx("images") as ioctx:
        rbd.RBD().create(ioctx, sys.argv[2], 1 << 20)
        with rbd.Image(ioctx, sys.argv[2]) as image:
            image.write(b"data", 0)
            print(image.size(), sys.argv, rbd.__name__)
try:
    raise rbd.ImageNotFound("x", errno=2)
except rbd.Error as failure:
    print(failure.errno)
"""


def main(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from librbd_py.cli.main import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, cwd="/")


def test_a_program_finds_our_modules_and_its_own_arguments(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    store = f"embedded:{tmp_path}/store"
    done = main("--store", store, "run", str(program), "--pool", "one", "run")
    assert done.stderr == ""
    assert done.stdout == f"1048576 [{str(program)!r}, '--pool', 'one', 'run'] librbd_py.rbd\n2\n"
    assert done.returncode == 0
    again = main("--store", store, "ls", "images")
    assert again.stdout == "one\n"


def test_modules_code_and_child_processes(tmp_path: Path) -> None:
    child = "[sys.executable, '-c', 'import rbd; print(rbd)']"
    done = main("run", "-c", f"import subprocess, sys; sys.exit(subprocess.call({child}))")
    assert "librbd_py/rbd" in done.stdout and done.returncode == 0
    assert main("run", "-c", "raise SystemExit(7)").returncode == 7


def test_the_folder_for_pythonpath(tmp_path: Path) -> None:
    folder = main("run", "--path").stdout.strip()
    code = "import rados, rbd; print(rbd.RBD().version(), rados.Rados)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": folder}, cwd="/",
    )  # fmt: skip
    assert done.stdout == "(1, 16, 0) <class 'librbd_py.rados.Rados'>\n", done.stderr


def test_nothing_to_run(tmp_path: Path) -> None:
    assert main("run").returncode == 22
    missing = main("run", str(tmp_path / "no.py"))
    assert missing.returncode == 2 and "No such file" in missing.stderr

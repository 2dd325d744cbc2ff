"""How `rbdpy` starts when it is a process of its own: what takes long is begun first, and nothing is tidied up that
ends with the process."""

from __future__ import annotations

import os
import sys


def cluster_of(argv: list[str]) -> str:
    """The ceph.conf of a command line, of $RBDPY_STORE or $CEPH_CONF, when nothing else is said of the cluster; empty:
    there is none, or more is said."""
    environ = os.environ
    if environ.get("CEPH_ARGS") or "run" in argv:
        return ""
    store, conf = environ.get("RBDPY_STORE", ""), ""
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("-c", "--conf"):
            conf = value if equals else next(words, "")
        elif name == "--store":
            store = value if equals else next(words, "")
        elif name in _CLUSTER or name.startswith(_OPTIONS):
            return ""
    kind, _, path = store.partition(":")
    if conf:
        path = conf
    elif (store and kind not in ("ceph", "rados")) or "?" in path or "%" in path:
        return ""
    path = path or environ.get("CEPH_CONF", "")
    return os.path.abspath(path) if path else ""


_CLUSTER = frozenset(
    ("--cluster", "--id", "-i", "--name", "-n", "--user", "-m", "--keyring", "-k", "--keyfile", "-K", "--help", "-h")
)

_OPTIONS = ("--rbd", "--ms", "--rados", "--client", "--mon", "--auth", "--debug", "--log", "--osd")  # Ceph's own


def entry() -> None:
    """The command `rbdpy`."""
    argv = sys.argv[1:]
    conf = cluster_of(argv)
    if conf:
        from librbd_py.native import lib

        lib.rbdn_rados_early(conf.encode("utf-8", "surrogateescape"))
    from librbd_py.cli.main import main

    status = main(argv)
    if "run" in argv:
        sys.exit(status)  # the program may have something to do at its end
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # images and connections are closed by now; the rest would only be freed

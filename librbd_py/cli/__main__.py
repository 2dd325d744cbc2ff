"""`python -m librbd_py.cli`: the command `rbdpy`."""

from librbd_py.cli.start import entry

entry()

"""`rbdpy libvirt`: domains whose disks this software serves."""

from __future__ import annotations

import argparse
import sys

from librbd_py.cli.registry import command
from librbd_py.cli.session import Failure, Session


def with_conversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--transport", choices=("vhost-user", "nbd"), default="vhost-user", help="how disks are served")
    parser.add_argument("--disk", metavar="TARGET", action="append", help="only this disk (vda, ...); may repeat")
    parser.add_argument("--revert", action="store_true", help="back to what the domain was before")


@command(
    "libvirt convert",
    "Rewrite a domain's XML (a file, or - for standard input) so that its rbd disks are served by this host.",
    with_conversion,
    specs=("domain-xml",),
)
def convert(session: Session) -> None:
    from qemu_glue.libvirt import domain  # only here: the other commands need no libvirt

    options = session.options
    if not options.specs:
        raise Failure("rbd: a file with the domain's XML, or -, was not specified", 22)
    path = options.specs[0]
    if path == "-":
        text = sys.stdin.buffer.read(domain.SIZE_LIMIT)
    else:
        with open(path, "rb") as file:
            text = file.read(domain.SIZE_LIMIT)
    targets = set(options.disk) if options.disk else None
    if options.revert:
        sys.stdout.write(domain.revert(text, targets))
    else:
        sys.stdout.write(domain.convert(text, options.transport, targets))

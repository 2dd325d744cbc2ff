"""`rbdpy libvirt`: domains whose disks this software serves."""

from __future__ import annotations

import argparse
import os
import sys

from librbd_py.cli.registry import command, with_image
from librbd_py.cli.session import Failure, Session, code_of

ASK_SECONDS = 10.0


def with_transport(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--transport", choices=("vhost-user", "nbd"), default="vhost-user", help="how disks are served")


def with_conversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--disk", metavar="TARGET", action="append", help="only this disk (vda, ...); may repeat")
    parser.add_argument("--revert", action="store_true", help="back to what the domain was before")
    parser.add_argument("--connect", metavar="URI", help="libvirt to ask for the domain [default: qemu:///system]")
    parser.add_argument("--define", action="store_true", help="give the result to libvirt instead of printing it")


@command(
    "libvirt convert",
    "Rewrite a domain (libvirt's name or uuid, an XML file, or - for standard input) so that its rbd disks are served "
    "by this host. With --store (or -c) the images are there and not in the cluster that the domain names.",
    with_transport,
    with_conversion,
    specs=("domain-or-xml",),
)
def convert(session: Session) -> None:
    from qemu_glue.libvirt import client, domain  # only here: the other commands need no libvirt

    options = session.options
    if not options.specs:
        raise Failure("rbd: a domain, a file with its XML, or -, was not specified", 22)
    what, uri = options.specs[0], options.connect or client.URI
    try:
        if what == "-":
            text = sys.stdin.buffer.read(domain.SIZE_LIMIT)
        elif options.connect is None and os.path.exists(what):
            with open(what, "rb") as file:
                text = file.read(domain.SIZE_LIMIT)
        else:
            text = client.domain_xml(uri, what)
        targets = set(options.disk) if options.disk else None
        if options.revert:
            made = domain.revert(text, targets)
        else:
            made = domain.convert(text, options.transport, targets, store=session.store)
        if options.define:
            client.define(uri, made)
        else:
            sys.stdout.write(made)
    except OSError as error:
        raise Failure(f"rbd: libvirt convert: {error.strerror or error}", code_of(error)) from None


@command(
    "libvirt disk",
    "Print the <disk> that gives a running domain this image: virsh attach-device DOMAIN FILE.",
    with_image,
    with_transport,
    specs=("image-spec", "target"),
)
def disk(session: Session) -> None:
    from qemu_glue.host.ask import ask
    from qemu_glue.host.config import load
    from qemu_glue.libvirt import domain

    options = session.options
    target = options.specs[-1] if len(options.specs) > (0 if options.image else 1) else ""
    if not target:
        raise Failure("rbd: the disk's target (vdb, ...) was not specified", 22)
    spec = session.spec()
    arguments = {"pool": spec.pool, "namespace": spec.namespace, "image": spec.image, "transport": options.transport}
    try:
        domain.attachable("", target)  # whether it is a target
        path = ask(load().qmp, "rbd-image-socket", arguments, ASK_SECONDS)["path"]
        sys.stdout.write(domain.attachable(path, target, options.transport))
    except (FileNotFoundError, ConnectionRefusedError):
        raise Failure("rbd: libvirt disk: the host service does not run (rbdpy host status)", 1) from None
    except OSError as error:
        raise Failure(f"rbd: libvirt disk: {error.strerror or error}", code_of(error)) from None
